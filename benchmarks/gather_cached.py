"""Lookups that hit: a module's forward beside nn.Embedding's, with slot = row and through the hash.

Sketch: 65,536 ids of D = 64 are 16 MiB read at random and 16 MiB written to fresh memory, for all three alike; ours
visits the ids once more to find the distinct ones, and through the hash compares a set of 16 keys (128 bytes) for each.
The batches together have about a million ids (65,536 of small ones) and are taken in turn, so that their rows are not
in the processor's own caches; small ones are timed several at once. Every row of them was looked up before, and the
hash has room for all (its cache is 3/4 of the table): no lookup misses, and the result says how many did.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from gather_rates import EXPONENT, draws
from limits import random_row_rate

import bigembed

TORCH, IDENTITY, HASH = "nn.Embedding", "Embedding, all fits", "Embedding, through the hash"
DIM = 64
ALL_BATCHES, MOST_BATCHES = 16, 256  # of the bar's number of ids, and of a smaller number
OUTPUT_BYTES = 512 << 20
MODES = ("no_grad", "training")


def cached_cases(folder: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """D = 64 by number of ids and distribution; then rows of other sizes, in tables of `side_gib`."""
    wanted = [(DIM, options.cached_rows, [options.many_ids, *options.ids])]
    for row_bytes in options.row_bytes:
        if row_bytes != 4 * DIM:
            side_rows = max(4096, int(options.side_gib * (1 << 30)) // row_bytes)
            wanted.append((row_bytes // 4, min(options.cached_rows, side_rows), [options.many_ids]))
    for dim, num_rows, counts in wanted:
        limit = random_row_rate(4 * dim, num_rows * 4 * dim, os.cpu_count() or 1) / (4 * dim)
        with three_modules(folder, num_rows, dim) as modules:
            for count in counts:
                if count * dim * 4 > OUTPUT_BYTES:
                    print(f"cached, {count:,} ids, D = {dim}: left out, the result is over 512 MiB", flush=True)
                    continue
                for distribution in ("uniform", f"zipf {EXPONENT}"):
                    yield from _cases(modules, count, distribution, options.cached_rounds, options.many_ids, limit)


@contextlib.contextmanager
def three_modules(folder: str, num_rows: int, dim: int) -> Iterator[dict[str, Any]]:
    """The same rows as nn.Embedding, and as two tables that differ in their cache. No row was ever written."""
    aside = tempfile.mkdtemp(dir=folder)
    plain = torch.nn.Embedding(num_rows, dim, _weight=torch.empty((num_rows, dim)).fill_(0.5))  # memory that is there
    modules: dict[str, Any] = {TORCH: plain}
    try:
        for name, cache_rows in ((IDENTITY, num_rows), (HASH, max(1, num_rows * 3 // 4))):
            path = os.path.join(aside, name.split()[-1])
            bigembed.Table.create(path, num_rows, dim, seed=1).close()
            modules[name] = bigembed.Embedding.open(path, cache_rows=cache_rows)
        yield modules
    finally:
        for name in (IDENTITY, HASH):
            if name in modules:
                modules[name].close()
        shutil.rmtree(aside)


def _cases(
    modules: dict[str, Any], count: int, distribution: str, rounds: int, timed_ids: int, limit: float
) -> Iterator[dict[str, Any]]:
    num_rows, dim = modules[TORCH].weight.shape
    draw = draws(distribution)
    num_batches = min(MOST_BATCHES, max(2, ALL_BATCHES * timed_ids // count))
    batches = [torch.from_numpy(draw(num_rows, count)) for _ in range(num_batches)]
    _load(modules, batches)
    misses = _misses(modules)
    for mode in MODES:
        figures = _interleaved(modules, batches, rounds, timed_ids, is_training=mode == "training")
        medians = {name: statistics.median(values) for name, values in figures.items()}
        yield {
            "kind": "cached",
            "mode": mode,
            "distribution": distribution,
            "row_bytes": 4 * dim,
            "num_rows": num_rows,
            "ids": count,
            "distinct_rows": len(torch.unique(torch.cat(batches))),
            "misses": _misses(modules) - misses,
            "limit_is": "random rows in RAM/s",
            "limit_per_second": limit,
            "best_peer": TORCH,
            "ways": {
                name: {
                    "rows_per_second": medians[name],
                    "of_limit": medians[name] / limit,
                    "ids": count,
                    "is_ours": name != TORCH,
                    "rounds": figures[name],
                }
                for name in modules
            },
        }


def _load(modules: dict[str, Any], batches: list[torch.Tensor]) -> None:
    """Every row of the batches into the caches, and the same values into nn.Embedding's weight."""
    with torch.no_grad():
        for batch in batches:
            modules[TORCH].weight[batch] = modules[IDENTITY](batch)
        for batch in batches:
            expected = modules[TORCH](batch)
            for name in (IDENTITY, HASH):
                if not torch.equal(modules[name](batch), expected):
                    raise AssertionError(f"{name} gives other rows than nn.Embedding")


def _misses(modules: dict[str, Any]) -> int:
    return sum(modules[name].table.stats()["cache"]["misses"] for name in (IDENTITY, HASH))


def _interleaved(
    modules: dict[str, Any], batches: list[torch.Tensor], rounds: int, timed_ids: int, is_training: bool
) -> dict[str, list[float]]:
    """Rows per second of each module's forward, round by round on the same next few batches."""
    few = min(len(batches), max(1, timed_ids // len(batches[0])))
    figures: dict[str, list[float]] = {name: [] for name in modules}
    for turn in range(rounds):
        part = [batches[(turn * few + b) % len(batches)] for b in range(few)]
        for name, module in modules.items():
            with torch.set_grad_enabled(is_training):
                start = time.perf_counter()
                for batch in part:
                    module(batch)
                figures[name].append(few * len(batches[0]) / (time.perf_counter() - start))
    return figures
