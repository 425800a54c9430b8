"""Many tokens looked up at once in the stored index, and many entries read; see kernels/tokens.py for what is where."""

from typing import NamedTuple

import numba as nb
import numpy as np

from bigembed.kernels.tokens import (
    ABSENT,
    BARE,
    BLOCK_ENTRIES,
    BLOCK_SHIFT,
    are_equal,
    entry_in,
    find_entry,
    hash_of,
    home_of,
    next_candidate,
    read_length,
)

WINDOW = 128  # tokens whose slots, blocks and bytes are asked for before any is used
_LINE = 64
_SLOT_SHIFT, _SLOT_MASK = np.uint64(39), (1 << 39) - 1


class TokenBytes(NamedTuple):
    """The entries: tokens_T is uint8, blocks_C uint64."""

    tokens_T: np.ndarray
    blocks_C: np.ndarray
    num_entries: int


class TokenIndex(NamedTuple):
    """The index over them: slots_S, seed and mask are uint64."""

    slots_S: np.ndarray
    num_homes: int
    seed: np.uint64
    mask: np.uint64


@nb.njit(**BARE)
def find_tokens(start, stop, bytes_B, start_M1, index, entries, out_M):
    """out_M[m] = the entry that holds the token bytes_B[start_M1[m] : start_M1[m + 1]], or ABSENT.

    Where the files contradict themselves, out_M[m] is -2 - 2 * slot (which names an entry that cannot be) or
    -3 - 2 * entry (whose bytes cannot be found). Returns the first such m, or -1; the second number means nothing.
    """
    # The work goes in windows and there in steps: all slots, then all blocks, then all bytes, so that the loads of a
    # step wait for memory together. Returning `loaded` keeps the compiler from dropping those that only come early.
    slots_S, tokens_T, blocks_C = index.slots_S, entries.tokens_T, entries.blocks_C
    loaded = np.uint64(0)
    damaged = -1
    for first in range(start, stop, WINDOW):
        last = min(first + WINDOW, stop)
        for m in range(first, last):  # out_M holds fingerprint and slot until the answer is there
            found = hash_of(bytes_B, start_M1[m], start_M1[m + 1], index.seed)
            slot = home_of(found, index.num_homes)
            out_M[m] = np.int64((found & index.mask) << _SLOT_SHIFT) | slot
            loaded ^= slots_S[slot]
        for m in range(first, last):
            fingerprint = np.uint64(out_M[m]) >> _SLOT_SHIFT
            slot = next_candidate(out_M[m] & _SLOT_MASK, fingerprint, slots_S)
            out_M[m] = np.int64(fingerprint << _SLOT_SHIFT) | slot
            loaded ^= _block_of(slot, slots_S, blocks_C)
        for m in range(first, last):
            if out_M[m] >= 0:
                at = np.int64(_block_of(out_M[m] & _SLOT_MASK, slots_S, blocks_C))
                if 0 <= at < tokens_T.shape[0] - _LINE:
                    loaded ^= np.uint64(tokens_T[at] ^ tokens_T[at + _LINE])
        for m in range(first, last):
            if out_M[m] >= 0:
                fingerprint, slot = np.uint64(out_M[m]) >> _SLOT_SHIFT, out_M[m] & _SLOT_MASK
                out_M[m] = _settle(bytes_B, start_M1[m], start_M1[m + 1], slot, fingerprint, slots_S, entries)
                if out_M[m] < ABSENT and damaged < 0:
                    damaged = m
    return damaged, loaded


@nb.njit(**BARE)
def _block_of(slot, slots_S, blocks_C):
    """Where the block of the entry in a slot begins; 0 where there is none."""
    if slot >= 0:
        block = entry_in(slots_S[slot]) >> BLOCK_SHIFT
        if 0 <= block < blocks_C.shape[0]:
            return blocks_C[block]
    return np.uint64(0)


@nb.njit(**BARE)
def _settle(bytes_B, first, last, slot, fingerprint, slots_S, entries):
    """The entry that is this token, among the candidates from a slot on, or ABSENT; damage as find_tokens says."""
    while slot >= 0:
        entry = entry_in(slots_S[slot])
        if not 0 <= entry < entries.num_entries:
            return -2 - 2 * slot
        length, at = find_entry(entry, entries.tokens_T, entries.blocks_C)
        if length < 0:
            return -3 - 2 * entry
        if length == last - first and are_equal(bytes_B, first, entries.tokens_T, at, length):
            return entry
        slot = next_candidate(slot + 1, fingerprint, slots_S)
    return ABSENT


@nb.njit(**BARE)
def home_slots(start, stop, hash_M, num_homes, out_M):
    """out_M[m] = the slot where the search for a hash begins."""
    for m in range(start, stop):
        out_M[m] = home_of(hash_M[m], num_homes)


@nb.njit(**BARE)
def first_candidates(start, stop, hash_M, index, out_M):
    """out_M[m] = the first entry with the fingerprint of a hash, or ABSENT: the one whose bytes will be read."""
    for m in range(start, stop):
        slot = next_candidate(home_of(hash_M[m], index.num_homes), hash_M[m] & index.mask, index.slots_S)
        out_M[m] = entry_in(index.slots_S[slot]) if slot >= 0 else ABSENT


@nb.njit(**BARE)
def locate_entries(start, stop, entry_N, entries, offset_N, length_N):
    """Where the bytes of each entry are in tokens_T, and how many; 0 and 0 for ABSENT.

    Returns the first n whose entry cannot be found, or -1.
    """
    for n in range(start, stop):
        offset_N[n], length_N[n] = 0, 0
        if entry_N[n] != ABSENT:
            length, at = np.int64(-1), np.int64(0)
            if 0 <= entry_N[n] < entries.num_entries:
                length, at = find_entry(entry_N[n], entries.tokens_T, entries.blocks_C)
            if length < 0:
                return n
            offset_N[n], length_N[n] = at, length
    return -1


@nb.njit(**BARE)
def same_entries(start, stop, a_N, b_N, entries, out_N):
    """out_N[n] = whether two entries hold the same token; returns the first n with one that cannot be found, or -1."""
    for n in range(start, stop):
        length_a, at_a = find_entry(a_N[n], entries.tokens_T, entries.blocks_C)
        length_b, at_b = find_entry(b_N[n], entries.tokens_T, entries.blocks_C)
        if length_a < 0 or length_b < 0:
            return n
        out_N[n] = length_a == length_b and are_equal(entries.tokens_T, at_a, entries.tokens_T, at_b, length_a)
    return -1


@nb.njit(**BARE)
def copy_ranges(start, stop, source_B, offset_N, length_N, start_N1, out_B):
    """out_B[start_N1[n] : start_N1[n] + length_N[n]] = the bytes of source_B from offset_N[n] on."""
    for n in range(start, stop):
        to, at = start_N1[n], offset_N[n]
        for i in range(length_N[n]):
            out_B[to + i] = source_B[at + i]


@nb.njit(**BARE)
def walk_entries(first, last, at, entries):
    """Step over entries first to last - 1, the first of which is at byte `at`; returns (-1, the byte after them).

    Or (entry, at) where one's length leads out of the file, or a block is elsewhere than blocks_C says.
    """
    for entry in range(first, last):
        if entry & (BLOCK_ENTRIES - 1) == 0 and np.int64(entries.blocks_C[entry >> BLOCK_SHIFT]) != at:
            return entry, at
        length, begins = read_length(entries.tokens_T, at)
        if length < 0:
            return entry, at
        at = begins + length
    return -1, at


@nb.njit(**BARE)
def find_rows(start, stop, row_N, hash_N, index, rows_E, out_N):
    """out_N[n] = the first entry whose row is row_N[n], or ABSENT; -2 - 2 * slot where a slot names no entry.

    Returns the first such n, or -1.
    """
    damaged = -1
    for n in range(start, stop):
        fingerprint = hash_N[n] & index.mask
        slot = next_candidate(home_of(hash_N[n], index.num_homes), fingerprint, index.slots_S)
        out_N[n] = ABSENT
        while slot >= 0:
            entry = entry_in(index.slots_S[slot])
            if not 0 <= entry < rows_E.shape[0]:
                out_N[n] = -2 - 2 * slot
                if damaged < 0:
                    damaged = n
                break
            if rows_E[entry] == row_N[n]:
                out_N[n] = entry
                break
            slot = next_candidate(slot + 1, fingerprint, index.slots_S)
    return damaged
