"""Tokens as bytes: their hash, which is the same on every machine, and how stored ones are found.

A token's hash starts as seed ^ length * GOLDEN; then for each 8 bytes, as a little-endian word and the last one filled
up with zeros, hash = mix64(hash ^ word); and mix64 once more at the end. All modulo 2**64.

The index is slots_S, uint64: (low 24 bits of the hash << 40) | (entry + 1), or 0 for an empty one. A token's home is
the slot hash * num_homes >> 64; from there on to the first empty slot it may be anywhere. `tokens_B` holds, one after
the other, each entry's length (7 bits a byte, low ones first, the top bit says that more follow) and its bytes;
blocks_C is where every 16th begins.
"""

import numba as nb
import numpy as np

from bigembed.kernels.bare import BARE
from bigembed.kernels.hashing import GOLDEN, mix64

ABSENT = -1
BLOCK_ENTRIES = 16  # between two places in blocks_C
BLOCK_SHIFT = 4
ENTRY_BITS = 40
FINGERPRINT_MASK = np.uint64((1 << 24) - 1)

_ENTRY_SHIFT = np.uint64(ENTRY_BITS)
_ENTRY_MASK = np.uint64((1 << ENTRY_BITS) - 1)
_LOW_32 = np.uint64(0xFFFFFFFF)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_ZERO, _O1, _O2, _O3, _O4, _O5, _O6, _O7 = [np.uint64(i) for i in range(8)]
_S8, _S16, _S24, _S32, _S40, _S48, _S56 = [np.uint64(8 * i) for i in range(1, 8)]


@nb.njit(**BARE)
def word_at(bytes_B, at):
    """The 8 bytes from `at` on, which must be there, as a little-endian word; one load once compiled."""
    i = np.uint64(at)
    return (
        np.uint64(bytes_B[i])
        | (np.uint64(bytes_B[i + _O1]) << _S8)
        | (np.uint64(bytes_B[i + _O2]) << _S16)
        | (np.uint64(bytes_B[i + _O3]) << _S24)
        | (np.uint64(bytes_B[i + _O4]) << _S32)
        | (np.uint64(bytes_B[i + _O5]) << _S40)
        | (np.uint64(bytes_B[i + _O6]) << _S48)
        | (np.uint64(bytes_B[i + _O7]) << _S56)
    )


@nb.njit(**BARE)
def last_word(bytes_B, at, count):
    """The 1 to 7 bytes from `at` on, filled up with zeros to a word."""
    word = _ZERO
    if at + 8 <= bytes_B.shape[0]:
        word = word_at(bytes_B, at) & (_ALL >> np.uint64(64 - 8 * count))
    else:
        for i in range(count):
            word |= np.uint64(bytes_B[at + i]) << np.uint64(8 * i)
    return word


@nb.njit(**BARE)
def hash_of(bytes_B, first, last, seed):
    """The hash of the token bytes_B[first:last]."""
    found = seed ^ (np.uint64(last - first) * GOLDEN)
    while first + 8 <= last:
        found = mix64(found ^ word_at(bytes_B, first))
        first += 8
    if first < last:
        found = mix64(found ^ last_word(bytes_B, first, last - first))
    return mix64(found)


@nb.njit(**BARE)
def hash_tokens(start, stop, bytes_B, start_M1, out_M, seed=_ZERO):
    """out_M[m] (uint64) = the hash of the token bytes_B[start_M1[m] : start_M1[m + 1]]."""
    for m in range(start, stop):
        out_M[m] = hash_of(bytes_B, start_M1[m], start_M1[m + 1], seed)


@nb.njit(**BARE)
def are_equal(a_B, first_a, b_B, first_b, count):
    """Whether `count` bytes are the same."""
    while count >= 8:
        if word_at(a_B, first_a) != word_at(b_B, first_b):
            return False
        first_a, first_b, count = first_a + 8, first_b + 8, count - 8
    return count == 0 or last_word(a_B, first_a, count) == last_word(b_B, first_b, count)


@nb.njit(**BARE)
def home_of(token_hash, num_homes):
    """token_hash * num_homes >> 64; num_homes < 2**32."""
    homes = np.uint64(num_homes)
    return np.int64(((token_hash >> _S32) * homes + (((token_hash & _LOW_32) * homes) >> _S32)) >> _S32)


@nb.njit(**BARE)
def slot_of(token_hash, entry, mask):
    """What the index holds for an entry; mask is FINGERPRINT_MASK but in tests that want fingerprints to be equal."""
    return ((token_hash & mask) << _ENTRY_SHIFT) | np.uint64(entry + 1)


@nb.njit(**BARE)
def entry_in(slot):
    return np.int64(slot & _ENTRY_MASK) - 1


@nb.njit(**BARE)
def next_candidate(at, fingerprint, slots_S):
    """The first slot from `at` on with this fingerprint, or ABSENT where an empty one or the end comes first."""
    found = ABSENT
    while at < slots_S.shape[0] and slots_S[at] != _ZERO:
        if slots_S[at] >> _ENTRY_SHIFT == fingerprint:
            found = at
            break
        at += 1
    return found


@nb.njit(**BARE)
def read_length(tokens_B, at):
    """(length of the entry at byte `at`, where its bytes begin); (-1, at) where no whole entry is."""
    size = tokens_B.shape[0]
    length, shift, position = np.int64(0), 0, at
    while 0 <= position < size and shift < 35:
        byte = np.int64(tokens_B[position])
        length |= (byte & 127) << shift
        position += 1
        shift += 7
        if byte < 128:
            if length <= size - position:
                return length, position
            break
    return np.int64(-1), at


@nb.njit(**BARE)
def find_entry(entry, tokens_B, blocks_C):
    """(length, where its bytes begin) of an entry; (-1, 0) where the files are damaged."""
    block = entry >> BLOCK_SHIFT
    if not 0 <= block < blocks_C.shape[0]:
        return np.int64(-1), np.int64(0)
    at, size = np.int64(blocks_C[block]), tokens_B.shape[0]
    for _ in range(entry & (BLOCK_ENTRIES - 1)):
        if not 0 <= at < size:
            return np.int64(-1), np.int64(0)
        byte = np.int64(tokens_B[np.uint64(at)])
        if byte < 128:  # nearly always; what it leads to is checked by the next step
            at += byte + 1
        else:
            length, at = read_length(tokens_B, at)
            if length < 0:
                return np.int64(-1), np.int64(0)
            at += length
    return read_length(tokens_B, at)
