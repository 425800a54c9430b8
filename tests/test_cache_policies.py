"""SetIndex under every policy against its twin: places, scores and all that a policy knows, at every step of a fuzz."""

import naive
import numpy as np
import pytest
from test_cache_index import as_rows, num_threads, some_rows  # noqa: F401
from test_row_cache import ArraySource, add, random_delta, random_rows

from bigembed.cache.index import ABSENT, POLICIES, IdentityIndex, SetIndex, make_index
from bigembed.cache.row_cache import RowCache
from bigembed.errors import InvalidArgument
from bigembed.kernels import policies

WITH_MARKS = POLICIES[1:]


def state(index):
    """What `naive.PolicyIndex.state` says, read from mark and ghost."""
    return [_set_state(index, home) for home in range(len(index.key))]


def _set_state(index, home):
    policy, ways = POLICIES[index.policy], index.key.shape[1]
    used = {home * ways + way: int(index.mark[home, way]) for way in range(ways) if index.key[home, way] != ABSENT}
    if policy == "lfu":
        return sorted((slot, (m & policies.COUNT_MASK) >> (index.epoch - (m >> 32))) for slot, m in used.items())
    if policy == "next_use":
        return sorted(used.items())
    by_order = sorted(used, key=lambda slot: used[slot] >> (2 if policy == "sieve" else 3))
    if policy == "sieve":
        ahead = [slot for slot in by_order if not used[slot] & policies.BEHIND]
        return [(slot, bool(used[slot] & policies.VISITED)) for slot in by_order], (ahead or by_order or [None])[0]
    small = [(slot, used[slot] & 3) for slot in by_order if not used[slot] & policies.IN_MAIN]
    main = [(slot, used[slot] & 3) for slot in by_order if used[slot] & policies.IN_MAIN]
    return small, main, {int(row) for row in index.ghost[home, 1:] if row != ABSENT}


def assert_same_state(index, oracle, step):
    np.testing.assert_array_equal(index.key, oracle.key)
    np.testing.assert_array_equal(index.score, oracle.score)
    assert state(index) == oracle.state()
    index._check(step)


def admit_as_naive(index, oracle, rows_U, step, protect_step, count=True):
    slots_U = index.probe(rows_U, step, count=count)
    np.testing.assert_array_equal(slots_U, oracle.probe(rows_U, step, count))
    assert_same_state(index, oracle, step)
    rows_M = rows_U[slots_U == ABSENT]
    admission = index.admit(rows_M, step, protect_step)
    got = zip(admission.slots_M, admission.victims_M, admission.victim_scores_M, strict=True)
    assert [tuple(int(x) for x in entry) for entry in got] == oracle.admit(rows_M, step, protect_step)
    assert_same_state(index, oracle, step)
    return admission


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_sets", "ways"), [(1, 1), (1, 2), (3, 4), (4, 16), (2, 20)])
@pytest.mark.parametrize("policy", WITH_MARKS)
def test_policy_equals_its_twin_at_every_step(policy, num_sets, ways, seed):
    rng = np.random.default_rng(seed)
    index, oracle = SetIndex(num_sets, ways, policy), naive.PolicyIndex(num_sets, ways, policy)
    num_rows = 3 * num_sets * ways + 10
    for step in range(1, 150):
        rows_U = some_rows(rng, num_sets, num_rows)[: rng.integers(1, num_sets * ways + 2)]
        protect_step = max(1, step + int(rng.integers(-3, 2)))
        admission = admit_as_naive(index, oracle, rows_U, step, protect_step, count=rng.random() < 0.7)
        next_step_U = np.where(rng.random(rows_U.size) < 0.3, 0, step + rng.integers(-1, 8, rows_U.size))
        action = rng.random()
        if action < 0.15:
            index.undo(admission)
            oracle.undo()
        elif action < 0.25:
            slots = rng.permutation(index.num_slots)[: rng.integers(0, index.num_slots // 2 + 1)]
            index.forget(slots)
            oracle.forget(slots)
        elif action < 0.27:
            index.clear()
            oracle.clear()
        index.expect(rows_U, next_step_U)
        oracle.expect(rows_U, next_step_U)
        assert_same_state(index, oracle, step)
        rows = rng.integers(0, num_rows, 20)
        np.testing.assert_array_equal(index.find(rows), oracle.find(rows))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_never_evicts_a_protected_row_and_fills_empty_ways_first(policy):
    rng = np.random.default_rng(0)
    index = SetIndex(3, 8, policy)
    for step in range(1, 200):
        rows_U = some_rows(rng, 3, 100)
        protect_step = max(1, step + int(rng.integers(-4, 3)))
        held = {int(row): int(score) for row, score in zip(index.key.flat, index.score.flat, strict=True)}
        slots_U = index.probe(rows_U, step)
        rows_M = rows_U[slots_U == ABSENT]
        empty = np.count_nonzero(index.key == ABSENT, axis=1)
        missed = np.bincount([naive.bucket(row, 3) for row in rows_M], minlength=3)
        admission = index.admit(rows_M, step, protect_step)
        for victim in admission.victims_M[admission.victims_M != ABSENT]:
            assert held[victim] < min(protect_step, step)
            assert victim not in rows_U
        np.testing.assert_array_equal(np.count_nonzero(index.key == ABSENT, axis=1), np.maximum(empty - missed, 0))
        for row in rows_M[admission.slots_M == ABSENT]:
            home = naive.bucket(row, 3)
            assert (index.score[home] >= min(protect_step, step)).all()


@pytest.mark.parametrize("policy", WITH_MARKS)
def test_policies_have_the_same_state_for_any_thread_count(policy, num_threads):  # noqa: F811
    rng = np.random.default_rng(0)
    index, oracle = SetIndex(700, 16, policy), naive.PolicyIndex(700, 16, policy)
    for step in range(1, 4):
        rows_U = rng.permutation(20_000)[:11_000]  # enough for 5 ranges
        admit_as_naive(index, oracle, rows_U, step, step)


def fill(policy, rows, ways):
    index = SetIndex(1, ways, policy)
    for step, row in enumerate(rows, 1):
        index.admit(as_rows([row]), step, step)
    return index, len(rows)


def use(index, row, step):
    assert index.probe(as_rows([row]), step)[0] != ABSENT


def victim(index, row, step):
    return int(index.admit(as_rows([row]), step, step).victims_M[0])


def test_lfu_keeps_the_row_used_most_and_forgets_old_fame():
    index, step = fill("lfu", [1, 2, 3], 3)
    for step in range(4, 9):
        use(index, 1, step)
    use(index, 2, 9)
    assert [victim(index, row, 10 + n) for n, row in enumerate([10, 11])] == [3, 2]  # 2 and 10 count alike
    # Each 3 missed rows halve every count: row 1 had most uses, and none since.
    seen = [victim(index, 20 + n, 20 + n) for n in range(20)]
    assert 1 in seen
    assert 1 not in seen[:5]


def test_sieve_evicts_the_first_row_without_a_visit_and_the_hand_goes_on_from_there():
    index, _ = fill("sieve", [1, 2, 3, 4], 4)
    use(index, 1, 5)
    use(index, 3, 6)
    assert [victim(index, row, row) for row in (10, 11, 12, 13, 14)] == [2, 4, 10, 11, 12]
    use(index, 14, 15)
    assert victim(index, 16, 16) == 13
    assert victim(index, 17, 17) == 16


def test_s3fifo_lets_a_scan_through_the_small_queue():
    index, step = fill("s3fifo", range(1, 17), 16)
    for step in (17, 18):
        index.probe(np.arange(1, 15), step)
    scanned = np.arange(100, 200)
    for row in scanned:
        step += 1
        index.admit(as_rows([row]), step, step)
    assert (index.find(np.arange(1, 14)) != ABSENT).all()


def test_s3fifo_puts_a_row_that_comes_back_from_the_ghost_into_main():
    index, step = fill("s3fifo", range(1, 17), 16)
    assert victim(index, 17, step + 1) == 1
    victim(index, 1, step + 2)
    assert index.mark[0, index.find(as_rows([1]))[0]] & policies.IN_MAIN


def test_next_use_evicts_unknown_rows_first_then_the_farthest():
    index, _ = fill("next_use", [1, 2, 3, 4], 4)
    index.expect(as_rows([1, 2, 3, 99]), as_rows([9, 30, 20, 7]))
    assert victim(index, 10, 5) == 4  # nothing is known of it
    index.expect(as_rows([10]), as_rows([25]))
    assert victim(index, 11, 6) == 2
    assert victim(index, 12, 10) == 1  # its step 9 has passed; row 11 was used later


@pytest.mark.parametrize("policy", ["lfu", "sieve", "s3fifo"])
def test_a_visit_that_does_not_count_only_protects(policy):
    index, step = fill(policy, range(16), 16)
    before = index.mark.copy()
    index.probe(np.arange(16), step + 1, count=False)
    np.testing.assert_array_equal(index.mark, before)
    assert (index.score == step + 1).all()
    index.probe(np.arange(16), step + 2)
    assert (index.mark != before).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_per_slot_is_what_the_arrays_take_under_each_policy(policy):
    index = SetIndex(11, 16, policy)
    arrays = (index.key, index.score, index.mark, index.ghost)
    assert sum(array.nbytes for array in arrays) == index.bytes_per_slot * index.num_slots


@pytest.mark.parametrize("policy", POLICIES)
def test_make_index_keeps_within_the_budget_under_each_policy(policy):
    index = make_index(10**6, 41, budget_bytes=10**6, capacity_rows=None, ways=16, policy=policy)
    taken = index.num_slots * (41 + index.bytes_per_slot)
    assert 10**6 - 16 * (41 + index.bytes_per_slot) < taken <= 10**6
    assert POLICIES[index.policy] == policy


def test_an_unknown_policy_is_named_with_those_there_are():
    with pytest.raises(InvalidArgument, match=r"policy 'mru' is not known\. Choose one of 'lru', 'lfu', 'sieve'"):
        make_index(100, 41, budget_bytes=None, capacity_rows=10, ways=16, policy="mru")
    with pytest.raises(InvalidArgument, match="'next_use'"):
        make_index(100, 41, budget_bytes=None, capacity_rows=1000, ways=16, policy="")


def test_an_index_that_holds_everything_takes_the_hint_and_ignores_it():
    index = make_index(10, 41, budget_bytes=None, capacity_rows=10, ways=16, policy="next_use")
    assert isinstance(index, IdentityIndex)
    index.admit(as_rows([1]), 1, 1)
    index.expect(as_rows([1, 2]), as_rows([5, 6]))
    assert list(index.probe(as_rows([1, 2]), 2, count=False)) == [1, ABSENT]


def keep_a_mark_without_a_row(index):
    slot = index.num_slots - 1
    index.forget(as_rows([slot]))
    index.mark.reshape(-1)[slot] = 1 << 5


def put_two_rows_at_one_place(index):
    index.mark[0, 0] = index.mark[0, 1]


def put_the_oldest_row_ahead_of_those_behind(index):
    index.mark[0, np.argmax(index.mark[0])] |= policies.BEHIND


@pytest.mark.parametrize(
    ("policy", "damage"),
    [
        ("lfu", keep_a_mark_without_a_row),
        ("sieve", put_two_rows_at_one_place),
        ("sieve", put_the_oldest_row_ahead_of_those_behind),
        ("s3fifo", put_two_rows_at_one_place),
    ],
)
def test_check_notices_damaged_marks(policy, damage):
    index = SetIndex(4, 3, policy)
    index.admit(np.arange(100, 140), 1, 1)
    index._check(1)
    damage(index)
    with pytest.raises(AssertionError):
        index._check(1)


@pytest.mark.parametrize("capacity_rows", [1, 16, 64])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_cache_serves_the_newest_values_under_each_policy(policy, capacity_rows):
    rng, source = np.random.default_rng(0), ArraySource()
    cache, oracle = RowCache(source, capacity_rows=capacity_rows, policy=policy), naive.RowCache(source.stored_VE)
    for _ in range(60):
        rows_U = random_rows(rng)
        located = cache.fetch(rows_U)
        got_UD = cache.gather(located, np.arange(rows_U.size)).numpy()
        np.testing.assert_array_equal(got_UD, oracle.gather(rows_U, np.arange(rows_U.size), cache.dim))
        marks = cache.index.mark.copy()
        again = cache.fetch(rows_U, count=False)
        if policy != "lru" and capacity_rows == 64 and again.past_PE.shape[0] == 0:
            np.testing.assert_array_equal(cache.index.mark, marks)  # the second visit is no second use
        delta_UE = random_delta(rng, rows_U)
        cache.update(again, add, delta_UE)
        oracle.update(rows_U, delta_UE)
        cache._check()
    cache.write_back()
    np.testing.assert_array_equal(source.stored_VE, oracle.newest_VE)


def test_a_row_cache_names_the_policies_there_are():
    with pytest.raises(InvalidArgument, match="policy 'mru' is not known"):
        RowCache(ArraySource(), capacity_rows=16, policy="mru")
