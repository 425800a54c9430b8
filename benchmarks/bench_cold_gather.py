"""Cold gather: uniform random rows of a table on disk, with nothing of it in memory.

Sketch: a row of 512 bytes costs one random 4-KiB read (1.13 where records cross pages), so the bound is the disk's
random-read rate at depth 64, measured here in the same run; no bandwidth matters (84,000 x 4 KiB = 0.34 GB/s).

    python benchmarks/bench_cold_gather.py [--gib 8] [--folder .]
"""

import argparse
import glob
import mmap
import os
import statistics
import tempfile
import time

import numpy as np
from common import disk_random_reads, drop_page_cache, memory_bytes, write_result

from bigembed import Table, init

DIM, BATCH = 128, 65_536


def build(path: str, rows: int) -> None:
    """A table whose every row is written, 512 bytes of weights and a check each."""
    with Table.create(path, rows, DIM, state_dim=0, init=init.uniform(-1, 1), seed=1) as table:
        table.publish()


def gather_bigembed(table: Table, rows: np.ndarray) -> float:
    start = time.perf_counter()
    table.read(rows)
    return len(rows) / (time.perf_counter() - start)


def gather_memmap(paths: list[str], chunk_rows: int, rows: np.ndarray, random_advice: bool) -> float:
    """np.memmap over the same chunk files, with and without MADV_RANDOM."""
    maps = []
    for path in paths:
        mapped = np.memmap(path, np.float32, "r").reshape(chunk_rows, DIM + 1)
        if random_advice:
            mapped._mmap.madvise(mmap.MADV_RANDOM)
        maps.append(mapped)
    out = np.empty((len(rows), DIM), np.float32)
    start = time.perf_counter()
    chunk = rows // chunk_rows
    for c, mapped in enumerate(maps):
        here = np.flatnonzero(chunk == c)
        out[here] = mapped[rows[here] - c * chunk_rows, :DIM]
    return len(rows) / (time.perf_counter() - start)


def measure(path: str, rounds: int, batch: int, disk_seconds: int) -> dict[str, object]:
    """Interleaved rounds of disk, bigembed and memmap; each gather starts with an empty page cache."""
    rng = np.random.default_rng(0)
    table = Table.open(path, mode="r", reader="cold")
    paths = sorted(glob.glob(os.path.join(path, "weight", "c.*")), key=lambda p: int(p.split(".")[-2]))
    num_rows, chunk_rows = table.shape[0], table.spec.chunk_rows
    table.read(rng.integers(0, num_rows, 64))  # compile
    figures: dict[str, list[float]] = {"disk reads/s, depth 64": [], "bigembed": [], "memmap MADV_RANDOM": []}
    drop_page_cache(paths)
    table.read(rng.integers(0, num_rows, batch))
    before = memory_bytes()
    for _ in range(rounds):
        figures["disk reads/s, depth 64"].append(disk_random_reads(paths, disk_seconds))
        drop_page_cache(paths)
        figures["bigembed"].append(gather_bigembed(table, rng.integers(0, num_rows, batch)))
        drop_page_cache(paths)
        figures["memmap MADV_RANDOM"].append(
            gather_memmap(paths, chunk_rows, rng.integers(0, num_rows, batch // 8), random_advice=True)
        )
    after = memory_bytes()
    drop_page_cache(paths)
    plain = gather_memmap(paths, chunk_rows, rng.integers(0, num_rows, max(1, batch // 128)), random_advice=False)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return {
        "rows": num_rows,
        "record_bytes": table.spec.record_bytes,
        "batch": batch,
        "rows_per_second": {**medians, "memmap plain": plain},
        "all_rounds": figures,
        "of_disk_rate": medians["bigembed"] / medians["disk reads/s, depth 64"],
        "rss_before": before,
        "rss_after": after,
    }


def gather_only(path: str, batch: int, batches: int) -> dict[str, object]:
    """Resident memory over many batches of our gather alone."""
    rng = np.random.default_rng(3)
    with Table.open(path, mode="r", reader="cold") as table:
        for _ in range(3):  # let the allocator settle: results of 32 MiB come and go
            table.read(rng.integers(0, table.shape[0], batch))
        before = memory_bytes()
        for _ in range(batches):
            table.read(rng.integers(0, table.shape[0], batch))
        return {"batches": batches, "rss_before": before, "rss_after": memory_bytes()}


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=8.0, help="size of the table")
    parser.add_argument("--folder", default=".", help="where the table goes; on the disk to measure")
    parser.add_argument("--keep", default=None, help="build here, or use what was built here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--disk-seconds", type=int, default=4, help="for each measurement of the disk's own rate")
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args(argv)
    rows = int(options.gib * (1 << 30)) // (4 * DIM)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = os.path.join(options.keep or folder, "table")
        if not os.path.exists(path):
            build(path, rows)
        steady = gather_only(path, options.batch, 8)
        result = {**measure(path, options.rounds, options.batch, options.disk_seconds), "steady": steady}
    for name, rate in result["rows_per_second"].items():  # type: ignore[attr-defined]
        print(f"{name:24} {rate:12,.0f} rows/s")
    print(f"bigembed reaches {result['of_disk_rate']:.2f} of the disk's rate")
    before, after = steady["rss_before"], steady["rss_after"]
    for kind in ("anonymous", "file"):
        print(
            f"resident {kind} memory over {steady['batches']} batches: "
            f"{before[kind] / 2**20:.1f} -> {after[kind] / 2**20:.1f} MiB"
        )  # type: ignore[index]
    if not options.no_result:
        print(write_result("cold_gather", result))
    return result


if __name__ == "__main__":
    main()
