"""Training steps with every row in memory: bigembed beside sparse and dense nn.Embedding and FBGEMM's CPU table.

Sketch: a step moves, for each of N ids, a row of output and of upstream gradient (2 x 4 D bytes), and for each of U
distinct rows reads the weight in forward, writes its summed gradient, and reads and writes weight and state in the
update: 65,536 uniform ids, D = 64, Adagrad: 65,536 x (2 + 1 + 2 + 4) x 256 bytes = 150 MB, 15 ms at 10 GB/s; grouping
comes on top. Dense Adam touches all rows: V = 8 M x 256 bytes x 7 = 14 GB, over a second.

One step is forward, backward with a fixed upstream gradient, optimizer step, zero_grad, on ids drawn beforehand and
the same for all. The contenders take turns, in blocks of steps; a figure is the median over rounds of a block's mean.
All rows were read once before. The limits of journal and index exceed what a table of changed rows needs (12 D + 64
bytes a row, twice), so no commit and no merge falls inside; this is asserted.

    python benchmarks/bench_train.py [--rows 8000000] [--rules SGD,Adam] [--folder .]
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import bar, print_bars, write_result
from train_contenders import (
    HAS_FBGEMM,
    RULES,
    Contender,
    bags_of,
    bigembed_table,
    contenders_of,
    preload,
    torch_dense_adam,
    torch_sparse,
)
from zipf import Zipf, mass_of_top

import bigembed

BARS = {65_536: 4.0, 8_192: 2.5, 256: 1.0}  # times faster than the best peer
SGD_BARS = {65_536: 1.5, 8_192: 1.0, 256: 1 / 1.5}
FORWARD_BARS, FORWARD_BAR_IDS = {"bigembed": 1.0, "bigembed, hashed": 1 / 1.6}, 65_536
FORWARDS = 4  # times as many forwards as steps in a block: they are shorter
BAG_IDS = 16
Inputs = tuple[torch.Tensor, ...]


class Ids:
    """Batches of ids, uniform or bounded Zipf over all rows or over some of them, as tuples a module takes."""

    def __init__(self, kind: str, rows: int | np.ndarray, exponent: float) -> None:
        self.pool = None if isinstance(rows, int) else rows
        self.num_rows = rows if isinstance(rows, int) else len(rows)
        self.rng = np.random.default_rng(1)
        self.zipf = Zipf(self.num_rows, exponent, 1) if kind == "zipf" else None

    def batches(self, steps: int, count: int) -> list[Inputs]:
        return [(torch.from_numpy(self._draw(count)),) for _ in range(steps)]

    def _draw(self, count: int) -> np.ndarray:
        drawn = self.rng.integers(0, self.num_rows, count) if self.zipf is None else self.zipf.sample(count)
        return drawn if self.pool is None else self.pool[drawn]


def interleaved(
    work: dict[str, Callable[[Inputs], Any]], draw: Callable[[], list[Inputs]], rounds: int
) -> dict[str, list[float]]:
    """Seconds a call of each, one figure a round; they begin by turns, and the first round is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for turn in range(rounds + 1):
        inputs = draw()
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for one in inputs:
                work[name](one)
            if turn:
                seconds[name].append((time.perf_counter() - start) / len(inputs))
    return seconds


def compare(
    contenders: list[Contender], ids: Ids, batch: int, options: Any, way: str, bag_ids: int = 1
) -> dict[str, Any]:
    """One line of the result: medians of all, the best peer, and how many times faster ours is."""
    steps = max(1, min(64, options.block_ids // batch)) * (FORWARDS if way == "forward" else 1)
    dim = contenders[0].module.embedding_dim
    gradient = torch.randn(batch // bag_ids, dim, generator=torch.Generator().manual_seed(0))
    offsets = torch.arange(0, batch // bag_ids * bag_ids, bag_ids)

    def draw() -> list[Inputs]:
        inputs = ids.batches(steps, batch // bag_ids * bag_ids)
        return inputs if bag_ids == 1 else [(*one, offsets) for one in inputs]

    def worker(contender: Contender) -> Callable[[Inputs], Any]:
        if way == "forward":
            return lambda inputs: contender.forward(*inputs)
        return lambda inputs: contender.step(inputs, gradient)

    seconds = interleaved({one.name: worker(one) for one in contenders}, draw, options.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = next(one.name for one in contenders if one.is_ours)
    best_peer = min((name for name in medians if name != ours), key=medians.__getitem__)
    return {
        "batch": batch,
        "ours": ours,
        "seconds": medians,
        "range": {name: [min(values), max(values)] for name, values in seconds.items()},
        "best_peer": best_peer,
        "times_faster": medians[best_peer] / medians[ours],
    }


def show(line: dict[str, Any]) -> None:
    times = "   ".join(f"{name} {1e3 * value:.3f}" for name, value in line["seconds"].items())
    head = f"{line['rule']:15} {line['ids']:8} {line['batch']:7,}"
    print(f"{head}  {line['times_faster']:6.2f} times   ms: {times}", flush=True)


def run_rule(rule: str, options: argparse.Namespace, folder: str) -> dict[str, list[dict[str, Any]]]:
    """Steps, bags and forwards of one rule's contenders."""
    print(f"-- {rule}: building {options.rows:,} rows, and reading each once", flush=True)
    contenders = contenders_of(rule, options.rows, options.dim, folder)
    ours = contenders[0].module
    before = _automatic(ours)
    found: dict[str, list[dict[str, Any]]] = {"train": [], "bags": [], "forward": []}
    bags = bags_of(contenders) if rule in ("SGD", "Adagrad") else []
    for kind in options.ids:
        ids = Ids(kind, options.rows, options.exponent)
        facts = {"rule": rule, "ids": kind}
        for batch in options.batches:
            found["train"].append({**facts, **compare(contenders, ids, batch, options, "step")})
            show(found["train"][-1])
        if len(bags) > 1:
            line = compare(bags, ids, max(options.batches), options, "step", options.bag_ids)
            found["bags"].append({**facts, "bag_ids": options.bag_ids, **line})
            show(found["bags"][-1])
        if rule == "SGD":
            line = compare(contenders[:2], ids, max(options.batches), options, "forward")
            found["forward"].append({"rule": "forward", "ids": kind, **line})
            show(found["forward"][-1])
    if rule == "Adam" and options.dense:
        found["train"].append(_dense(contenders, options))
    assert _automatic(ours) == before, "a commit or merge of its own fell into the timing"
    ours.close()
    return found


def _automatic(emb: Any) -> tuple[int, int]:
    stats = emb.stats()
    return stats["journal"]["auto_commits"], stats["merge"]["merges"]


def _dense(contenders: list[Contender], options: argparse.Namespace) -> dict[str, Any]:
    """Ours beside dense Adam, once: it takes seconds, and the same whatever the batch."""
    contenders[1:] = []  # their memory is needed
    gc.collect()
    dense = [contenders[0], torch_dense_adam(options.rows, options.dim)]
    once = argparse.Namespace(rounds=1, block_ids=1)
    line = compare(dense, Ids("uniform", options.rows, options.exponent), max(options.batches), once, "step")
    show({"rule": "Adam, dense", "ids": "uniform", **line})
    return {"rule": "Adam, dense", "ids": "uniform", **line}


def run_hashed(options: argparse.Namespace, folder: str) -> dict[str, list[dict[str, Any]]]:
    """Forward and SGD step with slots for 15/16 of the rows, on ids of a quarter of the rows, all cached."""
    print("-- through the hash", flush=True)
    ours = bigembed_table("SGD", options.rows, options.dim, folder, cache_rows=15 * options.rows // 16)
    pool = np.random.default_rng(2).permutation(options.rows)[: max(1, options.rows // 4)]
    preload(ours.module, torch.from_numpy(pool))
    contenders = [ours, torch_sparse("SGD", options.rows, options.dim)]
    found: dict[str, list[dict[str, Any]]] = {"train": [], "forward": []}
    before = ours.module.stats()["cache"]["misses"]
    for kind in options.ids:
        ids = Ids(kind, pool, options.exponent)
        for key, way, name in (("forward", "forward", "forward, hashed"), ("train", "step", "SGD, hashed")):
            line = compare(contenders, ids, max(options.batches), options, way)
            found[key].append({"rule": name, "ids": kind, **line})
            show(found[key][-1])
    misses = ours.module.stats()["cache"]["misses"] - before
    print(f"misses meanwhile: {misses:,}", flush=True)
    ours.module.close()
    return found


def bars_of(lines: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The bars, for the lines they speak of: these batches, and each rule as it is."""
    found = []
    for line in lines["train"]:
        limit = (SGD_BARS if line["rule"] == "SGD" else BARS).get(line["batch"])
        if limit is not None and line["rule"] in RULES:
            what = f"{line['rule']} step, {line['ids']}, {line['batch']:,} ids: times as fast as {line['best_peer']}"
            found.append(bar(what, line["times_faster"], limit))
    for line in lines["forward"]:
        if line["batch"] != FORWARD_BAR_IDS:
            continue
        what = f"{line['rule']}, {line['ids']}, {line['batch']:,} ids: times as fast as nn.Embedding"
        found.append(bar(what, line["times_faster"], FORWARD_BARS[line["ours"]]))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument(
        "--batches", type=lambda text: [int(part) for part in text.split(",")], default=[256, 8192, 65536]
    )
    parser.add_argument("--rules", type=lambda text: text.split(","), default=list(RULES))
    parser.add_argument("--ids", type=lambda text: text.split(","), default=["uniform", "zipf"])
    parser.add_argument("--exponent", type=float, default=1.05, help="of the bounded Zipf distribution")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block-ids", type=int, default=131_072, help="ids of a block of steps, which are at most 64")
    parser.add_argument("--bag-ids", type=int, default=BAG_IDS, help="ids of a bag")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of both sides")
    parser.add_argument("--no-dense", dest="dense", action="store_false", help="leave dense Adam out")
    parser.add_argument("--no-hashed", dest="hashed", action="store_false", help="leave the cache through the hash out")
    parser.add_argument("--folder", default=None, help="where the tables' files go; next to nothing is written")
    parser.add_argument("--no-result", action="store_true", help="print only")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(argv)
    torch.sparse.check_sparse_tensor_invariants.disable()  # as it is by default; said, it is not warned about
    torch.set_num_threads(options.threads)
    bigembed.set_num_threads(options.threads)
    mass = mass_of_top(options.rows, options.exponent, 1 / 8)
    print(f"V = {options.rows:,}, D = {options.dim}, {options.threads} threads; all rows cached, no commit inside")
    print(f"Zipf {options.exponent}: {mass:.3f} of the ids on 1/8 of the rows", flush=True)
    if not HAS_FBGEMM:
        print("FBGEMM is not installed (pip install --no-deps fbgemm-gpu-cpu==1.8.0): left out", flush=True)
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "bags": [], "forward": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        runs = [lambda rule=rule: run_rule(rule, options, folder) for rule in options.rules]
        for run in [*runs, *([lambda: run_hashed(options, folder)] if options.hashed else [])]:
            for key, found in run().items():
                lines[key] += found
            gc.collect()
    bars = bars_of(lines)
    print_bars(bars)
    facts = {"rows": options.rows, "dim": options.dim, "threads": options.threads, "rounds": options.rounds}
    result = {**facts, "zipf_mass_of_top_eighth": mass, "has_fbgemm": HAS_FBGEMM, **lines, "bars": bars}
    if not options.no_result:
        print(write_result("train", result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
