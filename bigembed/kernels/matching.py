"""Where rows stand in a list."""

import numba as nb
import numpy as np

from bigembed.kernels.bare import BARE

ABSENT = -1


@nb.njit(**BARE)
def match(rows_M, others_L, usable_L, at_M):
    """at_M[m] = the l with others_L[l] == rows_M[m] and usable_L[l], or ABSENT; returns how many there are.

    Both lists ascend without duplicates. Where one is far shorter, its rows are searched for in the other, so the cost
    is that of the shorter one.
    """
    count = 0
    low = 0
    for m in range(rows_M.shape[0]):
        row = rows_M[m]
        # Gallop from where the last row was found, then bisect: linear where the lists are alike, logarithmic where
        # this one is short.
        step, high = 1, low
        while high < others_L.shape[0] and others_L[high] < row:
            low = high + 1
            high += step
            step *= 2
        high = min(high, others_L.shape[0])
        while low < high:
            middle = (low + high) >> 1
            if others_L[middle] < row:
                low = middle + 1
            else:
                high = middle
        found = low < others_L.shape[0] and others_L[low] == row and usable_L[low]
        at_M[m] = low if found else ABSENT
        count += found
    return count


@nb.njit(**BARE)
def first_place(rows_U, row):
    """The first u with rows_U[u] == row, or ABSENT."""
    for u in range(rows_U.shape[0]):
        if rows_U[u] == row:
            return u
    return ABSENT


@nb.njit(**BARE)
def first_outside(rows_N, num_rows):
    """The first position with rows_N < 0 or rows_N >= num_rows, or ABSENT."""
    outside = 0
    for n in range(rows_N.shape[0]):  # without a way out, so that it is done with vectors
        outside |= (rows_N[n] < 0) | (rows_N[n] >= num_rows)
    if outside:
        for n in range(rows_N.shape[0]):
            if rows_N[n] < 0 or rows_N[n] >= num_rows:
                return n
    return ABSENT


@nb.njit(**BARE)
def has(values_U, value):
    """Whether a value is among them."""
    found = 0
    for u in range(values_U.shape[0]):  # without a way out, so that it is done with vectors
        found |= values_U[u] == value
    return found != 0


@nb.njit(nogil=True, cache=True)
def places_of(values_U, value):
    """The places of a value, int64, ascending: `np.flatnonzero(values_U == value)`, in 1 us where there are none."""
    count = 0
    for u in range(values_U.shape[0]):
        count += values_U[u] == value
    places = np.empty(count, np.int64)
    at = 0
    if count:
        for u in range(values_U.shape[0]):
            if values_U[u] == value:
                places[at] = u
                at += 1
    return places


def replaced_by_last(values_U: np.ndarray, place: int) -> np.ndarray:
    """A copy without the value at `place`, where the last one is now."""
    kept = values_U[:-1].copy()
    if place < len(kept):
        kept[place] = values_U[-1]
    return kept
