"""Loops that write the files of a vocabulary; kernels/token_search.py reads them."""

import numba as nb
import numpy as np

from bigembed.kernels.hashing import GOLDEN, mix64
from bigembed.kernels.tokens import entry_in, home_of, slot_of

_ENTRY_SHIFT = np.uint64(40)
_PARTITION_SHIFT = np.uint64(56)
_ZERO = np.uint64(0)


@nb.njit(nogil=True, cache=True)
def encoded_lengths(start, stop, start_M1, out_M):
    """out_M[m] = the bytes that a token takes in the file, its length included."""
    for m in range(start, stop):
        length = start_M1[m + 1] - start_M1[m]
        out_M[m] = length + 1
        while length >= 128:
            length >>= 7
            out_M[m] += 1


@nb.njit(nogil=True, cache=True)
def encode_tokens(start, stop, bytes_B, start_M1, at_M, out_T):
    """Write each token's length and bytes into out_T from at_M[m] on."""
    for m in range(start, stop):
        at, length = at_M[m], start_M1[m + 1] - start_M1[m]
        rest = length
        while rest >= 128:
            out_T[at] = np.uint8(rest & 127 | 128)
            at += 1
            rest >>= 7
        out_T[at] = np.uint8(rest)
        at += 1
        for i in range(length):
            out_T[at + i] = bytes_B[start_M1[m] + i]


@nb.njit(nogil=True, cache=True)
def hash_rows(start, stop, rows_M, seed, out_M):
    """out_M[m] = mix64(seed ^ row * GOLDEN)."""
    for m in range(start, stop):
        out_M[m] = mix64(seed ^ (np.uint64(rows_M[m]) * GOLDEN))


@nb.njit(nogil=True, cache=True)
def by_partition(hash_K, entry_K, count_P, pairs_K2):
    """Sort pairs by the top 8 bits of the hash, otherwise in their order; count_P gets how many each has."""
    count_P[:] = 0
    for k in range(hash_K.shape[0]):
        count_P[hash_K[k] >> _PARTITION_SHIFT] += 1
    next_P = np.zeros(count_P.shape[0], np.int64)
    for p in range(1, count_P.shape[0]):
        next_P[p] = next_P[p - 1] + count_P[p - 1]
    for k in range(hash_K.shape[0]):
        p = hash_K[k] >> _PARTITION_SHIFT
        pairs_K2[next_P[p], 0] = hash_K[k]
        pairs_K2[next_P[p], 1] = np.uint64(entry_K[k])
        next_P[p] += 1


@nb.njit(nogil=True, cache=True)
def fill_slots(pairs_K2, mask, num_homes, first_slot, slots_L, doubt_K):
    """Put pairs into slots_L, which is the index from first_slot on; returns how many are in doubt.

    Doubtful is a pair with the fingerprint of one before it on its way: it may be the same thing again, and only its
    bytes tell. doubt_K[:, 0] is which pair, doubt_K[:, 1] the earlier entry.
    """
    doubtful = 0
    for k in range(pairs_K2.shape[0]):
        fingerprint = pairs_K2[k, 0] & mask
        at = home_of(pairs_K2[k, 0], num_homes) - first_slot
        while slots_L[at] != _ZERO and slots_L[at] >> _ENTRY_SHIFT != fingerprint:
            at += 1
        if slots_L[at] == _ZERO:
            slots_L[at] = slot_of(pairs_K2[k, 0], np.int64(pairs_K2[k, 1]), mask)
        else:
            doubt_K[doubtful, 0] = k
            doubt_K[doubtful, 1] = entry_in(slots_L[at])
            doubtful += 1
    return doubtful
