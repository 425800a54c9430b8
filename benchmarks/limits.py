"""What this machine can do at most: memory bandwidth, rows of memory in random order, and the disk's own rates.

Sketch: each figure is the floor of another benchmark. A gather from RAM moves N rows at the rate of random rows of
that size; one that copies in order moves them at memcpy's rate; a cold gather reads one 4-KiB block a row at the
disk's rate at depth 64, and no bandwidth matters (84,000 x 4 KiB = 0.34 GB/s); a merge writes in order. A byte copied
is counted once, though it is read and written. The disk is read past the page cache, by fio where it is there, else
by as many threads as the depth (which is less at great depths: `way` says which).

    python benchmarks/limits.py [--folder .] [--gib 2]
"""

import argparse
import contextlib
import itertools
import json
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba as nb
import numpy as np
from common import disk_random_reads, drop_page_cache, write_result

ROW_BYTES = (64, 128, 256, 512, 1024, 2048, 4096)
DEPTHS = (1, 64, 256)
BLOCK, LARGE_BLOCK = 4096, 1 << 20


# -- memory -------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """The median time of one call, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_threads(count: int, threads: int) -> Callable[[Callable[[int, int], object]], None]:
    """A function that calls `work(start, stop)` over 0..count, split over so many threads."""
    edges = [count * part // threads for part in range(threads + 1)]
    pool = ThreadPoolExecutor(threads)

    def run(work: Callable[[int, int], object]) -> None:
        if threads == 1:
            work(0, count)
            return
        for _ in pool.map(work, edges[:-1], edges[1:]):
            pass

    return run


def memcpy_rate(total_bytes: int = 256 << 20, threads: int = 1, repeats: int = 5) -> float:
    """Bytes copied per second, from one array to another that are both in memory and much larger than the caches."""
    source, target = np.ones(total_bytes, np.uint8), np.zeros(total_bytes, np.uint8)

    def copy(start: int, stop: int) -> None:
        np.copyto(target[start:stop], source[start:stop])

    split = in_threads(total_bytes, threads)
    return total_bytes / seconds_of(lambda: split(copy), repeats)


@nb.njit(nogil=True)
def _copy_rows(start, stop, table_VW, rows_N, out_NW):
    for n in range(start, stop):
        row = rows_N[n]
        for w in range(out_NW.shape[1]):
            out_NW[n, w] = table_VW[row, w]


def random_row_rate(row_bytes: int, table_bytes: int = 1 << 30, threads: int = 1, repeats: int = 5) -> float:
    """Bytes copied per second, rows in uniform random order from a table of this size to a small output in order.

    The better of two ways: a plain loop over `threads` threads, and torch's index_select with as many.
    """
    import torch

    words, count = row_bytes // 4, max(256, min(65_536, (64 << 20) // row_bytes))
    table_VW = np.ones((max(1, table_bytes // row_bytes), words), np.float32)
    # Other ids each time: those of the last time may still be in the processor's caches.
    rows_RN = itertools.cycle(np.random.default_rng(0).integers(0, len(table_VW), (repeats + 1, count)))
    out_NW = np.ones((count, words), np.float32)
    table, out = torch.from_numpy(table_VW), torch.from_numpy(out_NW)

    def loop() -> None:
        rows_N = next(rows_RN)
        split(lambda start, stop: _copy_rows(start, stop, table_VW, rows_N, out_NW))

    def select() -> None:
        torch.index_select(table, 0, torch.from_numpy(next(rows_RN)), out=out)

    split = in_threads(count, threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        best = min(seconds_of(loop, repeats), seconds_of(select, repeats))
    finally:
        torch.set_num_threads(before)
    return count * row_bytes / best


def memory_limits(
    copy_bytes: int = 256 << 20,
    table_bytes: int = 1 << 30,
    row_bytes: tuple[int, ...] = ROW_BYTES,
    threads: tuple[int, ...] = (1, 2),
    repeats: int = 5,
) -> dict[str, Any]:
    """memcpy and random rows, bytes per second, by number of threads (a key is a string, as JSON has it)."""
    return {
        "memcpy_bytes_per_second": {str(t): memcpy_rate(copy_bytes, t, repeats) for t in threads},
        "random_row_bytes_per_second": {
            str(t): {str(size): random_row_rate(size, table_bytes, t, repeats) for size in row_bytes} for t in threads
        },
    }


# -- disk ---------------------------------------------------------------------------------------------------


def make_file(path: str, total_bytes: int) -> str:
    """A file of random bytes, on the disk and read once: some disks are slow with blocks that nobody has read yet."""
    block = np.random.default_rng(0).integers(0, 256, min(total_bytes, 64 << 20), np.uint8)
    with open(path, "wb") as file:
        for first in range(0, total_bytes, len(block)):
            file.write(block[: total_bytes - first])
        os.fsync(file.fileno())
    read_through([path])
    drop_page_cache([path])
    return path


def read_through(paths: list[str]) -> int:
    """Read files whole, in order; returns their bytes. Afterwards the page cache has what fits."""
    total, buffer = 0, bytearray(8 << 20)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def disk_limits(
    folder: str, total_bytes: int = 2 << 30, seconds: int = 3, depths: tuple[int, ...] = DEPTHS
) -> dict[str, Any]:
    """The disk's rates on a file of its own in this folder: reads and writes at random, and in order."""
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        path = make_file(os.path.join(aside, "file"), total_bytes)
        reads = {str(depth): random_reads([path], depth, seconds) for depth in depths}
        in_order = _bytes_of(path, "read", LARGE_BLOCK, 8, seconds)
        writes = _bytes_of(path, "randwrite", BLOCK, 64, seconds) / BLOCK
        written = _bytes_of(path, "write", LARGE_BLOCK, 8, seconds)
    return {
        "file_bytes": total_bytes,
        "way": "fio, libaio, O_DIRECT" if shutil.which("fio") and can_be_direct(folder) else "threads of Python",
        "random_reads_per_second": reads,
        "random_writes_per_second_depth_64": writes,
        "sequential_read_bytes_per_second": in_order,
        "sequential_write_bytes_per_second": written,
    }


def random_reads(paths: list[str], depth: int = 64, seconds: int = 3) -> float:
    """Random 4-KiB reads per second past the page cache, at this depth, over these files (of one size)."""
    if can_be_direct(os.path.dirname(paths[0])):
        return disk_random_reads(paths, seconds, depth)
    return _threaded(paths, "randread", BLOCK, depth, seconds) / BLOCK


def can_be_direct(folder: str) -> bool:
    """Whether files here can be read past the page cache; a memory filesystem may say no."""
    if not hasattr(os, "O_DIRECT"):
        return False
    with tempfile.NamedTemporaryFile(dir=folder) as file, contextlib.suppress(OSError):
        os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
        return True
    return False


def _bytes_of(path: str, pattern: str, block: int, depth: int, seconds: int) -> float:
    """Bytes per second of one of fio's patterns: read, write, randread, randwrite. Writes end with an fsync."""
    if not (shutil.which("fio") and can_be_direct(os.path.dirname(path))):
        return _threaded([path], pattern, block, depth, seconds)
    command = [
        "fio", "--name=limit", f"--filename={path}", f"--rw={pattern}", f"--bs={block}", f"--iodepth={depth}",
        "--ioengine=libaio", "--direct=1", f"--runtime={seconds}", "--time_based", "--norandommap", "--end_fsync=1",
        f"--size={os.path.getsize(path)}", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["jobs"][0]["write" if "write" in pattern else "read"]["bw_bytes"])


def _threaded(paths: list[str], pattern: str, block: int, depth: int, seconds: float) -> float:
    """`_bytes_of` by so many threads of preadv or pwritev; past the page cache where that can be."""
    writes = "write" in pattern
    direct = os.O_DIRECT if can_be_direct(os.path.dirname(paths[0])) else 0
    fds = [os.open(path, (os.O_RDWR if writes else os.O_RDONLY) | direct) for path in paths]
    blocks = max(1, os.path.getsize(paths[0]) // block)
    end, mutex, places = time.perf_counter() + seconds, threading.Lock(), iter(range(1 << 62))

    def work(seed: int) -> int:
        rng, buffer, done = np.random.default_rng(seed), mmap.mmap(-1, block), 0
        while not done or time.perf_counter() < end:
            if pattern.startswith("rand"):
                place = int(rng.integers(blocks * len(fds)))
            else:
                with mutex:
                    place = next(places) % (blocks * len(fds))
            fd, at = fds[place // blocks], place % blocks * block
            done += os.pwritev(fd, [buffer], at) if writes else os.preadv(fd, [buffer], at)
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(depth) as pool:
        total = sum(pool.map(work, range(depth)))
    for fd in fds:
        if writes:
            os.fsync(fd)
        os.close(fd)
    return total / (time.perf_counter() - start)


# -- as a program -------------------------------------------------------------------------------------------


def table_of(result: dict[str, Any]) -> list[str]:
    """The lines that are printed."""
    memory, disk = result["memory"], result["disk"]
    lines = [f"{'memcpy, GB/s by threads':44}" + _row(memory["memcpy_bytes_per_second"], 1e9, "{:8.2f}")]
    for threads, rates in memory["random_row_bytes_per_second"].items():
        lines.append(f"{f'random rows in RAM, GB/s, {threads} threads':44}" + _row(rates, 1e9, "{:8.2f}"))
    lines.append(f"disk by {disk['way']}")
    lines.append(f"{'random 4-KiB reads/s by depth':44}" + _row(disk["random_reads_per_second"], 1, "{:10,.0f}"))
    lines.append(f"{'random 4-KiB writes/s, depth 64':44}{disk['random_writes_per_second_depth_64']:10,.0f}")
    for name in ("read", "write"):
        lines.append(f"{f'sequential {name}, MB/s':44}{disk[f'sequential_{name}_bytes_per_second'] / 1e6:10,.0f}")
    return lines


def _row(figures: dict[str, float], unit: float, form: str) -> str:
    return "  ".join(f"{key}:{form.format(value / unit)}" for key, value in figures.items())


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=".", help="on the disk to measure")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the file that is read and written")
    parser.add_argument("--table-gib", type=float, default=1.0, help="size of the table in RAM; memcpy takes a quarter")
    parser.add_argument("--disk-seconds", type=int, default=4, help="for each rate of the disk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args(argv)
    table_bytes = int(options.table_gib * (1 << 30))
    file_bytes = max(1, int(options.gib * (1 << 30)) // LARGE_BLOCK) * LARGE_BLOCK
    result = {
        "memory": memory_limits(table_bytes // 4, table_bytes, repeats=options.repeats),
        "disk": disk_limits(options.folder, file_bytes, options.disk_seconds),
    }
    print("\n".join(table_of(result)))
    if not options.no_result:
        print(write_result("limits", result))
    return result


if __name__ == "__main__":
    main()
