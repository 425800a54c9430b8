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
def count_not_finite(start, stop, values_MD):
    """How many rows hold a NaN or an infinity."""
    words_MD = values_MD.view(np.uint32)
    exponent = np.uint32(0x7F800000)
    count = 0
    for m in range(start, stop):
        worst = np.uint32(0)
        for d in range(words_MD.shape[1]):
            worst = max(worst, words_MD[m, d] & exponent)
        if worst == exponent:
            count += 1
    return count


@nb.njit(nogil=True, cache=True)
def sum_of_squares(start, stop, values_MD):
    """The squares of all values, in float64; rows that hold a NaN or an infinity are left out."""
    total = 0.0
    for m in range(start, stop):
        of_row = 0.0
        for d in range(values_MD.shape[1]):
            value = np.float64(values_MD[m, d])
            of_row += value * value
        if of_row < np.inf:
            total += of_row
    return total
