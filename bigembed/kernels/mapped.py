"""Rows straight from maps of chunk files, in the order of a batch: no sort, no staging, each record looked at once."""

import numba as nb
import numpy as np

from bigembed.kernels.bare import BARE
from bigembed.kernels.initial import fill_initial_row
from bigembed.kernels.prefetch import ROWS_AHEAD, prefetch_item
from bigembed.kernels.records import check_of_sum, is_zero

LINE_WORDS = 16  # of a 64-byte cache line


@nb.njit(**BARE)
def gather_mapped(start, stop, rows_N, words_A, first_C, chunk_shift, keys_W, checks, words_NX, is_new_N):
    """words_NX[n] = the first X words of row rows_N[n]'s record; is_new_N[n] = whether it was never written.

    Args:
        words_A: memory with all maps in it. first_C: where in it each chunk begins, -1 for a chunk without a file.
        chunk_shift: log2 of a chunk's rows.
        checks: whether every record's check is verified.

    Returns:
        The first n whose record is damaged, or -1.
    """
    words, out_words = keys_W.shape[0], words_NX.shape[1]
    within_chunk = (np.int64(1) << chunk_shift) - 1
    for n in range(start, stop):
        if n + ROWS_AHEAD < stop:
            row = rows_N[n + ROWS_AHEAD]
            first = first_C[row >> chunk_shift] + (row & within_chunk) * words
            for w in range(0, words, LINE_WORDS):
                prefetch_item(words_A, first + w)
        row = rows_N[n]
        first = first_C[row >> chunk_shift]
        is_new_N[n] = first < 0
        if first < 0:
            continue
        first += (row & within_chunk) * words
        record_W = words_A[first : first + words]
        check = np.uint64(record_W[words - 1])
        if check == 0 and is_zero(record_W):
            is_new_N[n] = True
        elif not checks:
            for x in range(out_words):
                words_NX[n, x] = record_W[x]
        else:
            # A writer may be replacing the record: what is summed is what was copied.
            total = np.uint64(0)
            for x in range(out_words):
                words_NX[n, x] = record_W[x]
            for x in range(out_words):
                total += keys_W[x] * np.uint64(words_NX[n, x])
            for w in range(out_words, words - 1):
                total += keys_W[w] * np.uint64(record_W[w])
            if check == 0 or check != check_of_sum(row, total, keys_W):
                return n
    return -1


@nb.njit(nogil=True, cache=True)
def fill_new(start, stop, rows_N, is_new_N, initial, out_NX):
    """out_NX[n] = the first X initial values of row rows_N[n], where is_new_N[n]."""
    scratch_1, row_E = np.empty(1, np.float64), np.empty(initial.dim + initial.state_K.shape[0], np.float32)
    for n in range(start, stop):
        if is_new_N[n]:
            fill_initial_row(rows_N[n], initial, row_E, scratch_1)
            for x in range(out_NX.shape[1]):
                out_NX[n, x] = row_E[x]
