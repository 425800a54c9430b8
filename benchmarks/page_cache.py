"""The kernel's page cache as a cache of records: how often a record is in memory when it is read, measured.

Run as a program inside a memory cgroup: reads the records of a trace with pread after POSIX_FADV_RANDOM, asks for
each first with RWF_NOWAIT, which fails unless every page of it is in memory, and prints hits per batch as JSON.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np

PAGE_BYTES = 4096
MARGIN_BYTES = 4 << 20  # between what the reader itself takes and the limit set below


def write_records(path: str, num_bytes: int) -> None:
    """A file without holes, out of the page cache."""
    block = np.random.default_rng(0).bytes(1 << 24)
    with open(path, "wb") as file:
        for start in range(0, num_bytes, len(block)):
            file.write(block[: num_bytes - start])
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_trace(path: str, batches: list[np.ndarray], record_bytes: int, cache_bytes: int, group: Path) -> dict:
    """Hits of each batch, with a limit that leaves `cache_bytes` for pages, and the bytes of pages there were."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    buffer, hits, cached = [bytearray(record_bytes)], [], []
    own_bytes = _statistic(group, "total_rss") + MARGIN_BYTES
    (group / "memory.limit_in_bytes").write_text(str(own_bytes + cache_bytes))
    read_before = _read_bytes()
    for rows_U in batches:
        found = 0
        for offset in (rows_U * record_bytes).tolist():
            got = 0
            with contextlib.suppress(BlockingIOError):
                got = os.preadv(file, buffer, offset, os.RWF_NOWAIT)
            if got == record_bytes:
                found += 1
            else:
                os.preadv(file, buffer, offset)
        hits.append(found)
        cached.append(_statistic(group, "total_cache"))
    return {"hits": hits, "page_bytes": cached, "pages_read": (_read_bytes() - read_before) // PAGE_BYTES}


def _read_bytes() -> int:
    """What this process has had read from the device."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def _statistic(group: Path, name: str) -> int:
    lines = (group / "memory.stat").read_text().splitlines()
    return int(dict(line.split() for line in lines)[name])


if __name__ == "__main__":
    folder, record, cache, cgroup = sys.argv[1:]
    arrays = np.load(f"{folder}/batches.npz")
    trace = [arrays[f"arr_{n}"] for n in range(len(arrays.files))]
    print(json.dumps(read_trace(f"{folder}/records", trace, int(record), int(cache), Path(cgroup))))
