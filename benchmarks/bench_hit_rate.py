"""Hit rates of the cache's index by policy and trace, beside exact LRU and Belady; row cache beside page cache.

Sketch: no bytes move, so there is no bandwidth to reach; the limits are Belady's MIN (which knows the future) and, for
LRU, the fully associative list. A set of 16 ways is a small LRU over its share of the rows, whose number varies: it
hits less where few rows too many cost much (a hot set about as large as the cache). A page of 4096 bytes holds 15
records of 264 bytes; where rows are hashed, about one of them is wanted, so a page cache holds that much less.

Rates are hits over distinct rows of a step, counted over the second half of the steps.

    python benchmarks/bench_hit_rate.py [--rows 2097152] [--steps 600] [--folder .]
"""

import argparse
import json
import tempfile
import textwrap
import time
from collections import deque
from pathlib import Path
from typing import Any

import exact_caches
import numpy as np
import traces
from common import RESULTS, drop_page_cache, memory_cgroup, run_in, write_result
from page_cache import PAGE_BYTES, write_records
from traces import Trace

from bigembed import threads
from bigembed.cache.coming import ComingUses
from bigembed.cache.index import ABSENT, POLICIES, SetIndex

WAYS, WINDOW = 16, 4  # WINDOW: batches that "next_use" knows ahead
SMALL_BATCHES = 2  # a cache of so many batches' ids is small beside the window
RECORD_BYTES, SLOT_BYTES = 264, 277  # D = 64 and one state column: on disk with its check; in the cache with its index
DEMO_ROWS, DEMO_POSITIONS = 200_000_000, 4096


def second_half(hits: np.ndarray, batches: list[np.ndarray]) -> float:
    sizes, half = np.array([batch.size for batch in batches]), len(batches) // 2
    return float(np.sum(hits[half:]) / np.sum(sizes[half:]))


def index_rate(trace: Trace, slots: int, policy: str, ways: int = WAYS) -> float:
    """The rate of the library's index; every step looks its batch up once. "next_use" is told WINDOW batches ahead."""
    index = SetIndex(max(1, slots // ways), ways, policy)
    coming = ComingUses(index) if policy == "next_use" else None
    hits, to_announce = np.zeros(len(trace.batches), np.int64), deque(trace.batches)
    for step, rows_U in enumerate(trace.batches, start=1):
        while coming is not None and to_announce and len(trace.batches) - len(to_announce) < step + WINDOW:
            coming.announce(to_announce.popleft(), step - 1)
        slots_U = index.probe(rows_U, step)
        rows_M = rows_U[slots_U == ABSENT]
        hits[step - 1] = rows_U.size - rows_M.size
        index.admit(rows_M, step, step)
        if coming is not None:
            coming.looked_up(rows_U)
    return second_half(hits, trace.batches)


def dense_ids(batches: list[np.ndarray]) -> list[np.ndarray]:
    """The same batches over 0..(distinct ids)-1."""
    _, dense = np.unique(np.concatenate(batches), return_inverse=True)
    return np.split(dense, np.cumsum([batch.size for batch in batches])[:-1])


def measure(trace: Trace, slots: int) -> dict[str, Any]:
    """One line of the table."""
    slots -= slots % 32
    dense = dense_ids(trace.batches)
    num_ids = 1 + max(int(ids_U.max()) for ids_U in dense)
    exact = second_half(exact_caches.lru_hits(dense, num_ids, slots), dense)
    rates = {policy: index_rate(trace, slots, policy) for policy in POLICIES}
    return {
        "rows": trace.num_rows,
        "slots": slots,
        "distinct_rows_seen": num_ids,
        "in_bar": trace.in_bar,
        "exact_lru": exact,
        **rates,
        "belady": second_half(exact_caches.belady_hits(dense, num_ids, slots), dense),
        "lru_by_ways": {ways: index_rate(trace, slots, "lru", ways) for ways in (8, 16, 32)},
        "lru_minus_exact_points": 100 * (rates["lru"] - exact),
        "best": _best(rates),
    }


def _best(rates: dict[str, float]) -> str:
    """The policy that hits most often; LRU, which costs least, where that gains less than a tenth of a point."""
    best = max(POLICIES, key=lambda policy: rates[policy])
    return best if rates[best] - rates["lru"] >= 0.001 else "lru"


def all_traces(rows: int, slots: int, batch: int, steps: int) -> list[tuple[Trace, int]]:
    """Every trace with the slots of its cache; each is made once and dropped after use."""
    half = slots // 2
    made: list[tuple[Trace, int]] = [
        *((traces.zipf(exponent, rows, batch, steps), slots) for exponent in (0.8, 1.05, 1.2)),
        *(  # uniform, of a size where a set's share of the rows decides
            (traces.hot_set(int(part * slots), 1.0, rows, batch, steps, f"hot set {part} of cache"), slots)
            for part in (0.9, 1.0, 1.1)
        ),
        (traces.zipf(1.05, rows, batch, steps, f"Zipf 1.05, cache of {SMALL_BATCHES} batches"), SMALL_BATCHES * batch),
        (traces.scan(rows, batch, steps), slots),
        (traces.hot_set(half, 0.5, rows, batch, steps, "scan + hot set"), slots),
        (traces.shifting_hot_set(half, max(1, batch // 16), rows, batch, steps), slots),
    ]
    for tokens in ("bytes", "words"):
        trace = traces.demo_text(tokens, DEMO_ROWS, batch // 2, steps)
        made.append((trace, len(np.unique(np.concatenate(trace.batches))) // 8))
    return made


def print_line(name: str, line: dict[str, Any]) -> None:
    names = ("exact_lru", *POLICIES, "belady")
    rates = " ".join(f"{100 * line[column]:8.2f}" for column in names)
    print(f"{name:28} {rates}  {line['lru_minus_exact_points']:+6.2f}  {line['best']}", flush=True)


def against_page_cache(options: argparse.Namespace) -> dict[str, Any]:
    """The demo's ids in a cache of rows and in the kernel's cache of pages, with equal bytes."""
    real_rows = max(4096, options.page_file_bytes // RECORD_BYTES)
    trace = traces.demo_text("words", real_rows, options.batch // 2, options.page_steps)
    slots = max(WAYS, len(np.unique(np.concatenate(trace.batches))) // 8 // WAYS * WAYS)
    budget = slots * SLOT_BYTES
    result: dict[str, Any] = {"budget_bytes": budget, "steps": options.page_steps, "row_cache": {}, "page_lru": {}}
    for rows in (DEMO_ROWS, real_rows):
        trace = traces.demo_text("words", rows, options.batch // 2, options.page_steps)
        result["row_cache"][rows] = index_rate(trace, slots, "lru")
        first, last = _pages(trace.batches)
        num_pages = 1 + max(int(batch.max()) for batch in last)
        hits = exact_caches.lru_record_hits(last, first, num_pages, budget // PAGE_BYTES)
        result["page_lru"][rows] = second_half(hits, trace.batches)
    result["page_cache_measured"] = _measured_page_cache(trace, budget, options.folder)
    return result


def print_pages(pages: dict[str, Any]) -> None:
    print(f"the demo's words, {pages['budget_bytes'] / 2**20:.1f} MiB of cache, records of {RECORD_BYTES} bytes:")
    for rows, rate in pages["row_cache"].items():
        print(f"  {rows:11,} rows: row cache {100 * rate:.2f} %, LRU of pages {100 * pages['page_lru'][rows]:.2f} %")
    seen = pages["page_cache_measured"]
    if seen:
        print(
            f"  {seen['rows']:11,} rows: the kernel's page cache {100 * seen['rate']:.2f} %, "
            f"with {seen['page_bytes_mean'] / 2**20:.1f} MiB of pages"
        )


def _pages(batches: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Dense numbers of the first and the last page of each record."""
    both = [np.concatenate([b * RECORD_BYTES, (b + 1) * RECORD_BYTES - 1]) // PAGE_BYTES for b in batches]
    dense = dense_ids(both)
    return [ids[: ids.size // 2] for ids in dense], [ids[ids.size // 2 :] for ids in dense]


def _measured_page_cache(trace: Trace, budget: int, folder: str) -> dict[str, Any] | None:
    """Real reads of a file in a memory cgroup; None where we may not make one."""
    with tempfile.TemporaryDirectory(dir=folder) as place, memory_cgroup(1 << 30, "bigembed-pages") as group:
        if group is None:
            return None
        np.savez(f"{place}/batches.npz", *trace.batches)
        write_records(f"{place}/records", trace.num_rows * RECORD_BYTES)
        drop_page_cache([f"{place}/records"])
        program = str(Path(__file__).with_name("page_cache.py"))
        done = run_in(group, [program, place, str(RECORD_BYTES), str(budget), str(group)], timeout=600)
        if done.returncode:
            return None
        seen = json.loads(done.stdout)
        half = len(seen["page_bytes"]) // 2
        return {
            "rows": trace.num_rows,
            "rate": second_half(np.array(seen["hits"]), trace.batches),
            "page_bytes_mean": float(np.mean(seen["page_bytes"][half:])),
            "pages_read_per_missed_record": seen["pages_read"]
            / (sum(batch.size for batch in trace.batches) - sum(seen["hits"])),
        }


def plot(table: dict[str, dict[str, Any]], path: Path) -> None:
    """Rates of every policy, a group of bars for each trace, exact LRU and Belady as marks over them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(15, 5.2), layout="constrained")
    places, width = np.arange(len(table)), 0.8 / len(POLICIES)
    for n, policy in enumerate(POLICIES):
        rates = [100 * line[policy] for line in table.values()]
        axes.bar(places + (n - 2) * width, rates, width, label=policy)
    for name, style in (("exact_lru", "-"), ("belady", ":")):
        rates = [100 * line[name] for line in table.values()]
        axes.hlines(rates, places - 0.44, places + 0.44, "black", style, label=name.replace("_", " "))
    axes.set_xticks(places, [textwrap.fill(name, 12) for name in table])
    axes.margins(x=0.01)
    axes.set_ylabel("hits, % of distinct rows of a step")
    axes.set_ylim(0, 100)
    axes.set_title(f"Hit rates by policy, sets of {WAYS} ways; next_use knows {WINDOW} batches ahead")
    axes.legend(ncols=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1 << 21, help="V of the made-up traces; the cache has 1/8 as slots")
    parser.add_argument("--batch", type=int, default=8192, help="ids in a step; positions of the demo are half of it")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--page-steps", type=int, default=100, help="steps of the comparison with the page cache")
    parser.add_argument("--page-file-bytes", type=int, default=1 << 30, help="the file that is really read")
    parser.add_argument("--folder", default=".", help="where that file goes")
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    threads.set_num_threads(1)
    table = {}
    made = all_traces(options.rows, options.rows // 8, options.batch, options.steps)
    print(f"{'trace':28}" + "".join(f" {name:>8}" for name in ("exact", *POLICIES, "belady")) + "  lru-ex  best")
    for trace, slots in made:
        table[trace.name] = measure(trace, slots)
        print_line(trace.name, table[trace.name])
    worst = min(line["lru_minus_exact_points"] for line in table.values() if line["in_bar"])
    print(f"set-associative LRU minus exact LRU on stationary traces: {worst:+.2f} points at worst (bar: -0.5)")
    pages = against_page_cache(options)
    print_pages(pages)
    result = {
        "batch": options.batch,
        "steps": options.steps,
        "ways": WAYS,
        "next_use_window": WINDOW,
        "hit_rates": table,
        "worst_stationary_points": worst,
        "row_cache_and_page_cache": pages,
        "seconds": round(time.perf_counter() - started),
    }
    if not options.no_result:
        plot(table, RESULTS / "hit_rate.png")
        print(write_result("hit_rate", result))
    return result


if __name__ == "__main__":
    main()
