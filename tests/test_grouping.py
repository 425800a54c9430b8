"""group_by_row and sum_by_row against their twins: every output exact, for any thread count."""

import naive
import numpy as np
import pytest

from bigembed import threads
from bigembed.kernels import grouping
from bigembed.kernels.grouping import BLOCK_ROWS, group_by_row, square_by_block, sum_by_row

BIG = (1 << 48) - 1  # the largest row of the largest table


@pytest.fixture(params=[1, 2, 5])
def num_threads(request):
    before = threads.get_num_threads()
    threads.set_num_threads(request.param)
    yield request.param
    threads.set_num_threads(before)


def batches():
    rng = np.random.default_rng(0)
    yield np.array([], np.int64)
    yield np.array([BIG], np.int64)
    yield np.full(100, 7, np.int64)
    yield np.array([0, BIG, 0, 1, BIG, 1 << 32, 0], np.int64)
    for num_rows in (1, 2, 10, 1000, BIG):
        for size in (1, 2, 63, 64, 65, 500):
            yield rng.integers(0, num_rows, size)
    yield np.arange(300)[::-1].copy()
    yield np.arange(300) << 32  # equal low words


def test_group_by_row_equals_its_twin():
    for ids_N in batches():
        rows_U, inverse_N = group_by_row(ids_N)
        expected_rows_U, expected_inverse_N = naive.group_by_row(ids_N)
        np.testing.assert_array_equal(rows_U, expected_rows_U)
        np.testing.assert_array_equal(inverse_N, expected_inverse_N)
        assert rows_U.dtype == inverse_N.dtype == np.int64


def test_group_by_row_where_every_row_wants_the_same_place():
    """Rows that hash to the last place of the scratch table must all be found again behind its end."""
    mask = (1 << (2 * 40).bit_length()) - 1
    colliding = [row for row in range(20_000) if naive.mix64(row * 0x9E3779B97F4A7C15 % 2**64) & mask == mask]
    ids_N = np.array((colliding[:20] * 2), np.int64)
    assert ids_N.size == 40
    rows_U, inverse_N = group_by_row(ids_N)
    np.testing.assert_array_equal(rows_U, colliding[:20])
    np.testing.assert_array_equal(inverse_N, [*range(20), *range(20)])


def test_group_by_row_leaves_the_batch_alone_and_returns_arrays_of_their_own():
    ids_N = np.array([3, 3, 5], np.int64)
    rows_U, inverse_N = group_by_row(ids_N)
    assert rows_U.base is None, "a view would keep N rows alive"
    assert not np.shares_memory(rows_U, ids_N)
    assert not np.shares_memory(inverse_N, ids_N)
    np.testing.assert_array_equal(ids_N, [3, 3, 5])


def addends(rng, num_positions, dim):
    """Magnitudes so different that another order of addition gives other bits."""
    exponents = rng.integers(-12, 12, (num_positions, dim))
    return (rng.standard_normal((num_positions, dim)) * 2.0**exponents).astype(np.float32)


def test_sum_by_row_equals_its_twin():
    rng = np.random.default_rng(1)
    for ids_N in batches():
        rows_U, inverse_N = group_by_row(ids_N)
        for dim in (1, 3, 64):
            grad_ND = addends(rng, ids_N.size, dim)
            sums_UD, squares_B = sum_by_row(grad_ND, inverse_N, rows_U.size)
            assert sums_UD.tobytes() == naive.sum_by_row(grad_ND, inverse_N, rows_U.size).tobytes()
            assert squares_B.tobytes() == naive.square_by_block(sums_UD).tobytes()
            assert square_by_block(sums_UD).tobytes() == squares_B.tobytes()


def test_sum_by_row_with_sources_factors_and_a_row_left_out():
    rng = np.random.default_rng(4)
    for ids_N in batches():
        rows_U, inverse_N = group_by_row(ids_N)
        grad_XD = addends(rng, 7, 5)
        source_N, factor_N = rng.integers(0, 7, ids_N.size), addends(rng, ids_N.size, 1)[:, 0]
        for without in (-1, 0, rows_U.size - 1):
            given = grad_XD, inverse_N, rows_U.size, source_N, factor_N
            sums_UD, squares_B = sum_by_row(*given, without=without)
            assert sums_UD.tobytes() == naive.sum_by_row(*given, without=without).tobytes()
            assert squares_B.tobytes() == naive.square_by_block(sums_UD).tobytes()


def test_sum_by_row_adds_in_order_of_position():
    huge = np.float32(2**25)
    grad_ND = np.array([[1.0], [huge], [-huge]], np.float32)
    inverse_N = np.zeros(3, np.int64)
    assert sum_by_row(grad_ND, inverse_N, 1)[0] == 0.0
    assert sum_by_row(grad_ND[::-1].copy(), inverse_N, 1)[0] == 1.0


def test_sum_by_row_starts_from_positive_zero():
    sums_UD, _ = sum_by_row(np.array([[-0.0, -0.0]], np.float32), np.array([1]), 2)
    assert not np.signbit(sums_UD).any()
    np.testing.assert_array_equal(sums_UD, np.zeros((2, 2)))


@pytest.mark.parametrize("num_rows", [3, 700, 1 << 40])
def test_sum_by_row_has_the_same_bits_for_any_thread_count(num_threads, num_rows):
    rng = np.random.default_rng(2)
    num_positions, dim = 6 * grouping.GRAIN_VALUES // 128, 128  # enough for 5 owners
    ids_N = np.minimum(rng.integers(0, num_rows, num_positions), rng.integers(0, num_rows, num_positions))
    rows_U, inverse_N = group_by_row(ids_N)
    grad_ND = addends(rng, num_positions, dim)
    expected = naive.sum_by_row(grad_ND, inverse_N, rows_U.size)
    if num_rows < num_positions:
        backwards = naive.sum_by_row(grad_ND[::-1], inverse_N[::-1], rows_U.size)
        assert backwards.tobytes() != expected.tobytes(), "these addends do not notice their order"
    sums_UD, squares_B = sum_by_row(grad_ND, inverse_N, rows_U.size)
    assert sums_UD.tobytes() == expected.tobytes()
    assert squares_B.tobytes() == square_by_block(sums_UD).tobytes() == naive.square_by_block(expected).tobytes()


def starts(counts):
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def test_a_hot_first_block_is_one_owners_share():
    counts = np.ones(5 * BLOCK_ROWS - 3, np.int64)
    counts[3] = 1000
    assert list(grouping._edges_of_equal_work(starts(counts), 2)) == [0, 1, 5]
    assert list(grouping._edges_of_equal_work(starts(counts[::-1]), 2)) == [0, 5, 5]


def test_owners_cover_every_block_once_and_share_the_work():
    rng = np.random.default_rng(3)
    for num_unique in (1, 2, BLOCK_ROWS, BLOCK_ROWS + 1, 50 * BLOCK_ROWS - 1):
        counts = rng.integers(1, 20, num_unique)
        starts_U1, blocks = starts(counts), -(-num_unique // BLOCK_ROWS)
        for owners in (1, 2, 5, 7):
            edges = grouping._edges_of_equal_work(starts_U1, owners)
            assert edges[0] == 0
            assert edges[-1] == blocks
            assert edges.size == owners + 1
            assert (np.diff(edges) >= 0).all()
            if blocks == 50:
                rows = np.minimum(edges * BLOCK_ROWS, num_unique)
                work = np.diff(starts_U1[rows] + grouping.ROW_WORK * rows)
                assert work.max() <= work.sum() / owners + 2 * (20 + grouping.ROW_WORK) * BLOCK_ROWS
