"""Sealing rows that follow each other: how a table is written in bulk."""

import numba as nb
import numpy as np

from bigembed.kernels.hashing import mix64

_S32 = np.uint64(32)
_ONE = np.uint64(1)


@nb.njit(nogil=True, cache=True)
def seal_next(start, stop, first_row, words_MX, tail_T, keys_W, records_MW):
    """Write the records of rows first_row + m, which hold words_MX[m] and then tail_T.

    Equals `seal` of the same words. One pass over the words: they are copied and summed at once.

    Shape: words_MX uint32 (M, X), tail_T uint32 (T,), records_MW uint32 (M, W) with W = X + T + 1.
    """
    width = words_MX.shape[1]
    tail = tail_T.shape[0]
    last = keys_W.shape[0] - 1
    for m in range(start, stop):
        total = np.uint64(0)
        for x in range(width):
            word = words_MX[m, x]
            records_MW[m, x] = word
            total += keys_W[x] * np.uint64(word)
        for t in range(tail):
            word = tail_T[t]
            records_MW[m, width + t] = word
            total += keys_W[width + t] * np.uint64(word)
        check = mix64(mix64(np.uint64(first_row + m) ^ keys_W[last]) ^ total) >> _S32
        records_MW[m, last] = np.uint32(check if check != 0 else _ONE)


@nb.njit(nogil=True, cache=True)
def clear_unwritten(start, stop, written_M, records_MW):
    """Make the records of rows that are not written all zero."""
    for m in range(start, stop):
        if not written_M[m]:
            for w in range(records_MW.shape[1]):
                records_MW[m, w] = 0
