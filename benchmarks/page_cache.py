"""The kernel's page cache: how much of it is a file's, and as a cache of records how often one is found there.

Run as a program inside a memory cgroup: reads the records of a trace with pread after POSIX_FADV_RANDOM, asks for
each first with RWF_NOWAIT, which fails unless every page of it is in memory, and prints hits per batch as JSON.
"""

import contextlib
import ctypes
import json
import os
import sys
from pathlib import Path

import numpy as np

PAGE_BYTES = 4096
CACHESTAT = 451  # its number as a system call, the same on every machine
MARGIN_BYTES = 4 << 20  # between what the reader itself takes and the limit set below


def resident_bytes(array: np.ndarray) -> int:
    """How much of an array's pages is in memory (mincore): its own pages, or for a map those of the page cache."""
    if not array.nbytes:
        return 0
    first = array.ctypes.data & ~(PAGE_BYTES - 1)
    count = array.ctypes.data + array.nbytes - first
    flags_P = np.zeros(-(-count // PAGE_BYTES), np.uint8)
    where = (ctypes.c_void_p(first), ctypes.c_size_t(count), ctypes.c_void_p(flags_P.ctypes.data))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(*where):
        raise OSError(ctypes.get_errno(), "mincore")
    return int(np.count_nonzero(flags_P & 1)) * PAGE_BYTES


def file_cache_bytes(paths: list[str]) -> int:
    """How much of these files the page cache holds; of files that one may not write the kernel tells nothing."""
    total = 0
    for path in paths:
        if os.stat(path).st_size:
            counted = _cachestat_bytes(path)
            total += resident_bytes(np.memmap(path, np.uint8, "r")) if counted is None else counted
    return total


def _cachestat_bytes(path: str) -> int | None:
    """The same in one call a file, however large it is; None where the kernel is older than 6.5."""
    whole, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    with open(path, "rb") as file:
        where = (ctypes.c_long(CACHESTAT), ctypes.c_uint(file.fileno()), ctypes.byref(whole), ctypes.byref(found))
        failed = ctypes.CDLL(None).syscall(*where, ctypes.c_uint(0))
    return None if failed else int(found[0]) * PAGE_BYTES


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
