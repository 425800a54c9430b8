"""Bounded Zipf ids: P(rank k) = k^-a / sum of j^-a over ranks 1..V, ranks scattered over rows by a fixed permutation.

Sketch: nothing here takes memory that grows with V. A rank comes from rejection-inversion: the inverse of the
integral of x^-a proposes a rank, and some proposals are rejected so that the distribution is the exact one, up to
float64 rounding. The permutation is a Feistel network over the least power of two of rows, walked until it
lands below V: under two passes on average. A table of ranks would take 8 V bytes and a cache miss or more a draw.

`traces.BoundedZipf` is the slow twin, with both as arrays of V entries.
"""

import math

import numpy as np

EXACT_RANKS = 1 << 16  # the first ranks are summed one by one; beyond them the series is exact to float64
ROUNDS = 6
WALKS = 10_000  # under 2 passes are expected: this many mean that the permutation is broken


class Zipf:
    """Ids 0 <= id < num_rows, int64, with P(rank k) proportional to k ** -exponent over all ranks.

    Args:
        num_rows: V, from 1 to 2**48. exponent: a, at least 0 (0 is uniform).
        seed: decides the draws.
        scatter_seed: decides which rows are the frequent ones; samplers of different seeds agree about them.

    Example:
        >>> ids = Zipf(10**9, 1.05, seed=1).sample(65_536)
        >>> ids.shape, ids.dtype
        ((65536,), dtype('int64'))

    Source:
        W. Hoermann, G. Derflinger: Rejection-inversion to generate variates from monotone discrete distributions,
        ACM TOMACS 6(3), 1996.
    """

    def __init__(self, num_rows: int, exponent: float, seed: int = 0, scatter_seed: int = 0) -> None:
        if not 1 <= num_rows <= 1 << 48:
            raise ValueError(f"num_rows must be between 1 and 2**48, not {num_rows}.")
        if not (math.isfinite(exponent) and exponent >= 0):
            raise ValueError(f"exponent must be at least 0 and finite, not {exponent}.")
        self.num_rows, self.exponent = num_rows, float(exponent)
        self._rng = np.random.default_rng(seed)
        self._scatter = Scatter(num_rows, scatter_seed)
        # The integral is taken from 1/2 below each rank to 1/2 above; rank 1's stretch is cut to its exact mass of 1.
        self._first = float(self._integral(np.float64(1.5))) - 1.0
        self._last = float(self._integral(np.float64(num_rows + 0.5)))
        self._sure = 2.0 - float(self._inverse(self._integral(np.float64(2.5)) - 2.0**-self.exponent))

    def sample(self, count: int) -> np.ndarray:
        """The next `count` ids, int64."""
        return self._scatter.rows_of(self.sample_ranks(count) - 1)

    def sample_ranks(self, count: int) -> np.ndarray:
        """The next `count` ranks, int64 from 1 to V: 1 is the most frequent one."""
        ranks_N = np.empty(count, np.int64)
        have = 0
        while have < count:
            accepted = self._propose(count - have)
            ranks_N[have : have + len(accepted)] = accepted
            have += len(accepted)
        return ranks_N

    def _propose(self, count: int) -> np.ndarray:
        area_N = self._last + self._rng.random(count) * (self._first - self._last)
        x_N = self._inverse(area_N)
        rank_N = np.clip(np.floor(x_N + 0.5), 1, self.num_rows)
        # Left of `_sure` below its rank a proposal always lies under the rank's bar; else the bar decides.
        is_good_N = rank_N - x_N <= self._sure
        is_good_N |= area_N >= self._integral(rank_N + 0.5) - rank_N**-self.exponent
        return rank_N[is_good_N].astype(np.int64)

    def _integral(self, x: np.ndarray) -> np.ndarray:
        """The integral of t^-a from 1 to x; expm1 keeps its digits where a is near 1."""
        log_x, power = np.log(x), 1.0 - self.exponent
        return log_x if power == 0 else np.expm1(power * log_x) / power

    def _inverse(self, area: np.ndarray) -> np.ndarray:
        power = 1.0 - self.exponent
        return np.exp(area) if power == 0 else np.exp(np.log1p(np.maximum(power * area, -1.0 + 1e-16)) / power)


class Scatter:
    """A fixed permutation of 0..V-1 that is computed, not stored: neighbouring ranks get rows far apart."""

    def __init__(self, num_rows: int, seed: int = 0) -> None:
        bits = max(2, (num_rows - 1).bit_length())
        self.num_rows, self._low_bits, self._high_bits = num_rows, bits // 2, bits - bits // 2
        self._keys = np.random.default_rng(seed).integers(0, 1 << 63, ROUNDS, np.int64).astype(np.uint64)

    def rows_of(self, ranks_N: np.ndarray) -> np.ndarray:
        """The row of each rank (both from 0 on), int64."""
        rows_N = self._pass(ranks_N.astype(np.uint64))
        for _ in range(WALKS):
            outside = np.flatnonzero(rows_N >= np.uint64(self.num_rows))
            if not len(outside):
                return rows_N.astype(np.int64)
            rows_N[outside] = self._pass(rows_N[outside])
        raise AssertionError(f"the permutation of {self.num_rows} rows does not come back below them")

    def _pass(self, x_N: np.ndarray) -> np.ndarray:
        """One Feistel network over the power of two: each round adds a hash of one part to the other and swaps them."""
        width, other = self._low_bits, self._high_bits
        low_N, high_N = x_N & _mask(width), x_N >> np.uint64(width)
        for key in self._keys:
            low_N, high_N = high_N, (low_N ^ _mixed(high_N, key)) & _mask(width)
            width, other = other, width
        return low_N | (high_N << np.uint64(width))


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _mixed(x_N: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64, of x plus a key."""
    x_N = (x_N + key) * np.uint64(0x9E3779B97F4A7C15)
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def mass_of_top(num_rows: int, exponent: float, fraction: float) -> float:
    """The share of ids that fall on this fraction of the rows, the most frequent ones (at least one row)."""
    top = min(num_rows, max(1, int(num_rows * fraction)))
    return harmonic(top, exponent) / harmonic(num_rows, exponent)


def harmonic(count: int, exponent: float) -> float:
    """The sum of k ** -exponent for k = 1..count, by the Euler-Maclaurin formula beyond the first 65,536."""
    exact = min(count, EXACT_RANKS)
    total = math.fsum((np.arange(1, exact + 1, dtype=np.float64) ** -exponent).tolist())
    if count == exact:
        return total
    first, last, power = float(exact), float(count), 1.0 - exponent
    area = math.log(last / first) if power == 0 else first**power * math.expm1(power * math.log(last / first)) / power
    ends = (last**-exponent - first**-exponent) / 2
    slopes = -exponent * (last ** (-exponent - 1) - first ** (-exponent - 1)) / 12
    return total + area + ends + slopes
