"""Vocabulary: which row a token has, and which token a row has; read from disk, never loaded whole."""

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bigembed.errors import InvalidArgument, TableClosed
from bigembed.kernels.tokens import ABSENT
from bigembed.storage.files import disk_bytes
from bigembed.storage.rows import checked_rows
from bigembed.storage.table import Table
from bigembed.vocab.builder import VocabBuilder
from bigembed.vocab.current import CurrentTokens
from bigembed.vocab.format import FOLDER, VocabFacts, remove_leftovers
from bigembed.vocab.growth import add_tokens, compact, is_compaction_due
from bigembed.vocab.packed import PackedTokens, Token, listed, packed_slices
from bigembed.vocab.stored import BUDGET_BYTES
from bigembed.vocab.unknown import (
    ABSENT_ROW,
    NAMED,
    NoRow,
    OneRow,
    UnknownPolicy,
    as_policy,
    rows_by_policy,
    unknown_token,
)
from bigembed.vocab.verify import verify_stored

SLICE_TOKENS = 1 << 16
LARGE_BATCH = 1 << 18  # tokens after which all pages are unmapped: to map them again costs a few hundredths

Tokens = PackedTokens | Token | Iterable[Token]
Unknown = int | Token | UnknownPolicy | None

_current_of: "weakref.WeakKeyDictionary[Table, CurrentTokens]" = weakref.WeakKeyDictionary()


class Vocabulary:
    """The tokens of a table's rows: bytes, or text as its UTF-8. Get one with `Vocabulary.open` or `create`.

    Looking up reads what it needs from disk, where a token takes about 13 bytes beside its own. Vocabularies of one
    table share everything, and follow its rollbacks and refreshes. A forked child may read, and so may a copy that was
    pickled: it sees the last commit.

    Example:
        >>> import tempfile
        >>> table = Table.create(tempfile.mkdtemp() + "/t", num_rows=2, dim=4)
        >>> vocab = Vocabulary.create(table, ["the", "cat"])
        >>> vocab.rows(["cat", "the", "cat"]), vocab.tokens([0])
        (array([1, 0, 1]), [b'the'])
        >>> vocab.add(["cat", "sat"]), table.shape
        (array([1, 2]), (3, 4))
        >>> _ = table.commit("one more token")
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self._read()

    # -- making and opening ---------------------------------------------------------------------------------

    @staticmethod
    def stands_at(table_path: str) -> bool:
        """Whether the table at a path has a vocabulary."""
        return VocabFacts.read(os.path.join(table_path, FOLDER)) is not None

    @classmethod
    def open(cls, table: Table) -> "Vocabulary":
        """The vocabulary of an open table, or of a module on one.

        Raises:
            NoVocabulary: it has none. DamagedTable: a file is missing, or not as it was written.
        """
        return cls(_table_of(table))

    @classmethod
    def create(
        cls,
        table: Table,
        tokens: Tokens,
        rows: Sequence[int] | np.ndarray | None = None,
        *,
        unknown: Unknown = None,
        subwords: dict[str, Any] | None = None,
    ) -> "Vocabulary":
        """Give a table that has none a vocabulary; durable at once, and all or nothing.

        Args:
            table: the open table, or a module on it.
            tokens: those of rows 0, 1, ...; taken in slices, so an iterator need not fit in memory.
            rows: the row of each token, where it is another one. Several tokens may have one row: the first names it.
            unknown: what `rows` gives for unknown tokens: None (an error), a row, a token (its row), HashBuckets.
            subwords: settings of bigembed.vocab.subwords, stored as they are.

        Raises:
            InvalidArgument: there are more tokens than committed rows, or not as many as `rows`.
            TableExists: there is a vocabulary already.
        """
        table = _table_of(table)
        with table.mutex:
            table.check_writable()
            num_rows = table.generations()[0].num_rows
            row_M = None if rows is None else checked_rows(rows, num_rows)
            folder = os.path.join(table.path, FOLDER)
            if os.path.isdir(folder):
                remove_leftovers(folder, VocabFacts.read(folder))
            with VocabBuilder(folder) as builder:
                for part in packed_slices(tokens, SLICE_TOKENS):
                    start, stop = builder.num_entries, builder.num_entries + len(part)
                    if row_M is None and stop > num_rows:
                        raise InvalidArgument(
                            f"at least {stop} tokens were given for {num_rows} committed rows. Say which row each has, "
                            "or grow the table and commit first."
                        )
                    if row_M is not None and stop > len(row_M):
                        raise InvalidArgument(f"at least {stop} tokens were given, and {len(row_M)} rows for them.")
                    builder.append(part, None if row_M is None else row_M[start:stop])
                if row_M is not None and builder.num_entries != len(row_M):
                    raise InvalidArgument(f"{builder.num_entries} tokens were given, and {len(row_M)} rows for them.")
                is_token = isinstance(unknown, str | bytes)
                builder.finish(unknown if is_token else as_policy(unknown, num_rows), subwords)
            _current_of.pop(table, None)
            return cls(table)

    # -- facts ----------------------------------------------------------------------------------------------

    @property
    def subwords(self) -> dict[str, Any] | None:
        """Settings of bigembed.vocab.subwords, if unknown tokens are composed of subwords."""
        return self._read().stored.facts.subwords

    @property
    def unknown(self) -> UnknownPolicy:
        """What `rows` does about unknown tokens if it is not told."""
        return self._read().policy

    def __len__(self) -> int:
        """Entries, those of duplicate tokens included."""
        return self._read().num_entries

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} tokens of {self.table.path!r})"

    def _read(self) -> CurrentTokens:
        """The tokens as of now."""
        table = self.table
        if table.is_closed:
            raise TableClosed(f"{table.path} was closed. Open it again with Table.open.")
        with table.mutex:
            current = _current_of.get(table)
            if current is None:
                current = _current_of[table] = CurrentTokens(table)
            current.catch_up(table)
        return current

    # -- looking up -----------------------------------------------------------------------------------------

    def rows(self, tokens: Tokens, unknown: Unknown = None) -> np.ndarray:
        """The row of each token, in the order given; equals `[dictionary[token] for token in tokens]`.

        Args:
            tokens: a list of text or bytes, PackedTokens, or one token.
            unknown: what stands for unknown tokens: None (what the vocabulary says, an error unless it was told
                otherwise), a row, -1 (marks them), a token (its row), or HashBuckets(first_row, count).

        Returns:
            int64 (N,).

        Raises:
            UnknownToken: names the first unknown tokens and their positions.
        """
        current, num_rows = self._read(), self.table.spec.num_rows
        policy = current.policy if unknown is None else self._policy(unknown, num_rows)
        given = tokens if isinstance(tokens, PackedTokens | list) else listed(tokens)
        row_N = np.empty(len(given), np.int64)
        start = 0
        for part in packed_slices(given, SLICE_TOKENS):
            row_N[start : start + len(part)] = current.find(part, num_rows)
            start += len(part)
        if len(given) >= LARGE_BATCH:
            current.stored.trim()
        if policy == OneRow(ABSENT_ROW):
            return row_N
        position_K = np.flatnonzero(row_N == ABSENT)
        if len(position_K):
            if isinstance(policy, NoRow):
                raise unknown_token([given[int(k)] for k in position_K[:NAMED]], position_K, self._advice(current))
            row_N[position_K] = rows_by_policy(policy, given, position_K, num_rows)
        return row_N

    def _policy(self, unknown: Unknown, num_rows: int) -> UnknownPolicy:
        if isinstance(unknown, str | bytes):
            return OneRow(int(self.rows(unknown)[0]))
        return as_policy(unknown, num_rows)

    @staticmethod
    def _advice(current: CurrentTokens) -> str:
        if current.stored.facts.subwords is not None:
            return "Use embed(tokens), which composes unknown tokens of subwords, or say rows(tokens, unknown=row)."
        return (
            "Say what stands for unknown tokens, as in rows(tokens, unknown=row), or give them rows with add(tokens)."
        )

    def __contains__(self, token: object) -> bool:
        return isinstance(token, str | bytes) and bool(self.rows(token, ABSENT_ROW)[0] != ABSENT)

    def tokens(self, rows: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """The token of each row, None for a row without one. A row that has several gives the first.

        Raises:
            RowOutOfRange: names the row, its position and the valid range.
        """
        current, found = self._read(), []
        row_N = checked_rows(rows, self.table.spec.num_rows)
        for start in range(0, len(row_N), SLICE_TOKENS):
            packed, is_known_N = current.tokens_of(row_N[start : start + SLICE_TOKENS])
            tokens = zip(packed.to_list(), is_known_N.tolist(), strict=True)
            found += [token if is_known else None for token, is_known in tokens]
            current.stored.trim(BUDGET_BYTES)
        return found

    def packed(self, start: int, stop: int) -> PackedTokens:
        """The tokens of rows start to stop - 1; an empty one for a row without (`tokens` tells these apart)."""
        row_N = checked_rows(np.arange(start, max(start, stop)), self.table.spec.num_rows)
        current = self._read()
        found = current.tokens_of(row_N)[0]
        current.stored.trim(BUDGET_BYTES)
        return found

    def entries(self, start: int, stop: int) -> tuple[PackedTokens, np.ndarray]:
        """Entries start to stop - 1 in the order they were added: the tokens, and the row (int64) of each.

        A duplicate token is an entry too. Fewer at the end.
        """
        current = self._read()
        last = max(0, min(stop, current.num_entries))
        found = current.entries(min(max(0, start), last), last)
        current.stored.trim(BUDGET_BYTES)
        return found

    def __iter__(self) -> Iterator[bytes]:
        """All tokens in the order of `entries`, in bounded memory."""
        for start in range(0, len(self), SLICE_TOKENS):
            yield from self.entries(start, start + SLICE_TOKENS)[0].to_list()

    # -- growing --------------------------------------------------------------------------------------------

    def add(self, tokens: Tokens) -> np.ndarray:
        """The row of each token, where those that are new get new rows, in their order: the table grows by as many.

        Durable, and seen by others, with the table's next commit; a rollback takes rows and tokens back together. New
        rows are at their initial values.

        Returns:
            int64 (N,).

        Raises:
            ReadOnlyTable, ForkedTable, DiskFull: nothing was added.
        """
        packed = PackedTokens.of(tokens).checked()
        with self.table.mutex:
            self.table.check_writable()
            current = self._read()
            row_N = add_tokens(self.table, current, packed)
            if is_compaction_due(self.table, current):
                compact(self.table, current)
        return row_N

    def compact(self) -> None:
        """Fold added tokens into the immutable files, so that they need no memory; `add` does it when it pays.

        Only tokens whose rows no rollback can take back. Reads and writes the whole vocabulary; all or nothing.
        """
        with self.table.mutex:
            self.table.check_writable()
            compact(self.table, self._read())

    # -- upkeep ---------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Read everything and compare it with its checksums; look up every token and every row.

        Raises:
            DamagedTable: names the file and the place.
        """
        verify_stored(self._read().stored)

    def trim(self) -> None:
        """Unmap the pages that were read: they count as this process's memory, though the system may take them."""
        self._read().stored.trim()

    def stats(self) -> dict[str, Any]:
        """Plain numbers: tokens, in files and added; bytes on disk, in memory, and mapped at most."""
        current = self._read()
        facts = current.stored.facts
        return {
            "tokens": current.num_entries,
            "stored_tokens": facts.num_entries,
            "added_tokens": len(current.added),
            "duplicates": facts.duplicates,
            "disk_bytes": disk_bytes(current.folder),
            "memory_bytes": current.added.memory_bytes,
            "mapped_bytes": current.stored.mapped_bytes,
            "unknown": current.policy.to_json(),
            "subwords": facts.subwords,
        }

    def __reduce__(self) -> Any:
        return _open_to_read, (self.table.path,)


def _open_to_read(path: str) -> Vocabulary:
    """What a pickled vocabulary becomes: one that sees the table's last commit, and only reads."""
    return Vocabulary.open(Table.open(path, mode="r"))


def _table_of(given: Any) -> Table:
    table = getattr(given, "table", given)
    if not isinstance(table, Table):
        raise InvalidArgument(f"a Table or a module on one is needed, not a {type(given).__name__}.")
    return table
