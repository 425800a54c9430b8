"""Cosine similarity: rows at unit length for a fast product, and the exact value of a few pairs.

Sums run in float64, in the order of the columns, so results depend on no library and no number of threads.
"""

import math

import numba as nb
import numpy as np


@nb.njit(nogil=True, cache=True)
def _squared_norm(values_D):
    total = 0.0
    for d in range(values_D.shape[0]):
        value = np.float64(values_D[d])
        total += value * value
    return total


@nb.njit(nogil=True, cache=True)
def unit_rows(start, stop, values_MD, unit_MD, usable_M):
    """unit_MD[m] = values_MD[m] divided by its 2-norm; zeros, and not usable, where that is 0, NaN or infinite."""
    for m in range(start, stop):
        norm = math.sqrt(_squared_norm(values_MD[m]))
        usable_M[m] = 0.0 < norm < math.inf
        inverse = 1.0 / norm if usable_M[m] else 0.0
        for d in range(values_MD.shape[1]):
            unit_MD[m, d] = np.float32(np.float64(values_MD[m, d]) * inverse) if usable_M[m] else np.float32(0)


@nb.njit(nogil=True, cache=True)
def cosine(start, stop, values_MD, index_K, query_D, out_K):
    """out_K[k] = the cosine of row index_K[k] and the query, rounded to float32; both norms are finite and above 0."""
    query_norm = math.sqrt(_squared_norm(query_D))
    for k in range(start, stop):
        row_D = values_MD[index_K[k]]
        total = 0.0
        for d in range(query_D.shape[0]):
            total += np.float64(row_D[d]) * np.float64(query_D[d])
        out_K[k] = np.float32(total / (math.sqrt(_squared_norm(row_D)) * query_norm))
