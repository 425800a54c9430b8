"""A hash map from row to a 64-bit place: open addressing, linear probing, no deletion.

Plain arrays: key_C (-1 = empty) and place_C, capacity C a power of two, at most 3/4 full.
"""

import numba as nb
import numpy as np

from bigembed.kernels.bare import BARE
from bigembed.kernels.hashing import GOLDEN, mix64
from bigembed.kernels.prefetch import prefetch_item

AHEAD = 16  # rows whose places are asked for before the loop comes to them


@nb.njit(**BARE, inline="always")
def _home(row, mask):
    return np.int64(mix64(np.uint64(row) * GOLDEN) & np.uint64(mask))


@nb.njit(**BARE, inline="always")
def _ask(home, key_C, place_C):
    prefetch_item(key_C, home)
    prefetch_item(place_C, home)


@nb.njit(**BARE)
def map_find(start, stop, rows_M, key_C, place_C, out_M):
    """out_M[m] = the place of rows_M[m], or -1."""
    mask = key_C.shape[0] - 1
    for m in range(start, stop):
        if m + AHEAD < stop:
            _ask(_home(rows_M[m + AHEAD], mask), key_C, place_C)
        row = rows_M[m]
        at = _home(row, mask)
        while key_C[at] != row and key_C[at] != -1:
            at = (at + 1) & mask
        out_M[m] = place_C[at] if key_C[at] == row else -1


@nb.njit(**BARE)
def map_put(rows_M, places_M, key_C, place_C, count_1, old_M):
    """Set the place of each row, later entries winning; old_M gets the place before, or -1. count_1 counts the rows."""
    mask = key_C.shape[0] - 1
    for m in range(rows_M.shape[0]):
        if m + AHEAD < rows_M.shape[0]:
            _ask(_home(rows_M[m + AHEAD], mask), key_C, place_C)
        row = rows_M[m]
        at = _home(row, mask)
        while key_C[at] != row and key_C[at] != -1:
            at = (at + 1) & mask
        if key_C[at] == row:
            old_M[m] = place_C[at]
        else:
            old_M[m] = -1
            key_C[at] = row
            count_1[0] += 1
        place_C[at] = places_M[m]
