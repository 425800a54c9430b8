"""How much memory this process may use: the machine's, or what its control group allows. Linux; elsewhere unlimited."""

import contextlib
import os
from collections.abc import Iterator

CGROUP_ROOT = "/sys/fs/cgroup"
UNLIMITED_BYTES = 1 << 62


def memory_limit_bytes(process: str = "/proc/self/cgroup", root: str = CGROUP_ROOT) -> int:
    """The smallest of the machine's memory and the limits of the control groups (version 1 and 2) this process is in.

    Args:
        process: the file that lists the groups. root: where they are mounted.
    """
    limits = [UNLIMITED_BYTES]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _limit_files(process, root):
        with contextlib.suppress(OSError, ValueError), open(path) as file:  # "max" is no number and no limit
            limits.append(int(file.read()))
    return min(limits)


def _limit_files(process: str, root: str) -> Iterator[str]:
    """The files that may hold a limit: of the process's groups and, where a container hides these, of the root."""
    with contextlib.suppress(OSError, ValueError), open(process) as file:
        for line in file:
            _, controllers, group = line.rstrip("\n").split(":", 2)
            if not controllers:
                while group.strip("/"):
                    yield f"{root}{group}/memory.max"
                    group = os.path.dirname(group)
            elif "memory" in controllers.split(","):
                yield f"{root}/memory{group}/memory.limit_in_bytes"
    yield f"{root}/memory.max"
    yield f"{root}/memory/memory.limit_in_bytes"
