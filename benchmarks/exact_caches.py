"""Caches that nobody builds but everybody is compared with: exact LRU and Belady's MIN, fully associative.

Both see what the index sees: the hits of a batch are marked first, then its misses come in. Ids are dense, 0..V-1.
"""

import heapq

import numba as nb
import numpy as np


def lru_hits(batches: list[np.ndarray], num_ids: int, slots: int) -> np.ndarray:
    """Hits of each batch in a least recently used list of `slots` ids."""
    ring = _new_ring(num_ids)
    count = np.zeros(1, np.int64)
    return np.array([_lru_step(ids_U, *ring, count, slots) for ids_U in batches])


def lru_record_hits(batches: list[np.ndarray], first_page: list[np.ndarray], num_pages: int, pages: int) -> np.ndarray:
    """Record hits of each batch in an exact LRU of `pages` pages, as the kernel sees reads: record after record.

    Args:
        batches: the last page of each record; first_page: the first one, which is nearly always the same.
    """
    ring = _new_ring(num_pages)
    count = np.zeros(1, np.int64)
    pairs = zip(first_page, batches, strict=True)
    return np.array([_record_step(first_U, last_U, *ring, count, pages) for first_U, last_U in pairs])


def belady_hits(batches: list[np.ndarray], num_ids: int, slots: int) -> np.ndarray:
    """Hits of each batch if the ids kept are those used again soonest; an id may pass by. No cache hits more often."""
    upcoming = np.full(num_ids, len(batches), np.int64)
    next_steps = []
    for step in range(len(batches) - 1, -1, -1):
        next_steps.append(upcoming[batches[step]])
        upcoming[batches[step]] = step
    edges = np.cumsum([0] + [batch.size for batch in batches])
    return _belady(np.concatenate(batches), np.concatenate(next_steps[::-1]), edges, num_ids, slots)


def _new_ring(num_ids: int) -> tuple[np.ndarray, np.ndarray]:
    """Links to the older and the newer neighbour; the last entry is the ring's head. -1: not in the ring."""
    older, newer = np.full(num_ids + 1, -1, np.int64), np.full(num_ids + 1, -1, np.int64)
    older[num_ids] = newer[num_ids] = num_ids
    return older, newer


@nb.njit(cache=True)
def _use(one, older, newer, count, capacity):
    """Make `one` the newest, in place of the oldest where the ring is full; True if it was there."""
    head = older.size - 1
    was_there = older[one] >= 0
    if was_there:
        older[newer[one]], newer[older[one]] = older[one], newer[one]
    elif count[0] == capacity:
        oldest = newer[head]
        newer[head], older[newer[oldest]] = newer[oldest], head
        older[oldest] = newer[oldest] = -1
    else:
        count[0] += 1
    older[one], newer[one] = older[head], head
    newer[older[head]] = one
    older[head] = one
    return was_there


@nb.njit(cache=True)
def _lru_step(ids_U, older, newer, count, slots):
    missed = np.empty_like(ids_U)
    misses = 0
    for one in ids_U:
        if older[one] >= 0:
            _use(one, older, newer, count, slots)
        else:
            missed[misses] = one
            misses += 1
    for one in missed[:misses]:
        _use(one, older, newer, count, slots)
    return ids_U.size - misses


@nb.njit(cache=True)
def _record_step(first_U, last_U, older, newer, count, pages):
    hits = 0
    for u in range(first_U.size):
        whole = _use(first_U[u], older, newer, count, pages)
        if last_U[u] != first_U[u]:
            whole &= _use(last_U[u], older, newer, count, pages)
        hits += whole
    return hits


@nb.njit(cache=True)
def _belady(ids, next_steps, edges, num_ids, slots):
    kept_until = np.full(num_ids, -1, np.int64)  # the step of an id's next use, -1 where it is not in the cache
    hits = np.zeros(edges.size - 1, np.int64)
    farthest = [(np.int64(0), np.int64(0))]
    farthest.clear()
    used = 0
    for step in range(hits.size):
        for at in range(edges[step], edges[step + 1]):
            one = ids[at]
            if kept_until[one] >= 0:
                hits[step] += 1
            else:
                used += 1
            kept_until[one] = next_steps[at]
            heapq.heappush(farthest, (-next_steps[at], one))
        while used > slots:
            negative, one = heapq.heappop(farthest)
            if kept_until[one] == -negative:  # or else an entry of a use that is over
                kept_until[one] = -1
                used -= 1
    return hits
