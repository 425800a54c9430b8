"""One training run, alone in its process, and where its memory is. `memory.py` runs it and prints.

Every part is measured or counted, none is what is left over:

    imported     resident once torch and bigembed are imported
    code         what a few steps on a small table add: compiled kernels, torch's optimizer machinery, zarr
    cache, index, staging, pending
                 as `emb.stats()` counts them; of the cache's rows, the pages that are there
    kept         freed, but kept by malloc for the next batch: what malloc_trim gives back
    unexplained  what is then left of the resident memory; negative where a part is counted too high
"""

import ctypes
import glob
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import memory_bytes
from page_cache import file_cache_bytes, resident_bytes

WARM_ROWS = 40_000
PEERS = {"sgd": ("SGD", 0), "adagrad": ("Adagrad", 1), "rowwise_adagrad": ("Adagrad", 1), "adam": ("SparseAdam", 2)}
OURS = {"sgd": "SGD", "adagrad": "Adagrad", "rowwise_adagrad": "RowwiseAdagrad", "adam": "Adam"}


def resident() -> dict[str, int]:
    """Resident memory: anonymous, file-backed, shared, their sum, and the peak of the sum."""
    memory = memory_bytes()
    return {**memory, "rss": memory["anonymous"] + memory["file"] + memory["shared"]}


def spread_ids(rows: int, distinct: int, batch: int, seed: int) -> Callable[[], Any]:
    """Batches of distinct ids out of `distinct` rows that stand equally far apart: the same draws for every V."""
    import torch

    rng, count = np.random.default_rng(seed), min(rows, distinct)
    apart = rows // count

    def draw() -> torch.Tensor:
        return torch.from_numpy(rng.choice(count, min(batch, count), replace=False) * np.int64(apart))

    return draw


def all_spread_ids(rows: int, distinct: int, batch: int) -> list[Any]:
    """The same rows once each, in batches."""
    import torch

    count = min(rows, distinct)
    ids_N = torch.arange(count) * (rows // count)
    return list(ids_N.split(batch))


def train(emb: Any, opt: Any, ids: Any) -> float:
    """One step; returns its seconds."""
    import torch

    start = time.perf_counter()
    emb(ids).square().sum().backward()
    opt.step()
    opt.zero_grad()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run_steps(emb: Any, opt: Any, plan: dict[str, Any]) -> dict[str, Any]:
    """Every row once, untimed; then the timed steps. Step times in seconds, resident memory during the last half."""
    rows, distinct, batch = plan["rows"], plan["distinct_rows"], plan["batch"]
    device = plan["device"]
    for ids in all_spread_ids(rows, distinct, batch):
        train(emb, opt, ids.to(device))
    draw = spread_ids(rows, distinct, batch, seed=1)
    seconds, seen = [], []
    for _ in range(plan["steps"]):
        seconds.append(train(emb, opt, draw().to(device)))
        seen.append(resident()["rss"])
    return {
        "step_seconds": statistics.median(seconds),
        "mean_step_seconds": statistics.mean(seconds),
        "steady_rss": int(statistics.median(seen[len(seen) // 2 :])),
    }


def train_bigembed(plan: dict[str, Any]) -> dict[str, Any]:
    """Train out of a table in a temporary folder; returns what is in memory, by part, and on disk."""
    import torch

    import bigembed

    optimizer = getattr(bigembed.optim, OURS[plan["rule"]])
    assert bigembed.Embedding
    imported = resident()
    with tempfile.TemporaryDirectory(dir=plan["folder"]) as folder:
        load_code(optimizer, plan["dim"], f"{folder}/warm", plan["device"])
        loaded = resident()
        path = f"{folder}/table"
        how = {"path": path, "cache_bytes": plan["cache_bytes"], "device": plan["device"], "seed": 0}
        emb = bigembed.Embedding(plan["rows"], plan["dim"], **how)
        opt = optimizer(emb, lr=0.01)
        steps = run_steps(emb, opt, plan)
        steady, stats = resident(), emb.stats()
        parts = accounted(emb, stats)
        parts["kept"] = steady["rss"] - trimmed()["rss"]
        parts["code"] = loaded["rss"] - imported["rss"]
        unexplained = steady["rss"] - imported["rss"] - sum(parts.values())
        result = {
            **steps,
            "peak": resident()["peak"],
            "imported": imported,
            "steady": steady,
            "parts": {**parts, "unexplained": unexplained},
            "unexplained_share": unexplained / (steady["rss"] - imported["rss"]),
            "disk_bytes": sum(os.stat(file).st_blocks * 512 for file in _files(path)),
            "page_cache_bytes": file_cache_bytes(_files(path)),
            "device_bytes": torch.cuda.max_memory_allocated() if plan["device"] != "cpu" else 0,
            "stats": stats,
        }
        emb.commit("done")
        emb.close()
    return result


def load_code(optimizer: Any, dim: int, path: str, device: str = "cpu") -> None:
    """Everything that a run out of core does, on a table that takes no memory, so that what it loads is there."""
    from bigembed import Embedding, Table

    few = {"index_bytes": 1 << 18, "reader": "cold"}
    with Table.create(path, WARM_ROWS, dim, **few) as table:
        emb = Embedding.open(table, cache_bytes=1 << 20, device=device)
        opt = optimizer(emb, lr=0.01)
        draw = spread_ids(WARM_ROWS, WARM_ROWS, WARM_ROWS // 4, seed=0)
        for note in ("fills the journal", "reads the base"):
            for _ in range(4):
                train(emb, opt, draw().to(device))
            emb.commit(note)
            table.merge()
    trimmed()


def accounted(emb: Any, stats: dict[str, Any]) -> dict[str, int]:
    """The library's own account of its memory on the host, by part."""
    values_SE = emb.trainable.cache.values_SE.numpy()
    untouched = values_SE.nbytes - resident_bytes(values_SE)
    return {
        "cache": stats["cache"]["capacity_bytes"] - untouched,
        "index": stats["index"]["memory_bytes"],
        "staging": stats["staging"]["memory_bytes"] + stats["prefetch"]["memory_bytes"],
        "pending": stats["pending"]["gradient_bytes"],
    }


def trimmed() -> dict[str, int]:
    """Resident memory once malloc has given back what it keeps (glibc; elsewhere it keeps it)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return resident()


def _files(path: str) -> list[str]:
    return [file for file in glob.glob(f"{glob.escape(path)}/**", recursive=True) if os.path.isfile(file)]


def train_peer(plan: dict[str, Any]) -> dict[str, Any]:
    """The same steps on nn.Embedding(sparse=True), the whole table in memory; torch has no row-wise Adagrad."""
    import warnings

    import torch

    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    imported = resident()
    emb = torch.nn.Embedding(plan["rows"], plan["dim"], sparse=True, device=plan["device"])
    opt = getattr(torch.optim, PEERS[plan["rule"]][0])(emb.parameters(), lr=0.01)
    steps = run_steps(emb, opt, plan)
    return {**steps, "peak": resident()["peak"], "imported": imported, "steady": resident()}


def peer_bytes(rows: int, dim: int, rule: str) -> int:
    """What the weights and the optimizer's state of nn.Embedding take, without gradients, imports and code."""
    return 4 * rows * dim * (1 + PEERS[rule][1])


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps((train_peer if given["peer"] else train_bigembed)(given)))
