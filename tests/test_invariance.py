"""The table's bits after training do not depend on cache, policy, prefetching, threads, merges, commits or reopening.

Each way of training takes the same seeded batches; every one must leave the whole table, weights and state, with the
bytes of the plainest: all rows cached, one thread, one commit at the end.
"""

import functools
import tempfile

import numpy as np
import pytest
import torch
from training import RULES, batches

import bigembed
from bigembed import threads
from bigembed.cache.index import POLICIES
from bigembed.storage import store

V, D, STEPS = 300, 8, 12
GRAIN = 4  # items that are worth a thread here, so that a small test is shared among all


@pytest.fixture(params=[1, 2, 5], ids="{} threads".format)
def num_threads(request, monkeypatch):
    """That many threads, with work for each of them."""
    before = bigembed.get_num_threads()
    bigembed.set_num_threads(request.param)
    run = threads.run
    monkeypatch.setattr(threads, "run", lambda *args, grain=GRAIN: run(*args, grain=min(grain, GRAIN)))
    monkeypatch.setattr(threads, "GRAIN_ITEMS", GRAIN)
    monkeypatch.setattr("bigembed.kernels.grouping.GRAIN_VALUES", GRAIN)
    yield request.param
    bigembed.set_num_threads(before)


def make_module(path, cache_rows, journal_bytes, policy):
    facts = {"cache_rows": cache_rows, "journal_bytes": journal_bytes, "policy": policy}
    return bigembed.Embedding.open(path, padding_idx=3, **facts)


def train(
    folder,
    rule,
    *,
    cache_rows=None,
    commit_every=None,
    merge=False,
    reopen_every=None,
    journal_bytes=1 << 30,
    policy="lru",
    depth=0,
    steps=STEPS,
):
    """The bytes of the whole table after training, and what `stats()` said before the last close."""
    make, facts = RULES[rule]
    path = tempfile.mkdtemp(dir=folder) + "/t"
    bigembed.Table.create(path, V, D, seed=5).close()
    emb = make_module(path, cache_rows, journal_bytes, policy)
    opt = make(emb, **facts)
    rng = np.random.default_rng(3)
    loader = list(batches(steps, V, size=(40, 3)))
    for step, ids in enumerate(loader, start=1):
        if depth:
            for coming in loader[: depth + 1] if step == 1 else loader[step - 1 + depth : step + depth]:
                emb.prefetch(coming)
        target = torch.from_numpy(rng.standard_normal((40, 1, D)).astype(np.float32))
        loss = (emb(ids).tanh() - target).pow(2).sum() + emb(ids[::2]).pow(3).mean()
        loss.backward()
        if step % 4 == 0:  # a second backward, and a joint norm
            emb(ids[:5]).sin().sum().backward()
            torch.nn.utils.clip_grad_norm_(emb.parameters(), 3.0)
        opt.step()
        opt.zero_grad()
        if reopen_every is not None and step % reopen_every == 0:
            emb.commit(f"step {step}")
            emb.close()
            del emb, opt, loss
            emb = make_module(path, cache_rows, journal_bytes, policy)
            opt = make(emb, **facts)
        elif commit_every is not None and step % commit_every == 0:
            emb.commit(f"step {step}")
            if merge:
                emb.table.merge()
    emb.commit("end")
    stats = emb.stats()
    emb.close()
    with bigembed.Table.open(path, "r") as table:  # what is on disk, without any cache
        return table.read(np.arange(V), with_state=True).tobytes(), stats


@functools.cache
def plainest(rule):
    with tempfile.TemporaryDirectory() as folder:
        return train(folder, rule)[0]


WAYS = {
    "1 row cached": {"cache_rows": 1},
    "5 rows cached": {"cache_rows": 5},
    "64 rows cached": {"cache_rows": 64},
    "all rows cached": {},
    "merges": {"cache_rows": 64, "commit_every": 2, "merge": True},
    "commits": {"cache_rows": 5, "commit_every": 3},
    "tiny journal": {"cache_rows": 64, "journal_bytes": 20_000},
    "tinier journal": {"cache_rows": 5, "journal_bytes": 1},
    "1 batch ahead": {"cache_rows": 64, "depth": 1},
    "4 batches ahead": {"cache_rows": 64, "depth": 4},
    "2 ahead, 1 row cached, merges": {"cache_rows": 1, "depth": 2, "commit_every": 2, "merge": True},
    "written behind": {"cache_rows": 5, "journal_bytes": 20_000},
    "written behind, ahead": {"cache_rows": 64, "depth": 2, "commit_every": 3, "merge": True},
    "lfu": {"cache_rows": 64, "policy": "lfu", "journal_bytes": 20_000},
    "sieve, ahead": {"cache_rows": 64, "policy": "sieve", "depth": 3, "commit_every": 3},
    "s3fifo": {"cache_rows": 64, "policy": "s3fifo"},
    "next_use, ahead": {"cache_rows": 64, "policy": "next_use", "depth": 3, "journal_bytes": 20_000},
    "reopened": {"cache_rows": 64, "reopen_every": 5},
    "reopened at every step": {"reopen_every": 1, "journal_bytes": 20_000},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_training_gives_the_same_bytes(tmp_path, monkeypatch, rule, way):
    if "behind" in way:
        monkeypatch.setattr(store, "BEHIND_BYTES", 1)
    got, stats = train(tmp_path, rule, **WAYS[way])
    assert got == plainest(rule)
    if way == "tiny journal":
        assert stats["journal"]["auto_commits"] > 1
        assert stats["merge"]["merges"] > 0
    if way == "1 row cached":
        assert stats["cache"]["capacity_rows"] == 1
        assert stats["cache"]["past"] > 1000
    if way == "64 rows cached":
        assert stats["cache"]["evictions"] > 100
    if "ahead" in way:
        assert stats["prefetch"]["taken"] > 100


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cache_rows", [5, 64, None])
def test_any_number_of_threads_gives_the_same_bytes(tmp_path, rule, cache_rows, num_threads):
    assert train(tmp_path, rule, cache_rows=cache_rows)[0] == plainest(rule)


def test_the_threads_share_the_work(tmp_path, num_threads, monkeypatch):
    """Without this the test above could pass on one thread."""
    shared = []
    run = threads._Pool.run
    monkeypatch.setattr(
        threads._Pool, "run", lambda self, tasks, own_part: shared.append(1) or run(self, tasks, own_part)
    )
    train(tmp_path, "SGD", steps=2)
    assert bool(shared) == (num_threads > 1)


def test_reopening_without_the_step_count_would_show(tmp_path, monkeypatch):
    """Adam's bits depend on the step count: the proof that it travels with the commits."""
    kept = bigembed.Table.open.__func__

    def open_and_forget(cls, *args, **options):
        table = kept(cls, *args, **options)
        table.scalars = {}
        return table

    monkeypatch.setattr(bigembed.Table, "open", classmethod(open_and_forget))
    assert train(tmp_path, "Adam", reopen_every=5)[0] != plainest("Adam")


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_gives_the_same_bytes(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(store, "BEHIND_BYTES", 1 if seed % 2 else 1 << 20)
    rng = np.random.default_rng(seed)
    rule = list(RULES)[rng.integers(len(RULES))]
    way = {
        "cache_rows": int(rng.integers(1, V)),
        "commit_every": int(rng.integers(1, 5)),
        "merge": bool(rng.integers(2)),
        "reopen_every": int(rng.integers(2, 9)),
        "journal_bytes": int(10 ** rng.uniform(2, 6)),
        "depth": int(rng.integers(0, 5)),
        "policy": str(rng.choice(POLICIES)),
    }
    assert train(tmp_path, rule, **way)[0] == plainest(rule), way
