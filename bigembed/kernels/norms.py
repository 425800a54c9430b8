"""What a converter does to rows on their way: unit length, their spread, those that hold NaN or infinity."""

import math

import numba as nb
import numpy as np


@nb.njit(nogil=True, cache=True)
def normalize_rows(start, stop, values_MD, out_MD):
    """Each row divided by its 2-norm, both in float64, rounded once; rows of zeros stay. Equals its naive twin."""
    for m in range(start, stop):
        total = 0.0
        for d in range(values_MD.shape[1]):
            value = np.float64(values_MD[m, d])
            total += value * value
        norm = math.sqrt(total)
        for d in range(values_MD.shape[1]):
            out_MD[m, d] = np.float32(np.float64(values_MD[m, d]) / norm) if norm > 0.0 else values_MD[m, d]


@nb.njit(nogil=True, cache=True)
def survey_rows(start, stop, values_MD):
    """(rows that hold a NaN or an infinity, the squares of all values in the other rows, summed in float64)."""
    not_finite = 0
    total = 0.0
    for m in range(start, stop):
        of_row = 0.0
        for d in range(values_MD.shape[1]):
            value = np.float64(values_MD[m, d])
            of_row += value * value
        if of_row < np.inf:  # float32's largest square is far below float64's largest number
            total += of_row
        else:
            not_finite += 1
    return not_finite, total
