"""Group a batch by row: which rows it names, and the sum of each one's gradients."""

import numba as nb
import numpy as np

from bigembed import threads
from bigembed.kernels.hashing import GOLDEN, mix64

GRAIN_VALUES = 1 << 18  # gradient values (1 MiB) below which another thread is not worth its dispatch


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


@nb.njit(nogil=True, cache=True)
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


def sum_by_row(grad_ND: np.ndarray, inverse_N: np.ndarray, num_unique: int) -> np.ndarray:
    """Each row's gradients added in order of position, in float32, from 0.0 on: `naive.sum_by_row` exactly.

    Starting from 0.0 is what the dense gradient of `nn.Embedding` does; it turns a lone -0.0 into 0.0.

    Args:
        grad_ND: float32, C-contiguous.
        inverse_N: int64, the row of each position, 0 <= inverse_N < num_unique.
        num_unique: U, the rows of the result; a row without a position is 0.

    Returns:
        sums_UD, float32.
    """
    assert grad_ND.dtype == np.float32
    assert grad_ND.flags.c_contiguous
    sums_UD = np.zeros((num_unique, grad_ND.shape[1]), np.float32)
    owners = max(1, min(threads.get_num_threads(), grad_ND.size // GRAIN_VALUES))
    edges = _edges_of_equal_work(inverse_N, num_unique, owners)
    threads.run_whole(sum_owned_rows, owners, edges, grad_ND, inverse_N, sums_UD)
    return sums_UD


def _edges_of_equal_work(inverse_N: np.ndarray, num_unique: int, owners: int) -> np.ndarray:
    """owners + 1 edges that cut 0..U into ranges of about equally many positions (hot rows come first)."""
    edges = np.zeros(owners + 1, np.int64)
    if owners > 1:
        positions_through_U = np.cumsum(np.bincount(inverse_N, minlength=num_unique))
        targets = np.arange(1, owners) * inverse_N.size // owners
        edges[1:-1] = np.searchsorted(positions_through_U, targets) + 1
    edges[-1] = num_unique
    return edges


@nb.njit(nogil=True, cache=True)
def sum_owned_rows(owner, owners, edges, grad_ND, inverse_N, sums_UD):
    """Add the gradients of the rows from edges[owner] (inclusive) to edges[owner + 1] (exclusive)."""
    first, last = edges[owner], edges[owner + 1]
    dim = grad_ND.shape[1]
    for n in range(inverse_N.shape[0]):
        u = inverse_N[n]
        if first <= u < last:
            for d in range(dim):
                sums_UD[u, d] += grad_ND[n, d]
