"""Tables larger than memory, nn.Embedding over maps of as many bytes, and children in a memory cgroup to train them in.

A "table" of so many bytes counts weights and optimizer state: 8 GiB are 16.8 M rows of D = 128 with SGD, 8.4 M with
Adagrad. Both sides start with every row written, and an empty page cache.
"""

import argparse
import glob
import json
import mmap
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from common import disk_random_reads, drop_page_cache, memory_bytes, memory_cgroup, run_in
from zipf import Zipf

LR = 0.01
STATE_OF_RULE = {"sgd": 0, "adagrad": 1}  # copies of the weight, beside it
OURS_OF_RULE = {"sgd": "SGD", "adagrad": "Adagrad"}
PROCESS_BYTES = 600 << 20  # what Python with torch, batches and rows on their way take beside a cache
LEAST_LIMIT_BYTES = 1 << 30  # so that tiny sizes run at all
BLOCK_ROWS = 1 << 16


def rows_of(gib: float, rule: str, dim: int) -> int:
    """How many rows a table of this size has."""
    return int(gib * (1 << 30)) // (4 * dim * (1 + STATE_OF_RULE[rule]))


def place(folder: str, rule: str, rows: int, dim: int) -> str:
    """The folder below for one size and rule, so that what is kept is never taken for another."""
    path = f"{folder}/{rule}-{rows}-{dim}"
    os.makedirs(path, exist_ok=True)
    return path


def build_table(folder: str, rule: str, rows: int, dim: int) -> None:
    """folder/table with every row and its state written, if it is not there."""
    import bigembed

    if os.path.exists(f"{folder}/table"):
        return
    making = bigembed.init.uniform(-1, 1)
    facts = {"state_dim": 0, "init": making, "seed": 1, "overwrite": True}  # of a build that was broken off
    table = bigembed.Table.create(f"{folder}/making", rows, dim, **facts)
    emb = bigembed.Embedding.open(table, cache_rows=16)
    getattr(bigembed.optim, OURS_OF_RULE[rule])(emb, lr=LR)
    table.publish()
    emb.close()
    os.rename(f"{folder}/making", f"{folder}/table")


def build_flat(folder: str, rule: str, rows: int, dim: int) -> None:
    """folder/flat.0, the weights, and a file for each state, if they are not there."""
    block = np.random.default_rng(0).uniform(-1, 1, (BLOCK_ROWS, dim)).astype(np.float32)
    for number in range(1 + STATE_OF_RULE[rule]):
        path = f"{folder}/flat.{number}"
        if os.path.exists(path):
            continue
        with open(f"{path}.making", "wb") as file:
            for first in range(0, rows, BLOCK_ROWS):
                file.write(np.abs(block[: rows - first]) if number else block[: rows - first])
            os.fsync(file.fileno())
        os.rename(f"{path}.making", path)


def table_files(folder: str) -> list[str]:
    return sorted(glob.glob(f"{folder}/table/weight/c.*"))


def disk_rate(folder: str, seconds: int) -> float:
    """Random 4-KiB reads a second of the table's files at depth 64, with no writes left over from what ran before."""
    os.sync()
    return disk_random_reads(table_files(folder), seconds)


# -- in the child ---------------------------------------------------------------------------------------------


def open_bigembed(task: dict[str, Any]) -> tuple[Any, Any]:
    """(module, optimizer) on folder/table, at an explicit commit of its own: what was kept to roll back is let go."""
    import bigembed

    rows_bytes = task["cache_bytes"] - task["cache_bytes"] // 4
    index_bytes = task.get("index_bytes", task["cache_bytes"] // 4)
    limits = {"journal_bytes": task["journal_bytes"], "index_bytes": index_bytes}
    table = bigembed.Table.open(f"{task['folder']}/table", **limits)
    emb = bigembed.Embedding.open(table, cache_bytes=rows_bytes + index_bytes)
    opt = getattr(bigembed.optim, OURS_OF_RULE[task["rule"]])(emb, lr=LR)
    emb.commit("before")
    return emb, opt


def open_mapped(task: dict[str, Any]) -> tuple[Any, Any]:
    """(nn.Embedding(sparse=True) on a shared map with MADV_RANDOM, torch's optimizer with its state on another)."""
    import torch

    torch.sparse.check_sparse_tensor_invariants.disable()  # as it is by default; said, it is not warned about
    maps = []
    for path in sorted(glob.glob(f"{task['folder']}/flat.?")):
        mapped = np.memmap(path, np.float32, "r+").reshape(-1, task["dim"])
        mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        maps.append(torch.from_numpy(mapped))
    emb = torch.nn.Embedding.from_pretrained(maps[0], freeze=False, sparse=True)
    if task["rule"] == "sgd":
        return emb, torch.optim.SGD(emb.parameters(), lr=LR)
    small = torch.nn.Parameter(torch.zeros(1, task["dim"]))
    opt = torch.optim.Adagrad([small], lr=LR)  # which would fill a state as large as the weight, in memory
    opt.state[emb.weight] = {**opt.state.pop(small), "sum": maps[1]}
    opt.param_groups[0]["params"] = [emb.weight]
    return emb, opt


def stepper(emb: Any, opt: Any, batch: int, dim: int) -> Callable[[Any], None]:
    """One step on a batch of ids: forward, backward with a fixed upstream gradient, update, zero_grad."""
    import torch

    gradient = torch.randn(batch, dim, generator=torch.Generator().manual_seed(0))

    def step(ids_N: Any) -> None:
        emb(ids_N).backward(gradient)
        opt.step()
        opt.zero_grad()

    return step


class Draws:
    """Batches of ids as tensors, uniform or bounded Zipf; `seed` decides which."""

    def __init__(self, task: dict[str, Any], seed: int = 1) -> None:
        self.rows, self.batch = task["rows"], task["batch"]
        self.rng = np.random.default_rng(seed)
        self.zipf = Zipf(self.rows, task["exponent"], seed) if task["ids"] == "zipf" else None

    def __call__(self) -> Any:
        import torch

        drawn = self.rng.integers(0, self.rows, self.batch) if self.zipf is None else self.zipf.sample(self.batch)
        return torch.from_numpy(drawn)


class Timing:
    """Steps taken: their seconds, ids and distinct rows, and a curve of (seconds, ids, what else is told)."""

    def __init__(self) -> None:
        self.seconds, self.steps, self.ids, self.distinct_rows = 0.0, 0, 0, 0
        self.curve: list[list[float]] = []

    def take(self, step: Any, ids_N: Any) -> None:
        start = time.perf_counter()
        step(ids_N)
        self.seconds += time.perf_counter() - start
        self.steps += 1
        self.ids += ids_N.numel()
        self.distinct_rows += len(np.unique(ids_N.numpy()))

    def mark(self, *told: float) -> None:
        self.curve.append([round(self.seconds, 1), self.ids, *told])

    def result(self) -> dict[str, Any]:
        per_second = 1 / self.seconds if self.steps else 0.0
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "ids_per_second": self.ids * per_second,
            "distinct_rows_per_second": self.distinct_rows * per_second,
            "memory": memory_bytes(),
            "curve": self.curve,
        }


def discard(emb: Any) -> None:
    """Close without a commit: the changes of a benchmark are nobody's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        emb.close()


# -- in the parent --------------------------------------------------------------------------------------------


def memory_of(table_bytes: float, ratio: float) -> dict[str, int]:
    """The cgroup's limit for a table so many times the memory, and the part of it for a cache with its index."""
    memory_bytes = int(table_bytes / ratio)
    cache_bytes = max(memory_bytes // 4, min(memory_bytes // 2, memory_bytes - PROCESS_BYTES))
    return {"limit_bytes": max(memory_bytes, LEAST_LIMIT_BYTES), "cache_bytes": cache_bytes}


def run_child(script: str, task: dict[str, Any], limit_bytes: int | None) -> dict[str, Any]:
    """What the script makes of `--task`, alone in a fresh cgroup (None: without one), with an empty page cache."""
    drop_page_cache([*table_files(task["folder"]), *glob.glob(f"{task['folder']}/flat.?")])
    arguments = [script, "--task", json.dumps(task)]
    if limit_bytes is None:
        return _answer(run_in(None, arguments))
    with memory_cgroup(limit_bytes, f"bigembed-bench-{os.getpid()}") as group:
        return {"limited": group is not None, **_answer(run_in(group, arguments))}


def _answer(done: Any) -> dict[str, Any]:
    if done.returncode:
        return {"failed": done.returncode}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def say(text: str) -> None:
    """Progress, from child or parent: on the standard error, so that a child's answer stays alone on its output."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def common_options(description: str) -> argparse.ArgumentParser:
    """What the out-of-core benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--gib", type=float, default=8.0, help="the table, weights and state")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16_384)
    parser.add_argument("--exponent", type=float, default=1.05, help="of the bounded Zipf distribution")
    parser.add_argument("--folder", default=".", help="where the tables go; on the disk to measure")
    parser.add_argument("--keep", default=None, help="build here, or use what was built here: twice --gib a rule")
    parser.add_argument("--disk-seconds", type=int, default=4, help="for each measurement of the disk's own rate")
    parser.add_argument("--no-result", action="store_true", help="print only")
    parser.add_argument("--task", type=json.loads, default=None, help=argparse.SUPPRESS)
    return parser
