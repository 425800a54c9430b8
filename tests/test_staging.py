"""Staging: what it fetches equals at every moment what its source would give, whenever the bytes arrive."""

import threading

import numpy as np
import pytest

from bigembed.cache.staging import Staging
from bigembed.spec import StateColumns, TableSpec

V, D, K = 120, 3, 1
ROW_BYTES = 4 * (D + K) + 10


class SourceFailed(Exception):
    """What a source raises."""


class PlannedCopy:
    """A read that takes the values of the moment it runs, for rows nobody wrote since it was planned: like a disk's.

    Rows written since give garbage, as a torn read would, and so do rows in `unsound`, which it reports.
    """

    def __init__(self, source, rows_M):
        self.source, self.rows_M, self.closed = source, rows_M, False
        self.planned_VE = source.stored_VE.copy()
        self.is_cancelled = False

    def run(self, out_ME):
        self.source.may_run.wait(10)
        out_ME[...] = self.planned_VE[self.rows_M]
        rewritten = (self.source.stored_VE[self.rows_M] != out_ME).any(axis=1)
        out_ME[rewritten] = np.nan
        sound_M = ~np.isin(self.rows_M, list(self.source.unsound))
        out_ME[~sound_M] = np.inf
        self.closed = True
        if self.source.planned_fails:
            raise SourceFailed
        return sound_M

    def cancel(self):
        self.is_cancelled = True

    def close(self):
        self.closed = True


class ArraySource:
    """Rows in an array; planned reads run while `may_run` is set."""

    def __init__(self):
        self.spec = TableSpec(num_rows=V, dim=D, state=(StateColumns("moment", K),))
        self.stored_VE = np.random.default_rng(0).standard_normal((V, D + K)).astype(np.float32)
        self.may_run = threading.Event()
        self.may_run.set()
        self.unsound, self.planned_fails = set(), False
        self.fetched, self.plans = [], []

    def fetch_rows(self, rows_M, values_ME):
        assert rows_M.size > 0
        assert (np.diff(rows_M) > 0).all()
        self.fetched.append(rows_M.tolist())
        values_ME[...] = self.stored_VE[rows_M]

    def append_rows(self, rows_M, values_ME):
        self.stored_VE[rows_M] = values_ME

    def read_ahead(self, rows_M):
        self.plans.append(PlannedCopy(self, rows_M))
        return self.plans[-1]


def rows(*numbers):
    return np.array(numbers, np.int64)


def fetch(staging, rows_M):
    """What staging gives, after checking it against the source."""
    values_ME = np.full((rows_M.size, D + K), -1, np.float32)
    staging.tick()
    staging.fetch_rows(rows_M, values_ME)
    assert values_ME.tobytes() == staging.source.stored_VE[rows_M].tobytes()
    staging._check()
    return values_ME


@pytest.fixture
def source():
    made = ArraySource()
    yield made
    made.may_run.set()  # the background thread is everybody's


def test_staged_rows_are_not_read_again(source):
    staging = Staging(source, 1 << 20)
    staging.prefetch(rows(1, 5, 9))
    fetch(staging, rows(1, 2, 5, 9))
    assert source.fetched == [[2]]
    stats = staging.stats()
    assert (stats["staged"], stats["taken"], stats["batches"], stats["memory_bytes"]) == (3, 3, 0, 0)
    fetch(staging, rows(1, 5, 9))
    assert source.fetched[1:] == [[1, 5, 9]]


def test_prefetch_returns_before_the_rows_are_there_and_a_fetch_waits(source):
    source.may_run.clear()
    staging = Staging(source, 1 << 20)
    staging.prefetch(rows(1, 5, 9))
    threading.Timer(0.05, source.may_run.set).start()
    fetch(staging, rows(5))
    assert source.fetched == []
    assert staging.stats()["stalls"] == 1
    assert staging.stats()["stall_seconds"] > 0


def test_a_few_rows_of_a_batch_on_its_way_are_read_now(source):
    source.may_run.clear()
    staging = Staging(source, 1 << 20)
    staging.prefetch(np.arange(100))
    values = np.empty((2, D + K), np.float32)
    staging.fetch_rows(rows(3, 50), values)  # waits for nothing
    assert source.fetched == [[3, 50]]
    assert values.tobytes() == source.stored_VE[[3, 50]].tobytes()
    assert staging.stats()["overtaken"] == 2
    assert staging.stats()["stalls"] == 0
    staging._check()
    source.may_run.set()
    staging.fetch_rows(rows(*range(100)), np.empty((100, D + K), np.float32))
    assert source.fetched[1:] == [[3, 50]]  # the others came in the background


def test_a_row_written_while_it_is_in_flight_is_read_again(source):
    source.may_run.clear()
    staging = Staging(source, 1 << 20)
    staging.prefetch(rows(1, 5, 9))
    staging.append_rows(rows(0, 5), np.ones((2, D + K), np.float32))
    source.may_run.set()
    fetch(staging, rows(1, 5, 9))
    assert source.fetched == [[5]]
    assert staging.stats()["rewritten"] == 1


def test_a_row_written_after_it_arrived_is_read_again(source):
    staging = Staging(source, 1 << 20)
    staging.prefetch(rows(1, 5, 9))
    staging._batches[0].task.wait()
    staging.append_rows(rows(9), np.ones((1, D + K), np.float32))
    fetch(staging, rows(1, 9))
    assert source.fetched == [[9]]


def test_rows_of_two_prefetches_are_read_once(source):
    staging = Staging(source, 1 << 20)
    staging.prefetch(rows(1, 5, 9))
    staging.prefetch(rows(1, 4, 9, 20))
    assert [plan.rows_M.tolist() for plan in source.plans] == [[1, 5, 9], [4, 20]]
    fetch(staging, rows(1, 4, 5, 9, 20))
    assert source.fetched == []


@pytest.mark.parametrize("how", ["unsound", "planned_fails"])
def test_what_could_not_be_read_ahead_is_read_by_the_fetch(source, how):
    setattr(source, how, {5} if how == "unsound" else True)
    staging = Staging(source, 1 << 20)
    staging.prefetch(rows(1, 5, 9))
    fetch(staging, rows(1, 5, 9))
    assert source.fetched == [[5] if how == "unsound" else [1, 5, 9]]


def test_the_budget_bounds_what_is_staged(source):
    staging = Staging(source, 5 * ROW_BYTES)
    assert staging.stats()["memory_bytes"] == 0
    staging.prefetch(np.arange(8))
    assert staging.stats()["memory_bytes"] == 5 * ROW_BYTES
    assert staging.stats()["refused"] == 3
    staging.prefetch(rows(50))
    assert staging.stats()["refused"] == 4, "the first batch is still wanted"
    fetch(staging, np.arange(8))
    assert source.fetched == [[5, 6, 7]]
    assert staging.stats()["memory_bytes"] == 0
    Staging(source, 0).prefetch(rows(1))
    assert len(source.plans) == 1


def test_a_batch_that_nobody_looks_up_gives_its_room_to_a_newer_one(source):
    staging = Staging(source, 5 * ROW_BYTES)
    staging.prefetch(np.arange(5))
    for _ in range(3):
        fetch(staging, rows(100))
    staging.prefetch(rows(7, 8))
    assert staging.stats()["expired"] == 5
    assert [batch.rows_M.tolist() for batch in staging._batches] == [[7, 8]]


def test_a_batch_that_nobody_looks_up_expires(source):
    staging = Staging(source, 1 << 20)
    staging.prefetch(rows(1, 2))
    for _ in range(65):
        staging.tick()
    assert staging.stats()["expired"] == 2
    assert staging.stats()["memory_bytes"] == 0


def test_drop_forgets_and_cancels(source):
    source.may_run.clear()
    staging = Staging(source, 1 << 20)
    staging.prefetch(rows(1, 2))
    staging.drop()
    source.stored_VE[:] = 7
    source.may_run.set()
    fetch(staging, rows(1, 2))
    assert source.plans[0].is_cancelled
    assert source.fetched == [[1, 2]]


def test_a_source_that_fails_may_be_tried_again(source):
    staging = Staging(source, 1 << 20)
    staging.prefetch(rows(1, 5))
    kept, source.fetch_rows = source.fetch_rows, None
    with pytest.raises(TypeError):
        fetch(staging, rows(1, 2))
    source.fetch_rows = kept
    fetch(staging, rows(1, 2, 5))


@pytest.mark.parametrize("seed", range(12))
def test_fuzz_against_the_array(source, seed):
    rng = np.random.default_rng(seed)
    staging = Staging(source, int(rng.choice([3, 40, 1000])) * ROW_BYTES)
    for _ in range(150):
        some = np.unique(rng.integers(0, rng.choice([15, V]), rng.integers(1, 30)))
        action = rng.random()
        if action < 0.35:
            staging.prefetch(some)
        elif action < 0.7:
            source.may_run.set()
            fetch(staging, some)
        elif action < 0.9:
            staging.append_rows(some, rng.standard_normal((some.size, D + K)).astype(np.float32))
        elif action < 0.95:
            source.unsound = set(rng.integers(0, V, 10).tolist())
        else:
            staging.drop()
        if rng.random() < 0.5:
            source.may_run.clear()
        elif rng.random() < 0.5:
            source.may_run.set()
        staging._check()
    source.may_run.set()
    for batch in list(staging._batches):
        batch.task.wait()
    staging.drop()
    assert all(plan.closed for plan in source.plans)
