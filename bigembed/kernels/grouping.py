"""Group a batch by row: which rows it names, and the sum of each one's gradients."""

import numba as nb
import numpy as np

from bigembed import threads
from bigembed.kernels.bare import BARE
from bigembed.kernels.hashing import GOLDEN, mix64
from bigembed.kernels.prefetch import ROWS_AHEAD, prefetch_row

GRAIN_VALUES = 1 << 17  # gradient values (512 KiB) below which another thread is not worth its dispatch
BLOCK_ROWS = 64  # rows whose squares are added together, fixed so that no bit depends on the threads
ROW_WORK = 2  # positions that take as long as what a row takes beside its own: its sum written, and squared
NONE_I = np.empty(0, np.int64)
NONE_F = np.empty(0, np.float32)


def group_by_row(ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows in order of first position, and each position's place among them: `naive.group_by_row`.

    Args:
        ids_N: int64, C-contiguous; N < 2**31.

    Returns:
        rows_U and inverse_N, both int64, with `rows_U[inverse_N] == ids_N`.
    """
    assert ids_N.ndim == 1
    assert ids_N.dtype == np.int64
    assert ids_N.size < 1 << 31
    rows_N, inverse_N = np.empty_like(ids_N), np.empty_like(ids_N)
    # At most half full, so that runs of taken places stay short.
    places_H = np.full(1 << (2 * ids_N.size).bit_length(), -1, np.int32)
    count = group_positions(ids_N, places_H, rows_N, inverse_N)
    return rows_N[:count].copy(), inverse_N


@nb.njit(**BARE)
def group_positions(ids_N, places_H, rows_N, inverse_N):
    """Fill inverse_N and the first U entries of rows_N, return U; places_H is -1, H > N a power of two."""
    mask = places_H.shape[0] - 1
    count = 0
    for n in range(ids_N.shape[0]):
        row = ids_N[n]
        at = np.int64(mix64(np.uint64(row) * GOLDEN) & np.uint64(mask))
        u = places_H[at]
        while u >= 0 and rows_N[u] != row:
            at = (at + 1) & mask
            u = places_H[at]
        if u < 0:
            u = count
            places_H[at] = u
            rows_N[u] = row
            count += 1
        inverse_N[n] = u
    return count


@nb.njit(**BARE)
def take_first(inverse_N, values_N, values_U):
    """values_U[u] = the value at the first position of row u."""
    for n in range(inverse_N.shape[0] - 1, -1, -1):
        values_U[inverse_N[n]] = values_N[n]


def sum_by_row(
    grad_XD: np.ndarray,
    inverse_N: np.ndarray,
    num_unique: int,
    source_N: np.ndarray | None = None,
    factor_N: np.ndarray | None = None,
    *,
    without: int = -1,
) -> tuple[np.ndarray, np.ndarray]:
    """Each row's gradients added in order of position, in float32, from 0.0 on: `naive.sum_by_row` exactly.

    Starting from 0.0 is what the dense gradient of `nn.Embedding` does; it turns a lone -0.0 into 0.0.

    Args:
        grad_XD: float32, C-contiguous.
        inverse_N: int64, the row of each position, 0 <= inverse_N < num_unique.
        num_unique: U, the rows of the result; a row without a position is 0.
        source_N: int64, the row of grad_XD that each position has its gradient from; None is its own.
        factor_N: float32, what each position's gradient is multiplied by first; None is 1.
        without: this row's sum stays 0.

    Returns:
        sums_UD, float32, and the sum of squares of each block of BLOCK_ROWS rows of it, float64.
    """
    assert grad_XD.dtype == np.float32
    assert grad_XD.flags.c_contiguous
    dim = grad_XD.shape[1]
    sums_UD = np.empty((num_unique, dim), np.float32)
    squares_B = np.empty(-(-num_unique // BLOCK_ROWS), np.float64)
    starts_U1, order_N = np.empty(num_unique + 1, np.int32), np.empty(inverse_N.size, np.int32)
    source_N = NONE_I if source_N is None else source_N
    factor_N = NONE_F if factor_N is None else factor_N
    given = grad_XD, source_N, factor_N, order_N, starts_U1, without
    owners = min(threads.get_num_threads(), inverse_N.size * dim // GRAIN_VALUES, squares_B.size)
    if owners < 2:
        sum_positions(inverse_N, *given, sums_UD, squares_B)
    else:
        order_positions(inverse_N, order_N, starts_U1)
        edges = _edges_of_equal_work(starts_U1, owners)
        threads.run_whole(sum_owned_blocks, owners, edges, *given, sums_UD, squares_B)
    return sums_UD, squares_B


def square_by_block(sums_UD: np.ndarray) -> np.ndarray:
    """The sum of squares of each block of BLOCK_ROWS rows, in float64: what `sum_by_row` returns beside the sums."""
    squares_B = np.empty(-(-sums_UD.shape[0] // BLOCK_ROWS), np.float64)
    threads.run(square_blocks, squares_B.size, sums_UD, squares_B, grain=32)
    return squares_B


def _edges_of_equal_work(starts_U1: np.ndarray, owners: int) -> np.ndarray:
    """owners + 1 edges that cut the blocks into ranges of about equal work (rows of many positions come first)."""
    num_unique = starts_U1.size - 1
    ends = np.arange(BLOCK_ROWS, num_unique, BLOCK_ROWS)  # of every block but the last, in rows
    edges = np.zeros(owners + 1, np.int64)
    targets = np.arange(1, owners) * (int(starts_U1[-1]) + ROW_WORK * num_unique) // owners
    edges[1:-1] = np.searchsorted(starts_U1[ends] + ROW_WORK * ends, targets) + 1
    edges[-1] = -(-num_unique // BLOCK_ROWS)
    return np.minimum(edges, edges[-1])


@nb.njit(**BARE)
def order_positions(inverse_N, order_N, starts_U1):
    """order_N = the positions of row 0, of row 1, ..., each in order; those of row u are starts_U1[u] to [u + 1]."""
    starts_U1[:] = 0
    for n in range(inverse_N.shape[0]):
        starts_U1[inverse_N[n] + 1] += 1
    for u in range(starts_U1.shape[0] - 1):
        starts_U1[u + 1] += starts_U1[u]
    for n in range(inverse_N.shape[0]):
        u = inverse_N[n]
        order_N[starts_U1[u]] = n
        starts_U1[u] += 1
    for u in range(starts_U1.shape[0] - 1, 0, -1):  # each start has moved to the next one's place
        starts_U1[u] = starts_U1[u - 1]
    starts_U1[0] = 0


@nb.njit(nogil=True, cache=True)
def sum_positions(inverse_N, grad_XD, source_N, factor_N, order_N, starts_U1, without, sums_UD, squares_B):
    """All of `sum_by_row` on one thread, without a dispatch between its steps."""
    order_positions(inverse_N, order_N, starts_U1)
    sum_blocks(0, squares_B.shape[0], grad_XD, source_N, factor_N, order_N, starts_U1, without, sums_UD, squares_B)


@nb.njit(nogil=True, cache=True)
def sum_owned_blocks(
    owner, owners, edges, grad_XD, source_N, factor_N, order_N, starts_U1, without, sums_UD, squares_B
):
    """`sum_blocks` from block edges[owner] (inclusive) to edges[owner + 1] (exclusive)."""
    first, last = edges[owner], edges[owner + 1]
    sum_blocks(first, last, grad_XD, source_N, factor_N, order_N, starts_U1, without, sums_UD, squares_B)


@nb.njit(nogil=True, cache=True)
def sum_blocks(start, stop, grad_XD, source_N, factor_N, order_N, starts_U1, without, sums_UD, squares_B):
    """Add up the gradients of the rows of these blocks, and the squares of the sums while they are near."""
    squares_D = np.empty(sums_UD.shape[1], np.float64)
    _sum_blocks(start, stop, grad_XD, source_N, factor_N, order_N, starts_U1, without, sums_UD, squares_B, squares_D)


@nb.njit(**BARE)
def _sum_blocks(start, stop, grad_XD, source_N, factor_N, order_N, starts_U1, without, sums_UD, squares_B, squares_D):
    dim = sums_UD.shape[1]
    for block in range(start, stop):
        first, last = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, sums_UD.shape[0])
        for u in range(first, last):
            sum_D = sums_UD[u]
            begin, end = starts_U1[u], starts_U1[u + 1] if u != without else starts_U1[u]
            if begin == end:
                sum_D[:] = np.float32(0.0)
            for j in range(begin, end):
                if j + ROWS_AHEAD < order_N.shape[0]:  # its positions lie anywhere in the batch
                    n = order_N[j + ROWS_AHEAD]
                    prefetch_row(grad_XD, source_N[n] if source_N.shape[0] else np.int64(n), dim)
                n = order_N[j]
                grad_D = grad_XD[source_N[n] if source_N.shape[0] else np.int64(n)]
                factor = factor_N[n] if factor_N.shape[0] else np.float32(1.0)
                if j == begin:
                    for d in range(dim):
                        sum_D[d] = np.float32(0.0) + grad_D[d] * factor
                else:
                    for d in range(dim):
                        sum_D[d] += grad_D[d] * factor
        squares_B[block] = _square_block(first, last, sums_UD, squares_D)


@nb.njit(nogil=True, cache=True)
def square_blocks(start, stop, sums_UD, squares_B):
    """squares_B[b] = the sum of squares of the rows of block b, in float64."""
    squares_D = np.empty(sums_UD.shape[1], np.float64)
    for block in range(start, stop):
        first, last = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, sums_UD.shape[0])
        squares_B[block] = _square_block(first, last, sums_UD, squares_D)


@nb.njit(**BARE)
def _square_block(first, last, sums_UD, squares_D):
    """Squares added down each column first, which vectors can do, and then along."""
    squares_D[:] = 0.0
    for u in range(first, last):
        for d in range(squares_D.shape[0]):
            x = np.float64(sums_UD[u, d])
            squares_D[d] += x * x
    total = 0.0
    for d in range(squares_D.shape[0]):
        total += squares_D[d]
    return total
