"""The set-associative index as loops over plain arrays: which slot holds a row, and who makes room for one.

key and score are int64 of shape (sets, ways). key is the row in a way, or ABSENT; score is the step of its
last use, 0 for an empty way, so that the lowest score is an empty way or else the least recently used one.
A row lives in a way of set `bucket(row, sets)`; slot = set * ways + way.
"""

import numba as nb

from bigembed.kernels.bare import BARE
from bigembed.kernels.hashing import bucket
from bigembed.kernels.prefetch import prefetch_item

ABSENT = -1
AHEAD = 16  # rows whose sets are asked for before the loop comes to them
LINE_KEYS = 8  # in a 64-byte cache line


@nb.njit(**BARE)
def find(start, stop, key, rows_U, slots_U):
    """slots_U[u] = the slot of rows_U[u], or ABSENT."""
    sets, ways = key.shape
    for u in range(start, stop):
        if u + AHEAD < stop:
            coming = bucket(rows_U[u + AHEAD], sets) * ways
            for way in range(0, ways, LINE_KEYS):
                prefetch_item(key, coming + way)
        row, home, slot = rows_U[u], bucket(rows_U[u], sets), ABSENT
        for way in range(ways):  # all of them: a way out would be a guess for the processor
            if key[home, way] == row:
                slot = home * ways + way
        slots_U[u] = slot


@nb.njit(**BARE)
def find_loaded(start, stop, loaded_S, rows_U, slots_U):
    """slots_U[u] = rows_U[u] where it is loaded, or ABSENT: `find` of an index with slot = row."""
    for u in range(start, stop):
        if u + AHEAD < stop:
            prefetch_item(loaded_S, rows_U[u + AHEAD])
        row = rows_U[u]
        slots_U[u] = row if loaded_S[row] else ABSENT


@nb.njit(**BARE)
def touch(start, stop, slots_U, step, score_S):
    """score_S = step at each slot of slots_U, skipping ABSENT; slots are distinct, so each has one writer."""
    for u in range(start, stop):
        slot = slots_U[u]
        if slot >= 0:
            score_S[slot] = step


@nb.njit(**BARE)
def touch_again(slots_N, step, score_S):
    """`touch` of slots that may repeat, all in use; returns how many distinct ones there are."""
    distinct = 0
    for n in range(slots_N.shape[0]):
        if n + AHEAD < slots_N.shape[0]:
            prefetch_item(score_S, slots_N[n + AHEAD])
        slot = slots_N[n]
        distinct += score_S[slot] != step
        score_S[slot] = step
    return distinct


@nb.njit(**BARE)
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


@nb.njit(**BARE)
def count_misplaced(key):
    """How many rows sit in a set that is not theirs; 0 in a sound index."""
    sets, ways = key.shape
    misplaced = 0
    for home in range(sets):
        for way in range(ways):
            if key[home, way] != ABSENT and bucket(key[home, way], sets) != home:
                misplaced += 1
    return misplaced
