"""RowCache against a plain array: it serves the newest values, and loses none whatever its source raises."""

import naive
import numba as nb
import numpy as np
import pytest
import torch

from bigembed import threads
from bigembed.cache import row_cache
from bigembed.cache.row_cache import RowCache
from bigembed.errors import InvalidArgument
from bigembed.spec import StateColumns, TableSpec

V, D, K = 200, 3, 2
CAPACITIES = [1, 3, 16, 64, V]


class SourceFailed(Exception):
    """What a source raises; no error of the library, so that nothing but the cache can be the one to catch it."""


class ArraySource:
    """Rows in an array, strict about its contract; raises at the calls whose numbers (from 0) are in `fail_at`."""

    def __init__(self, num_rows=V, seed=0, fail_at=()):
        self.spec = TableSpec(num_rows=num_rows, dim=D, state=(StateColumns("moment", K),))
        values = np.random.default_rng(seed).standard_normal((num_rows, D + K))
        self.stored_VE = values.astype(np.float32)
        self.fail_at = set(fail_at)
        self.calls = []

    def fetch_rows(self, rows_M, out_ME):
        self._call("fetch", rows_M, out_ME)
        out_ME[...] = self.stored_VE[rows_M]

    def append_rows(self, rows_M, values_ME):
        self._call("append", rows_M, values_ME)
        self.stored_VE[rows_M] = values_ME

    def _call(self, name, rows_M, values_ME):
        assert rows_M.dtype == np.int64
        assert values_ME.dtype == np.float32
        assert values_ME.shape == (rows_M.size, D + K)
        assert rows_M.size > 0, "an empty call"
        assert (np.diff(rows_M) > 0).all(), f"rows are not ascending and distinct: {rows_M}"
        self.calls.append((name, rows_M.copy()))
        if len(self.calls) - 1 in self.fail_at:
            if name == "fetch":
                values_ME[...] = np.nan  # half done
            raise SourceFailed(name)


@nb.njit(nogil=True)
def add(start, stop, values_SE, past_PE, slots_U, delta_UE):
    """A rule: every value of row u changes by delta_UE[u]."""
    slots, width = values_SE.shape
    for u in range(start, stop):
        for e in range(width):
            if slots_U[u] < slots:
                values_SE[slots_U[u], e] += delta_UE[u, e]
            else:
                past_PE[slots_U[u] - slots, e] += delta_UE[u, e]


def newest(cache):
    """The newest values of all rows, without a fetch: what is stored, with what is in the cache over it."""
    values_VE = cache.source.stored_VE.copy()
    cache.overlay(np.arange(len(values_VE)), values_VE)
    return values_VE


def snapshot(cache):
    index = cache.index
    arrays = (index.loaded,) if hasattr(index, "loaded") else (index.key, index.score)
    held = [array.tobytes() for array in (*arrays, cache._dirty_S, newest(cache))]
    return held, cache.step, cache.stats()


def random_delta(rng, rows_U):
    return rng.standard_normal((rows_U.size, D + K)).astype(np.float32)


def random_rows(rng, num_rows=V):
    """Distinct rows in random order, half hot and half cold."""
    hot, cold = rng.integers(0, num_rows // 10, 20), rng.integers(0, num_rows, 20)
    return rng.permutation(np.unique(np.concatenate([hot, cold])[: rng.integers(0, 41)]))


class Pair:
    """A cache and its twin, each step done on both. A step that fails is tried again, as a user would."""

    def __init__(self, cache):
        self.cache, self.twin = cache, naive.RowCache(cache.source.stored_VE)
        self.failures = 0

    def _until_it_works(self, action):
        for _ in range(10):
            try:
                return action()
            except SourceFailed:
                self.failures += 1
                self.check()
        raise AssertionError("the source fails for ever")

    def check(self):
        self.cache._check()
        assert newest(self.cache).tobytes() == self.twin.newest_VE.tobytes()

    def fetch(self, rng, rows_U, **options):
        located = self._until_it_works(lambda: self.cache.fetch(rows_U, **options))
        inverse_N = rng.integers(0, max(1, rows_U.size), 50 if rows_U.size else 0)
        out_ND = self.cache.gather(located, inverse_N)
        assert out_ND.numpy().tobytes() == self.twin.gather(rows_U, inverse_N, D).tobytes()
        self.check()
        return located

    def update(self, rng, located):
        delta_UE = random_delta(rng, located.rows_U)
        self.twin.update(located.rows_U, delta_UE)
        try:
            self.cache.update(located, add, delta_UE)
        except SourceFailed:
            self.failures += 1  # not again: the change is made
        self.check()

    def write_back(self):
        self._until_it_works(self.cache.write_back)
        self.twin.write_back()
        assert self.cache.dirty_rows == 0
        assert self.cache.source.stored_VE.tobytes() == self.twin.stored_VE.tobytes()
        self.check()

    def refresh(self, rng):
        """What a table does that writes rows itself: store them, then tell the cache."""
        rows_M = random_rows(rng)
        values_ME = random_delta(rng, rows_M)
        self.cache.source.stored_VE[rows_M] = values_ME
        self.cache.refresh(rows_M, values_ME)
        self.twin.refresh(rows_M, values_ME)
        self.check()

    def drop(self):
        self.cache.drop()
        self.twin = naive.RowCache(self.cache.source.stored_VE)
        assert self.cache.dirty_rows == self.cache.stats()["used_rows"] == 0
        self.check()


def play(pair, seed, steps):
    """A seeded sequence of everything a table and its modules do."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        action, rows_U = rng.random(), random_rows(rng)
        if action < 0.55:
            protect_step = max(1, pair.cache.step - int(rng.integers(0, 3)))
            pair.update(rng, pair.fetch(rng, rows_U, protect_step=protect_step))
        elif action < 0.7:
            pair.fetch(rng, rows_U)
        elif action < 0.8:
            before = snapshot(pair.cache)
            pair.fetch(rng, rows_U, admit=False)
            assert snapshot(pair.cache) == before
        elif action < 0.88:
            pair.write_back()
        elif action < 0.95:
            pair.refresh(rng)
        else:
            pair.drop()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity_rows", CAPACITIES)
def test_fuzz_against_its_twin(capacity_rows, seed):
    pair = Pair(RowCache(ArraySource(seed=seed), capacity_rows=capacity_rows))
    assert pair.cache.num_slots == capacity_rows
    play(pair, seed, steps=80)
    pair.write_back()


@pytest.mark.parametrize("how_often", [1, 3])
@pytest.mark.parametrize("capacity_rows", CAPACITIES)
def test_nothing_is_lost_when_the_source_fails_at_any_call(capacity_rows, how_often, monkeypatch):
    monkeypatch.setattr(row_cache, "APPEND_BYTES", 7 * 4 * (D + K))  # so that a write_back fails between batches
    call = 0
    while True:
        source = ArraySource(fail_at=range(call, call + how_often))
        pair = Pair(RowCache(source, capacity_rows=capacity_rows))
        play(pair, seed=5, steps=50)
        pair.write_back()
        if pair.failures == 0:
            break
        call += 1
    assert call > 20


def test_rows_changed_past_the_cache_wait_for_a_source_that_fails():
    """All that can happen between a failed update and the next append that works."""
    cache = RowCache(ArraySource(), capacity_rows=1)
    rows_U = np.array([9, 4, 7, 1, 8])
    located = cache.fetch(rows_U)
    expected_VE = cache.source.stored_VE.copy()
    expected_VE[rows_U] += 1
    cache.source.fail_at = range(1, 100)
    with pytest.raises(SourceFailed):
        cache.update(located, add, np.ones((5, D + K), np.float32))
    assert cache.dirty_rows == 5
    cache._check()
    assert newest(cache).tobytes() == expected_VE.tobytes()
    with pytest.raises(AssertionError):
        cache.update(located, add, np.ones((5, D + K), np.float32))
    for failing in (cache.write_back, lambda: cache.fetch(rows_U)):
        with pytest.raises(SourceFailed):
            failing()
        assert newest(cache).tobytes() == expected_VE.tobytes()
    cache.source.fail_at = ()
    peeked = cache.gather(cache.fetch(np.array([1, 2, 7, 9]), admit=False), np.arange(4))
    assert peeked.numpy().tobytes() == expected_VE[[1, 2, 7, 9], :D].tobytes()
    refreshed = np.zeros((2, D + K), np.float32)
    expected_VE[[4, 8]] = cache.source.stored_VE[[4, 8]] = refreshed
    cache.refresh(np.array([4, 8]), refreshed)
    cache._check()
    cache.write_back()
    assert cache.source.stored_VE.tobytes() == expected_VE.tobytes()


def test_refresh_of_every_waiting_row_leaves_none_waiting():
    cache = RowCache(ArraySource(), capacity_rows=1)
    located = cache.fetch(np.arange(5))
    cache.source.fail_at = {1}
    with pytest.raises(SourceFailed):
        cache.update(located, add, np.ones((5, D + K), np.float32))
    cache.refresh(np.arange(5), cache.source.stored_VE[:5])
    cache._check()
    assert cache.dirty_rows == 0


def test_an_interrupted_copy_into_the_slots_leaves_no_row_that_is_not_there(monkeypatch):
    cache = RowCache(ArraySource(), capacity_rows=3)
    cache.update(cache.fetch(np.arange(3)), add, np.ones((3, D + K), np.float32))
    expected_VE = newest(cache)

    def interrupted(slots_M, values_ME):
        cache.values_SE.fill_(float("nan"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.fetch(np.arange(10, 13))
    cache._check()
    assert newest(cache).tobytes() == expected_VE.tobytes()


@pytest.mark.parametrize("num_rows", [9_000, 30_000])  # slot = row, and sets
def test_the_same_bytes_for_any_thread_count(num_rows):
    def train(num_threads):
        threads.set_num_threads(num_threads)
        rng = np.random.default_rng(0)
        pair = Pair(RowCache(ArraySource(num_rows), capacity_rows=9_000))
        for _ in range(3):
            rows_U = rng.permutation(num_rows)[:11_000]  # enough for 5 ranges, and more than the slots
            pair.update(rng, pair.fetch(rng, rows_U))
        return snapshot(pair.cache), pair.cache.source.calls[-1][1].tobytes()

    before = threads.get_num_threads()
    try:
        assert train(1) == train(2) == train(5)
    finally:
        threads.set_num_threads(before)


def test_a_fetch_reads_once_and_appends_once():
    cache = RowCache(ArraySource(), capacity_rows=16)
    rows_U = np.arange(16)[::-1].copy()
    cache.update(cache.fetch(rows_U), add, np.ones((16, D + K), np.float32))
    assert [name for name, _ in cache.source.calls] == ["fetch"]
    cache.fetch(np.array([50, 0, 40, 1, 60]))
    assert [name for name, _ in cache.source.calls] == ["fetch", "append", "fetch"]
    assert list(cache.source.calls[-2][1]) == sorted(cache.source.calls[-2][1])
    assert list(cache.source.calls[-1][1]) == [40, 50, 60]
    cache.fetch(np.array([0, 50]))
    assert len(cache.source.calls) == 3, "hits need no source"


def test_protected_rows_stay_until_they_are_not_protected():
    cache = RowCache(ArraySource(), capacity_rows=16)
    pending = cache.fetch(np.arange(10))
    cache.fetch(np.arange(100, 116), protect_step=pending.step)
    assert cache.stats()["past"] == 10
    assert (cache.fetch(np.arange(10), protect_step=pending.step).slots_U < 16).all()
    assert cache.stats()["hits"] == 10
    cache.fetch(np.arange(150, 166))
    assert cache.stats()["evictions"] == 16


def test_located_says_where_rows_are():
    cache = RowCache(ArraySource(), capacity_rows=2)
    located = cache.fetch(np.array([8, 3, 9, 5]))
    assert list(located.slots_U) == [0, 1, 3, 2]  # past the cache in order of row: 5, then 9
    assert located.past_PE.numpy().tobytes() == cache.source.stored_VE[[5, 9]].tobytes()
    assert isinstance(located.past_PE, torch.Tensor)


def test_located_rows_cannot_be_used_after_the_cache_moved_on():
    cache = RowCache(ArraySource(), capacity_rows=16)
    rows_U = np.arange(3)
    for move_on in (
        lambda: cache.fetch(rows_U),
        lambda: cache.refresh(rows_U, cache.source.stored_VE[:3]),
        cache.drop,
    ):
        located = cache.fetch(rows_U)
        move_on()
        with pytest.raises(AssertionError, match="located before"):
            cache.gather(located, np.arange(3))
        with pytest.raises(AssertionError, match="located before"):
            cache.update(located, add, np.ones((3, D + K), np.float32))


def test_gather_returns_a_tensor_of_its_own():
    cache = RowCache(ArraySource(), capacity_rows=16)
    out_ND = cache.gather(cache.fetch(np.arange(3)), np.array([2, 0, 2, 1]))
    assert out_ND.shape == (4, D)
    assert out_ND.dtype == torch.float32
    assert out_ND.is_contiguous()
    out_ND.fill_(7)
    assert newest(cache).tobytes() == cache.source.stored_VE.tobytes()


def test_write_back_is_ascending_and_in_bounded_batches(monkeypatch):
    monkeypatch.setattr(row_cache, "APPEND_BYTES", 5 * 4 * (D + K) + 3)
    cache = RowCache(ArraySource(), capacity_rows=64)
    rows_U = np.random.default_rng(0).permutation(V)[:17]
    cache.update(cache.fetch(rows_U), add, np.ones((17, D + K), np.float32))
    cache.write_back()
    appended = [rows for name, rows in cache.source.calls if name == "append"]
    assert [rows.size for rows in appended] == [5, 5, 5, 2]
    assert list(np.concatenate(appended)) == sorted(rows_U)
    cache.write_back()
    assert len(cache.source.calls) == 5, "clean rows are not written again"


def test_stats_count_unique_rows():
    cache = RowCache(ArraySource(), capacity_rows=3)
    ones = np.ones((4, D + K), np.float32)
    cache.update(cache.fetch(np.array([1, 2, 3, 4])), add, ones)  # 4 goes past
    cache.fetch(np.array([3, 5]))  # 3 hits, 5 evicts 1
    cache.fetch(np.array([6]), admit=False)
    assert cache.stats() == {
        "capacity_rows": 3,
        "capacity_bytes": 3 * (4 * (D + K) + 1 + 16),
        "used_rows": 3,
        "dirty_rows": 2,
        "hits": 1,
        "misses": 5,
        "evictions": 1,
        "write_backs": 2,
        "past": 1,
    }
    assert all(type(value) is int for value in cache.stats().values())


@pytest.mark.parametrize("budget_bytes", [1, 500, 3_000, 4_399, 4_400, 10_000])
def test_memory_stays_within_the_budget(budget_bytes):
    cache = RowCache(ArraySource(), budget_bytes=budget_bytes)
    taken = 4 * cache.values_SE.numel() + cache._dirty_S.nbytes + cache.index.bytes_per_slot * cache.num_slots
    assert taken == cache.stats()["capacity_bytes"]
    assert taken <= budget_bytes or cache.num_slots == 1
    assert (cache.num_slots == V) == (budget_bytes >= 4_400)  # 22 bytes a row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either budget_bytes or capacity_rows"),
        ({"budget_bytes": 9, "capacity_rows": 9}, "either budget_bytes or capacity_rows"),
        ({"budget_bytes": 0}, "budget_bytes must be at least 1, not 0"),
        ({"capacity_rows": -1}, "capacity_rows must be at least 1, not -1"),
        ({"capacity_rows": 9, "ways": 0}, "ways must be at least 1, not 0"),
    ],
)
def test_wrong_arguments_say_so(options, message):
    with pytest.raises(InvalidArgument, match=message):
        RowCache(ArraySource(), **options)
