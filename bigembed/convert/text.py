"""Text: a line is a row, a token and its numbers; after a header "V D" (word2vec, fastText .vec) or none (GloVe)."""

from collections.abc import Iterator

import numpy as np

from bigembed.convert import text_shape
from bigembed.convert.line_batch import LineBatch
from bigembed.convert.lines import BadLine, excerpt, read_line
from bigembed.convert.read_ahead import WINDOW_BYTES, Window
from bigembed.convert.source import Block, ReadOptions, Source
from bigembed.convert.stream import ByteStream
from bigembed.convert.streamed import StreamedSource, with_stream
from bigembed.kernels.text import find_lines

LINE_BYTES = 64 << 20  # the longest line, about
BLOCK_LINES = 1 << 18
HEAD_BYTES = 64 << 10
DIM_BYTES = 16 << 20  # looked at for the number of columns


def recognise(head: bytes, path: str) -> str | None:
    """The format of a text of vectors that begins with these (unpacked) bytes; None for everything else."""
    return text_shape.recognise(head)


def open_source(path_or_stream: str | ByteStream, format: str, options: ReadOptions) -> Source:
    """Open a text as "word2vec-text" or "glove"; "-" is standard input.

    Raises:
        BadSource: the first lines are not of this format; says what they look like.
    """
    return with_stream(path_or_stream, lambda stream: TextSource(stream, format, options))


class TextSource(StreamedSource):
    """The rows of a text, in the order of its lines; blank lines are passed over.

    The kernel reads what is written as usual; a line that it does not settle is read again in Python, which is also
    where every message about a line comes from.
    """

    def __init__(self, stream: ByteStream, format: str, options: ReadOptions, window_bytes: int = WINDOW_BYTES) -> None:
        super().__init__(stream, format, options, window_bytes)
        self.dtype = "text"
        self._options = options
        self._line = 1  # the number of the next one
        self._rows_read = 0
        self._unended_at = -1  # where in the buffer the last line ends, if no line feed ended it
        if format == "word2vec-text":
            self._read_header()
        else:
            self._find_dim()

    def _read_header(self) -> None:
        """Take V and D from the first line."""
        head = self.stream.head(HEAD_BYTES)
        header = text_shape.read_header(head)
        if header is None:
            raise self.bad(
                "line 1",
                f'a header "rows columns" was expected, found {excerpt(head.split(bytes([10]), 1)[0])}; the file looks '
                f"like {text_shape.looks_like(head)}. Text without a header has the format glove.",
            )
        num_rows, dim, self.offset = header
        self.set_dim(dim, self._options)
        self.set_promised(num_rows, 2 * dim)
        self._line = 2

    def _find_dim(self) -> None:
        """Take D from the user or the first lines."""
        size = HEAD_BYTES
        head = self.stream.head(size)
        while len(head) == size and size < DIM_BYTES and head.count(b"\n") < text_shape.DIM_LINES:
            size *= 4
            head = self.stream.head(size)
        # A line without its end is a line all the same if the file ends there.
        lines = text_shape.lines_of(head + b"\n" if len(head) < size else head)
        dim = self._options.dim or text_shape.guess_dim(lines)
        if not any(text_shape.fits(line, dim) for line in lines):
            raise self.bad(
                "line 1",
                f"a token and {self._options.dim or 'its'} numbers were expected; the file looks like "
                f"{text_shape.looks_like(head)}.",
            )
        self.set_dim(dim, self._options)
        self.offset = len(text_shape.BOM) if head.startswith(text_shape.BOM) else 0

    def blocks_of(self, window: Window) -> Iterator[Block]:
        """The whole lines of a window, in blocks."""
        if window.is_last and len(window) and window.buffer_B[window.stop - 1] != 10:
            self._unended_at = window.stop
            window.buffer_B[window.stop] = 10
            window.stop += 1
        room = min(BLOCK_LINES, len(window))
        start_L, stop_L = np.empty(room, np.int64), np.empty(room, np.int64)
        while not self.is_full:
            count = find_lines(window.buffer_B, window.start, window.stop, start_L, stop_L)
            if count == 0:
                break
            batch = LineBatch(window.buffer_B, start_L[:count], stop_L[:count], self.dim, self.space_for)
            used = count if self.wanted is None else batch.limit(self.wanted - self.taken)
            self.taken += len(batch.lines)
            self._settle(batch, window)
            window.use(int(stop_L[used - 1]) + 1)
            self._line += used
            block = batch.block()
            self._rows_read += len(block.values_MD)
            if len(block.values_MD):
                yield block
        if len(window) > LINE_BYTES and not self.is_full:
            raise self.bad(self._place(0, window.offset), f"there is no line end within {LINE_BYTES:,} bytes.")
        if window.is_last and self.skipped.count and not self._rows_read:
            raise self.bad("line 1", f"not one line could be read; the first is {self.skipped.first[0]}")

    def _place(self, line: int, byte: int) -> str:
        return f"line {self._line + line} (byte {byte})"

    def _settle(self, batch: LineBatch, window: Window) -> None:
        """Read the lines that the kernel has left open, or say what is wrong with them."""
        last = len(batch.stop_L) - 1
        is_unended = batch.stop_L[last] == self._unended_at and last in batch.lines[-1:]
        if is_unended:
            batch.doubt(last)
        for line in batch.unsettled().tolist():
            try:
                self._settle_line(batch, line, is_unended and line == last)
            except BadLine as problem:
                place = self._place(line, window.offset + int(batch.start_L[line]) - window.start)
                if not self._options.skip_bad_lines:
                    advice = "To leave such lines out, use skip_bad_lines (--skip-bad-lines)."
                    raise self.bad(place, f"{problem}. {advice}") from None
                self.skipped.add(self.bad(place, f"{problem}."))

    def _settle_line(self, batch: LineBatch, line: int, is_unended: bool) -> None:
        text = batch.text(line)
        if is_unended and self.promised is not None and not self.is_full:
            raise BadLine(f"the file ends in this line, row {self.taken:,} of {self.promised:,}: {excerpt(text)}")
        batch.settle(line, *read_line(text, self.dim, bare_empty=self.format == "glove" and not is_unended))
        if is_unended:
            self.notes.append("The last line has no line end: if the file was cut off, so was its last number.")

    def finish(self, rest: Window) -> None:
        if self.promised is not None:
            if self.taken == 0:
                raise self.bad("line 2", f"the header says {self.promised:,} rows, but nothing follows it.")
            problem = f"the header says {self.promised:,} rows, but the file has {self.taken:,}."
            self.wrong_count(self._place(0, rest.offset + len(rest)), problem)
