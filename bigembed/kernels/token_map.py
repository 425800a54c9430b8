"""A hash map of tokens in memory: slots as in the stored index, in an array of a power of two that wraps around."""

import numba as nb
import numpy as np

from bigembed.kernels.tokens import ABSENT, BARE, FINGERPRINT_MASK, are_equal, entry_in, home_of, slot_of

_ENTRY_SHIFT = np.uint64(40)
_ZERO = np.uint64(0)


@nb.njit(**BARE)
def put_distinct(first, bytes_B, start_K1, hash_M, slots_S, out_M):
    """Put the tokens from `first` on, which have the hashes hash_M, into an index that has those before.

    out_M[m] = the first token that is the same as number first + m. slots_S must keep empty ones.
    """
    wrap = np.int64(slots_S.shape[0] - 1)
    for m in range(hash_M.shape[0]):
        k = first + m
        found = _find(k, bytes_B, start_K1, hash_M[m], bytes_B, start_K1, slots_S)
        if found == ABSENT:
            found = k
            at = home_of(hash_M[m], slots_S.shape[0])
            while slots_S[at] != _ZERO:
                at = (at + 1) & wrap
            slots_S[at] = slot_of(hash_M[m], k, FINGERPRINT_MASK)
        out_M[m] = found


@nb.njit(**BARE)
def find_among(start, stop, bytes_B, start_M1, hash_M, known_B, known_K1, slots_S, out_M):
    """out_M[m] = the token of known_B that is the same, or ABSENT."""
    for m in range(start, stop):
        out_M[m] = _find(m, bytes_B, start_M1, hash_M[m], known_B, known_K1, slots_S)


@nb.njit(**BARE)
def _find(m, bytes_B, start_M1, token_hash, known_B, known_K1, slots_S):
    wrap = np.int64(slots_S.shape[0] - 1)
    fingerprint = token_hash & FINGERPRINT_MASK
    at = home_of(token_hash, slots_S.shape[0])
    length = start_M1[m + 1] - start_M1[m]
    while slots_S[at] != _ZERO:
        if slots_S[at] >> _ENTRY_SHIFT == fingerprint:
            k = entry_in(slots_S[at])
            is_here = k + 1 < known_K1.shape[0]  # another thread may just have put one that the caller does not see yet
            same_length = is_here and known_K1[k + 1] - known_K1[k] == length
            if same_length and are_equal(bytes_B, start_M1[m], known_B, known_K1[k], length):
                return k
        at = (at + 1) & wrap
    return np.int64(ABSENT)
