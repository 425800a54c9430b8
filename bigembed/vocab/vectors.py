"""From tokens to vectors: a token's own row, or the mean of its word's and subwords' rows (fastText)."""

from collections.abc import Iterable, Iterator
from typing import Any

import numba as nb
import numpy as np

from bigembed import threads
from bigembed.storage.table import Table
from bigembed.vocab.packed import PackedTokens, Token
from bigembed.vocab.subwords import Subwords
from bigembed.vocab.vocabulary import Vocabulary

SLICE_TOKENS = 4096  # whose rows are in memory at once

Tokens = PackedTokens | Token | Iterable[Token]


def parts_of_tokens(vocabulary: Vocabulary, tokens: Tokens, unknown: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose mean is each token's vector: (rows_F, start_N1); token n has rows_F[start_N1[n]:start_N1[n+1]].

    One row a token in a plain vocabulary. With subwords a known word has its own row first, then those of its
    n-grams; an unknown one has its n-grams only, or nothing (a vector of zeros) if it has none.

    Args:
        unknown: as for `Vocabulary.rows`; of no use with subwords.

    Raises:
        UnknownToken: a token is unknown, and nothing stands for it.
    """
    packed = PackedTokens.of(tokens)
    if vocabulary.subwords is None:
        return vocabulary.rows(packed, unknown), np.arange(len(packed) + 1)
    return Subwords.from_settings(vocabulary.subwords).rows_of(packed, vocabulary.rows(packed, unknown=-1))


def vectors_of_tokens(table: Table, vocabulary: Vocabulary, tokens: Tokens, unknown: Any = None) -> np.ndarray:
    """float32 (N, D): the vector of each token; see `parts_of_tokens`.

    Raises:
        UnknownToken: as there.
    """
    packed = PackedTokens.of(tokens)
    out_ND = np.empty((len(packed), table.shape[1]), np.float32)
    for first in range(0, len(packed), SLICE_TOKENS):
        some = packed.between(first, min(first + SLICE_TOKENS, len(packed)))
        rows_F, start_N1 = parts_of_tokens(vocabulary, some, unknown)
        values_FD = table.read(rows_F)
        threads.run(mean_of_parts, len(some), values_FD, start_N1, out_ND[first : first + len(some)], grain=256)
    return out_ND


def composes_words(vocabulary: Vocabulary | None) -> bool:
    """Whether a word's vector is more than its own row, so that the table's rows are no vectors of words."""
    return vocabulary is not None and vocabulary.subwords is not None and len(vocabulary) > 0


def word_vectors(table: Table, vocabulary: Vocabulary) -> Iterator[tuple[PackedTokens, np.ndarray, np.ndarray]]:
    """(words, their rows, their vectors) of a vocabulary that composes words, in order of its entries, in parts."""
    for first in range(0, len(vocabulary), SLICE_TOKENS):
        words, row_M = vocabulary.entries(first, min(first + SLICE_TOKENS, len(vocabulary)))
        yield words, row_M, vectors_of_tokens(table, vocabulary, words)


@nb.njit(nogil=True, cache=True)
def mean_of_parts(start, stop, values_FD, start_N1, out_ND):
    """out_ND[n] = the mean of values_FD[start_N1[n] : start_N1[n + 1]], summed in order in float32; zeros of none."""
    for n in range(start, stop):
        out_ND[n] = 0.0
        first, last = start_N1[n], start_N1[n + 1]
        for f in range(first, last):
            for d in range(out_ND.shape[1]):
                out_ND[n, d] += values_FD[f, d]
        if last > first:
            count = np.float32(last - first)
            for d in range(out_ND.shape[1]):
                out_ND[n, d] /= count
