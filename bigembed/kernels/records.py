"""Rows to records and back: the check that ends a record, and what an all-zero record means.

check = top half of mix64(mix64(row ^ salt) ^ sum over words of key[w] * word[w]) modulo 2**64, or 1 where that
is 0. Keys are odd, so a change of any single word changes the sum; two changes cancel with probability 2**-32.
"""

import numba as nb
import numpy as np

from bigembed.kernels.bare import BARE
from bigembed.kernels.hashing import GOLDEN, mix64, mixed
from bigembed.kernels.initial import fill_initial_row
from bigembed.spec import TableSpec

_S32 = np.uint64(32)
_ONE = np.uint64(1)


def check_keys(spec: TableSpec) -> np.ndarray:
    """uint64 (W,): the key of each word before the check; the last entry is the table's salt."""
    with np.errstate(over="ignore"):
        ordinals = np.uint64(spec.salt) + np.arange(1, spec.record_words + 1, dtype=np.uint64) * GOLDEN
        keys = mixed(ordinals) | _ONE
    keys[-1] = np.uint64(spec.salt)
    return keys


@nb.njit(**BARE)
def record_check(row, words_W, keys_W):
    """The check of a record whose first W - 1 words are given; never 0."""
    total = np.uint64(0)
    for w in range(keys_W.shape[0] - 1):  # in vectors as it is; in halves of 32 bits it was 1.6 times as slow
        total += keys_W[w] * np.uint64(words_W[w])
    return check_of_sum(row, total, keys_W)


@nb.njit(**BARE, inline="always")
def check_of_sum(row, total, keys_W):
    """The check of a record whose sum over words of key * word is known."""
    check = mix64(mix64(np.uint64(row) ^ keys_W[keys_W.shape[0] - 1]) ^ total) >> _S32
    return check if check != 0 else _ONE


@nb.njit(nogil=True, cache=True)
def seal(start, stop, rows_M, values_ME, keys_W, records_MW):
    """Write the records of rows_M that hold values_ME; returns the sum of their checks."""
    width = values_ME.shape[1]
    total = np.uint64(0)
    words_ME = values_ME.view(np.uint32)
    for m in range(start, stop):
        for e in range(width):
            records_MW[m, e] = words_ME[m, e]
        check = record_check(rows_M[m], records_MW[m], keys_W)
        records_MW[m, width] = np.uint32(check)
        total += check
    return total


@nb.njit(**BARE)
def is_zero(words_W):
    """Whether every word is zero: a record that was never written."""
    bits = np.uint32(0)
    for w in range(words_W.shape[0]):
        bits |= words_W[w]
    return bits == 0


@nb.njit(nogil=True, cache=True)
def first_damaged(start, stop, rows_M, records_MW, keys_W):
    """The first m whose record is neither whole nor all zero, or -1."""
    last = keys_W.shape[0] - 1
    for m in range(start, stop):
        check = np.uint64(records_MW[m, last])
        if check == 0:
            if not is_zero(records_MW[m]):
                return m
        elif check != record_check(rows_M[m], records_MW[m], keys_W):
            return m
    return -1


@nb.njit(nogil=True, cache=True)
def unseal(start, stop, rows_M, records_MW, keys_W, initial, out_ME):
    """Write the values of sound records, initial values where all zero; returns the first damaged m, or -1."""
    width = out_ME.shape[1]
    scratch_1 = np.empty(1, np.float64)
    words_ME = out_ME.view(np.uint32)
    damaged = -1
    for m in range(start, stop):
        check = np.uint64(records_MW[m, width])
        if check == 0 and is_zero(records_MW[m]):
            fill_initial_row(rows_M[m], initial, out_ME[m], scratch_1)
            continue
        if check == 0 or check != record_check(rows_M[m], records_MW[m], keys_W):
            damaged = m
            break
        for e in range(width):
            words_ME[m, e] = records_MW[m, e]
    return damaged


@nb.njit(nogil=True, cache=True)
def unseal_sound(rows_M, records_MW, keys_W, initial, out_ME, sound_M):
    """As `unseal`, but goes on past damage: sound_M says which rows were written to out_ME."""
    count = rows_M.shape[0]
    for m in range(count):
        sound_M[m] = True
    m = unseal(0, count, rows_M, records_MW, keys_W, initial, out_ME)
    while m >= 0:
        sound_M[m] = False
        m = unseal(m + 1, count, rows_M, records_MW, keys_W, initial, out_ME)


@nb.njit(nogil=True, cache=True)
def count_and_sum(records_MW):
    """(written records, sum of checks modulo 2**64): what the superblock keeps of a chunk."""
    last = records_MW.shape[1] - 1
    count = 0
    total = np.uint64(0)
    for m in range(records_MW.shape[0]):
        check = records_MW[m, last]
        if check != 0:
            count += 1
            total += np.uint64(check)
    return count, total
