"""What stands for tokens that are not in a vocabulary: nothing (an error), one row, or something with `rows_of`."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bigembed.errors import DamagedTable, InvalidArgument, UnknownToken
from bigembed.vocab.hashed import HashBuckets
from bigembed.vocab.packed import PackedTokens, Token

NAMED, SHOWN = 5, 80  # unknown tokens in a message, and characters of each
ABSENT_ROW = -1


class UnknownPolicy(Protocol):
    """Rows for unknown tokens; `bigembed.vocab.hashed.HashBuckets` is one."""

    def rows_of(self, tokens: PackedTokens) -> np.ndarray: ...
    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class OneRow:
    """A row for all unknown tokens; -1 to leave them without one."""

    row: int

    def rows_of(self, tokens: PackedTokens) -> np.ndarray:
        return np.full(len(tokens), self.row, np.int64)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "row", "row": self.row}


@dataclass(frozen=True)
class NoRow:
    """Unknown tokens are an error."""

    def rows_of(self, tokens: PackedTokens) -> np.ndarray:
        raise UnknownToken("a token is not in the vocabulary")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "error"}


def as_policy(unknown: Any, num_rows: int | None = None) -> UnknownPolicy:
    """The policy that a user's word stands for: None, a row, or an object with `rows_of`.

    Raises:
        InvalidArgument: it is none of these, or the row is not below `num_rows` (where given).
    """
    if unknown is None:
        return NoRow()
    if hasattr(unknown, "rows_of"):
        return unknown
    if isinstance(unknown, bool) or not hasattr(unknown, "__index__"):
        raise InvalidArgument(
            f"unknown={unknown!r} cannot stand for unknown tokens; give a row, a token, HashBuckets(first_row, count), "
            "or None for an error."
        )
    row = operator.index(unknown)
    if row < ABSENT_ROW or (num_rows is not None and row >= num_rows):
        raise InvalidArgument(f"unknown={row} is no row; use 0 to {(num_rows or (1 << 63)) - 1}, or -1 to mark them.")
    return OneRow(row)


def policy_from_json(stored: dict[str, Any], path: str) -> UnknownPolicy:
    """What `to_json` of a policy wrote.

    Raises:
        DamagedTable: it is nothing that this library knows.
    """
    try:
        if stored["kind"] == "error":
            return NoRow()
        if stored["kind"] == "row":
            return as_policy(stored["row"])
        return HashBuckets.from_json(stored)
    except (KeyError, TypeError, InvalidArgument) as error:
        raise DamagedTable(f"{path} names no policy for unknown tokens that this library knows: {stored!r}.") from error


def rows_by_policy(
    policy: UnknownPolicy, given: PackedTokens | list[Token], position_K: np.ndarray, num_rows: int
) -> np.ndarray:
    """int64 (K,): the rows that a policy has for the tokens at some positions.

    Raises:
        InvalidArgument: the table does not have them.
    """
    if isinstance(policy, OneRow):  # needs no tokens
        row_K = np.full(len(position_K), policy.row, np.int64)
    elif isinstance(given, PackedTokens):
        row_K = policy.rows_of(given.select(position_K))
    else:
        row_K = policy.rows_of(PackedTokens.of([given[k] for k in position_K.tolist()]))
    if len(row_K) and not 0 <= row_K.min() <= row_K.max() < num_rows:
        raise InvalidArgument(f"{policy} gives rows {row_K.min()} to {row_K.max()}; the table has {num_rows} rows.")
    return row_K


def unknown_token(first: Sequence[Token], position_K: np.ndarray, advice: str) -> UnknownToken:
    """The error that names the first unknown tokens and their positions among all that were asked for."""
    named = [f"{_shown(token)} (at position {k})" for token, k in zip(first, position_K.tolist(), strict=False)]
    more = f" and {len(position_K) - len(named):,} more" if len(position_K) > len(named) else ""
    verb = "is" if len(position_K) == 1 else "are"
    return UnknownToken(f"{', '.join(named)}{more} {verb} not in the vocabulary. {advice}")


def _shown(token: Token) -> str:
    text = token if isinstance(token, str) else token.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")
