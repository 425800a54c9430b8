"""One contract for the host's indexes and the device's: their state is equal after every step of a seeded fuzz."""

import naive
import numpy as np
import pytest
import torch
from devices import NO_CUDA

from bigembed.cache.device_index import DeviceIdentityIndex, DeviceSetIndex, make_device_index
from bigembed.cache.index import ABSENT, IdentityIndex, SetIndex, make_index


class OnHost:
    """A device index that takes and gives arrays, as the host's do."""

    def __init__(self, index, device):
        self._index, self._device = index, device

    def __getattr__(self, name):
        value = getattr(self._index, name)
        return value.cpu().numpy() if isinstance(value, torch.Tensor) else value

    def _tensor(self, array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def find(self, rows):
        return self._index.find(self._tensor(rows)).cpu().numpy()

    def probe(self, rows, step):
        return self._index.probe(self._tensor(rows), step).cpu().numpy()

    def admit(self, rows, step, protect_step):
        return self._index.admit(self._tensor(rows), step, protect_step)

    def forget(self, slots):
        self._index.forget(self._tensor(slots))

    def rows_of(self, slots):
        return self._index.rows_of(self._tensor(slots)).cpu().numpy()


def set_index(kind, num_sets, ways):
    return SetIndex(num_sets, ways) if kind == "host" else OnHost(DeviceSetIndex(num_sets, ways, kind), kind)


def identity_index(kind, num_rows):
    return IdentityIndex(num_rows) if kind == "host" else OnHost(DeviceIdentityIndex(num_rows, kind), kind)


def entries(admission):
    """[(slot, victim, victim's score)] of each row."""
    columns = (admission.slots_M, admission.victims_M, admission.victim_scores_M)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def some_rows(rng, num_sets, num_rows):
    """Distinct rows: half of them hot; sometimes all of one set, so that more miss than there are ways."""
    hot, cold = rng.integers(0, num_rows // 10, 30), rng.integers(0, num_rows, 30)
    rows = rng.permutation(np.unique(np.concatenate([hot, cold])[: rng.integers(0, 61)]))
    if rng.random() < 0.2:
        rows = np.array([row for row in rng.permutation(num_rows) if naive.bucket(row, num_sets) == 0])
    return rows


@pytest.mark.parametrize("kind", ["host", "cpu", pytest.param("cuda", marks=NO_CUDA)])
class TestContract:
    def assert_same_state(self, index, oracle, step):
        np.testing.assert_array_equal(index.key, oracle.key)
        np.testing.assert_array_equal(index.score, oracle.score)
        assert index.used_slots == sum(row != ABSENT for ways in oracle.key for row in ways)
        index._check(step)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize(("num_sets", "ways"), [(1, 1), (1, 3), (5, 4), (7, 16)])
    def test_a_set_index_equals_its_twin_at_every_step(self, kind, num_sets, ways, seed):
        rng = np.random.default_rng(seed)
        index, oracle = set_index(kind, num_sets, ways), naive.SetIndex(num_sets, ways)
        for step in range(1, 60):
            rows_U = some_rows(rng, num_sets, 300)
            protect_step = max(1, step + int(rng.integers(-3, 2)))
            slots_U = index.probe(rows_U, step)
            np.testing.assert_array_equal(slots_U, oracle.probe(rows_U, step))
            rows_M = rows_U[slots_U == ABSENT]
            admission = index.admit(rows_M, step, protect_step)
            assert entries(admission) == oracle.admit(rows_M, step, protect_step)
            self.assert_same_state(index, oracle, step)
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
            self.assert_same_state(index, oracle, step)
            rows, slots = rng.integers(0, 300, 20), np.arange(index.num_slots)
            np.testing.assert_array_equal(index.find(rows), oracle.find(rows))
            np.testing.assert_array_equal(index.rows_of(slots), oracle.rows_of(slots))

    @pytest.mark.parametrize("seed", range(2))
    def test_an_identity_index_equals_its_twin_at_every_step(self, kind, seed):
        rng = np.random.default_rng(seed)
        index, oracle = identity_index(kind, 100), naive.IdentityIndex(100)
        everything = np.arange(100)
        for step in range(1, 60):
            rows_U = rng.permutation(100)[: rng.integers(0, 30)]
            slots_U = index.probe(rows_U, step)
            np.testing.assert_array_equal(slots_U, oracle.find(rows_U))
            rows_M = rows_U[slots_U == ABSENT]
            admission = index.admit(rows_M, step, 1)
            assert entries(admission) == [(row, ABSENT, 0) for row in rows_M]
            if rng.random() < 0.3:
                index.undo(admission)
            else:
                oracle.admit(rows_M)
            if rng.random() < 0.2:
                slots = rng.permutation(100)[:20]
                index.forget(slots)
                oracle.forget(slots)
            np.testing.assert_array_equal(index.find(everything), oracle.find(everything))
            np.testing.assert_array_equal(index.rows_of(everything), oracle.find(everything))
            assert index.used_slots == len(oracle.loaded)
            index._check(step)
        index.clear()
        assert (index.find(everything) == ABSENT).all()

    def test_admission_takes_empty_ways_then_the_oldest_and_never_a_protected_one(self, kind):
        index = set_index(kind, 1, 4)
        assert index.admit(np.array([10, 11]), 1, 1).slots_M.tolist() == [0, 1]
        assert index.admit(np.array([12]), 2, 2).slots_M.tolist() == [2]
        assert list(index.probe(np.array([10, 99]), 3)) == [0, ABSENT]
        admission = index.admit(np.array([20, 21, 22, 23]), 4, 3)
        assert entries(admission) == [(3, ABSENT, 0), (1, 11, 1), (2, 12, 2), (ABSENT, ABSENT, 0)]
        assert list(index.key[0]) == [10, 21, 22, 20]

    def test_admission_never_evicts_a_hit_of_the_same_step_whatever_is_protected(self, kind):
        index = set_index(kind, 1, 2)
        index.admit(np.array([1, 2]), 1, 1)
        index.probe(np.array([1, 3, 4]), 2)
        assert index.admit(np.array([3, 4]), 2, 100).slots_M.tolist() == [1, ABSENT]

    def test_bytes_per_slot_is_what_the_arrays_take(self, kind):
        index = set_index(kind, 11, 16)
        assert index.key.nbytes + index.score.nbytes == index.bytes_per_slot * index.num_slots
        identity = identity_index(kind, 123)
        assert identity.loaded.nbytes == identity.bytes_per_slot * identity.num_slots


def test_any_id_may_be_asked_for():
    """Padding and ids out of range are in no slot; nothing is read out of bounds."""
    asked = torch.tensor([ABSENT, -7, 50, 1 << 62, -(1 << 63)])
    for index in (DeviceSetIndex(2, 4, "cpu"), DeviceIdentityIndex(50, "cpu")):
        index.admit(torch.tensor([0, 49]), 1, 1)
        assert (index.find(asked) == ABSENT).all()


@pytest.mark.parametrize("damage", ["twice", "moved", "no score", "future"])
def test_check_notices_damage(damage):
    index = DeviceSetIndex(4, 3, "cpu")
    index.admit(torch.arange(100, 140), 1, 1)
    index._check(1)
    if damage == "twice":
        index.key[0, 0] = index.key[0, 1]
    elif damage == "moved":
        index.key.copy_(index.key.roll(1, 0))
    elif damage == "no score":
        index.key[0, 0] = ABSENT
    else:
        index.score[0, 0] = 9
    with pytest.raises(AssertionError):
        index._check(1)


def test_make_device_index_has_the_sizes_of_make_index():
    for capacity_rows, ways in [(1, 16), (3, 16), (40, 16), (999, 16), (1000, 16), (10**9, 16), (8, 2)]:
        sizes = {"budget_bytes": None, "capacity_rows": capacity_rows, "ways": ways}
        host, device = make_index(1000, 40, **sizes), make_device_index(1000, 40, **sizes, device="cpu")
        assert device.num_slots == host.num_slots
        assert isinstance(device, DeviceIdentityIndex) == isinstance(host, IdentityIndex)
        assert isinstance(host, IdentityIndex) or device.key.shape == host.key.shape


def test_a_budget_pays_for_the_slot_behind_the_last_one():
    for budget_bytes in [*range(1, 43_000, 97), 42_041, 42_042]:
        index = make_device_index(1000, 41, budget_bytes=budget_bytes, capacity_rows=None, ways=16, device="cpu")
        assert (index.num_slots + 1) * (41 + index.bytes_per_slot) <= budget_bytes or index.num_slots == 1
        assert isinstance(index, DeviceIdentityIndex) == (budget_bytes >= 42_042)
