"""Tokens in, vectors out, with gradients: what `Embedding.embed` does; and the vocabulary that a module shows."""

from typing import Any

import torch
from torch import nn

from bigembed.errors import NoVocabulary
from bigembed.storage.table import Table
from bigembed.vocab.vectors import Tokens, parts_of_tokens
from bigembed.vocab.vocabulary import Vocabulary


class NoVocabularyHere(NoVocabulary, AttributeError):
    """`vocab` of a module whose table has no vocabulary: so `hasattr`, `getattr(emb, "vocab", None)` and tools that
    walk a module's attributes pass over it."""


def vocabulary_of(table: Table) -> Vocabulary:
    """The table's vocabulary; NoVocabularyHere where it has none."""
    try:
        return Vocabulary.open(table)
    except NoVocabulary as error:
        raise NoVocabularyHere(str(error)) from error


def embed_tokens(lookup: nn.Module, vocabulary: Vocabulary, tokens: Tokens, unknown: Any) -> torch.Tensor:
    """(N, D): `lookup` of each token's rows, and their mean where there are several (fastText's subwords)."""
    rows_F, start_N1 = parts_of_tokens(vocabulary, tokens, unknown)
    vectors_FD = lookup(torch.from_numpy(rows_F))
    if len(rows_F) == len(start_N1) - 1 and vocabulary.subwords is None:
        return vectors_FD
    return nn.functional.embedding_bag(
        torch.arange(len(rows_F), device=vectors_FD.device),
        vectors_FD,
        torch.from_numpy(start_N1).to(vectors_FD.device),
        mode="mean",
        include_last_offset=True,
    )
