"""From positions of a text to what the model sees: the tokens before each position, and the ids of their n-grams."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from bigembed.demo.tokens import Corpus, Tokens

ORDERS = (2, 3, 4)  # ascending
CONTEXT = 8  # tokens before a position that the dense model sees

_SALT = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)


@dataclass(frozen=True)
class Batch:
    """What one step needs.

    context_NC: int64, classes of the CONTEXT tokens before each position, oldest first.
    ids_NG: int64, an id for each order of n-gram that ends there.
    target_N: int64, the class of the token at the position.
    """

    context_NC: torch.Tensor
    ids_NG: torch.Tensor
    target_N: torch.Tensor


def make_batch(corpus: Corpus, tokens: Tokens, positions_N: np.ndarray, num_rows: int) -> Batch:
    """The batch of these positions: predict each token from what precedes it in its own document."""
    symbols_NC = context_symbols(tokens, positions_N, outside=len(corpus.class_of_symbol) - 1)
    ids_NG = ngram_ids(corpus.hash_of_symbol[symbols_NC], num_rows)
    context_NC = corpus.class_of_symbol[symbols_NC]
    target_N = corpus.class_of_symbol[tokens.symbols_T[positions_N]]
    return Batch(torch.from_numpy(context_NC), torch.from_numpy(ids_NG), torch.from_numpy(target_N))


def context_symbols(tokens: Tokens, positions_N: np.ndarray, outside: int) -> np.ndarray:
    """int64 (N, CONTEXT): the symbols before each position, oldest first; `outside` before its document begins."""
    starts_N = tokens.starts[np.searchsorted(tokens.starts, positions_N, side="right") - 1]
    places_NC = positions_N[:, None] + np.arange(-CONTEXT, 0)
    symbols_NC = tokens.symbols_T[np.maximum(places_NC, 0)].astype(np.int64)
    symbols_NC[places_NC < starts_N[:, None]] = outside
    return symbols_NC


def ngram_ids(hashes_NC: np.ndarray, num_rows: int) -> np.ndarray:
    """int64 (N, len(ORDERS)): the row of the last 2, 3 and 4 tokens; the same on every machine.

    Multiply and xor, token by token from the newest to the oldest; 0 <= id < num_rows. n-grams that meet in one
    row share it: with 200 million rows and a million n-grams, one n-gram in 200 does.

    Args:
        hashes_NC: uint64, a hash of each token, oldest first; C >= 4.
    """
    ids_NG = np.empty((len(hashes_NC), len(ORDERS)), np.int64)
    mixed_N = np.full(len(hashes_NC), _SALT)
    for length in range(1, ORDERS[-1] + 1):
        mixed_N = _mix(mixed_N ^ hashes_NC[:, -length])
        if length in ORDERS:
            ids_NG[:, ORDERS.index(length)] = _mix(mixed_N + _SALT) % np.uint64(num_rows)
    return ids_NG


def _mix(x_N: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers; products wrap around."""
    x_N = (x_N ^ (x_N >> _SHIFT)) * _MULTIPLIER
    return x_N ^ (x_N >> _SHIFT)


def random_positions(tokens: Tokens, count: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of `count` positions, drawn with replacement."""
    generator = np.random.default_rng(seed)
    while True:
        yield generator.integers(0, len(tokens), count)


def spread_positions(tokens: Tokens, count: int) -> np.ndarray:
    """At most `count` positions at equal distances over the whole text."""
    return np.unique(np.linspace(0, len(tokens) - 1, min(count, len(tokens))).astype(np.int64))
