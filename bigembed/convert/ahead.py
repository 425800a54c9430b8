"""AheadSource: a source whose blocks are filled by a thread of its own, one block ahead of whoever uses them."""

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any

import numpy as np

from bigembed.convert.number_types import Losses
from bigembed.convert.source import BLOCK_BYTES, Block, ReadOptions, Source
from bigembed.spec import MAX_ROWS, MAX_WORDS
from bigembed.vocab.packed import PackedTokens


class AheadSource(Source):
    """A source that says what its pieces are and how one is filled; both run in the thread.

    The thread is the source's own, not `threads.run_in_background`: the table's writer waits there for the disk, and
    reading would wait with it.

    Attributes:
        losses: what float32 could not hold; told in `notes` after the last block.
        late_tokens: what `more_tokens` gives.
    """

    def __init__(self, path: str, format: str) -> None:
        super().__init__(path, format)
        self.losses = Losses()
        self.late_tokens: Iterable[tuple[PackedTokens, np.ndarray]] = ()
        self._running: Iterator[Block] | None = None

    def settle(self, num_rows: int | None, dim: int, options: ReadOptions) -> None:
        """Set the shape, or raise `BadSource` where no table could have it or it is not what the user said."""
        if num_rows is not None and not 1 <= num_rows <= MAX_ROWS:
            raise self.bad("its shape", f"there are {num_rows} rows, but a table has at least one and at most 2**48.")
        if not 1 <= dim < MAX_WORDS:
            raise self.bad("its shape", f"there are {dim} columns, but a table has at least one and under {MAX_WORDS}.")
        if options.dim not in (None, dim):
            raise self.bad("its shape", f"there are {dim} columns, but dim={options.dim} was asked for.")
        self.num_rows, self.dim = num_rows, dim

    @property
    def block_rows(self) -> int:
        return max(1, BLOCK_BYTES // (4 * self.dim))

    def pieces(self) -> Iterator[Any]:
        """What to read, in order; none has more than `block_rows` rows."""
        raise NotImplementedError

    def fill(self, piece: Any, buffer_MD: np.ndarray) -> Block:
        """The block of a piece, in `buffer_MD`, which has room for `block_rows` rows; counts `done_bytes`."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of what `pieces` and `fill` opened; the thread does not run any more. Safe to repeat."""

    def blocks(self) -> Iterator[Block]:
        self._running = self._blocks()
        return self._running

    def _blocks(self) -> Iterator[Block]:
        buffers = [np.empty((self.block_rows, self.dim), np.float32) for _ in range(2)]
        try:
            yield from fill_ahead(self.pieces(), self.fill, buffers)
        finally:
            self.release()
        self.notes += self.losses.notes(self.dtype)

    def more_tokens(self) -> Iterator[tuple[PackedTokens, np.ndarray]]:
        yield from self.late_tokens

    def close(self) -> None:
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]
        self.release()


def fill_ahead(pieces: Iterator[Any], fill: Callable[[Any, Any], Any], buffers: list[Any]) -> Iterator[Any]:
    """`fill(piece, buffer)` of each piece in order, made in a thread; a buffer is free again at the next one."""
    free: SimpleQueue[Any] = SimpleQueue()
    full: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
    for buffer in buffers:
        free.put(buffer)
    thread = threading.Thread(target=_fill_each, args=(pieces, fill, free, full), name="bigembed read", daemon=True)
    thread.start()
    try:
        while True:
            filled, buffer = full.get()
            if isinstance(filled, BaseException):
                raise filled
            if filled is None:
                return
            yield filled
            free.put(buffer)
    finally:
        free.put(None)
        thread.join()


def _fill_each(pieces: Iterator[Any], fill: Callable[..., Any], free: SimpleQueue, full: SimpleQueue) -> None:
    try:
        for piece in pieces:
            buffer = free.get()
            if buffer is None:
                return
            full.put((fill(piece, buffer), buffer))
        full.put((None, None))
    except BaseException as error:
        full.put((error, None))
