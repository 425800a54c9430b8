"""word2vec's binary format: a line "V D", then for each row its token, a space and D little-endian float32."""

from collections.abc import Iterator

import numpy as np

from bigembed import threads
from bigembed.convert import text_shape
from bigembed.convert.lines import excerpt
from bigembed.convert.read_ahead import WINDOW_BYTES, Window
from bigembed.convert.source import BLOCK_BYTES, Block, ReadOptions, Source
from bigembed.convert.stream import ByteStream
from bigembed.convert.streamed import StreamedSource, packed, with_stream
from bigembed.kernels.word2vec import TOKEN_BYTES, copy_vectors, find_records

HEAD_BYTES = 4096
GRAIN_BYTES = 256 << 10  # of vectors that are worth a second thread
_TEXT_CONTROLS = b"\t\r\n"


def recognise(head: bytes, path: str) -> str | None:
    """ "word2vec-binary" where a line "V D" is followed by a token, a space, and bytes that are no text; else None."""
    header = text_shape.read_header(head)
    if header is None or header[1] == 0:
        return None
    token, _, vector = head[header[2] :].partition(b" ")
    is_ours = b"\0" not in token and len(token) <= TOKEN_BYTES and _is_binary(vector[: 4 * header[1]])
    return "word2vec-binary" if is_ours else None


def _is_binary(part: bytes) -> bool:
    """Whether bytes are no UTF-8, or hold control characters."""
    if any(byte < 32 and byte not in _TEXT_CONTROLS for byte in part):
        return True
    try:
        part.decode()
    except UnicodeDecodeError as error:
        return error.reason != "unexpected end of data"
    return False


def open_source(path_or_stream: str | ByteStream, format: str, options: ReadOptions) -> Source:
    """Open a file in word2vec's binary format; "-" is standard input.

    Raises:
        BadSource: it does not begin with a line "rows columns".
    """
    return with_stream(path_or_stream, lambda stream: Word2vecBinarySource(stream, options))


class Word2vecBinarySource(StreamedSource):
    """The rows of a file as word2vec.c, gensim or GoogleNews have it, with or without line feeds between them."""

    def __init__(self, stream: ByteStream, options: ReadOptions, window_bytes: int = WINDOW_BYTES) -> None:
        super().__init__(stream, "word2vec-binary", options, window_bytes)
        head = stream.head(HEAD_BYTES)
        header = text_shape.read_header(head)
        if header is None:
            raise self.bad(
                "byte 0",
                f'a line "rows columns" was expected, found {excerpt(head.split(bytes([10]), 1)[0])}; the file looks '
                f"like {text_shape.looks_like(head)}.",
            )
        num_rows, dim, self.offset = header
        self.set_dim(dim, options)
        self._vector_bytes = 4 * dim
        self.set_promised(num_rows, 1 + self._vector_bytes)

    def blocks_of(self, window: Window) -> Iterator[Block]:
        """The whole records of a window, in blocks."""
        assert self.wanted is not None
        most = max(1, BLOCK_BYTES // self._vector_bytes)
        while not self.is_full:
            room = min(self.wanted - self.taken, most, 1 + len(window) // self._vector_bytes)
            start_M, stop_M = np.empty(room, np.int64), np.empty(room, np.int64)
            count, rest, wrong_at = find_records(
                window.buffer_B, window.start, window.stop, self._vector_bytes, start_M, stop_M
            )
            if wrong_at >= 0 and count == 0:
                raise self._bad_token(window, wrong_at)
            if count == 0:
                break
            values_MD = self.space_for(count)
            grain = 1 + GRAIN_BYTES // self._vector_bytes
            threads.run(copy_vectors, count, window.buffer_B, stop_M, values_MD.view(np.uint8), grain=grain)
            self.taken += count
            tokens = packed(window.buffer_B, start_M[:count], stop_M[:count])
            window.use(rest)
            yield Block(values_MD, tokens)

    def _bad_token(self, window: Window, at: int) -> Exception:
        is_zero = window.buffer_B[at] == 0
        what = "a zero byte" if is_zero else f"no space within {TOKEN_BYTES:,} bytes"
        return self.bad(
            f"byte {window.offset + at - window.start}",
            f"{what} in the token of row {self.taken}, which begins at byte {window.offset}. The file is damaged, or "
            f"its vectors do not have the {self.dim} columns that its first line says.",
        )

    def finish(self, rest: Window) -> None:
        left = rest.buffer_B[rest.start : rest.stop].tobytes().lstrip(b"\n")
        if left or self.taken == 0:
            raise self.bad(
                f"byte {rest.offset + len(rest)}",
                f"the file ends in row {self.taken} of {self.promised:,}, after {len(left)} bytes of its token, a "
                f"space and {self._vector_bytes} bytes of numbers.",
            )
        problem = f"the header says {self.promised:,} rows, but the file has {self.taken:,}."
        self.wrong_count(f"byte {rest.offset + len(rest)}", problem)
