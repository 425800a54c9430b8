"""Traces for the cache: batches of ids as training asks for them, by seed, each reduced to its distinct rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trace:
    """Batches of one stream.

    name: as printed. in_bar: stationary and without an edge, so that sets must hit about as often as exact LRU.
    num_rows: V. batches: int64 rows of each step, distinct, in order of first position.
    """

    name: str
    in_bar: bool
    num_rows: int
    batches: list[np.ndarray]


def distinct(ids_N: np.ndarray) -> np.ndarray:
    """The rows of a batch, in order of first position."""
    rows_U, first_U = np.unique(ids_N, return_index=True)
    return rows_U[np.argsort(first_U)]


class BoundedZipf:
    """Ids with P(rank k) ~ k ** -exponent over all of `num_rows` ranks, ranks scattered over rows by a permutation."""

    def __init__(self, exponent: float, num_rows: int, seed: int = 0) -> None:
        weights_V = np.arange(1, num_rows + 1, dtype=np.float64) ** -exponent
        self.mass_V = np.cumsum(weights_V)
        self.mass_V /= self.mass_V[-1]
        self.row_of_rank_V = np.random.default_rng(seed).permutation(num_rows)

    def top_mass(self, share: float = 1 / 8) -> float:
        """The share of ids that fall on this share of the rows, the most frequent ones."""
        return float(self.mass_V[max(0, int(len(self.mass_V) * share) - 1)])

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        ranks_N = np.searchsorted(self.mass_V, rng.random(count), side="right")
        return self.row_of_rank_V[np.minimum(ranks_N, len(self.mass_V) - 1)]


def zipf(exponent: float, num_rows: int, batch: int, steps: int, name: str = "", seed: int = 0) -> Trace:
    """Draws with replacement; it is printed how much of them falls on the top rows."""
    sampler, rng = BoundedZipf(exponent, num_rows, seed), np.random.default_rng(seed + 1)
    print(f"Zipf {exponent}: {sampler.top_mass():.3f} of the ids on 1/8 of {num_rows:,} rows", flush=True)
    batches = [distinct(sampler.draw(rng, batch)) for _ in range(steps)]
    return Trace(name or f"Zipf {exponent}", not name, num_rows, batches)


def scan(num_rows: int, batch: int, steps: int) -> Trace:
    """All rows in order, again and again."""
    batches = [np.arange(step * batch, (step + 1) * batch) % num_rows for step in range(steps)]
    return Trace("scan", False, num_rows, batches)


def hot_set(hot_rows: int, share: float, num_rows: int, batch: int, steps: int, name: str, seed: int = 0) -> Trace:
    """Uniform ids of a hot set; the rest of each batch goes on through a scan of all rows."""
    rng = np.random.default_rng(seed)
    hot_rows_H, count = rng.permutation(num_rows)[:hot_rows], int(batch * share)
    batches = []
    for step in range(steps):
        scanned = np.arange(step * (batch - count), (step + 1) * (batch - count)) % num_rows
        batches.append(distinct(rng.permutation(np.concatenate([rng.choice(hot_rows_H, count), scanned]))))
    return Trace(name, False, num_rows, batches)


def shifting_hot_set(hot_rows: int, moved: int, num_rows: int, batch: int, steps: int, seed: int = 0) -> Trace:
    """Nine ids in ten uniform over a window of rows that moves on by `moved` rows a step, one over all rows."""
    rng = np.random.default_rng(seed)
    scattered_V, batches = rng.permutation(num_rows), []
    for step in range(steps):
        places = np.where(
            rng.random(batch) < 0.9,
            step * moved + rng.integers(0, hot_rows, batch),
            rng.integers(0, num_rows, batch),
        )
        batches.append(distinct(scattered_V[places % num_rows]))
    return Trace("shifting hot set", False, num_rows, batches)


def demo_text(tokens: str, num_rows: int, positions: int, steps: int, seed: int = 0) -> Trace:
    """The ids of `bigembed demo`: n-grams of Python's standard library, hashed to the demo's rows."""
    from bigembed.demo.ngrams import make_batch, random_positions
    from bigembed.demo.tokens import load_corpus

    corpus = load_corpus((), tokens, seed)
    batches = []
    for positions_N in _first(steps, random_positions(corpus.train, positions, seed)):
        batches.append(distinct(make_batch(corpus, corpus.train, positions_N, num_rows).ids_NG.numpy().reshape(-1)))
    return Trace(f"demo text, {tokens}", True, num_rows, batches)


def _first(count: int, batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for _, batch in zip(range(count), batches, strict=False):
        yield batch
