"""Training with table : memory of 2, 4 and 8, journal on and merges inside, beside nn.Embedding over mapped weights.

Sketch: uniform ids over a table r times the memory, half of which is cache, miss 1 - 1/(2r) of the time: at r = 4 a
step of 16,384 ids costs 14,300 random reads, 0.19 s at 75,000 reads/s, 86,000 ids/s at best. Every changed row is
written to the journal (516 bytes, 40 MB/s) and merged once into the base: rows of a 1 GiB journal are one in 16 of
the table, sparse, so a merged row costs about a page read and a page written, plus its share of old records kept for
rollback. The mapped peer reads one page a fault, at depth 1 (15,000/s), and the system writes whole pages back.

Each side runs alone in a cgroup: a while to fill its memory, then steps until the time is over and, for ours, at least
three merges are done (one, at ratios other than 4). A step's time counts, drawing its ids does not. The disk's rate is
measured between the runs.

    python benchmarks/bench_train_out_of_core.py [--ratios 2,4,8] [--rules sgd,adagrad] [--ids uniform,zipf] [--full]
"""

import json
import shutil
import sys
import tempfile
from typing import Any

from common import bar, print_bars, write_result
from out_of_core import (
    STATE_OF_RULE,
    Draws,
    Timing,
    build_flat,
    build_table,
    common_options,
    discard,
    disk_rate,
    memory_of,
    open_bigembed,
    open_mapped,
    place,
    rows_of,
    run_child,
    say,
    stepper,
)

PEER_BAR, DISK_BAR = 2.2, 0.6
BAR_RATIO = 4.0
CHECK_STEPS = 10


def train_bigembed(task: dict[str, Any]) -> dict[str, Any]:
    """Ours, until time and merges are done or `max_seconds` are over."""
    emb, opt = open_bigembed(task)
    step, draw = stepper(emb, opt, task["batch"], task["dim"]), Draws(task)
    warm = Timing()
    while warm.seconds < task["warm_seconds"]:
        warm.take(step, draw())
    before = emb.stats()
    timing = Timing()
    while timing.seconds < task["max_seconds"]:
        for _ in range(CHECK_STEPS):
            timing.take(step, draw())
        merge = emb.stats()["merge"]
        merges = merge["merges"] - before["merge"]["merges"]
        timing.mark(merges, merge["rows_left"])
        if timing.seconds >= task["seconds"] and merges >= task["min_merges"]:
            break
    stats = emb.stats()
    result = {
        **timing.result(),
        "merges": merges,
        "stalls": stats["merge"]["stalls"] - before["merge"]["stalls"],
        "stall_seconds": stats["merge"]["stall_seconds"] - before["merge"]["stall_seconds"],
        "misses_per_step": (stats["cache"]["misses"] - before["cache"]["misses"]) / timing.steps,
        "stats": stats,
    }
    discard(emb)
    return result


def train_mapped(task: dict[str, Any]) -> dict[str, Any]:
    """The peer, for a fixed time."""
    emb, opt = open_mapped(task)
    step, draw = stepper(emb, opt, task["batch"], task["dim"]), Draws(task)
    for seconds in (task["warm_seconds"], task["peer_seconds"]):
        timing = Timing()
        while timing.seconds < seconds or not timing.steps:
            timing.take(step, draw())
            timing.mark()
    return timing.result()


CHILDREN = {"bigembed": train_bigembed, "mapped": train_mapped}


def cases(options: Any) -> list[tuple[str, float, str]]:
    """(rule, ratio, ids) to run. By default Adagrad only where there is a bar."""
    return [
        (rule, ratio, ids)
        for rule in options.rules
        for ratio in options.ratios
        for ids in options.ids
        if options.full or rule == options.rules[0] or ratio == BAR_RATIO
    ]


def run_case(rule: str, ratio: float, ids: str, options: Any, folder: str, before: float) -> dict[str, Any]:
    """Ours and the peer, with the disk's rate around ours."""
    rows = rows_of(options.gib, rule, options.dim)
    memory = memory_of(options.gib * (1 << 30), ratio)
    task = {
        "rule": rule, "ids": ids, "rows": rows, "dim": options.dim, "batch": options.batch, "folder": folder,
        "exponent": options.exponent, "cache_bytes": memory["cache_bytes"], "journal_bytes": options.journal_bytes,
        "warm_seconds": options.warm_seconds, "seconds": options.seconds, "max_seconds": options.max_seconds,
        "min_merges": options.min_merges if ratio == BAR_RATIO else 1, "peer_seconds": options.peer_seconds,
    }  # fmt: skip
    ours = run_child(__file__, {"child": "bigembed", **task}, memory["limit_bytes"])
    after = disk_rate(folder, options.disk_seconds)
    peer = run_child(__file__, {"child": "mapped", **task}, memory["limit_bytes"])
    case: dict[str, Any] = {"rule": rule, "ids": ids, "ratio": ratio, "rows": rows, **memory}
    case |= {"disk_reads_per_second": [before, after], "bigembed": ours, "mapped": peer}
    case["of_disk"] = ours.get("distinct_rows_per_second", 0.0) / ((before + after) / 2)
    case["times_faster"] = ours.get("ids_per_second", 0.0) / peer["ids_per_second"] if "failed" not in peer else None
    return case


def show(case: dict[str, Any]) -> None:
    ours, peer = case["bigembed"], case["mapped"]
    head = f"{case['rule']:8} {case['ids']:8} table {case['ratio']:g} x memory"
    if "failed" in ours or "failed" in peer:
        print(f"{head}: ended with {ours.get('failed', 0)} (ours) and {peer.get('failed', 0)} (the peer)", flush=True)
        return
    rates = f"{ours['ids_per_second']:9,.0f} ids/s, {case['times_faster']:.2f} times the mapped peer's"
    merges = f"{ours['merges']} merges, {ours['stall_seconds']:.1f} s of stalls in {ours['seconds']:.0f} s"
    print(f"{head}: {rates}; distinct rows {case['of_disk']:.2f} of the disk's rate; {merges}", flush=True)


def bars_of(found: list[dict[str, Any]], min_merges: int) -> list[dict[str, Any]]:
    bars = []
    for case in found:
        if case["ratio"] != BAR_RATIO or case["times_faster"] is None:
            continue
        enough = case["bigembed"].get("merges", 0) >= min_merges
        what = f"{case['rule']}, {case['ids']}, table 4 x memory{'' if enough else ' (too few merges)'}: "
        bars.append(bar(what + "times the mapped peer", case["times_faster"] if enough else 0.0, PEER_BAR))
        if case["ids"] == "uniform":
            bars.append(bar(what + "of the disk's rate", case["of_disk"] if enough else 0.0, DISK_BAR))
    return bars


def _options(argv: list[str] | None) -> Any:
    parser = common_options(__doc__.splitlines()[0])
    add, words = parser.add_argument, lambda text: text.split(",")
    add("--ratios", type=lambda text: [float(part) for part in text.split(",")], default=[2.0, 4.0, 8.0])
    add("--rules", type=words, default=list(STATE_OF_RULE))
    add("--ids", type=words, default=["uniform", "zipf"])
    add("--full", action="store_true", help="every rule at every ratio")
    add("--journal-bytes", type=int, default=1 << 30)
    add("--warm-seconds", type=float, default=10.0)
    add("--seconds", type=float, default=45.0, help="at least, for ours")
    add("--max-seconds", type=float, default=150.0, help="at most, for ours, merges or not")
    add("--min-merges", type=int, default=3, help="for ours, at ratio 4; one at others")
    add("--peer-seconds", type=float, default=15.0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _options(argv)
    if options.task is not None:
        answer = CHILDREN[options.task["child"]](options.task)
        print(json.dumps(answer))
        return answer
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder, built, rate = "", "", 0.0
        for rule, ratio, ids in cases(options):
            if rule != built:
                if built and not options.keep:
                    shutil.rmtree(folder)
                rows, built = rows_of(options.gib, rule, options.dim), rule
                folder = place(options.keep or temporary, rule, rows, options.dim)
                say(f"building for {rule}: {rows:,} rows of D = {options.dim}, twice")
                build_table(folder, rule, rows, options.dim)
                build_flat(folder, rule, rows, options.dim)
                rate = disk_rate(folder, options.disk_seconds)
            say(f"{rule}, {ids}, table {ratio:g} x memory")
            found.append(run_case(rule, ratio, ids, options, folder, rate))
            rate = disk_rate(folder, options.disk_seconds)
            show(found[-1])
    bars = bars_of(found, options.min_merges)
    print_bars(bars)
    facts = {"gib": options.gib, "dim": options.dim, "batch": options.batch, "journal_bytes": options.journal_bytes}
    result = {**facts, "cases": found, "bars": bars}
    if not options.no_result:
        print(write_result("train_out_of_core", result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
