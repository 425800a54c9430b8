"""Modules with a cache on a device: the table's bytes are those of the host alone, and nothing else differs either."""

import functools
import gc
import os
import tempfile

import numpy as np
import pytest
import torch
from devices import DEVICES, NO_CUDA
from torch import nn
from training import RULES, batches, coefficients, plain_twin, rows_and_state, small_embedding, small_table, weights

import bigembed
from bigembed import optim
from bigembed.cache.stack import DEFAULT_DEVICE_BYTES
from bigembed.errors import InvalidArgument, InvalidIds, NoOptimizer, RowOutOfRange, StaleGraph, StorageFailed
from bigembed.storage.store import RecordStore

V, D, STEPS = 300, 8, 6
CUDA = [pytest.param("cuda", marks=NO_CUDA)]


# -- invariance -------------------------------------------------------------------------------------------------


def few_of_each(step):
    """30 distinct ids, each at most 8 times in all lookups of a step."""
    rng = np.random.default_rng([step, 8])
    return torch.from_numpy(np.repeat(rng.permutation(V)[:30], 4).reshape(40, 3))


def hot(step):
    """Half of the positions are of 5 rows, 60 or more of each."""
    return next(batches(1, V, size=(40, 16), seed=step))


def train(rule, ids_of_step, depth=0, commit_every=None, **caches):
    """The bytes of the whole table after training; every batch is announced `depth` steps before."""
    make, facts = RULES[rule]
    with tempfile.TemporaryDirectory() as folder:
        emb = small_embedding(folder, V, D, seed=5, padding_idx=3, **caches)
        opt = make(emb, **facts)
        loader = bigembed.lookahead([ids_of_step(n) for n in range(STEPS)], {emb: lambda ids: ids}, depth=depth)
        for step, ids in enumerate(loader, start=1):
            factors = coefficients(ids, D).to(emb.handle.device)
            (emb(ids).tanh() * factors).sum().backward()
            emb(ids[::2]).pow(3).mean().backward()
            if step % 3 == 0:
                nn.utils.clip_grad_norm_(emb.parameters(), 3.0)
            opt.step()
            opt.zero_grad()
            emb.trainable.caches._check()
            if commit_every is not None and step % commit_every == 0:
                emb.commit()
        if depth:
            assert emb.stats()["prefetch"]["requested"] > 0
        return rows_and_state(emb).tobytes(), emb.stats()


@functools.cache
def without_a_device(rule):
    return train(rule, few_of_each)[0]


@functools.cache
def all_on_a_device(rule):
    return train(rule, hot, device_rows=V)[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("cache_rows", [5, 64, V])
@pytest.mark.parametrize("device_rows", [1, 64, V])
def test_every_size_of_the_tiers_gives_the_same_bytes(device_rows, cache_rows, depth, rule):
    how = {"device_rows": device_rows, "cache_rows": cache_rows, "depth": depth}
    assert train(rule, few_of_each, **how)[0] == without_a_device(rule)
    assert train(rule, hot, **how)[0] == all_on_a_device(rule)


@pytest.mark.parametrize("policy", ["lfu", "sieve", "s3fifo", "next_use"])
def test_the_hosts_policy_changes_no_bytes(tmp_path, policy):
    emb = bigembed.Embedding.open(small_table(tmp_path, V, D), device_rows=16, cache_rows=32, policy=policy)
    twin = plain_twin(emb)
    for step in range(6):
        emb.prefetch(hot(step + 1))
        assert torch.equal(emb(hot(step)), twin(hot(step)))


def test_commits_and_a_tiny_journal_change_no_bytes():
    got, stats = train("Adam", few_of_each, device_rows=16, cache_rows=32, commit_every=5, journal_bytes=4_000)
    assert got == without_a_device("Adam")
    assert stats["journal"]["auto_commits"] > 1


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("device_rows", [1, 64])
def test_on_cuda_too_any_size_gives_the_same_bytes(device, device_rows, rule):
    def run(rows):
        return train(rule, hot, device=device, device_rows=rows, cache_rows=32, depth=2)[0]

    assert run(device_rows) == run(V)


# -- a twin -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("device_rows", [3, 50])
def test_trains_as_nn_embedding(tmp_path, device_rows, device):
    emb = small_embedding(tmp_path, device=device, device_rows=device_rows, cache_rows=5, padding_idx=2)
    plain = plain_twin(emb).to(device)
    for module, opt in ((emb, optim.SGD(emb, lr=0.25)), (plain, torch.optim.SGD(plain.parameters(), lr=0.25))):
        for ids in batches(5):
            (module(ids.to(device)) * coefficients(ids, 4).to(device)).sum().backward()
            opt.step()
            opt.zero_grad()
    assert torch.equal(weights(emb), weights(plain).cpu())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4), (2, 0, 3)])
def test_ids_of_any_shape_on_the_host_or_the_device(tmp_path, shape, dtype, device):
    emb = small_embedding(tmp_path, device=device, device_rows=5, cache_rows=3)
    opt = optim.SGD(emb)
    ids = torch.randint(0, 50, shape, dtype=dtype)
    for given in (ids, ids.to(device)):
        rows = emb(given)
        assert rows.device == emb.handle.device == emb.weight.device
        assert torch.equal(rows.cpu(), weights(emb)[ids.long()])
        rows.sum().backward()
        opt.zero_grad()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_read_and_written_by_the_weight(tmp_path, device):
    emb = small_embedding(tmp_path, device=device, device_rows=5, cache_rows=3)
    ids = torch.tensor([1, 2, 7], device=device)
    emb(ids)
    emb.weight[ids] = torch.ones(3, 4, device=device)
    assert torch.equal(emb(ids), torch.ones(3, 4, device=device))
    assert torch.equal(emb.weight[ids], torch.ones(3, 4, device=device))
    assert emb.to_nn_embedding().weight.device == emb.handle.device


# -- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("ids", "position"), [([1, 2, 50], 2), ([-1, 70], 0), ([3, -(2**60)], 1)])
def test_an_id_out_of_range_changes_nothing(tmp_path, ids, position, device):
    emb = small_embedding(tmp_path, device=device, device_rows=5, cache_rows=3)
    emb(torch.tensor([1, 2]))
    before = emb.stats()
    text = rf"ids contain {ids[position]} \(at position {position}\), but this table has 50 rows .* grow the table"
    for given in (torch.tensor(ids), torch.tensor(ids, device=device)):
        with pytest.raises(RowOutOfRange, match=text):
            emb(given)
        with pytest.raises(RowOutOfRange, match=text):
            emb.prefetch(given)
    after = emb.stats()
    for moved in ("bytes_down", "locked_bytes"):
        assert after["device"].pop(moved) >= before["device"].pop(moved)
    assert after == before
    emb(torch.tensor([1, 2]))


def test_ids_that_are_none(tmp_path):
    emb = small_embedding(tmp_path, device_rows=5)
    with pytest.raises(InvalidIds, match="ids are on meta, this table's rows are served on the cpu"):
        emb(torch.ones(3, dtype=torch.int64, device="meta"))
    with pytest.raises(InvalidIds, match="dtype"):
        emb(torch.ones(3))
    with pytest.raises(TypeError, match=r"torch\.tensor"):
        emb([1, 2])


def test_options_that_cannot_be(tmp_path):
    table = small_table(tmp_path)
    for facts, text in (
        ({"host_cache_bytes": 1 << 20}, "use cache_bytes"),
        ({"device_rows": 0}, "at least 1, not 0"),
        ({"device_rows": 5, "host_cache_bytes": 0}, "host_cache_bytes must be positive, not 0"),
        ({"device_rows": 5, "cache_bytes": 1 << 62, "cache_rows": 3, "device": "meta"}, "'meta' is not supported"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            bigembed.Embedding.open(table, **facts)


def test_a_backward_without_an_optimizer_is_refused(tmp_path):
    emb = small_embedding(tmp_path, device_rows=5)
    with pytest.raises(NoOptimizer):
        emb(torch.tensor([1])).sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["fetch", "append"])
def test_nothing_is_lost_when_the_storage_fails(tmp_path, name, device, monkeypatch):
    """Every third read or write of the store fails; what failed is done again."""
    emb = small_embedding(tmp_path, device=device, device_rows=3, cache_rows=5)
    plain = plain_twin(emb)
    opt, theirs = optim.SGD(emb, lr=0.25), torch.optim.SGD(plain.parameters(), lr=0.25)
    works, calls, failures = getattr(RecordStore, name), [], []

    def fails_at_times(self, *args):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise StorageFailed("a bad sector")
        return works(self, *args)

    def until_it_works(action):
        for _ in range(20):
            try:
                return action()
            except StorageFailed:
                failures.append(1)
                emb.trainable.caches._check()
        raise AssertionError("never")

    monkeypatch.setattr(RecordStore, name, fails_at_times)
    for ids in batches(8):
        factors = coefficients(ids, 4)
        (until_it_works(lambda ids=ids: emb(ids)) * factors.to(device)).sum().backward()
        (plain(ids) * factors).sum().backward()
        until_it_works(opt.step)
        theirs.step()
        opt.zero_grad()
        theirs.zero_grad()
    until_it_works(emb.table._cache.write_back)
    monkeypatch.undo()
    assert failures
    assert torch.equal(weights(emb), weights(plain))


# -- the table sees what is on the device -----------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_commit_reopen_and_rollback_with_dirty_rows_on_the_device(tmp_path, device):
    path = str(tmp_path / "t")
    bigembed.Table.create(path, 50, 4, seed=1).close()
    where = {"device": device, "device_rows": 20, "cache_rows": 8}
    emb = bigembed.Embedding.open(path, **where)
    opt = optim.Adagrad(emb, lr=0.5)

    def step():
        emb(torch.arange(12)).pow(2).sum().backward()
        opt.step()
        opt.zero_grad()

    step()
    stats = emb.stats()
    assert (stats["device"]["dirty_rows"], stats["cache"]["dirty_rows"]) == (12, 0)
    trained = rows_and_state(emb)
    emb.commit("trained")
    assert emb.stats()["device"]["dirty_rows"] == 0
    step()
    pending = emb(torch.tensor([1])).sum()
    emb.table.rollback()
    assert rows_and_state(emb).tobytes() == trained.tobytes()
    with pytest.raises(StaleGraph, match="rolled back"):
        pending.backward()
    assert torch.equal(emb(torch.arange(50)).cpu(), torch.from_numpy(trained[:, :4]))
    emb.close()
    emb = bigembed.Embedding.open(path, **where)
    assert rows_and_state(emb).tobytes() == trained.tobytes()
    assert torch.equal(emb(torch.arange(50)).cpu(), torch.from_numpy(trained[:, :4]))
    emb.close()


def test_the_table_reads_writes_and_grows(tmp_path):
    emb = small_embedding(tmp_path, device_rows=20, cache_rows=8)
    opt = optim.SGD(emb, lr=1.0)
    before = weights(emb)
    emb(torch.arange(10)).sum().backward()
    opt.step()
    opt.zero_grad()
    assert np.array_equal(emb.table.read(np.arange(10)), (before[:10] - 1).numpy())
    emb.table.write(np.arange(5), np.full((5, 4), 3.0, np.float32))
    assert emb(torch.arange(5)).tolist() == [[3.0] * 4] * 5
    emb.table.grow(80)
    emb(torch.tensor([79, 6])).sum().backward()
    opt.step()
    assert np.array_equal(emb.table.read([6]), (before[6:7] - 2).numpy())
    with pytest.raises(RowOutOfRange, match="has 80 rows"):
        emb(torch.tensor([80]))


def test_stats_of_each_tier(tmp_path):
    emb = small_embedding(tmp_path, device_rows=10, cache_rows=50)
    opt = optim.SGD(emb)
    emb(torch.arange(10)).sum().backward()
    opt.step()
    assert emb.stats()["pending"]["gradient_bytes"] == 10 * (8 + 4 * 4)
    opt.zero_grad()
    emb(torch.arange(20, 30))
    emb(torch.arange(10))
    stats = emb.stats()
    device, host = stats["device"], stats["cache"]
    assert (device["hits"], device["misses"], device["evictions"], device["write_backs"]) == (0, 30, 20, 10)
    assert (host["hits"], host["misses"], host["dirty_rows"]) == (10, 20, 10)
    row_bytes = 4 * emb.table.spec.row_width
    assert device["bytes_up"] >= 30 * row_bytes
    assert device["bytes_down"] >= 10 * row_bytes
    assert small_embedding(tmp_path).stats()["device"] == {}


# -- ahead ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_only_rows_that_no_tier_holds_are_read_ahead(tmp_path, device):
    emb = small_embedding(tmp_path, device=device, device_rows=20, cache_rows=1)
    with torch.no_grad():
        emb(torch.arange(10))
        emb.prefetch(torch.arange(5, 15, device=device))
        assert emb.stats()["prefetch"]["requested"] == 5
        emb(torch.arange(5, 15))
    assert emb.stats()["prefetch"]["taken"] == 5


def test_a_row_updated_between_its_prefetch_and_its_use_is_seen_updated(tmp_path):
    emb = small_embedding(tmp_path, device_rows=3, cache_rows=3)
    opt = optim.SGD(emb, lr=1.0)
    before = weights(emb)
    ids = torch.arange(10)
    rows = emb(ids)
    emb.prefetch(ids)
    rows.sum().backward()
    opt.step()
    assert torch.equal(emb(ids), before[:10] - 1)


@pytest.mark.parametrize("holds", [False, True])
def test_rows_of_a_forward_stay_on_the_device_for_its_step(tmp_path, holds):
    emb = small_embedding(tmp_path, device_rows=3, cache_rows=50)
    opt = optim.SGD(emb)
    rows = emb(torch.tensor([1, 2, 3]))
    if not holds:
        rows = rows.detach()
    with torch.no_grad():
        emb(torch.arange(10, 20))
        before = emb.stats()["device"]
        emb(torch.tensor([1, 2, 3]))
    assert emb.stats()["device"]["hits"] - before["hits"] == (3 if holds else 0)
    if holds:
        rows.sum().backward()
        opt.step()
        assert emb.stats()["device"]["bytes_up"] == before["bytes_up"]


# -- moves ------------------------------------------------------------------------------------------------------


def test_a_move_to_where_it_is_does_nothing(tmp_path):
    emb = small_embedding(tmp_path, device_rows=5)
    caches, handle = emb.trainable.caches, emb.handle
    for move in (emb.cpu, lambda: emb.to("cpu"), emb.float):
        assert move() is emb
    assert emb.trainable.caches is caches
    assert emb.handle is handle


@pytest.mark.parametrize("to_device", [True, False])
def test_a_pending_gradient_and_changed_rows_move_along(tmp_path, to_device):
    """Here from the host to a device tier on the cpu and back; `.to("cuda")` does the same."""
    places = [None, 5] if to_device else [5, None]
    emb = small_embedding(tmp_path, cache_rows=50, device_rows=places[0])
    plain = plain_twin(emb)
    opt, theirs = optim.SGD(emb, lr=0.25), torch.optim.SGD(plain.parameters(), lr=0.25)
    for module, rule in ((emb, opt), (plain, theirs)):
        module(torch.arange(10)).sum().backward()
        rule.step()
        rule.zero_grad()
        module(torch.tensor([1, 2, 2])).sum().backward()
        for parameter in module.parameters():
            parameter.grad.mul_(0.5)
    handle, graph = emb.handle, emb(torch.tensor([3])).sum()
    emb.trainable.move(device_rows=places[1])
    assert emb.handle is handle
    assert emb.stats()["cache"]["used_rows"] == 0
    with pytest.raises(StaleGraph, match="was moved"):
        graph.backward()
    for module, rule in ((emb, opt), (plain, theirs)):
        module(torch.tensor([2, 4])).sum().backward()
        rule.step()
    assert torch.equal(weights(emb), weights(plain))


def test_a_move_that_fails_moves_nothing(tmp_path, monkeypatch):
    emb = small_embedding(tmp_path)
    opt = optim.SGD(emb, lr=1.0)
    emb(torch.arange(4)).sum().backward()
    opt.step()
    expected, caches = weights(emb), emb.trainable.caches
    with pytest.raises(InvalidArgument, match="at least 1, not 0"):
        emb.trainable.move(device_rows=0)

    def refuse(self, rows_M, values_ME):
        raise StorageFailed("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(RecordStore, "append", refuse)
        with pytest.raises(StorageFailed):
            emb.trainable.move(device_rows=5)
    assert emb.trainable.caches is caches
    assert torch.equal(weights(emb), expected)


def test_a_module_made_in_inference_mode_trains(tmp_path):
    with torch.inference_mode():
        emb = small_embedding(tmp_path, device_rows=5, cache_rows=3)
        emb(torch.arange(20))
    before = weights(emb)
    with torch.device("meta"):
        opt = optim.SGD(emb, lr=1.0)
        emb(torch.arange(20, device="cpu")).sum().backward()
        opt.step()
    assert torch.equal(weights(emb)[:20], before[:20] - 1)


@pytest.mark.parametrize("device", CUDA)
def test_to_cuda_and_back(device):
    emb = bigembed.Embedding(500, D, seed=1, cache_bytes=1 << 20)
    handle, before = emb.handle, weights(emb)
    opt = optim.Adam(nn.Sequential(emb), lr=0.5)
    for move in (emb.cuda, emb.cpu, lambda: emb.to(device, torch.float32)):
        emb(torch.arange(40)).sum().backward()
        nn.utils.clip_grad_norm_(emb.parameters(), 1.0)
        move()
        assert emb.handle is handle
        assert (handle.shape, handle.dtype, handle.grad.device) == ((1,), torch.float32, handle.device)
        opt.step()
        opt.zero_grad()
        assert emb(torch.arange(3)).device == handle.device
    assert (weights(emb)[:40] != before[:40]).all()
    with pytest.raises(InvalidArgument, match="is open with modules on cuda:0"):
        bigembed.Embedding.open(emb.table, device="cpu")


@pytest.mark.parametrize("device", CUDA)
def test_budgets_on_cuda(device):
    emb = bigembed.Embedding(1_000_000_000, D, device=device, host_cache_bytes=1 << 20)
    assert 0.98 * DEFAULT_DEVICE_BYTES < emb.stats()["device"]["capacity_bytes"] <= DEFAULT_DEVICE_BYTES
    assert emb.stats()["cache"]["capacity_bytes"] <= 1 << 20
    emb = bigembed.Embedding(1_000_000_000, D, device=device, cache_bytes=1 << 20)
    assert emb.stats()["device"]["capacity_bytes"] <= 1 << 20


def test_a_temporary_table_goes_at_once_when_nothing_holds_it(tmp_path):
    gc.disable()
    try:
        emb = small_embedding(tmp_path, device_rows=5)
        emb(torch.arange(5))
        path = emb.table.path
        del emb
        assert not os.path.exists(path)
    finally:
        gc.enable()
