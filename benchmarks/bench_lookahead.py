"""Reads under compute: an 8 GiB table in a memory cgroup of 2 GiB, a dense model beside it, with and without lookahead.

Sketch: a step that misses M rows waits for M reads at the disk's depth-64 rate (14,000 uniform misses of 16,384 ids:
0.19 s at 75,000 reads/s). A dense model of about the same time runs on one thread. One after the other they take the
sum; with the rows of the next batches read in the background the step takes the larger of the two, and on top what
cannot be hidden: grouping, gathering, updating and evicting on the model's thread.

No merge falls into the timing (bench_out_of_core.py has them). Measured in one child, interleaved by rounds: the table
alone (lookups, backward, step; no model), the lookups alone, the model alone (on rows made up once), both without
lookahead, both with it.

    python benchmarks/bench_lookahead.py [--gib 8] [--memory-gib 2] [--folder .] [--keep FOLDER]
"""

import argparse
import glob
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from common import disk_random_reads, drop_page_cache, memory_cgroup, run_in, write_result
from traces import BoundedZipf

DIM = 128


def build(folder: str, rows: int) -> None:
    """The table, every row written."""
    from bigembed import Table, init

    if not os.path.exists(f"{folder}/table"):
        with Table.create(f"{folder}/table", rows, DIM, state_dim=0, init=init.uniform(-1, 1), seed=1) as table:
            table.publish()


class Dense:
    """A dense model whose forward and backward take about `seconds` on one thread: a chain of square layers."""

    def __init__(self, seconds: float) -> None:
        import torch

        self.layer = torch.nn.Linear(DIM, DIM)
        self.layers = 10
        rows = torch.randn(4096, DIM, requires_grad=True)
        taken = []
        for _ in range(8):
            start = time.perf_counter()
            self.loss(rows).backward()
            taken.append(time.perf_counter() - start)
        self.layers = max(1, round(10 * seconds / statistics.median(taken)))

    def loss(self, rows):  # type: ignore[no-untyped-def]
        import torch

        hidden = rows[:4096]
        for _ in range(self.layers):
            hidden = torch.tanh(self.layer(hidden))
        return hidden.square().mean() + rows.square().mean()


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Median seconds a step of each way, on one kind of ids."""
    import torch

    import bigembed

    torch.set_num_threads(1)  # the model's; the other core is free for reads
    index_bytes = options.cache_bytes // 2  # as the journal: room for the run without a merge
    table = bigembed.Table.open(f"{options.folder}/table", journal_bytes=options.journal_bytes, index_bytes=index_bytes)
    emb = bigembed.Embedding.open(table, cache_bytes=3 * options.cache_bytes // 4 + index_bytes, policy=options.policy)
    opt = bigembed.optim.SGD(emb, lr=0.01)
    rows = emb.num_embeddings
    zipf = BoundedZipf(options.zipf, rows) if options.zipf else None
    rng = np.random.default_rng(0)

    def batches(count: int) -> "list[torch.Tensor]":
        """Drawn beforehand: no part of a step."""
        drawn = (zipf.draw(rng, options.batch) if zipf else rng.integers(0, rows, options.batch) for _ in range(count))
        return [torch.from_numpy(ids) for ids in drawn]

    def train(ids: "torch.Tensor", loss_of: Callable) -> None:
        loss_of(emb(ids)).backward()
        opt.step()
        opt.zero_grad()

    def alone(found: "torch.Tensor") -> "torch.Tensor":
        return found.square().mean()

    seconds: dict[str, list[float]] = {name: [] for name in ("table", "lookup", "model", "sum", "lookahead")}
    misses: list[float] = []

    def timed(name: str, batch_source, step: Callable) -> None:  # type: ignore[no-untyped-def]
        os.sync()  # each begins without the writes that the one before left to the system
        before = emb.stats()["cache"]["misses"]
        last = time.perf_counter()
        for position, ids in enumerate(batch_source):
            step(ids)
            now = time.perf_counter()
            if position >= options.depth:  # steps whose reads were already under way
                seconds[name].append(now - last)
            last = now
        if name == "table":
            misses.append((emb.stats()["cache"]["misses"] - before) / options.steps)

    emb.table.merge()
    merges = emb.stats()["merge"]["merges"]
    for ids in batches(options.warm_steps):
        train(ids, alone)
    timed("lookup", batches(options.steps), lambda ids: emb(ids))
    made_up = torch.randn(options.batch, DIM, requires_grad=True)
    dense = Dense(statistics.median(seconds["lookup"]))  # about as long as the reads
    seconds["lookup"].clear()
    for _ in range(options.rounds):
        timed("table", batches(options.steps), lambda ids: train(ids, alone))
        timed("lookup", batches(options.steps), lambda ids: emb(ids))
        timed("model", batches(options.steps), lambda ids: dense.loss(made_up).backward())
        timed("sum", batches(options.steps), lambda ids: train(ids, dense.loss))
        ahead = bigembed.lookahead(batches(options.steps), {emb: lambda ids: ids}, depth=options.depth)
        timed("lookahead", ahead, lambda ids: train(ids, dense.loss))
    stats = emb.stats()
    is_merging = stats["merge"]["running"] or stats["merge"]["merges"] > merges
    assert not is_merging, "a merge came between: take fewer steps"
    emb.table.rollback()  # the table is as it was, for the next run
    emb.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": medians,
        "misses_per_step": statistics.median(misses),
        "lookahead_over_larger": medians["lookahead"] / max(medians["table"], medians["model"]),
        "sum_over_larger": medians["sum"] / max(medians["table"], medians["model"]),
        "stats": stats,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--memory-gib", type=float, default=2.0)
    parser.add_argument("--cache-bytes", type=int, default=1 << 30, help="3/4 for rows")
    parser.add_argument("--journal-bytes", type=int, default=16 << 30, help="room for the run: merges are not measured")
    parser.add_argument("--batch", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warm-steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--folder", default=".", help="where the table goes; on the disk to measure")
    parser.add_argument("--keep", default=None, help="build here, or use what was built here")
    parser.add_argument("--disk-seconds", type=int, default=4)
    parser.add_argument("--no-result", action="store_true", help="print only")
    parser.add_argument("--zipf", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def _run_child(options: argparse.Namespace, zipf: float, folder: str) -> dict[str, object]:
    """One kind of ids, alone in a fresh cgroup with an empty page cache."""
    drop_page_cache(glob.glob(f"{folder}/table/weight/c.*"))
    arguments = [__file__, "--child", "--folder", folder, "--zipf", str(zipf)]
    for name in ("cache_bytes", "journal_bytes", "batch", "steps", "warm_steps", "rounds", "depth", "policy"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    with memory_cgroup(int(options.memory_gib * (1 << 30))) as group:
        done = run_in(group, arguments)
        if done.returncode:
            raise SystemExit(f"the child ended with {done.returncode}")
        return {"limited": group is not None, **json.loads(done.stdout.splitlines()[-1])}


def main(argv: list[str] | None = None) -> dict[str, object]:
    options = _parser().parse_args(argv)
    if options.child:
        result = measure(options)
        print(json.dumps(result))
        return result
    rows = int(options.gib * (1 << 30)) // (4 * DIM)
    runs: dict[str, dict[str, object]] = {}
    disk = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = options.keep or temporary
        os.makedirs(folder, exist_ok=True)
        build(folder, rows)
        paths = sorted(glob.glob(f"{folder}/table/weight/c.*"))
        for name, zipf in (("uniform", 0.0), ("zipf 1.05", 1.05)):
            disk.append(disk_random_reads(paths, options.disk_seconds))
            runs[name] = _run_child(options, zipf, folder)
    result = {"rows": rows, "batch": options.batch, "depth": options.depth, "disk_reads_per_second": disk, **runs}
    heads = " ".join(f"{head:>8}" for head in ("table", "lookup", "model", "both", "ahead"))
    print(f"{'seconds a step':14} {heads} {'ahead/larger':>12} {'both/larger':>11}")
    for name, run in runs.items():
        times = run["seconds"]
        row = " ".join(f"{times[key]:8.4f}" for key in ("table", "lookup", "model", "sum", "lookahead"))
        ratios = f"{run['lookahead_over_larger']:12.2f} {run['sum_over_larger']:11.2f}"
        print(f"{name:14} {row} {ratios}  {run['misses_per_step']:,.0f} misses a step")
    print(f"disk, random 4-KiB reads at depth 64: {', '.join(f'{r:,.0f}' for r in disk)} /s")
    if not options.no_result:
        print(write_result("lookahead", result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
