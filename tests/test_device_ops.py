"""The torch ops of the device cache against their twins: every output exact."""

import naive
import numpy as np
import pytest
import torch
from devices import DEVICES
from test_grouping import BIG, addends, batches

from bigembed.cache import device_ops
from bigembed.kernels import grouping

pytestmark = pytest.mark.parametrize("device", DEVICES)


def tensor(array, device):
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def test_hashing_equals_its_twin(device):
    rng = np.random.default_rng(0)
    rows = np.concatenate([[0, 1, BIG, -1, np.iinfo(np.int64).min], rng.integers(0, BIG, 300)])
    mixed = device_ops.mix64(tensor(rows, device)).cpu().numpy().astype(np.uint64)
    assert list(mixed) == [naive.mix64(int(row) % 2**64) for row in rows]
    for count in (1, 2, 1000, 12_345_678, (1 << 32) - 1):
        got = device_ops.bucket(tensor(rows, device), count)
        assert got.tolist() == [naive.bucket(row, count) for row in rows]


def test_group_by_row_equals_its_twin(device):
    for ids_N in batches():
        rows_U, inverse_N = device_ops.group_by_row(tensor(ids_N, device))
        expected_rows_U, expected_inverse_N = naive.group_by_row(ids_N)
        np.testing.assert_array_equal(rows_U.cpu(), expected_rows_U)
        np.testing.assert_array_equal(inverse_N.cpu(), expected_inverse_N)
        assert rows_U.dtype == inverse_N.dtype == torch.int64


def test_a_batch_ends_in_absent(device):
    batch = device_ops.group(tensor([5, 3, 5, 5, 0], device), 6)
    assert batch.rows_N.tolist() == [5, 3, 0, -1, -1]
    assert (int(batch.num_unique), int(batch.bad_position)) == (3, 5)


@pytest.mark.parametrize(
    ("ids", "found"),
    [([0, 9, 4], (3, 0)), ([0, 10, -4], (1, 10)), ([-1, 99], (0, -1)), ([], (0, 0)), ([BIG], (0, BIG))],
)
def test_first_out_of_range(device, ids, found):
    position, bad_id = device_ops.first_out_of_range(torch.tensor(ids, dtype=torch.int64, device=device), 10)
    assert (int(position), int(bad_id)) == found


def test_a_lookup_is_found_for_every_device(device):
    lookup = device_ops.lookup_for(torch.device(device))
    assert (lookup is device_ops.find_and_gather) == (device == "cpu")


def test_compact_and_rank_in_group(device):
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 50):
        mask = rng.random(size) < 0.4
        found = device_ops.compact(tensor(mask, device)).tolist()
        expected = list(np.flatnonzero(mask))
        assert found == expected + [0] * (size - len(expected))
        groups = rng.integers(0, 5, size)
        ranks = [int((groups[:m] == groups[m]).sum()) for m in range(size)]
        assert device_ops.rank_in_group(tensor(groups, device)).tolist() == ranks


def check_sums(device, inverse_N, num_unique, dim, rng):
    grad_ND = addends(rng, len(inverse_N), dim)
    sums_UD = device_ops.sum_by_row(tensor(grad_ND, device), tensor(inverse_N, device), num_unique).cpu().numpy()
    assert sums_UD.tobytes() == naive.sum_by_row_in_tree(grad_ND, inverse_N, num_unique).tobytes()
    short_U = np.bincount(inverse_N, minlength=num_unique) <= device_ops.FAN
    in_order_UD, _ = grouping.sum_by_row(grad_ND, inverse_N, num_unique)
    assert sums_UD[short_U].tobytes() == in_order_UD[short_U].tobytes()
    return sums_UD.tobytes() == in_order_UD.tobytes()


def test_sum_by_row_equals_its_twin(device):
    rng = np.random.default_rng(1)
    for ids_N in batches():
        rows_U, inverse_N = naive.group_by_row(ids_N)
        for dim in (1, 3, 64):
            check_sums(device, inverse_N, rows_U.size, dim, rng)


def test_sum_by_row_at_the_edges_of_its_tree(device):
    rng = np.random.default_rng(2)
    for length in (31, 32, 33, 64, 1023, 1024, 1025, 32 * 1024 + 1):
        hot = np.zeros(length, np.int64)
        cold = rng.integers(1, 40, 60)
        is_in_order = check_sums(device, rng.permutation(np.concatenate([hot, cold])), 42, 2, rng)
        assert is_in_order == (length <= 33), "these addends do not notice their order"  # 33: one run and one more


def test_sum_by_row_of_fewer_positions_than_rows(device):
    rng = np.random.default_rng(3)
    check_sums(device, np.full(100, 499), 500, 3, rng)
    check_sums(device, np.zeros(3, np.int64), 5, 1, rng)
    check_sums(device, np.empty(0, np.int64), 5, 1, rng)


def test_sum_by_row_starts_from_positive_zero(device):
    grad_ND = torch.full((1, 2), -0.0, device=device)
    sums_UD = device_ops.sum_by_row(grad_ND, torch.ones(1, dtype=torch.int64, device=device), 2)
    assert not torch.signbit(sums_UD).any()
    nothing = device_ops.sum_by_row(grad_ND[:0], torch.empty(0, dtype=torch.int64, device=device), 0)
    assert nothing.shape == (0, 2)
