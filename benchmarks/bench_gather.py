"""Gathering rows: cold from the disk, from a warm page cache, and through the cache, beside limits and peers.

Sketch, for 65,536 ids:
- cold, a row of 512 bytes: one random 4-KiB read each (1.13 where records cross pages), so the disk's rate at depth 64
  bounds it: 0.78 s at 84,000 reads/s. No bandwidth matters (0.34 GB/s). Rows of 64 bytes cost as many reads, rows of
  4096 bytes two.
- warm: 65,536 x 256 bytes are 16 MiB out of the page cache at the rate of random rows in RAM, 2 ms at 8 GB/s, and a
  minor fault for each page that is not mapped; sorting the ids, reading a check with each row and spreading the rows
  come on top.
- cached: the same bytes out of the cache; beside them one visit of the ids to find the distinct ones, and a set of
  keys (128 bytes) for each of those through the hash.

Slow peers get fewer ids, as many as they do in `--cap-seconds`, and the result says how many. The copies for zarr,
tensorstore, h5py and LMDB are smaller than the table, which favours them when cold: more ids share a page.

    python benchmarks/bench_gather.py [--folder .] [--keep FOLDER] [--quick] [--parts cold warm cached]
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

from common import drop_page_cache, print_bars, write_result
from gather_bars import bars, lines_of
from gather_cached import cached_cases
from gather_copies import COPIES
from gather_rates import EXPONENT, draws, rates
from gather_ways import Stored, cold_ways, warm_ways
from limits import memcpy_rate, random_reads, random_row_rate, read_through
from zipf import mass_of_top

PARTS = ("cold", "warm", "cached")
MAIN_ROW_BYTES = 512  # of the one large table
BAR_ROW_BYTES = (256, 512)  # D = 64 and 128: every peer is shown, and warm bars are set
OUTPUT_BYTES = 512 << 20  # a case whose result is larger is left out
# Sizes that nobody gave, and the same for --quick.
SIZES: dict[str, Any] = {
    "gib": 8.0, "side_gib": 1.0, "copy_gib": 1.0, "row_bytes": [64, 256, 512, 1024, 4096],
    "ids": [256, 4096, 1 << 20], "many_ids": 65_536, "rounds": 3, "cap_seconds": 1.0, "disk_seconds": 2,
    "cached_rows": 8_000_000, "cached_rounds": 9,
}  # fmt: skip
QUICK: dict[str, Any] = {
    **SIZES, "gib": 1.0, "side_gib": 0.25, "copy_gib": 0.125, "row_bytes": [256, 512], "ids": [256], "rounds": 1,
    "cap_seconds": 0.3, "disk_seconds": 1, "cached_rows": 1_000_000, "cached_rounds": 3,
}  # fmt: skip


def stored_in(folder: str, row_bytes: int, gib: float, copy_gib: float) -> Stored:
    """The table of this size, and copies if every peer is shown; built where they are not there yet, and read once."""
    if row_bytes not in BAR_ROW_BYTES:
        copy_gib = 0.0
    num_rows = max(4096, int(gib * (1 << 30)) // row_bytes)
    copied_rows = 0 if not copy_gib else min(num_rows, max(256, int(copy_gib * (1 << 30)) // row_bytes))
    stored = Stored(folder, row_bytes, num_rows, copied_rows)
    stored.build()
    read_through(stored.files)  # a disk behind a hypervisor is slow with blocks that it has not seen for a while
    return stored


def cold_cases(folder: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The large table with every peer, other numbers of ids, Zipf; then rows of other sizes from smaller tables."""
    main = stored_in(folder, MAIN_ROW_BYTES, options.gib, options.copy_gib)

    def case(stored: Stored, count: int, distribution: str, ways: list[Any], rounds: int) -> dict[str, Any]:
        found = rates(
            ways, stored, draws(distribution), count, is_cold=True, rounds=rounds, cap_seconds=options.cap_seconds,
            limit=lambda: random_reads(stored.chunk_paths, 64, options.disk_seconds),
        )  # fmt: skip
        return {"kind": "cold", "distribution": distribution, "limit_is": "random 4-KiB reads/s at depth 64", **found}

    few = slice(3)  # ours, pread, MADV_RANDOM
    yield case(main, options.many_ids, "uniform", cold_ways(main), options.rounds)
    yield case(main, options.many_ids, f"zipf {EXPONENT}", cold_ways(main)[few], options.rounds)
    for count in options.ids:
        rounds = 1 if count > options.many_ids else options.rounds
        yield case(main, count, "uniform", cold_ways(main)[few], rounds)
    drop_page_cache(main.files)
    for row_bytes in options.row_bytes:
        if row_bytes != MAIN_ROW_BYTES:
            stored = stored_in(folder, row_bytes, options.side_gib, options.copy_gib / 4)
            ways = cold_ways(stored) if row_bytes in BAR_ROW_BYTES else cold_ways(stored)[few]
            yield case(stored, options.many_ids, "uniform", ways, max(1, options.rounds - 1))


def warm_cases(folder: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tables that the page cache holds whole: every peer at D = 64 and 128, and the fast ones at other sizes."""
    for row_bytes in options.row_bytes:
        stored = stored_in(folder, row_bytes, options.side_gib, options.copy_gib / 4)
        few = slice(7)  # index_select, ours, pread and MADV_RANDOM
        limit = random_row_rate(row_bytes, stored.num_rows * row_bytes, os.cpu_count() or 1) / row_bytes
        measured = partial(float, limit)  # once for all cases of these rows
        wanted = [(options.many_ids, "uniform")]
        if row_bytes == BAR_ROW_BYTES[0]:
            wanted += [(count, "uniform") for count in options.ids] + [(options.many_ids, f"zipf {EXPONENT}")]
        for count, distribution in wanted:
            if count * row_bytes > OUTPUT_BYTES:
                print(f"warm, {count:,} ids of {row_bytes} bytes: left out, the result is over 512 MiB", flush=True)
                continue
            every = row_bytes in BAR_ROW_BYTES and (count, distribution) == wanted[0]
            found = rates(
                warm_ways(stored) if every else warm_ways(stored)[few], stored, draws(distribution), count,
                is_cold=False, rounds=2 * options.rounds + 1, cap_seconds=options.cap_seconds / 4, limit=measured,
            )  # fmt: skip
            yield {"kind": "warm", "distribution": distribution, "limit_is": "random rows in RAM/s", **found}


def measure(folder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases of the parts asked for, printed as they come."""
    makers = {"cold": cold_cases, "warm": warm_cases, "cached": cached_cases}
    cases = []
    for part in options.parts:
        for case in makers[part](folder, options):
            print("\n".join(lines_of(case)), flush=True)
            cases.append(case)
    return cases


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _parsed(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = options.keep or temporary
        os.makedirs(folder, exist_ok=True)
        result: dict[str, Any] = {
            "memcpy_bytes_per_second": memcpy_rate(threads=os.cpu_count() or 1),
            "zipf_mass_of_top_eighth": mass_of_top(options.cached_rows, EXPONENT, 1 / 8),
            "copies": "the first rows of the table, for " + ", ".join(COPIES),
            "cases": measure(folder, options),
        }
    result["bars"] = bars(result["cases"], options.many_ids)
    print_bars(result["bars"])
    if not options.no_result:
        print(write_result("gather", result))
    return result


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=".", help="where the tables go; on the disk to measure")
    parser.add_argument("--keep", default=None, help="build here, or use what was built here")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="smaller tables, fewer cases and rounds")
    parser.add_argument("--gib", type=float, help="size of the large table, of 512-byte rows")
    parser.add_argument("--side-gib", type=float, help="size of the other tables")
    parser.add_argument(
        "--copy-gib", type=float, help="of the large table's copies for zarr, h5py, LMDB; a quarter for others"
    )
    parser.add_argument("--row-bytes", type=int, nargs="+", help="sizes of rows")
    parser.add_argument("--ids", type=int, nargs="+", help="numbers of ids beside --many-ids")
    parser.add_argument("--many-ids", type=int, help="the number of ids that the bars are about")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--cap-seconds", type=float, help="what a slow peer may take for one gather")
    parser.add_argument("--disk-seconds", type=int, help="for each measurement of the disk's own rate")
    parser.add_argument("--cached-rows", type=int, help="V of the cached part, where D is 64")
    parser.add_argument("--cached-rounds", type=int)
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args(argv)
    for name, size in (QUICK if options.quick else SIZES).items():
        if getattr(options, name) is None:
            setattr(options, name, size)
    return options


if __name__ == "__main__":
    main()
