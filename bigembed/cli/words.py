"""`bigembed lookup` and `nearest`: rows of a table by their tokens, and the rows most like them."""

import argparse
import os
from typing import Any

import numpy as np

from bigembed.cli import values
from bigembed.cli.command import OK, add_command, open_table, progress_bar
from bigembed.cli.output import printable
from bigembed.errors import InvalidArgument, NoVocabulary, RowOutOfRange, UnknownToken

DIGITS = 19  # of the largest row


EXAMPLES = """  bigembed lookup glove.bigembed king queen
  bigembed lookup glove.bigembed -- -- -lrb-                tokens that begin with a dash come after --
"""


def add_lookup(commands: Any) -> None:
    text = "Print the vectors of tokens. One line a token: the token, a tab, its numbers; words outside a fastText "
    text += "vocabulary are composed of their subwords."
    parser = add_command(commands, "lookup", _lookup, text, EXAMPLES)
    parser.add_argument("table", metavar="TABLE", help="the table's folder")
    parser.add_argument(
        "tokens", metavar="TOKEN", nargs="+", help="a token (after -- if one begins with a dash); or a row"
    )
    parser.add_argument("--rows", action="store_true", help="the words are row numbers")


def _lookup(args: argparse.Namespace) -> int:
    with open_table(args.table) as table:
        vectors_ND = _vectors(table, args.tokens, args.rows)
        for token, vector in zip(args.tokens, vectors_ND, strict=True):
            print(printable(token), " ".join(map(str, vector)), sep="\t")
    return OK


def add_nearest(commands: Any) -> None:
    text = "Print the rows with the largest cosine to a token's. The whole table is read once, in bounded memory."
    parser = add_command(commands, "nearest", _nearest, text, "  bigembed nearest glove.bigembed king --count 5\n")
    parser.add_argument("table", metavar="TABLE", help="the table's folder")
    parser.add_argument("token", metavar="TOKEN", help="a token; or a row's number with --rows")
    parser.add_argument("--count", type=values.count, default=10, metavar="N", help="how many (default: 10)")
    parser.add_argument("--rows", action="store_true", help="the word is a row number")


def _nearest(args: argparse.Namespace) -> int:
    from bigembed.convert.nearest import nearest
    from bigembed.vocab.vocabulary import Vocabulary

    with open_table(args.table) as table:
        query_1D = _vectors(table, [args.token], args.rows)
        words = Vocabulary.open(table) if Vocabulary.stands_at(table.path) else None
        own = _rows([args.token], table.shape[0]) if args.rows else _own_rows(words, args.token)
        with progress_bar("comparing", "row", unit_scale=True) as move:
            how: dict[str, Any] = {"exclude_rows": own, "vocabulary": words, "progress": move}
            rows_1C, similarity_1C = nearest(table, query_1D, args.count, **how)
        found = words.tokens(rows_1C[0]) if words is not None else [None] * len(rows_1C[0])
        for row, similarity, token in zip(rows_1C[0], similarity_1C[0], found, strict=True):
            shown = f"row {row}" if token is None else printable(token.decode("utf-8", "replace"))
            print(f"{similarity:.4f}\t{shown}")
    return OK


def _own_rows(words: Any, token: str) -> list[int]:
    """The token's own row, where it has one: it is no neighbour of itself."""
    row = int(words.rows([os.fsencode(token)], unknown=-1)[0])
    return [row] if row >= 0 else []


def _vectors(table: Any, tokens: list[str], are_rows: bool) -> np.ndarray:
    """float32 (N, D): of rows by number, or of tokens."""
    if are_rows:
        return table.read(np.array(_rows(tokens, table.shape[0]), np.int64))
    from bigembed.vocab.vectors import vectors_of_tokens
    from bigembed.vocab.vocabulary import Vocabulary

    if not Vocabulary.stands_at(table.path):
        raise NoVocabulary(f"{table.path} has no vocabulary: its rows have numbers only. Look them up with --rows.")
    vocabulary, wanted = Vocabulary.open(table), [os.fsencode(token) for token in tokens]
    try:
        return vectors_of_tokens(table, vocabulary, wanted)
    except UnknownToken as error:
        raise _unknown(vocabulary, wanted) from error


def _unknown(vocabulary: Any, tokens: list[bytes]) -> UnknownToken:
    """The error that names the unknown ones of some tokens, and says what the command line can do about them."""
    from bigembed.vocab.unknown import NAMED, unknown_token

    position_K = np.flatnonzero(vocabulary.rows(tokens, unknown=-1) < 0)
    first = [tokens[k] for k in position_K[:NAMED].tolist()]
    advice = "Use tokens that it has, or convert with --unknown TOKEN, whose row then stands for all others."
    return unknown_token(first, position_K, advice)


def _rows(words: list[str], num_rows: int) -> list[int]:
    """The rows with these numbers.

    Raises:
        InvalidArgument: one is no number. RowOutOfRange: the table does not have it.
    """
    for word in words:
        if not word.isdecimal():
            raise InvalidArgument(f"{word!r} is not a row's number; leave --rows out to look tokens up.")
        if len(word) > DIGITS or int(word) >= num_rows:
            raise RowOutOfRange(
                f"there is no row {word}: this table has {num_rows} rows (valid ids are 0 to {num_rows - 1})."
            )
    return [int(word) for word in words]


COMMANDS = (add_lookup, add_nearest)
