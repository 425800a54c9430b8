"""Rows as text: "word2vec-text" (a header line "V D") and "glove" (none), each line a token and its numbers.

A number is the shortest text that gives the same float32 back, so a round trip is exact. Tokens that a reader would
take apart are refused: in word2vec text those with any white space (its own tools split there); in GloVe text those
with line ends, a space at either end, or a decimal number after a space, which looks like one number too many; NUL in
both.
"""

import codecs
import re

import numpy as np

from bigembed import threads
from bigembed.convert.writers.tokens import find_refused, refused_bytes, with_blanks
from bigembed.convert.writers.writer import Writer
from bigembed.kernels.format_floats import NUMBER_BYTES, format_lines
from bigembed.vocab.packed import PackedTokens

BUFFER_BYTES = 16 << 20  # of text made at once, for the longest numbers there are
GRAIN_NUMBERS = 1 << 12  # below this many a second thread is not worth it

_DECIMAL = re.compile(rb"[+-]?(?=[^eE]*[.eE])(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")  # a number, but no plain integer


class _TextWriter(Writer):
    dtypes = ("float32",)
    carries_tokens = True
    _refused_256: np.ndarray
    _reason: str

    def _begin(self) -> None:
        self._output = self._file(self.target)
        self._buffer_B = np.empty(0, np.uint8)
        if self.format == "word2vec-text":
            self._output.write(f"{self.num_rows} {self.dim}\n".encode())

    def _append(self, values_MD: np.ndarray, tokens: PackedTokens | None) -> None:
        assert tokens is not None, "checked by append"
        refused = find_refused(tokens, self._refused_256)
        if refused is not None:
            raise self._refused(refused, tokens, self._reason)
        for m in with_blanks(tokens):
            if any(map(_DECIMAL.fullmatch, re.split(b"[ \t]+", tokens[m])[1:])):
                raise self._refused(m, tokens, "the number after a space would be taken for one of the vector")
        step = max(1, BUFFER_BYTES // (self.dim * NUMBER_BYTES + 1))
        for start in range(0, len(tokens), step):
            stop = min(start + step, len(tokens))
            self._write_lines(values_MD[start:stop], tokens.between(start, stop))

    def _write_lines(self, values_MD: np.ndarray, tokens: PackedTokens) -> None:
        token_bytes = int(tokens.start_M1[-1] - tokens.start_M1[0])
        needed = token_bytes + len(tokens) * (self.dim * NUMBER_BYTES + 1)
        if len(self._buffer_B) < needed:
            self._buffer_B = np.empty(needed, np.uint8)
        grain = max(1, GRAIN_NUMBERS // self.dim)
        args = (values_MD, tokens.bytes_B, tokens.start_M1, self._buffer_B)
        for first, end in threads.run(format_lines, len(tokens), *args, grain=grain):
            self._output.write(self._buffer_B[first:end])


class Word2vecTextWriter(_TextWriter):
    """Writes "word2vec-text", as gensim and fastText (.vec) read it."""

    format = "word2vec-text"
    _refused_256 = refused_bytes(inside=b" \t\n\v\f\r\0")
    _reason = "white space and NUL would end the token"


class GloveWriter(_TextWriter):
    """Writes "glove": lines without a header; a token may hold spaces, but not begin or end with one."""

    format = "glove"
    _refused_256 = refused_bytes(inside=b"\n\r\0", first=b" \t", last=b" \t")
    _reason = "a line end, NUL, or a space at either end would be lost"

    def _append(self, values_MD: np.ndarray, tokens: PackedTokens | None) -> None:
        if tokens is not None and self.rows == 0 and tokens[0].startswith(codecs.BOM_UTF8):
            raise self._refused(0, tokens, "at the start of a file its first bytes are taken for a byte order mark")
        super()._append(values_MD, tokens)
