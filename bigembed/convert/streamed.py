"""StreamedSource: a source read once from front to back, through windows of a stream; what its formats share."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from bigembed import threads
from bigembed.convert.read_ahead import WINDOW_BYTES, ReadAhead, Window
from bigembed.convert.source import Block, ReadOptions, Source
from bigembed.convert.stream import ByteStream
from bigembed.kernels.text import pack_tokens
from bigembed.spec import MAX_WORDS
from bigembed.vocab.packed import PackedTokens

GRAIN_TOKENS = 4096
Made = TypeVar("Made")


class StreamedSource(Source):
    """A source that a stream holds, as `promised` items (lines, records) where a header says how many.

    Bytes are counted in what the stream gives, so unpacked.

    Attributes:
        stream: what is read. offset: bytes of it taken before the first item.
        promised: items that the header promises; None without a header.
        wanted: items to take: as promised, or the user's limit if that is less; None for all there are.
        taken: items so far.
    """

    def __init__(self, stream: ByteStream, format: str, options: ReadOptions, window_bytes: int = WINDOW_BYTES) -> None:
        super().__init__(stream.path, format)
        self.stream = stream
        self.files = self.files if stream.can_be_read_again else []
        self.total_bytes = stream.total_bytes
        self.has_tokens = True
        self.offset = 0
        self.promised: int | None = None
        # Lines that are skipped count as taken, so with them the limit is left to whoever asks for blocks.
        self.wanted: int | None = options.limit if not options.skip_bad_lines else None
        self._is_limited = self.wanted is not None
        self._may_differ = options.skip_bad_lines
        self.taken = 0
        self._window_bytes = window_bytes
        self._ahead: ReadAhead | None = None
        self._space_F = np.empty(0, np.float32)
        if not stream.head(1):
            raise self.bad("byte 0", "the file is empty; rows were expected.")

    def set_dim(self, dim: int, options: ReadOptions) -> None:
        """Set D, or raise `BadSource` where no table could have it, or it is not what the user said."""
        if not 1 <= dim < MAX_WORDS:
            raise self.bad("line 1", f"there are {dim} columns, but a table has at least 1 and under {MAX_WORDS}.")
        if options.dim not in (None, dim):
            raise self.bad("line 1", f"there are {dim} columns, but dim={options.dim} was asked for.")
        self.dim = dim

    def set_promised(self, count: int, item_bytes: int) -> None:
        """Set V; a number that the file has no room for, at `item_bytes` or more each, is not told as `num_rows`."""
        self.promised = count
        self._is_limited = self.wanted is not None and self.wanted <= count
        self.wanted = count if self.wanted is None else min(count, self.wanted)
        is_plain_file = self.total_bytes is not None and self.stream.compression is None
        self.num_rows = None if is_plain_file and count * item_bytes > (self.total_bytes or 0) else count

    def blocks_of(self, window: Window) -> Iterator[Block]:
        """The rows of the whole items in a window; uses these, and counts them in `taken`."""
        raise NotImplementedError

    def finish(self, rest: Window) -> None:
        """The stream has ended with these bytes, fewer items than promised: complain, or tell it in `notes`."""

    @property
    def is_full(self) -> bool:
        return self.wanted is not None and self.taken >= self.wanted

    def space_for(self, rows: int) -> np.ndarray:
        """float32 (rows, D), the same memory each time."""
        if len(self._space_F) < rows * self.dim:
            self._space_F = np.empty(rows * self.dim, np.float32)
        return self._space_F[: rows * self.dim].reshape(rows, self.dim)

    def blocks(self) -> Iterator[Block]:
        self.stream.read_into(bytearray(self.offset))
        self._ahead = ReadAhead(self.stream, self.offset, self._window_bytes)
        try:
            window = self._ahead.next()
            while True:
                yield from self.blocks_of(window)
                self.done_bytes = self.stream.done_bytes
                if self.is_full or window.is_last:
                    break
                window = self._ahead.next()
            if not self.is_full:
                self.finish(window)
            elif not self._is_limited:
                self._look_behind(window, self._ahead)
        finally:
            self._ahead.close()
        self.done_bytes = self.stream.done_bytes
        if self.stream.sha256 is not None:
            self.facts |= {"size": self.stream.done_bytes, "sha256": self.stream.sha256}

    def wrong_count(self, where: str, problem: str) -> None:
        """The header's number of rows is wrong: an error, or a note where the user takes what there is."""
        if not self._may_differ:
            raise self.bad(where, f"{problem} To take the rows all the same, use skip_bad_lines (--skip-bad-lines).")
        self.notes.append(problem)

    def _look_behind(self, window: Window, ahead: ReadAhead) -> None:
        """Read what follows the last row that was promised; there should be nothing."""
        first, count, is_blank = window.offset, 0, True
        while True:
            count += len(window)
            is_blank = is_blank and not window.buffer_B[window.start : window.stop].tobytes().strip()
            if window.is_last:
                break
            window.use(window.stop)
            window = ahead.next()
        if not is_blank:
            problem = f"the header says {self.promised:,} rows, but {count:,} bytes follow them."
            self.wrong_count(f"byte {first}", problem)

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        if self._ahead is None or not self._ahead.is_reading:
            self.stream.close()


def with_stream(path_or_stream: str | ByteStream, make: Callable[[ByteStream], Made]) -> Made:
    """make(stream), where a stream that is opened here is closed again if that fails."""
    if isinstance(path_or_stream, ByteStream):
        return make(path_or_stream)
    stream = ByteStream.open(path_or_stream)
    try:
        return make(stream)
    except BaseException:
        stream.close()
        raise


def packed(buffer_B: np.ndarray, start_M: np.ndarray, stop_M: np.ndarray) -> PackedTokens:
    """The tokens that lie at start_M to stop_M - 1 of a buffer, copied."""
    packed_M1 = np.zeros(len(start_M) + 1, np.int64)
    np.cumsum(stop_M - start_M, out=packed_M1[1:])
    bytes_B = np.empty(packed_M1[-1], np.uint8)
    threads.run(pack_tokens, len(start_M), buffer_B, start_M, packed_M1, bytes_B, grain=GRAIN_TOKENS)
    return PackedTokens(bytes_B, packed_M1)
