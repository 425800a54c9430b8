"""VocabBuilder: writes a vocabulary's files in one pass over the tokens, in bounded memory."""

import os
import secrets
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np

from bigembed import threads
from bigembed.errors import InvalidArgument, TableExists
from bigembed.kernels.token_index import encode_tokens, encoded_lengths, hash_rows
from bigembed.kernels.tokens import ABSENT, BLOCK_ENTRIES
from bigembed.storage import files
from bigembed.storage.readers import MappedFile
from bigembed.vocab.file_writer import FileWriter
from bigembed.vocab.format import KINDS, MAX_TOKEN_BYTES, FileFacts, VocabFacts, file_path
from bigembed.vocab.index_builder import IndexBuilder
from bigembed.vocab.packed import PackedTokens, Token, hashes
from bigembed.vocab.stored import StoredVocabulary
from bigembed.vocab.token_file import TokenFile
from bigembed.vocab.unknown import NoRow, UnknownPolicy, as_policy

SLICE_TOKENS = 1 << 16  # encoded at once
SLICE_BYTES = 8 << 20


@dataclass(frozen=True)
class BuildReport:
    """What was built.

    Args:
        num_tokens: entries, duplicates included.
        duplicates: entries whose token came before; it stands for the row it had first.
        first_duplicates: up to 20 of them in order, as (token, row, the row that the token stands for).
    """

    num_tokens: int
    duplicates: int
    first_duplicates: list[tuple[bytes, int, int]] = field(default_factory=list)


class VocabBuilder:
    """Writes the files of a vocabulary into a folder; they count once `finish` has returned, and not before.

    Best in a `with` block: leaving it without `finish` removes what was written. Takes about 110 MiB for 10^8 tokens.

    Args:
        folder: `<table>/vocab`; made if it is not there.
        sequence: ends the files' names; another one than those in use have.
        folded_rows: entries of the log of added tokens below this row are among the tokens given.

    Example:
        >>> import tempfile
        >>> with VocabBuilder(tempfile.mkdtemp() + "/vocab") as builder:
        ...     builder.append(PackedTokens.of(["the", "cat", "the"]))
        ...     builder.finish()
        BuildReport(num_tokens=3, duplicates=1, first_duplicates=[(b'the', 2, 0)])
    """

    def __init__(self, folder: str, *, sequence: int = 1, folded_rows: int = 0) -> None:
        self.folder, self.sequence, self.folded_rows = folder, sequence, folded_rows
        self.num_entries = 0
        self._seed = np.uint64(secrets.randbits(64))
        self._facts: dict[str, FileFacts] = {}
        self._writers: dict[str, FileWriter] = {}
        self._is_finished = self._is_abandoned = False
        self._made_folder = not os.path.isdir(folder)
        if self._made_folder:
            files.make_directory(folder)
        elif (old := VocabFacts.read(folder)) is not None and old.sequence >= sequence:
            raise TableExists(f"{folder} has a vocabulary already. Add tokens to it with Vocabulary.add.")
        self._index = IndexBuilder(self._path("pairs"), self._are_same)
        self._open("tokens")
        self._open("blocks")

    def _path(self, kind: str) -> str:
        return file_path(self.folder, kind, self.sequence)

    def _open(self, kind: str) -> FileWriter:
        self._writers[kind] = FileWriter(self._path(kind))
        return self._writers[kind]

    # -- tokens ---------------------------------------------------------------------------------------------

    def append(self, tokens: PackedTokens, rows: np.ndarray | None = None) -> None:
        """The next entries, one for each token, and the row that each stands for.

        Args:
            tokens: any number; empty ones too. Free again on return.
            rows: int64 (M,); None: the entry's own number. Several entries may have one row: the first is its token.

        Raises:
            InvalidArgument: rows of another length or below 0, or a token of 2 GiB or more.
        """
        tokens = tokens.checked()
        rows_M = None if rows is None else np.ascontiguousarray(rows, np.int64)
        if rows_M is not None and (rows_M.shape != (len(tokens),) or (len(rows_M) and rows_M.min() < 0)):
            raise InvalidArgument(f"rows of shape {rows_M.shape} for {len(tokens)} tokens; one row >= 0 for each.")
        check_lengths(tokens)
        start = 0
        while start < len(tokens):
            most = int(np.searchsorted(tokens.start_M1, tokens.start_M1[start] + SLICE_BYTES, "right")) - 1
            stop = min(len(tokens), start + SLICE_TOKENS, max(start + 1, most))
            self._append_slice(tokens.between(start, stop), None if rows_M is None else rows_M[start:stop])
            start = stop

    def _append_slice(self, tokens: PackedTokens, rows_M: np.ndarray | None) -> None:
        count, first = len(tokens), self.num_entries
        at_M1 = np.zeros(count + 1, np.int64)
        threads.run(encoded_lengths, count, tokens.start_M1, at_M1[1:])
        np.cumsum(at_M1, out=at_M1)
        encoded_T = np.empty(at_M1[-1], np.uint8)
        threads.run(encode_tokens, count, tokens.bytes_B, tokens.start_M1, at_M1, encoded_T)
        self._append_rows(rows_M, count)
        offset_C = (self._writers["tokens"].size_bytes + at_M1[-first % BLOCK_ENTRIES : -1 : BLOCK_ENTRIES]).astype(
            "<u8"
        )
        self._writers["blocks"].append(offset_C)
        self._writers["tokens"].append(encoded_T)
        self._index.append(hashes(tokens, int(self._seed)), first)
        self.num_entries += count

    def _append_rows(self, rows_M: np.ndarray | None, count: int) -> None:
        """Write the rows of the next entries, if not all entries so far have their own number."""
        own_M = np.arange(self.num_entries, self.num_entries + count)
        rows_M = own_M if rows_M is None else rows_M
        if "rows" not in self._writers:
            if np.array_equal(rows_M, own_M):
                return
            writer = self._open("rows")
            for start in range(0, self.num_entries, SLICE_TOKENS):
                writer.append(np.arange(start, min(start + SLICE_TOKENS, self.num_entries)).astype("<i8"))
        self._writers["rows"].append(rows_M.astype("<i8"))

    # -- the end --------------------------------------------------------------------------------------------

    def finish(
        self,
        unknown: "int | Token | UnknownPolicy | None" = None,
        subwords: dict[str, Any] | None = None,
    ) -> BuildReport:
        """Write the index, and make everything durable; from here on the vocabulary is there.

        Args:
            unknown: what stands for unknown tokens: None (an error), a row, a token (its row), or HashBuckets.
            subwords: settings of bigembed.vocab.subwords, stored as they are.

        Raises:
            InvalidArgument: `unknown` is a token that was not appended, or nothing that can be stored.
        """
        policy = NoRow() if isinstance(unknown, str | bytes) else as_policy(unknown)
        kept = [self._finish_file(kind) for kind in ("tokens", "blocks", "rows") if kind in self._writers]
        self._entries = TokenFile(self._path("tokens"), self._path("blocks"), self.num_entries)
        num_homes, row_homes = self._write_index("index", self._index), 0
        if "rows" in kept:
            row_homes = self._write_row_index()
        facts = VocabFacts(
            sequence=self.sequence,
            num_entries=self.num_entries,
            duplicates=self._index.repeated,
            num_homes=num_homes,
            row_homes=row_homes,
            seed=int(self._seed),
            folded_rows=self.folded_rows,
            unknown=policy.to_json(),
            subwords=subwords,
            files={kind: self._facts[kind] for kind in KINDS if kind in self._facts},
        )
        stored = StoredVocabulary(self.folder, facts)
        if isinstance(unknown, str | bytes):
            facts = replace(facts, unknown=_row_policy(stored, unknown).to_json())
        report = self._report(stored)
        files.sync_directory(self.folder)
        files.sync_directory(os.path.dirname(self.folder))
        facts.write(self.folder)
        self._is_finished = True
        return report

    def _finish_file(self, kind: str) -> str:
        self._facts[kind] = self._writers.pop(kind).finish()
        return kind

    def _write_index(self, kind: str, index: IndexBuilder) -> int:
        num_homes = index.write(self._open(kind))
        self._finish_file(kind)
        return num_homes

    def _write_row_index(self) -> int:
        """The index from rows to entries, over the file of rows."""
        rows = MappedFile(self._path("rows"))
        row_E = rows.bytes_B.view(np.int64)
        index = IndexBuilder(self._path("pairs"), lambda a_N, b_N: row_E[a_N] == row_E[b_N])
        for start in range(0, self.num_entries, SLICE_TOKENS):
            row_M = row_E[start : start + SLICE_TOKENS]
            hash_M = np.empty(len(row_M), np.uint64)
            threads.run(hash_rows, len(row_M), row_M, self._seed, hash_M)
            index.append(hash_M, start)
            rows.trim()
        return self._write_index("entries", index)

    def _are_same(self, a_N: np.ndarray, b_N: np.ndarray) -> np.ndarray:
        same_N = self._entries.are_same(a_N, b_N)
        self._entries.tokens.trim()
        return same_N

    def _report(self, stored: StoredVocabulary) -> BuildReport:
        entry_K, first_K = self._index.first_repeated_K2.T
        tokens, row_K = stored.entries.packed(entry_K).to_list(), stored.rows_of(entry_K).tolist()
        named = list(zip(tokens, row_K, stored.rows_of(first_K).tolist(), strict=True))
        return BuildReport(self.num_entries, self._index.repeated, named)

    def abandon(self) -> None:
        """Remove what was written, if `finish` was not called; safe to repeat."""
        if self._is_finished or self._is_abandoned:
            return
        self._is_abandoned = True
        decided = VocabFacts.read(self.folder)
        if decided is not None and decided.sequence == self.sequence:
            return  # the very last step failed after it had taken effect: these are the files that count
        for writer in self._writers.values():
            writer.close()
        self._index.close()
        for kind in KINDS:
            files.unlink(self._path(kind))
        if self._made_folder and not os.listdir(self.folder):
            files.remove_tree(self.folder)

    def __enter__(self) -> "VocabBuilder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()


def check_lengths(tokens: PackedTokens) -> None:
    """Raises InvalidArgument for a token that is too long to be stored."""
    longest = int(tokens.length_M.max()) if len(tokens) else 0
    if longest > MAX_TOKEN_BYTES:
        raise InvalidArgument(f"a token has {longest:,} bytes; at most {MAX_TOKEN_BYTES:,} are possible.")


def _row_policy(stored: StoredVocabulary, token: Token) -> UnknownPolicy:
    """The row of a token, for all unknown ones."""
    entry_1 = stored.find(PackedTokens.of(token))
    if entry_1[0] == ABSENT:
        raise InvalidArgument(f"unknown={token!r} is not among the tokens, so it has no row to stand for unknown ones.")
    return as_policy(int(stored.rows_of(entry_1)[0]))
