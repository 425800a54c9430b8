"""Who makes room in a set when it is not the least recently used row: LFU, SIEVE, S3-FIFO, next use.

The arrays of `probing`, whose rules all hold here too (an empty way first; no way whose score is protected),
and one more, mark int64 (sets, ways): what a policy knows of the row in a way, 0 for an empty one.

    LFU       epoch << 32 | count         count, of that epoch, halves with each epoch; an epoch is as many
                                          missed rows as the index has slots
    SIEVE     order << 2 | behind << 1 | visited      the hand stands before the first row that is not behind it
    S3FIFO    order << 3 | in_main << 2 | frequency   frequency 0..3; S (small) and M (main) share one order
    NEXT_USE  the step of the next use, 0 = unknown

order is 1 for the oldest row of a set and grows; only comparisons count. S3FIFO has a ghost int64 (sets, ways)
too: column 0 counts the rows that ever entered it, column 1 + n % (ways of M) holds the n-th, or ABSENT.

A batch marks its hits first, then admits its misses in order of first position, each by one of these rules.

Source: ageing by halving, Redis `src/evict.c` (LFU mode), and Arlitt et al., "Evaluating content management
techniques for Web proxy caches", 2000, for why counts must age; Zhang et al., "SIEVE is simpler than LRU", NSDI
2024, algorithm 1; Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1.
"""

import numba as nb
import numpy as np

from bigembed.kernels.hashing import bucket
from bigembed.kernels.probing import ABSENT

LFU, SIEVE, S3FIFO, NEXT_USE = 1, 2, 3, 4

EPOCH_SHIFT, COUNT_MASK = 32, (1 << 32) - 1
VISITED, BEHIND, SIEVE_SHIFT = 1, 2, 2
FREQUENCY_MASK, IN_MAIN, S3FIFO_SHIFT = 3, 4, 3
SMALL_WAYS = 8  # S3-FIFO's small queue has one in so many ways, at least one
_LAST = 1 << 62  # above every score, order and step


@nb.njit(nogil=True, cache=True)
def use(start, stop, policy, epoch, slots_U, mark_S):
    """Note in mark_S one use of the row in each slot, skipping ABSENT; slots are distinct."""
    for u in range(start, stop):
        slot = slots_U[u]
        if slot >= 0:
            if policy == LFU:
                mark_S[slot] = epoch << EPOCH_SHIFT | min(COUNT_MASK, aged_count(mark_S[slot], epoch) + 1)
            elif policy == SIEVE:
                mark_S[slot] |= VISITED
            elif policy == S3FIFO and mark_S[slot] & FREQUENCY_MASK < FREQUENCY_MASK:
                mark_S[slot] += 1


@nb.njit(nogil=True, cache=True)
def admit(
    owner,
    owners,
    rows_M,
    step,
    protected_from,
    key,
    score,
    policy,
    epoch,
    mark,
    ghost,
    slots_M,
    victims_M,
    victim_scores_M,
    victim_marks_M,
):
    """As `probing.admit`, the way chosen by `policy`; victim_marks_M is the mark that the way had before."""
    sets, ways = key.shape
    first, last = sets * owner // owners, sets * (owner + 1) // owners
    before = np.empty(ways, np.int64)
    for m in range(rows_M.shape[0]):
        home = bucket(rows_M[m], sets)
        if first <= home < last:
            slots_M[m] = victims_M[m] = ABSENT
            victim_scores_M[m] = victim_marks_M[m] = 0
            before[:] = mark[home]
            way = _choose(policy, epoch, step, protected_from, key[home], score[home], mark[home], ghost[home])
            if way != ABSENT:
                slots_M[m] = home * ways + way
                victims_M[m] = key[home, way]
                victim_scores_M[m] = score[home, way]
                victim_marks_M[m] = before[way]
                mark[home, way] = _first_mark(policy, epoch, rows_M[m], way, mark[home], ghost[home])
                key[home, way] = rows_M[m]
                score[home, way] = step


@nb.njit(nogil=True, cache=True)
def _choose(policy, epoch, step, protected_from, key_W, score_W, mark_W, ghost_W):
    """The way that makes room, ABSENT where all are protected."""
    for way in range(score_W.size):
        if score_W[way] == 0:
            return way
    if policy == LFU:
        return _choose_lfu(epoch, protected_from, score_W, mark_W)
    if policy == SIEVE:
        return _choose_sieve(protected_from, score_W, mark_W)
    if policy == S3FIFO:
        return _choose_s3fifo(protected_from, key_W, score_W, mark_W, ghost_W)
    return _choose_next_use(step, protected_from, score_W, mark_W)


@nb.njit(nogil=True, cache=True)
def _first_mark(policy, epoch, row, way, mark_W, ghost_W):
    """The mark of a row that comes into this way, whose old mark still counts for the order."""
    if policy == LFU:
        return epoch << EPOCH_SHIFT | 1
    if policy == SIEVE:
        order = mark_W.max() >> SIEVE_SHIFT
        ahead = 0
        for other in range(mark_W.size):
            ahead += other != way and mark_W[other] > 0 and not mark_W[other] & BEHIND
        if ahead == 0:  # the hand has come to the newest row: it starts again from the oldest
            for other in range(mark_W.size):
                mark_W[other] &= ~BEHIND
        return (order + 1) << SIEVE_SHIFT
    if policy == S3FIFO:
        order = mark_W.max() >> S3FIFO_SHIFT
        in_main = 0
        for n in range(1, main_ways(mark_W.size) + 1):
            if ghost_W[n] == row:
                ghost_W[n] = ABSENT
                in_main = IN_MAIN
        return (order + 1) << S3FIFO_SHIFT | in_main
    return 0


@nb.njit(nogil=True, cache=True)
def aged_count(mark, epoch):
    """LFU's count as of this epoch."""
    return (mark & COUNT_MASK) >> min(np.int64(63), epoch - (mark >> EPOCH_SHIFT))


@nb.njit(nogil=True, cache=True)
def _choose_lfu(epoch, protected_from, score_W, mark_W):
    """The lowest (count, score, way)."""
    chosen, lowest_count, lowest_score = ABSENT, np.int64(_LAST), np.int64(_LAST)
    for way in range(score_W.size):
        if score_W[way] < protected_from:
            count = aged_count(mark_W[way], epoch)
            if count < lowest_count or (count == lowest_count and score_W[way] < lowest_score):
                chosen, lowest_count, lowest_score = way, count, score_W[way]
    return chosen


@nb.njit(nogil=True, cache=True)
def _choose_next_use(step, protected_from, score_W, mark_W):
    """The least recently used of the rows without a use ahead, or else the one whose use is farthest."""
    chosen, lowest = ABSENT, np.int64(2 * _LAST - 1)
    for way in range(score_W.size):
        if score_W[way] < protected_from:
            rank = score_W[way] if mark_W[way] <= step else _LAST + (_LAST - 1 - mark_W[way])
            if rank < lowest:
                chosen, lowest = way, rank
    return chosen


@nb.njit(nogil=True, cache=True)
def _choose_sieve(protected_from, score_W, mark_W):
    """The first unvisited row from the hand on, or else, after a whole turn, the first one.

    The hand passes protected rows and leaves them as they are; of the others it takes the visited bit.
    """
    chosen, lowest = ABSENT, np.int64(_LAST)
    for way in range(mark_W.size):
        # In the order of the hand: visited rows after all others, those behind the hand after those ahead.
        rank = (mark_W[way] & VISITED) << 61 | (mark_W[way] & BEHIND) << 59 | mark_W[way] >> SIEVE_SHIFT
        if score_W[way] < protected_from and rank < lowest:
            chosen, lowest = way, rank
    if chosen == ABSENT:
        return chosen
    turned = mark_W[chosen] & VISITED
    here = (mark_W[chosen] & BEHIND, mark_W[chosen] >> SIEVE_SHIFT)
    for way in range(mark_W.size):
        order = mark_W[way] >> SIEVE_SHIFT
        if score_W[way] < protected_from and (turned or (mark_W[way] & BEHIND, order) < here):
            mark_W[way] &= ~VISITED
        mark_W[way] = mark_W[way] & ~BEHIND | (BEHIND if order < here[1] else 0)
    return chosen


@nb.njit(nogil=True, cache=True)
def main_ways(ways):
    """How many of a set's ways are S3-FIFO's main queue; 0 of a single one."""
    return ways - max(1, ways // SMALL_WAYS)


@nb.njit(nogil=True, cache=True)
def _choose_s3fifo(protected_from, key_W, score_W, mark_W, ghost_W):
    """From S while S has its share: its oldest row, unless used more than once, which moves it to M; else from M.

    A protected row of S waits at its place. Where one queue has only protected rows the other one gives.
    """
    in_small = free_small = free_main = 0
    for way in range(mark_W.size):
        free = score_W[way] < protected_from
        in_small += not mark_W[way] & IN_MAIN
        free_small += free and not mark_W[way] & IN_MAIN
        free_main += free and mark_W[way] & IN_MAIN > 0
    over_share = in_small - max(1, mark_W.size // SMALL_WAYS) + 1
    for _ in range(min(free_small, max(over_share, 1 if free_main == 0 else 0))):
        way = _oldest(0, protected_from, score_W, mark_W)
        if mark_W[way] & FREQUENCY_MASK <= 1:
            _enter_ghost(key_W[way], ghost_W)
            return way
        mark_W[way] = _newest_order(mark_W) + 1 << S3FIFO_SHIFT | IN_MAIN
        free_main += 1
    return _choose_in_main(protected_from, score_W, mark_W) if free_main else ABSENT


@nb.njit(nogil=True, cache=True)
def _choose_in_main(protected_from, score_W, mark_W):
    """The oldest row of M with frequency 0; rows before it go to the young end, with one less.

    A protected row goes there as it is. Whole rounds that find no 0 leave the order alone, so they are taken at
    once: the choice is the lowest (frequency, order).
    """
    chosen, lowest = ABSENT, np.int64(_LAST)
    for way in range(mark_W.size):
        rank = (mark_W[way] & FREQUENCY_MASK) << 60 | mark_W[way] >> S3FIFO_SHIFT
        if mark_W[way] & IN_MAIN and score_W[way] < protected_from and rank < lowest:
            chosen, lowest = way, rank
    rounds = mark_W[chosen] & FREQUENCY_MASK
    for way in range(mark_W.size):
        if mark_W[way] & IN_MAIN and score_W[way] < protected_from:
            mark_W[way] -= rounds
    while True:
        way = _oldest(IN_MAIN, np.int64(_LAST), score_W, mark_W)
        if way == chosen:
            return chosen
        frequency = mark_W[way] & FREQUENCY_MASK
        if score_W[way] < protected_from:
            frequency -= 1
        mark_W[way] = _newest_order(mark_W) + 1 << S3FIFO_SHIFT | IN_MAIN | frequency


@nb.njit(nogil=True, cache=True)
def _oldest(queue, below, score_W, mark_W):
    """The oldest way of a queue (0 or IN_MAIN) with a score below this."""
    chosen = ABSENT
    for way in range(mark_W.size):
        if mark_W[way] & IN_MAIN == queue and score_W[way] < below and (chosen < 0 or mark_W[way] < mark_W[chosen]):
            chosen = way
    return chosen


@nb.njit(nogil=True, cache=True)
def _newest_order(mark_W):
    return mark_W.max() >> S3FIFO_SHIFT


@nb.njit(nogil=True, cache=True)
def _enter_ghost(row, ghost_W):
    """Remember a row that left S, in place of the one remembered longest."""
    room = main_ways(ghost_W.size)
    if room:
        ghost_W[1 + ghost_W[0] % room] = row
        ghost_W[0] += 1
