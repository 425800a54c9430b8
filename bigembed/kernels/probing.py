"""The set-associative index as loops over plain arrays: which slot holds a row, and who makes room for one.

key and score are int64 of shape (sets, ways). key is the row in a way, or ABSENT; score is the step of its
last use, 0 for an empty way, so that the lowest score is an empty way or else the least recently used one.
A row lives in a way of set `bucket(row, sets)`; slot = set * ways + way.
"""

import numba as nb

from bigembed.kernels.hashing import bucket

ABSENT = -1
BLOCK_ROWS = 128  # their sets, 128 bytes each with 16 ways, stay in the first-level cache


@nb.njit(nogil=True, cache=True)
def find(start, stop, key, rows_U, slots_U):
    """slots_U[u] = the slot of rows_U[u], or ABSENT. What it returns means nothing."""
    sets, ways = key.shape
    loaded = 0
    for first in range(start, stop, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, stop)
        # The search below leaves its loop at a place no processor can predict, which makes every load wait for
        # the one before. So a block's sets are loaded first; returning `loaded` keeps the compiler from
        # dropping that.
        for u in range(first, last):
            home = bucket(rows_U[u], sets)
            slots_U[u] = home
            loaded ^= key[home, 0] ^ key[home, ways // 2]
        for u in range(first, last):
            row, home = rows_U[u], slots_U[u]
            slot = ABSENT
            for way in range(ways):
                if key[home, way] == row:
                    slot = home * ways + way
                    break
            slots_U[u] = slot
    return loaded


@nb.njit(nogil=True, cache=True)
def touch(start, stop, slots_U, step, score_S):
    """score_S = step at each slot of slots_U, skipping ABSENT; slots are distinct, so each has one writer."""
    for u in range(start, stop):
        slot = slots_U[u]
        if slot >= 0:
            score_S[slot] = step


@nb.njit(nogil=True, cache=True)
def admit(owner, owners, rows_M, step, protected_from, key, score, slots_M, victims_M, victim_scores_M):
    """Give each missed row of this owner's sets the way with the lowest (score, way) below protected_from.

    A way just given has score step >= protected_from, so the m-th miss of a set takes its m-th way. slots_M
    is the slot given, or ABSENT where all are protected; victims_M and victim_scores_M what it held before.
    """
    sets, ways = key.shape
    first, last = sets * owner // owners, sets * (owner + 1) // owners
    for m in range(rows_M.shape[0]):
        home = bucket(rows_M[m], sets)
        if first <= home < last:
            lowest, chosen = protected_from, ABSENT
            for way in range(ways):
                if score[home, way] < lowest:
                    lowest, chosen = score[home, way], way
            slots_M[m] = ABSENT
            victims_M[m] = ABSENT
            victim_scores_M[m] = 0
            if chosen >= 0:
                slots_M[m] = home * ways + chosen
                victims_M[m] = key[home, chosen]
                victim_scores_M[m] = lowest
                key[home, chosen] = rows_M[m]
                score[home, chosen] = step


@nb.njit(nogil=True, cache=True)
def count_misplaced(key):
    """How many rows sit in a set that is not theirs; 0 in a sound index."""
    sets, ways = key.shape
    misplaced = 0
    for home in range(sets):
        for way in range(ways):
            if key[home, way] != ABSENT and bucket(key[home, way], sets) != home:
                misplaced += 1
    return misplaced
