"""Entries: the tokens of a binary file's dictionary, read in order, a stretch of the file in memory at a time."""

import numpy as np

from bigembed.convert.fields import Fields
from bigembed.kernels.entries import cut_counted, cut_ended
from bigembed.storage.files import File
from bigembed.vocab.packed import PackedTokens

BUFFER_BYTES = 1 << 20  # no entry is longer
SCAN_TOKENS = 1 << 16


class Entries:
    """A position in a dictionary.

    Args:
        file: an open file. at: where the first entry begins. end: where the dictionary ends at the latest.
        tail_bytes: entries are bytes, a zero byte, and so many bytes whose last one is the entry's kind; None: entries
            are a length of 4 bytes and as many bytes, and have no kind.
    """

    def __init__(self, file: File, at: int, end: int, tail_bytes: int | None = None) -> None:
        self._file, self._tail_bytes = file, tail_bytes
        self._next, self._end = at, end  # of the file, not read yet
        self._buffer_B = np.empty(BUFFER_BYTES, np.uint8)
        self._token_B = np.empty(BUFFER_BYTES, np.uint8)
        self._first = self._last = 0  # of the buffer, not cut yet
        self.number = 0  # of the next entry

    @property
    def at(self) -> int:
        """Where the next entry begins in the file."""
        return self._next - (self._last - self._first)

    def take(self, count: int) -> tuple[PackedTokens, np.ndarray]:
        """The next `count` tokens, and their kinds (uint8; 0 where they have none).

        Raises:
            BadSource: the dictionary ends before, or an entry is longer than `BUFFER_BYTES`.
        """
        start_M1, kind_M = np.zeros(count + 1, np.int64), np.zeros(count, np.uint8)
        parts, done, total = [], 0, 0
        while True:
            found, used = self._cut(count - done, start_M1[done + 1 :], kind_M[done:])
            start_M1[done + 1 : done + 1 + found] += total
            parts.append(self._token_B[:used].tobytes())
            done, total = done + found, total + used
            self.number += found
            if done == count:
                return PackedTokens(np.frombuffer(b"".join(parts), np.uint8), start_M1), kind_M
            self._refill()

    def skip(self, count: int) -> int:
        """Step over `count` entries; returns the sum of their kinds."""
        kinds = 0
        while count > 0:
            some = min(count, SCAN_TOKENS)
            kinds += int(self.take(some)[1].sum())
            count -= some
        return kinds

    def _cut(self, most: int, end_M: np.ndarray, kind_M: np.ndarray) -> tuple[int, int]:
        """Cut what the buffer holds; returns the entries and the bytes of their tokens."""
        stretch = (self._buffer_B, self._first, self._last, most)
        if self._tail_bytes is None:
            found, self._first, used = cut_counted(*stretch, self._token_B, end_M)
        else:
            found, self._first, used = cut_ended(*stretch, self._tail_bytes, self._token_B, end_M, kind_M)
        return found, used

    def _refill(self) -> None:
        """Move what is left to the buffer's beginning, and fill it up."""
        left = self._last - self._first
        where = Fields(self._file, self.at, self._end)
        if left == len(self._buffer_B):
            raise where.bad(f"token {self.number} takes more than {left} bytes; the dictionary is damaged.")
        self._buffer_B[:left] = self._buffer_B[self._first : self._last].copy()
        room = min(len(self._buffer_B) - left, self._end - self._next)
        read = self._file.pread_into(self._buffer_B[left : left + room], self._next)
        if read == 0:
            raise where.bad(f"the dictionary ends inside or before token {self.number}: cut off or damaged.")
        self._first, self._last, self._next = 0, left + read, self._next + read
