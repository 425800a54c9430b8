"""LineBatch: some whole lines of a buffer, read into rows by the kernel; what it leaves open the caller settles."""

from collections.abc import Callable

import numpy as np

from bigembed import threads
from bigembed.convert.source import Block
from bigembed.convert.streamed import packed
from bigembed.kernels.decimals import powers_of_five
from bigembed.kernels.text import BLANK, GOOD, UNSURE, read_lines

GRAIN_BYTES = 64 << 10  # of text that are worth a second thread


class LineBatch:
    """Lines `start_L` to `stop_L` (their line feeds) of a buffer, read.

    Args:
        dim: D.
        space_for: gives float32 (rows, D).

    Attributes:
        lines: int64, which of them are not blank and not past the `limit`.
    """

    def __init__(
        self,
        buffer_B: np.ndarray,
        start_L: np.ndarray,
        stop_L: np.ndarray,
        dim: int,
        space_for: Callable[[int], np.ndarray],
    ) -> None:
        self._buffer_B, self.start_L, self.stop_L = buffer_B, start_L, stop_L
        # Only lines long enough for D numbers have a row, so that the rows take no more room than the text allows.
        has_row_L = stop_L - start_L >= 2 * dim - 1
        self._row_L = np.where(has_row_L, np.cumsum(has_row_L) - 1, -1)
        self._values_MD = space_for(int(has_row_L.sum()))
        self._token_stop_L = np.empty(len(start_L), np.int64)
        self._status_L = np.empty(len(start_L), np.uint8)
        grain = 1 + len(start_L) * GRAIN_BYTES // (int(stop_L[-1] - start_L[0]) + 1)
        arrays = (self._row_L, powers_of_five(), self._values_MD, self._token_stop_L, self._status_L)
        threads.run(read_lines, len(start_L), buffer_B, start_L, stop_L, *arrays, grain=grain)
        self.lines = np.flatnonzero(self._status_L != BLANK)

    def limit(self, count: int) -> int:
        """Keep the first `count` lines that are not blank; returns how many lines end with the last of these."""
        if len(self.lines) <= count:
            return len(self.start_L)
        self.lines = self.lines[:count]
        return int(self.lines[-1]) + 1

    def unsettled(self) -> np.ndarray:
        """The lines that the kernel has left open."""
        return self.lines[self._status_L[self.lines] == UNSURE]

    def doubt(self, line: int) -> None:
        """Leave a line open, whatever the kernel made of it."""
        self._status_L[line] = UNSURE

    def text(self, line: int) -> bytes:
        return self._buffer_B[self.start_L[line] : self.stop_L[line]].tobytes()

    def settle(self, line: int, token_bytes: int, values_D: np.ndarray) -> None:
        """What a line that was left open holds: its token is its first bytes."""
        self._values_MD[self._row_L[line]] = values_D
        self._token_stop_L[line] = self.start_L[line] + token_bytes
        self._status_L[line] = GOOD

    def block(self) -> Block:
        """The rows of all lines that are good."""
        good_L = self.lines[self._status_L[self.lines] == GOOD]
        row_M = self._row_L[good_L]
        is_whole = len(row_M) == len(self._values_MD)
        values_MD = self._values_MD if is_whole else self._values_MD[row_M]
        return Block(values_MD, packed(self._buffer_B, self.start_L[good_L], self._token_stop_L[good_L]))
