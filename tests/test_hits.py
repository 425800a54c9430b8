"""Lookups that find all of their rows, and steps that go back to the slots of their forward: nothing stale is used."""

import numpy as np
import pytest
import torch
from training import plain_twin, small_embedding, small_table, weights

import bigembed
from bigembed import optim

IDS = torch.tensor([1, 2, 3, 2])
CACHES = pytest.mark.parametrize("cache_rows", [None, 32])


def moved_away_and_back(emb, opt):
    emb.trainable.move(device_rows=50)
    emb.trainable.move(device_rows=None)
    return opt


def grown(emb, opt):
    emb.table.grow(200)
    return opt


CHANGES = {
    "another optimizer": lambda emb, opt: optim.Adagrad(emb, lr=1.0),
    "growth": grown,
    "a move": moved_away_and_back,
}


@CACHES
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before backward", "before step"])
def test_slots_of_a_cache_that_is_no_more_are_not_used(tmp_path, cache_rows, change, when):
    """The new cache has had as many misses as the old one when the step comes."""
    emb = small_embedding(tmp_path, cache_rows=cache_rows, num_rows=100)
    opt = optim.SGD(emb, lr=1.0)
    before = weights(emb)
    loss = emb(IDS).sum()
    if when == "before step":
        loss.backward()
    opt = CHANGES[change](emb, opt)
    with torch.no_grad():
        emb(torch.tensor([50, 60]))
    if when == "before backward":
        loss.backward()
    opt.step()
    emb.trainable.caches._check()
    emb.commit()
    after = weights(emb)
    assert (after[1:4] != before[1:4]).all()
    assert torch.equal(after[4:100], before[4:])


@CACHES
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_a_batch_that_is_all_there_trains_as_any_other(tmp_path, cache_rows, padding_idx):
    emb = small_embedding(tmp_path, cache_rows=cache_rows, padding_idx=padding_idx)
    plain = plain_twin(emb, sparse=True)
    opt, plain_opt = optim.SGD(emb, lr=0.5), torch.optim.SGD(plain.parameters(), lr=0.5)
    for step in range(4):
        for model, rule in ((emb, opt), (plain, plain_opt)):
            first, second = model(IDS), model(IDS[:2])
            (first.pow(2).sum() + second.sum()).backward()
            rule.step()
            rule.zero_grad()
        assert torch.equal(weights(emb), weights(plain)), step
    assert emb.trainable.caches.rows._expects_hits


@CACHES
def test_ids_may_be_changed_between_forward_and_backward(tmp_path, cache_rows):
    """The graph has its own: a loader may fill the same tensor again."""
    emb = small_embedding(tmp_path, cache_rows=cache_rows)
    opt = optim.SGD(emb, lr=1.0)
    before = weights(emb)
    with torch.no_grad():
        emb(IDS)
    ids = IDS.clone()
    rows = emb(ids)
    assert emb.trainable.caches.rows._expects_hits
    ids.fill_(9)
    rows.sum().backward()
    opt.step()
    assert torch.equal(weights(emb)[9], before[9])
    assert torch.equal(weights(emb)[2], before[2] - 2)


def test_hits_count_distinct_rows_where_rows_may_leave_and_positions_where_all_fit(tmp_path):
    for cache_rows, hits in ((32, 3), (None, 4)):
        emb = small_embedding(tmp_path, cache_rows=cache_rows)
        with torch.no_grad():
            emb(IDS), emb(IDS)  # the first reads them, the second finds them all
            before = emb.stats()["cache"]["hits"]
            assert torch.equal(emb(IDS), weights(emb)[IDS])
        assert emb.stats()["cache"]["hits"] - before == hits


def test_a_lookup_of_what_is_there_protects_it_for_its_backward(tmp_path):
    """A cache of one set: the rows of an open graph are not evicted, however it found them."""
    emb = small_embedding(tmp_path, cache_rows=4)
    with torch.no_grad():
        emb(IDS), emb(IDS)
    rows = emb(IDS)
    with torch.no_grad():
        emb(torch.arange(10, 20))
    misses = emb.stats()["cache"]["misses"]
    with torch.no_grad():
        emb(IDS)
    assert emb.stats()["cache"]["misses"] == misses
    del rows


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_hyperparameters_of_any_kind_of_number_can_be_committed(tmp_path, value):
    emb = small_embedding(tmp_path)
    opt = optim.Adam(emb, lr=value, betas=(np.float32(0.5), torch.tensor(0.75)))
    emb(IDS).sum().backward()
    opt.step()
    emb.commit()
    assert emb.table.scalars["lr"] == 0.5
    assert emb.table.scalars["betas"] == [0.5, 0.75]


def test_an_optimizer_is_not_copied(tmp_path):
    import copy
    import pickle

    opt = optim.SGD(small_embedding(tmp_path))
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="one optimizer trains a table"):
            copied(opt)


def test_an_interrupted_run_waits_for_every_range(monkeypatch):
    """A range works on memory of whoever called: a Ctrl-C while one is waited for must not leave the others running."""
    from bigembed import threads

    before = bigembed.get_num_threads()
    bigembed.set_num_threads(4)
    done, wait = [], threads.Task.wait

    def interrupted(task):
        wait(task)
        if len(done) < 4:
            done.append(task)
            raise KeyboardInterrupt

    monkeypatch.setattr(threads.Task, "wait", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            threads.run(lambda start, stop: None, 4, grain=1)
        assert len(done) == 3
        assert all(task.is_done for task in done)
    finally:
        bigembed.set_num_threads(before)


def test_failed_passes_of_threads_that_have_ended_are_forgotten(tmp_path):
    import threading

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, handle):
            return handle.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("no")

    emb = small_embedding(tmp_path)
    opt = optim.SGD(emb, lr=1.0)

    def fail():
        with pytest.raises(ValueError, match="no"):
            (Fails.apply(emb.handle).sum() + emb(IDS).sum()).backward()

    for _ in range(3):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    emb(IDS).sum().backward()
    opt.step()
    assert emb.trainable.pending._incoming == {}


def test_next_use_keeps_no_announcements_where_everything_fits(tmp_path):
    """Nobody leaves such a cache, so its lookups are not compared with what was announced."""
    for cache_rows in (None, 16):
        table = small_table(tmp_path)
        emb = bigembed.Embedding.open(table, cache_rows=cache_rows, policy="next_use")
        loader = [torch.arange(4) + 4 * (turn % 3) for turn in range(30)]
        with torch.no_grad():
            for ids in bigembed.lookahead(loader, {emb: lambda ids: ids}):
                assert torch.equal(emb(ids), weights(emb)[ids])
        coming = emb.trainable.caches._coming
        assert (coming is None) == (cache_rows is None)
        assert coming is None or len(coming._announced) == 0
