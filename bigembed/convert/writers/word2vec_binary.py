"""Rows as "word2vec-binary": a header line "V D", then token, a space, and D float32 for each row, as gensim writes.

No line feed follows a vector (the C tool writes one; readers accept both), so a token may not begin with one. Nor may
it hold a space or NUL.
"""

import numpy as np

from bigembed import threads
from bigembed.convert.writers.tokens import find_refused, refused_bytes
from bigembed.convert.writers.writer import Writer
from bigembed.kernels.token_records import pack_records
from bigembed.vocab.packed import PackedTokens

GRAIN_BYTES = 1 << 18  # below this much a second thread is not worth it

_REFUSED_256 = refused_bytes(inside=b" \0", first=b"\n")


class Word2vecBinaryWriter(Writer):
    """Writes "word2vec-binary"."""

    format = "word2vec-binary"
    dtypes = ("float32",)
    carries_tokens = True

    def _begin(self) -> None:
        self._output = self._file(self.target)
        self._output.write(f"{self.num_rows} {self.dim}\n".encode())

    def _append(self, values_MD: np.ndarray, tokens: PackedTokens | None) -> None:
        assert tokens is not None, "checked by append"
        refused = find_refused(tokens, _REFUSED_256)
        if refused is not None:
            raise self._refused(refused, tokens, "a space or NUL ends the token, and a line feed before it is skipped")
        numbers_MB = self._narrowed(values_MD).view(np.uint8)
        token_bytes = int(tokens.start_M1[-1] - tokens.start_M1[0])
        out_B = np.empty(token_bytes + len(tokens) * (1 + numbers_MB.shape[1]), np.uint8)
        grain = max(1, GRAIN_BYTES // numbers_MB.shape[1])
        threads.run(pack_records, len(tokens), tokens.bytes_B, tokens.start_M1, numbers_MB, out_B, grain=grain)
        self._output.write(out_B)
