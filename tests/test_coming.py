"""Next uses, as the index hears them, against a plain reading of what was announced; and what that is good for."""

import numpy as np
import pytest
import torch
from training import small_table

import bigembed
from bigembed.cache.coming import ComingUses
from bigembed.cache.index import SetIndex


def marks(index, num_rows):
    slots = index.find(np.arange(num_rows))
    return [int(index.mark.reshape(-1)[slot]) if slot >= 0 else None for slot in slots]


@pytest.mark.parametrize("seed", range(6))
def test_marks_name_the_first_announced_batch_with_the_row(seed):
    rng = np.random.default_rng(seed)
    index = SetIndex(2, 8, "next_use")
    coming, window, step = ComingUses(index), [], 0
    known = {}  # row -> rank of its next use when it was last told
    for _ in range(60):
        rows = rng.permutation(np.unique(rng.integers(0, 24, 6)))
        if len(window) < 3:
            coming.announce(rows, step)
            window.append(set(rows.tolist()))
            continue
        looked = window.pop(0)
        rows_U = rng.permutation(np.array(sorted(looked)))
        step += 1
        slots = index.probe(rows_U, step)
        index.admit(rows_U[slots < 0], step, step)
        coming.looked_up(rows_U)
        index._check(step)
        order = [batch.step for batch in coming._announced]
        for row in looked:
            uses = [order[rank] for rank, batch in enumerate(window) if row in batch]
            known[row] = uses[0] if uses else 0
        held = marks(index, 24)
        for row in looked:
            assert held[row] in (known[row], None)
        for rank, batch in enumerate(window):  # rows that are there know of every announced use
            for row in batch:
                first = next(order[r] for r, b in enumerate(window) if row in b)
                assert held[row] in (first, None), (row, rank)


def test_an_announcement_that_never_comes_is_forgotten():
    coming = ComingUses(SetIndex(2, 8, "next_use"))
    coming.announce(np.arange(3), 1)
    coming.announce(np.arange(3), 5000)
    assert len(coming._announced) == 1
    coming.forget()
    coming.looked_up(np.arange(3))


def hits(tmp_path, policy, depth):
    emb = bigembed.Embedding.open(small_table(tmp_path, 2000, 4), cache_rows=256, policy=policy)
    rng = np.random.default_rng(0)
    loader = [torch.from_numpy(rng.integers(0, 600, 60)) for _ in range(80)]
    for ids in bigembed.lookahead(loader, {emb: lambda ids: ids}, depth=depth):
        emb(ids)
    emb.trainable.cache._check()
    return emb.stats()["cache"]["hits"]


def test_what_is_known_to_come_stays_in_the_cache(tmp_path):
    lru = hits(tmp_path, "lru", 4)
    assert hits(tmp_path, "next_use", 4) > lru
    assert hits(tmp_path, "next_use", 0) == hits(tmp_path, "lru", 0) == lru, "without a window it is LRU"
