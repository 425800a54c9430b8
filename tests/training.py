"""What the tests of training share: small modules on temporary tables, and their plain twins in memory."""

import tempfile

import numpy as np
import torch
from torch import nn

import bigembed

CACHE_ROWS = [3, None]  # a cache that holds next to nothing, and one that holds every row
RULES = {
    "SGD": (bigembed.optim.SGD, {"lr": 0.5}),
    "momentum": (bigembed.optim.SGD, {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.125, "nesterov": True}),
    "Adagrad": (bigembed.optim.Adagrad, {"lr": 0.25, "lr_decay": 0.125, "initial_accumulator_value": 0.5}),
    "RowwiseAdagrad": (bigembed.optim.RowwiseAdagrad, {"lr": 0.25, "initial_accumulator_value": 0.25}),
    "Adam": (bigembed.optim.Adam, {"lr": 0.0625, "betas": (0.75, 0.875)}),
    "AdamW": (bigembed.optim.AdamW, {"lr": 0.0625, "betas": (0.75, 0.875), "weight_decay": 0.25}),
}


def small_table(folder, num_rows=50, dim=4, *, journal_bytes=1 << 30, seed=7, **facts):
    """A temporary table: it goes without a commit, and without a warning."""
    path = tempfile.mkdtemp(dir=folder) + "/t"
    facts = {"journal_bytes": journal_bytes, "seed": seed, "is_temporary": True, **facts}
    return bigembed.Table.create(path, num_rows, dim, **facts)


def small_embedding(folder, *args, cache_rows=None, device=None, device_rows=None, **facts):
    """A module on a temporary table, with a cache of `cache_rows` rows; None is room for all."""
    table = small_table(folder, *args, **facts)
    return bigembed.Embedding.open(table, cache_rows=cache_rows, device=device, device_rows=device_rows)


def plain_twin(emb, sparse=False):
    """An nn.Embedding with the same rows."""
    return nn.Embedding(*emb.weight.shape, emb.padding_idx, sparse=sparse, _weight=weights(emb).clone())


def weights(emb):
    """The whole weight: a (V, D) tensor; of an nn.Embedding a copy."""
    if isinstance(emb, nn.Embedding):
        return emb.weight.detach().clone()
    return torch.from_numpy(emb.table.read(np.arange(emb.num_embeddings)))


def rows_and_state(emb):
    """The whole table with its state, (V, E)."""
    return emb.table.read(np.arange(emb.num_embeddings), with_state=True)


def batches(count, num_rows=50, size=(6, 4), seed=0):
    """Seeded batches of ids, half from a few hot rows, with repeats."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        hot, cold = rng.integers(0, min(5, num_rows), size), rng.integers(0, num_rows, size)
        yield torch.from_numpy(np.where(rng.random(size) < 0.5, hot, cold))


def coefficients(ids, dim, seed=0):
    """Factors (*ids.shape, dim) that are multiples of 1/8, so that sums of them are exact in any order."""
    rng = np.random.default_rng([seed, int(ids.sum())])
    return torch.from_numpy(rng.integers(-16, 17, (*ids.shape, dim)).astype(np.float32) / 8)
