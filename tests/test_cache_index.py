"""SetIndex and IdentityIndex against their twins: key and score are equal after every step of a seeded fuzz."""

import naive
import numpy as np
import pytest

from bigembed import threads
from bigembed.cache.index import ABSENT, IdentityIndex, SetIndex, make_index


@pytest.fixture(params=[1, 2, 5])
def num_threads(request):
    before = threads.get_num_threads()
    threads.set_num_threads(request.param)
    yield request.param
    threads.set_num_threads(before)


def as_rows(rows):
    return np.array(rows, np.int64)


def admit_as_naive(index, oracle, rows_U, step, protect_step):
    """One probe and one admission on both; returns the admission. Every output and the whole state are equal."""
    slots_U = index.probe(rows_U, step)
    np.testing.assert_array_equal(slots_U, oracle.probe(rows_U, step))
    rows_M = rows_U[slots_U == ABSENT]
    admission = index.admit(rows_M, step, protect_step)
    expected = oracle.admit(rows_M, step, protect_step)
    got = zip(admission.slots_M, admission.victims_M, admission.victim_scores_M, strict=True)
    assert [tuple(int(x) for x in entry) for entry in got] == expected
    assert_same_state(index, oracle, step)
    return admission


def assert_same_state(index, oracle, step):
    np.testing.assert_array_equal(index.key, oracle.key)
    np.testing.assert_array_equal(index.score, oracle.score)
    index._check(step)


def some_rows(rng, num_sets, num_rows):
    """Distinct rows: half of them hot; sometimes all of one set, so that more miss than there are ways."""
    hot, cold = rng.integers(0, num_rows // 10, 30), rng.integers(0, num_rows, 30)
    rows = rng.permutation(np.unique(np.concatenate([hot, cold])[: rng.integers(0, 61)]))
    if rng.random() < 0.2:
        rows = as_rows([row for row in rng.permutation(num_rows) if naive.bucket(row, num_sets) == 0])
    return rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_sets", "ways"), [(1, 1), (1, 3), (5, 4), (7, 16)])
def test_set_index_equals_its_twin_at_every_step(num_sets, ways, seed):
    rng = np.random.default_rng(seed)
    index, oracle = SetIndex(num_sets, ways), naive.SetIndex(num_sets, ways)
    for step in range(1, 80):
        rows_U = some_rows(rng, num_sets, 300)
        protect_step = max(1, step + int(rng.integers(-3, 2)))
        admission = admit_as_naive(index, oracle, rows_U, step, protect_step)
        action = rng.random()
        if action < 0.2:
            index.undo(admission)
            oracle.undo()
        elif action < 0.3:
            slots = rng.permutation(index.num_slots)[: rng.integers(0, index.num_slots + 1)]
            index.forget(slots)
            oracle.forget(slots)
        elif action < 0.33:
            index.clear()
            oracle.clear()
        assert_same_state(index, oracle, step)
        rows = rng.integers(0, 300, 20)
        np.testing.assert_array_equal(index.find(rows), oracle.find(rows))
        slots = np.arange(index.num_slots)
        np.testing.assert_array_equal(index.rows_of(slots), oracle.rows_of(slots))
        assert_same_state(index, oracle, step)


def test_set_index_has_the_same_state_for_any_thread_count(num_threads):
    rng = np.random.default_rng(0)
    index, oracle = SetIndex(700, 16), naive.SetIndex(700, 16)
    for step in range(1, 4):
        rows_U = rng.permutation(20_000)[:11_000]  # enough for 5 ranges
        admit_as_naive(index, oracle, rows_U, step, step)


@pytest.mark.parametrize("seed", range(2))
def test_identity_index_equals_its_twin_at_every_step(seed):
    rng = np.random.default_rng(seed)
    index, oracle = IdentityIndex(100), naive.IdentityIndex(100)
    for step in range(1, 60):
        rows_U = rng.permutation(100)[: rng.integers(0, 30)]
        slots_U = index.probe(rows_U, step)
        np.testing.assert_array_equal(slots_U, oracle.find(rows_U))
        rows_M = rows_U[slots_U == ABSENT]
        admission = index.admit(rows_M, step, 1)
        np.testing.assert_array_equal(admission.slots_M, rows_M)
        assert (admission.victims_M == ABSENT).all()
        if rng.random() < 0.3:
            index.undo(admission)
        else:
            oracle.admit(rows_M)
        if rng.random() < 0.2:
            slots = rng.permutation(100)[:20]
            index.forget(slots)
            oracle.forget(slots)
        everything = np.arange(100)
        np.testing.assert_array_equal(index.find(everything), oracle.find(everything))
        np.testing.assert_array_equal(index.rows_of(everything), oracle.find(everything))
        index._check(step)
    index.clear()
    assert (index.find(np.arange(100)) == ABSENT).all()
    index._check(60)


def test_admission_takes_empty_ways_then_the_least_recently_used_and_never_a_protected_one():
    index = SetIndex(1, 4)
    assert list(index.admit(as_rows([10, 11]), 1, 1).slots_M) == [0, 1]
    assert list(index.admit(as_rows([12]), 2, 2).slots_M) == [2]
    assert list(index.probe(as_rows([10, 99]), 3)) == [0, ABSENT]
    assert list(index.score[0]) == [3, 1, 2, 0]
    # At step 4, row 10 (step 3) is protected: way 3 is empty, then 11 (step 1), then 12 (step 2), then no room.
    admission = index.admit(as_rows([20, 21, 22, 23]), 4, 3)
    assert list(admission.slots_M) == [3, 1, 2, ABSENT]
    assert list(admission.victims_M) == [ABSENT, 11, 12, ABSENT]
    assert list(index.key[0]) == [10, 21, 22, 20]
    assert index.used_slots == 4


def test_admission_never_evicts_a_hit_of_the_same_step_whatever_is_protected():
    index = SetIndex(1, 2)
    index.admit(as_rows([1, 2]), 1, 1)
    index.probe(as_rows([1, 3, 4]), 2)
    assert list(index.admit(as_rows([3, 4]), 2, 100).slots_M) == [1, ABSENT]
    assert list(index.key[0]) == [1, 3]


def test_probe_marks_and_find_does_not():
    index = SetIndex(3, 2)
    index.admit(as_rows([5]), 1, 1)
    index.find(as_rows([5]))
    assert index.score.max() == 1
    index.probe(as_rows([5]), 2)
    assert index.score.max() == 2


def put_a_row_in_two_slots(index):
    index.key[0, 0] = index.key[0, 1]


def move_every_row_to_the_next_set(index):
    index.key[...] = np.roll(index.key, 1, axis=0)


def empty_a_way_but_keep_its_score(index):
    index.key[0, 0] = ABSENT
    index.used_slots -= 1


def use_a_way_in_the_future(index):
    index.score[0, 0] = 9


def lose_count(index):
    index.used_slots -= 1


@pytest.mark.parametrize(
    "damage",
    [
        put_a_row_in_two_slots,
        move_every_row_to_the_next_set,
        empty_a_way_but_keep_its_score,
        use_a_way_in_the_future,
        lose_count,
    ],
)
def test_check_notices_damage(damage):
    index = SetIndex(4, 3)
    index.admit(np.arange(100, 140), 1, 1)
    assert index.used_slots == 12
    index._check(1)
    damage(index)
    with pytest.raises(AssertionError):
        index._check(1)


def test_bytes_per_slot_is_what_the_arrays_take():
    index = SetIndex(11, 16)
    assert index.key.nbytes + index.score.nbytes == index.bytes_per_slot * index.num_slots
    assert index.mark.nbytes == index.ghost.nbytes == 0
    identity = IdentityIndex(123)
    assert identity.loaded.nbytes == identity.bytes_per_slot * identity.num_slots


def test_make_index_by_capacity():
    def shape(capacity_rows, ways=16):
        index = make_index(1000, 40, budget_bytes=None, capacity_rows=capacity_rows, ways=ways)
        return index.key.shape if isinstance(index, SetIndex) else index.num_slots

    assert shape(1) == (1, 1)
    assert shape(3) == (1, 3)
    assert shape(16) == (1, 16)
    assert shape(40) == (2, 16)
    assert shape(999) == (62, 16)
    assert shape(1000) == shape(10**9) == 1000
    assert shape(8, ways=2) == (4, 2)


def test_make_index_uses_the_budget_and_keeps_within_it():
    num_rows, row_bytes = 1000, 41
    for budget_bytes in [*range(1, 43_000, 97), 41_999, 42_000, 42_001]:
        index = make_index(num_rows, row_bytes, budget_bytes=budget_bytes, capacity_rows=None, ways=16)
        taken = index.num_slots * (row_bytes + index.bytes_per_slot)
        assert isinstance(index, IdentityIndex) == (budget_bytes >= num_rows * 42)
        if isinstance(index, SetIndex):
            sets, ways = index.key.shape
            assert taken <= budget_bytes or (sets, ways) == (1, 1)
            more = 16 if ways == 16 else 1  # one more set, or one more way of the only set, would not fit
            assert taken + more * (row_bytes + 16) > budget_bytes
