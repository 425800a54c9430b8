"""Vocabularies without storage: rows that are hashes of tokens, of ids, or of the last n ids of a sequence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from bigembed import threads
from bigembed.errors import InvalidArgument
from bigembed.kernels.ngrams import fold, hashes_to_rows, ngrams_to_rows
from bigembed.kernels.tokens import hash_tokens
from bigembed.vocab.packed import PackedTokens, Token
from bigembed.vocab.primes import distinct_primes

MOST_ROWS = 1 << 62
ALL_BITS = 2**64 - 1


@dataclass(frozen=True)
class HashVocab:
    """Every token has `num_hashes` rows, which are hashes of it: no vocabulary is kept, and none is ever full.

    Tokens that meet in one row share it. With several hashes, two tokens rarely share all of theirs; their vector is
    then the sum or mean over the rows ("Bloom embeddings").

    The rows are the same on every machine, for any number of threads, in every version. With the 64-bit hash h of a
    token (bigembed.kernels.tokens, seed 0), or h = the id itself, modulo 2**64, the k-th row is

        first_row + mix64(h ^ key_k) % num_rows,    key_k = fold(fold(0, seed), k)

    with mix64 of bigembed.kernels.hashing and fold of bigembed.kernels.ngrams.

    Args:
        num_rows: rows are first_row <= row < first_row + num_rows.
        num_hashes: rows a token.
        first_row: where the hashed rows begin in the table.
        seed: another seed gives other rows.

    Example:
        >>> HashVocab(1000).rows(["der", "hund"])
        array([[804],
               [458]])
    """

    num_rows: int
    num_hashes: int = 1
    first_row: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_integer("num_rows", self.num_rows, 1, MOST_ROWS)
        _check_integer("num_hashes", self.num_hashes, 1, 1 << 16)
        _check_integer("first_row", self.first_row, 0, MOST_ROWS)
        _check_integer("seed", self.seed, 0, ALL_BITS)

    def rows(self, tokens: "PackedTokens | Token | Iterable[Token] | np.ndarray") -> np.ndarray:
        """int64 (N, num_hashes): the rows of N tokens, or of an integer array of N ids (of any shape, flattened).

        Raises:
            InvalidArgument: the array is not of integers, or something is neither text nor bytes.
        """
        hash_N = _hashes(tokens)
        start = _fold(0, self.seed)
        key_K = np.array([_fold(start, k) for k in range(self.num_hashes)], np.uint64)
        out_NK = np.empty((len(hash_N), self.num_hashes), np.int64)
        threads.run(hashes_to_rows, len(hash_N), hash_N, key_K, self.num_rows, self.first_row, out_NK)
        return out_NK


@dataclass(frozen=True)
class HashBuckets:
    """What stands for unknown tokens: one of `count` rows from `first_row` on, by the token's hash.

    Equals the only row of HashVocab(count, first_row=first_row, seed=seed).
    """

    first_row: int
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_integer("first_row", self.first_row, 0, MOST_ROWS)
        _check_integer("count", self.count, 1, MOST_ROWS)
        _check_integer("seed", self.seed, 0, ALL_BITS)

    def rows_of(self, tokens: PackedTokens) -> np.ndarray:
        """int64 (N,): the row of each token."""
        return HashVocab(self.count, 1, self.first_row, self.seed).rows(tokens)[:, 0]

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it; `from_json` reads it."""
        return {"kind": "hash-buckets", "first_row": self.first_row, "count": self.count, "seed": self.seed}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "HashBuckets":
        """What `to_json` wrote.

        Raises:
            InvalidArgument: it is something else.
        """
        if stored.get("kind") != "hash-buckets":
            raise InvalidArgument(f"{stored!r} is no hash buckets; kind must be 'hash-buckets'.")
        return cls(stored.get("first_row"), stored.get("count"), stored.get("seed", 0))  # type: ignore[arg-type]


class NgramHash:
    """Rows of an n-gram memory: at each position of a sequence, hashes of its last n ids, for several n.

    Every pair of an order n and a head h has a range of rows of its own and a hash of its own; column c = i * heads + h
    is that of orders[i] and head h. Ids may be any 64-bit integers.

    The rows are the same on every machine, for any number of threads, in every version. All numbers wrap around at
    2**64; mix64 is that of bigembed.kernels.hashing, fold that of bigembed.kernels.ngrams:

        start    = fold(fold(0, seed), layer)
        state_0  = start;  state_k = fold(state_(k-1), id of the position k - 1 before this one)
        row      = first_rows[c] + mix64(state_n ^ fold(fold(start, n), h)) % sizes[c]

    Args:
        num_rows: rows of each (order, head): one number for all, or one for each column.
        orders: the lengths n of the n-grams, distinct.
        heads: hashes for each order; two n-grams rarely meet in all of them.
        seed, layer: other numbers give other rows; `layer` is for models that have several memories.
        pad: the id that stands before a sequence begins.
        primes: take as sizes the next primes from num_rows on, each only once, as the Engram models do.

    Attributes:
        sizes: rows of each column. first_rows: where each column's rows begin. total_rows: their sum, V of the table.

    Example:
        >>> memory = NgramHash(1000, orders=(2, 3), heads=2)
        >>> memory.total_rows, memory.rows(np.array([[5, 6, 7]])).shape
        (4000, (1, 3, 4))

    Note:
        The Engram code multiplies ids by random odd numbers and xors them; its rows are not these.
    """

    def __init__(
        self,
        num_rows: int | Sequence[int],
        orders: Sequence[int] = (2, 3),
        heads: int = 1,
        *,
        seed: int = 0,
        pad: int = 0,
        layer: int = 0,
        primes: bool = False,
    ) -> None:
        _check_integer("heads", heads, 1, 1 << 16)
        _check_integer("seed", seed, 0, ALL_BITS)
        _check_integer("layer", layer, 0, ALL_BITS)
        _check_integer("pad", pad, -(2**63), 2**63 - 1)
        self.orders = tuple(orders)
        for order in self.orders:
            _check_integer("orders", order, 1, 1 << 16)
        if not self.orders or len(set(self.orders)) != len(self.orders):
            raise InvalidArgument(f"orders are {self.orders}; give at least one, and each only once.")
        self.heads, self.seed, self.pad, self.layer = int(heads), int(seed), int(pad), int(layer)
        sizes = _sizes(num_rows, len(self.orders) * heads)
        self.sizes = distinct_primes(sizes) if primes else sizes
        *self.first_rows, self.total_rows = accumulate(self.sizes, initial=0)
        _check_integer("the sum of num_rows", self.total_rows, 1, MOST_ROWS)
        self._tables = self._columns()

    def __repr__(self) -> str:
        return (
            f"NgramHash({list(self.sizes)}, orders={self.orders}, heads={self.heads}, seed={self.seed}, "
            f"pad={self.pad}, layer={self.layer})"
        )

    def _columns(self) -> tuple[Any, ...]:
        """The kernel's arguments from `pad` on: the columns by ascending order."""
        start = _fold(_fold(0, self.seed), self.layer)
        columns = sorted(range(len(self.sizes)), key=lambda c: self.orders[c // self.heads])
        orders = [self.orders[c // self.heads] for c in columns]
        keys = [_fold(_fold(start, n), c % self.heads) for n, c in zip(orders, columns, strict=True)]
        return (
            np.uint64(self.pad & ALL_BITS),
            np.uint64(start),
            np.array(orders, np.int64),
            np.array(columns, np.int64),
            np.array(keys, np.uint64),
            np.array([self.sizes[c] for c in columns], np.uint64),
            np.array([self.first_rows[c] for c in columns], np.int64),
        )

    def rows(self, ids: Any) -> Any:
        """The rows of the n-grams that end at each position.

        Args:
            ids: integers, a numpy array or a torch tensor of any device.

        Returns:
            int64, a numpy array or a tensor on the device of the ids.

        Raises:
            InvalidArgument: ids are not integers, or have no dimension.

        Shape:
            ids (..., T) -> (..., T, len(orders) * heads); sequences run along the last dimension of the ids.
        """
        ids_array = _integers(ids)
        if ids_array.ndim == 0:
            raise InvalidArgument("ids are a single number; an array of sequences (..., T) was expected.")
        flat_N = ids_array.reshape(-1).view(np.uint64)
        out_NC = np.empty((flat_N.size, len(self.sizes)), np.int64)
        threads.run(ngrams_to_rows, flat_N.size, flat_N, ids_array.shape[-1], *self._tables, out_NC)
        rows = out_NC.reshape(*ids_array.shape, len(self.sizes))
        if isinstance(ids, np.ndarray) or not hasattr(ids, "device"):
            return rows
        return ids.long().new_tensor(rows)  # int64 on the device of the ids, without an import of torch


def _fold(state: int, x: int) -> int:
    """`fold` of Python's integers."""
    return int(fold(np.uint64(state), np.uint64(x)))


def _hashes(tokens: Any) -> np.ndarray:
    """uint64: the hash of each token; ids are their own."""
    if isinstance(tokens, np.ndarray) and tokens.dtype.kind in "USO":
        tokens = tokens.reshape(-1).tolist()
    if isinstance(tokens, np.ndarray) or hasattr(tokens, "detach"):
        return _integers(tokens).reshape(-1).view(np.uint64)
    packed = PackedTokens.of(tokens)
    hash_N = np.empty(len(packed), np.uint64)
    threads.run(hash_tokens, len(packed), packed.bytes_B, packed.start_M1, hash_N)
    return hash_N


def _integers(ids: Any) -> np.ndarray:
    """An array or a tensor as int64, C-contiguous."""
    array = np.asarray(ids.detach().cpu().numpy() if hasattr(ids, "detach") else ids)
    if array.dtype.kind not in "iu":
        raise InvalidArgument(f"ids are of type {array.dtype}; integers were expected.")
    return np.asarray(array, np.int64, order="C")


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidArgument(f"{name} is {value!r}; an integer from {low} to {high} was expected.")


def _sizes(num_rows: int | Sequence[int], columns: int) -> list[int]:
    sizes = [num_rows] * columns if isinstance(num_rows, int | np.integer) else list(num_rows)
    if len(sizes) != columns:
        raise InvalidArgument(
            f"num_rows has {len(sizes)} numbers; {columns} were expected, one for each order and head."
        )
    for size in sizes:
        _check_integer("num_rows", size, 1, MOST_ROWS)
    return [int(size) for size in sizes]
