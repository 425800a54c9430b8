"""Norms of gradient rows other than the 2-norm, in float64, as range kernels: each row has one writer.

A row's terms are added in column order; how the rows are put together is the caller's.
"""

import numba as nb
import numpy as np


@nb.njit(nogil=True, cache=True)
def row_power_sums(start, stop, sums_UD, power, out_U):
    """out_U[u] = the sum of |g|**power over sums_UD[u]; for power 0 the number of entries that are not 0."""
    for u in range(start, stop):
        total = 0.0
        for d in range(sums_UD.shape[1]):
            g = abs(np.float64(sums_UD[u, d]))
            if power == 1.0:
                total += g
            elif power == 0.0:
                total += 1.0 if g != 0.0 else 0.0
            else:
                total += g**power
        out_U[u] = total


@nb.njit(nogil=True, cache=True)
def row_largest(start, stop, sums_UD, out_U):
    """out_U[u] = the largest |g| of sums_UD[u]; NaN where there is one."""
    for u in range(start, stop):
        best = abs(np.float64(sums_UD[u, 0]))
        for d in range(1, sums_UD.shape[1]):
            g = abs(np.float64(sums_UD[u, d]))
            if np.isnan(g) or g > best:
                best = g
        out_U[u] = best
