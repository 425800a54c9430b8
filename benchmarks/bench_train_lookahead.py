"""Training with lookahead, table 8 times the memory, bounded Zipf ids, Adagrad: beside what no step can be faster than.

Sketch: with the rows of coming batches read in the background, a step takes the larger of its reads (missed rows over
the disk's depth-64 rate) and its work with every row in memory. 16,384 ids of Zipf 1.05 over 8.4 M rows are some
9,000 distinct ones, of which a cache of a thirtieth of the table misses a third to a half: 4,000 reads, 55 ms at
75,000/s, against a few ms of work: here the disk decides. At 1,000,000 reads/s they would be 4 ms.

One child in a cgroup takes blocks of steps by turns, without and with lookahead, in a journal that holds them all
(bench_train_out_of_core.py has merges). Another, without a limit, takes the same steps with every row in memory beside
nn.Embedding(sparse=True) with torch's Adagrad there. The time of a step counts from the one before, reading ahead
included; its ids were drawn before.

    python benchmarks/bench_train_lookahead.py [--gib 8] [--ratio 8] [--folder .] [--keep FOLDER]
"""

import json
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

from common import bar, print_bars, write_result
from out_of_core import (
    Draws,
    build_table,
    common_options,
    discard,
    disk_rate,
    memory_of,
    open_bigembed,
    place,
    rows_of,
    run_child,
    say,
    stepper,
)

RULE, BAR = "adagrad", 1.2
OTHER_DISKS = (500_000, 1_000_000)  # reads/s


def train_ahead(task: dict[str, Any]) -> dict[str, Any]:
    """Median seconds a step without and with lookahead, and the rows a step misses."""
    import bigembed

    emb, opt = open_bigembed(task)
    step, draw = stepper(emb, opt, task["batch"], task["dim"]), Draws(task)
    emb.table.merge()
    merges = emb.stats()["merge"]["merges"]
    for _ in range(task["warm_steps"]):
        step(draw())
    seconds: dict[str, list[float]] = {"plain": [], "lookahead": []}
    misses: dict[str, list[float]] = {"plain": [], "lookahead": []}
    for turn in range(task["rounds"]):
        say(f"round {turn + 1} of {task['rounds']}")
        for name in seconds:
            batches: Iterable[Any] = [draw() for _ in range(task["steps"])]
            if name == "lookahead":
                batches = bigembed.lookahead(batches, {emb: lambda ids_N: ids_N}, depth=task["depth"])
            before = emb.stats()["cache"]["misses"]
            seconds[name] += _timed(step, batches, task["depth"])
            misses[name].append((emb.stats()["cache"]["misses"] - before) / task["steps"])
    stats = emb.stats()
    merged = stats["merge"]["merges"] > merges or stats["merge"]["running"]
    discard(emb)
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "mean_seconds": {name: statistics.fmean(values) for name, values in seconds.items()},
        "misses_per_step": {name: statistics.fmean(values) for name, values in misses.items()},
        "merge_inside": merged,
        "stats": stats,
    }


def _timed(step: Callable[[Any], None], batches: Iterable[Any], skipped: int) -> list[float]:
    """Seconds of each step but the first ones, whose reads were not ahead."""
    os.sync()  # each block begins without the writes that the one before left to the system
    seconds = []
    last = time.perf_counter()
    for ids_N in batches:
        step(ids_N)
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
    return seconds[skipped:]


def train_in_memory(task: dict[str, Any]) -> dict[str, Any]:
    """The same steps with every row in memory: ours, and nn.Embedding(sparse=True)."""
    import torch
    from bench_train import Ids, compare
    from train_contenders import bigembed_table, torch_sparse

    torch.sparse.check_sparse_tensor_invariants.disable()
    with tempfile.TemporaryDirectory(dir=task["folder"]) as folder:
        ours = bigembed_table("Adagrad", task["rows"], task["dim"], folder)
        contenders = [ours, torch_sparse("Adagrad", task["rows"], task["dim"])]
        ids = Ids(task["ids"], task["rows"], task["exponent"])
        line = compare(
            contenders, ids, task["batch"], Namespace(rounds=task["memory_rounds"], block_ids=1 << 17), "step"
        )
        ours.module.close()
    return line


CHILDREN = {"ahead": train_ahead, "in_memory": train_in_memory}


def verdict(ahead: dict[str, Any], in_memory: dict[str, Any], rate: float) -> dict[str, Any]:
    """The step beside its bound, beside nn.Embedding in memory, and what other disks would make of it."""
    step_s, missed = ahead["seconds"]["lookahead"], ahead["misses_per_step"]["lookahead"]
    cached_s = in_memory["seconds"][in_memory["ours"]]
    peer_s = in_memory["seconds"][in_memory["best_peer"]]
    larger_s = max(missed / rate, cached_s)
    computed = {}
    for other in OTHER_DISKS:
        bound_s = max(missed / other, cached_s)
        computed[str(other)] = {
            "bound_over_in_memory": bound_s / peer_s,
            "step_over_in_memory": bound_s * step_s / larger_s / peer_s,  # as far above its bound as here
        }
    return {
        "missed_rows": missed,
        "reads_seconds": missed / rate,
        "cached_seconds": cached_s,
        "step_seconds": step_s,
        "over_larger": step_s / larger_s,
        "in_memory_peer": in_memory["best_peer"],
        "in_memory_peer_seconds": peer_s,
        "over_in_memory": step_s / peer_s,
        "computed": computed,
    }


def show(result: dict[str, Any], found: dict[str, Any]) -> None:
    print(
        f"a step: {1e3 * found['step_seconds']:.2f} ms with lookahead, "
        f"{1e3 * result['ahead']['seconds']['plain']:.2f} without"
    )
    print(f"reads: {found['missed_rows']:,.0f} missed rows, {1e3 * found['reads_seconds']:.2f} ms at the disk's rate; "
          f"all cached: {1e3 * found['cached_seconds']:.2f} ms; {found['over_larger']:.2f} of the larger")  # fmt: skip
    print(f"{found['in_memory_peer']} wholly in memory: {1e3 * found['in_memory_peer_seconds']:.2f} ms; "
          f"ours out of core takes {found['over_in_memory']:.2f} times that")  # fmt: skip
    for other, computed in found["computed"].items():
        print(f"computed for a disk of {int(other):,} reads/s: {computed['step_over_in_memory']:.2f} times "
              f"({computed['bound_over_in_memory']:.2f} at the bound)")  # fmt: skip


def _options(argv: list[str] | None) -> Any:
    parser = common_options(__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=8.0)
    parser.add_argument("--ids", default="zipf", choices=["uniform", "zipf"])
    parser.add_argument("--journal-bytes", type=int, default=32 << 30, help="room for the run: merges are not measured")
    parser.add_argument("--index-bytes", type=int, default=512 << 20, help="the limit of its index, likewise")
    parser.add_argument("--steps", type=int, default=60, help="of a block")
    parser.add_argument("--warm-steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-rounds", type=int, default=9)
    parser.add_argument("--depth", type=int, default=2)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _options(argv)
    if options.task is not None:
        answer = CHILDREN[options.task["child"]](options.task)
        print(json.dumps(answer))
        return answer
    rows = rows_of(options.gib, RULE, options.dim)
    memory = memory_of(options.gib * (1 << 30), options.ratio)
    names = (
        "dim",
        "batch",
        "exponent",
        "ids",
        "journal_bytes",
        "steps",
        "warm_steps",
        "rounds",
        "memory_rounds",
        "depth",
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = place(options.keep or temporary, RULE, rows, options.dim)
        task = {name: getattr(options, name) for name in names}
        task |= {"rule": RULE, "rows": rows, "folder": folder, "cache_bytes": memory["cache_bytes"]}
        task["index_bytes"] = options.index_bytes
        say(f"building {rows:,} rows of D = {options.dim} with {RULE}'s state")
        build_table(folder, RULE, rows, options.dim)
        rates = [disk_rate(folder, options.disk_seconds)]
        ahead = run_child(__file__, {"child": "ahead", **task}, memory["limit_bytes"])
        rates.append(disk_rate(folder, options.disk_seconds))
        say("the same with every row in memory")
        in_memory = run_child(__file__, {"child": "in_memory", **task}, None)
    for run in (ahead, in_memory):
        if "failed" in run:
            raise SystemExit(f"a child ended with {run['failed']}")
    found = verdict(ahead, in_memory, sum(rates) / 2)
    facts = {"rows": rows, "ratio": options.ratio, **memory, "batch": options.batch, "ids": options.ids}
    result = {**facts, "disk_reads_per_second": rates, "ahead": ahead, "in_memory": in_memory, **found}
    what = (
        f"table {options.ratio:g} x memory, {options.ids}, Adagrad, lookahead: step by the larger of reads and cached"
    )
    result["bars"] = [bar(what, found["over_larger"], BAR, "most")]
    show(result, found)
    print_bars(result["bars"])
    if ahead["merge_inside"]:
        print("a merge came between: raise --journal-bytes, or take fewer steps")
    if not options.no_result:
        print(write_result("train_lookahead", result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
