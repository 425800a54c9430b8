"""Ten minutes on a table of 264 GB, sparse on what disk there is, with a journal of one GiB: where merges are sparse.

Sketch: 512 M rows of D = 128, uniform ids: nearly every row is new, so its read is a hole and costs no disk. It is
written once to the journal (516 bytes) and merged once, into a block of 4 KiB that nobody else of its epoch shares:
a million rows are 0.5 GB of journal and 4 GB of blocks. So it is random writes that bound it; at 40,000 rows/s ten
minutes would fill 98 GB. It stops before the disk is full.

There is no peer: nn.Embedding over a map would fault and write back the same blocks, with no commit to return to.

    python benchmarks/bench_train_sparse.py [--gib 246] [--seconds 600] [--folder .]
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import write_result
from out_of_core import Draws, Timing, common_options, discard, memory_of, rows_of, run_child, say, stepper

CHECK_STEPS, MARK_SECONDS = 10, 15


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Steps until the time is over or the disk nearly full; a mark is seconds, ids, merges, seconds of stalls, disk."""
    import bigembed

    folder, index_bytes = f"{task['folder']}/table", task["cache_bytes"] // 4
    limits = {"journal_bytes": task["journal_bytes"], "index_bytes": index_bytes}
    table = bigembed.Table.create(folder, task["rows"], task["dim"], state_dim=0, init="uniform", seed=1, **limits)
    emb = bigembed.Embedding.open(table, cache_bytes=task["cache_bytes"])
    step, draw = stepper(emb, bigembed.optim.SGD(emb, lr=0.01), task["batch"], task["dim"]), Draws(task)
    timing, marked = Timing(), 0.0
    while timing.seconds < task["seconds"] and _free_bytes(folder) > task["min_free_bytes"]:
        for _ in range(CHECK_STEPS):
            timing.take(step, draw())
        if timing.seconds - marked >= MARK_SECONDS:
            marked = timing.seconds
            merge, disk = emb.stats()["merge"], _used_bytes(folder)
            timing.mark(merge["merges"], round(merge["stall_seconds"], 2), disk)
            rate, gib = timing.ids / timing.seconds, disk / 2**30
            say(f"{marked:5.0f} s  {rate:,.0f} ids/s  {merge['merges']} merges  {gib:.1f} GiB on disk")
    result = {
        **timing.result(),
        "disk_was_full": timing.seconds < task["seconds"],
        "disk_bytes": _used_bytes(folder),
        "stats": emb.stats(),
    }
    discard(emb)
    return result


def _free_bytes(folder: str) -> int:
    return shutil.disk_usage(folder).free


def _used_bytes(folder: str) -> int:
    """Disk that the files below take, holes not counted."""
    return sum(path.stat().st_blocks * 512 for path in Path(folder).rglob("*") if path.is_file())


def _options(argv: list[str] | None) -> Any:
    parser = common_options(__doc__.splitlines()[0])
    parser.set_defaults(gib=246.0)  # 264 GB
    parser.add_argument("--ids", default="uniform", choices=["uniform", "zipf"])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--memory-gib", type=float, default=4.0, help="the cgroup's limit; half is cache")
    parser.add_argument("--journal-bytes", type=int, default=1 << 30)
    parser.add_argument("--min-free-bytes", type=int, default=8 << 30, help="of the disk: it stops there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _options(argv)
    if options.task is not None:
        answer = train(options.task)
        print(json.dumps(answer))
        return answer
    facts = {"gib": options.gib, "rows": rows_of(options.gib, "sgd", options.dim), "ids": options.ids}
    memory = memory_of(options.memory_gib * (1 << 30), 1.0)
    names = ("dim", "batch", "exponent", "seconds", "journal_bytes", "min_free_bytes")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        task = {**facts, **{name: getattr(options, name) for name in names}}
        task |= {"folder": folder, "cache_bytes": memory["cache_bytes"]}
        run = run_child(__file__, task, memory["limit_bytes"])
    if "failed" in run:
        raise SystemExit(f"the child ended with {run['failed']}")
    result = {**facts, **memory, "journal_bytes": options.journal_bytes, "batch": options.batch, **run}
    merge = run["stats"]["merge"]
    print(f"{facts['rows']:,} rows, {options.ids}: {run['ids_per_second']:,.0f} ids/s over {run['seconds']:.0f} s")
    gib = run["disk_bytes"] / 2**30
    print(f"{merge['merges']} merges, {merge['stall_seconds']:.1f} s of stalls, {gib:.1f} GiB on disk")
    if run["disk_was_full"]:
        print("it stopped because the disk was nearly full")
    if not options.no_result:
        print(write_result("train_sparse", result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
