"""AddedTokens: the tokens of the log, indexed in memory."""

import numpy as np

from bigembed import threads
from bigembed.kernels.token_map import find_among, put_distinct
from bigembed.kernels.tokens import ABSENT
from bigembed.vocab.packed import PackedTokens, hashes

MAX_FILL = 0.7


def first_of_each(tokens: PackedTokens, seed: int) -> np.ndarray:
    """int64 (M,): the first position of the same token; equals a dict's setdefault over all."""
    hash_M, first_M, sealed = hashes(tokens, seed), np.empty(len(tokens), np.int64), tokens.sealed()
    put_distinct(0, sealed.bytes_B, sealed.start_M1, hash_M, _empty_slots(len(tokens)), first_M)
    return first_M


def _empty_slots(count: int) -> np.ndarray:
    """Room for `count` tokens."""
    return np.zeros(1 << max(4, int(np.ceil(np.log2(max(1, count) / MAX_FILL)))), np.uint64)


class AddedTokens:
    """Tokens in the order they were added, and the row of each, ascending; equals a dict where the first one wins.

    About 8 bytes for the row, 8 for the start and 11 to 23 for the index of each, beside the token.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._bytes_B = np.empty(0, np.uint8)
        self._start_K1 = np.zeros(1, np.int64)
        self._row_K = np.empty(0, np.int64)
        self._slots_S = _empty_slots(0)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> np.ndarray:
        """int64 (K,), ascending."""
        return self._row_K[: self._count]

    @property
    def packed(self) -> PackedTokens:
        return PackedTokens(self._bytes_B, self._start_K1[: self._count + 1]).sealed()

    @property
    def memory_bytes(self) -> int:
        return self._bytes_B.nbytes + self._start_K1.nbytes + self._row_K.nbytes + self._slots_S.nbytes

    def append(self, tokens: PackedTokens, row_M: np.ndarray) -> None:
        """Add tokens with their rows, which are above those before; another thread may `find` meanwhile."""
        old, count = self._count, self._count + len(tokens)
        first_byte, end = int(self._start_K1[old]), int(self._start_K1[old] + tokens.start_M1[-1] - tokens.start_M1[0])
        self._bytes_B = _with_room(self._bytes_B, first_byte, end)
        self._start_K1 = _with_room(self._start_K1, old + 1, count + 1)
        self._row_K = _with_room(self._row_K, old, count)
        self._bytes_B[first_byte:end] = tokens.bytes_B[tokens.start_M1[0] : tokens.start_M1[-1]]
        self._start_K1[old + 1 : count + 1] = tokens.start_M1[1:] - tokens.start_M1[0] + first_byte
        self._row_K[old:count] = row_M
        self._count, slots_S = count, self._slots_S
        if count > MAX_FILL * len(slots_S):
            slots_S, old = _empty_slots(2 * count), 0
        known = self.packed
        hash_M, first_M = hashes(known.between(old, count), self._seed), np.empty(count - old, np.int64)
        put_distinct(old, known.bytes_B, known.start_M1, hash_M, slots_S, first_M)
        self._slots_S = slots_S

    def find(self, tokens: PackedTokens) -> np.ndarray:
        """int64 (M,): the row of each token, ABSENT for unknown ones."""
        if not self._count:
            return np.full(len(tokens), ABSENT, np.int64)
        found_M, known, tokens = np.empty(len(tokens), np.int64), self.packed, tokens.sealed()
        args = (hashes(tokens, self._seed), known.bytes_B, known.start_M1, self._slots_S, found_M)
        threads.run(find_among, len(tokens), tokens.bytes_B, tokens.start_M1, *args)
        return np.where(found_M == ABSENT, ABSENT, self._row_K[found_M])

    def positions_of(self, row_N: np.ndarray) -> np.ndarray:
        """int64 (N,): which token has each row, ABSENT for rows that were not added."""
        if not self._count:
            return np.full(len(row_N), ABSENT, np.int64)
        at_N = np.minimum(np.searchsorted(self.rows, row_N), self._count - 1)
        return np.where(self.rows[at_N] == row_N, at_N, ABSENT)


def _with_room(array: np.ndarray, used: int, count: int) -> np.ndarray:
    """The array itself, or a copy of its used part with room for `count` items and more."""
    if count <= len(array):
        return array
    larger = np.empty(max(count, 2 * len(array)), array.dtype)
    larger[:used] = array[:used]
    return larger
