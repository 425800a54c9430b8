"""From a table to a file of embeddings: the rows of its last commit, streamed in order, with their tokens."""

import os
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from bigembed import threads
from bigembed.convert.writers.formats import writer_for
from bigembed.convert.writers.writer import WriteOptions
from bigembed.errors import InvalidArgument, StateMismatch, TableMoved
from bigembed.kernels.norms import survey_rows
from bigembed.storage.create import checked_integer
from bigembed.storage.table import Table
from bigembed.vocab.packed import PackedTokens
from bigembed.vocab.vectors import composes_words, word_vectors
from bigembed.vocab.vocabulary import Vocabulary

BLOCK_BYTES = 8 << 20  # of records read at once
MAX_BLOCK_ROWS = 1 << 16  # as many tokens are objects at once

Progress = Callable[[int, int], None]  # (rows written, rows to write)
Rows = tuple[np.ndarray, PackedTokens | None]  # float32 (M, D), and a token for each


@dataclass
class ExportReport:
    """What an export wrote.

    Args:
        target: as the user gave it. format, dtype: as written. files: all that were written, tokens beside included.
        rows, dim: written. generation: the commit that they are of. size_bytes: of all files.
        notes: what a user should know. seconds: all of it.
    """

    target: str
    format: str
    dtype: str
    rows: int
    dim: int
    generation: int
    files: list[str] = field(default_factory=list)
    size_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def export(
    table_path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    tensor: str | None = None,
    part_bytes: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the rows of a table's last commit to a file, in bounded memory; float32 values come out bit for bit.

    The target appears only when it is whole: an error or Ctrl-C leaves nothing. A row without a token is written as
    "row:17", and in a table without a vocabulary the row's number is its token. Where words are composed of subwords
    (fastText), formats that hold tokens get the words alone, with their composed vectors. Formats that hold no tokens
    get `<target>.vocab.txt` beside (see bigembed.convert.writers.vocab_text) if the table has a vocabulary.

    Args:
        table_path: the table's folder; it may be open for writing, but must not be committed to meanwhile.
        target: the file to write, or a folder where `part_bytes` is given.
        format: one of bigembed.convert.writers.formats.WRITE_FORMATS; None to go by the target's suffix (.txt and
            .vec are word2vec text, with a header).
        dtype: "float32", or "float16" or "bfloat16" (npy, safetensors, torch), rounded to nearest, ties to even.
        overwrite: replace what an export wrote there before.
        tensor: the tensor's name in safetensors ("embedding.weight") and torch ("weight") files.
        part_bytes: the most bytes of one safetensors file; makes a folder of them with an index.
        limit: write only so many rows, from row 0 on.
        progress: called with the rows written so far, and how many there will be.

    Returns:
        What was written.

    Raises:
        TableMissing, NotATable, DamagedTable, DamagedRow: the table cannot be read, or there is no folder for the
            target.
        TableExists: something stands at the target. UnknownFormat: the suffix or the format is unknown.
        InvalidArgument: an option that the format lacks, or a token that it cannot hold.
        TableMoved: the table was committed to meanwhile, so the rows would be of different commits.

    Example:
        >>> import tempfile, numpy as np
        >>> from bigembed.storage.table import Table
        >>> folder = tempfile.mkdtemp()
        >>> with Table.create(folder + "/t", num_rows=3, dim=2, init="zeros") as table:
        ...     table.write([1], np.ones((1, 2), np.float32))
        ...     generation = table.commit()
        >>> report = export(folder + "/t", folder + "/rows.npy")
        >>> np.load(folder + "/rows.npy")[1]
        array([1., 1.], dtype=float32)
    """
    began = time.monotonic()
    where = os.fspath(target)
    _check_place(where, table_path)
    if limit is not None and checked_integer("limit", limit) < 1:
        raise InvalidArgument(f"limit must be at least 1, not {limit}.")
    kind = writer_for(where, "safetensors" if part_bytes is not None and format is None else format)
    with Table.open(table_path, mode="r") as table:
        vocabulary = Vocabulary.open(table) if Vocabulary.stands_at(table.path) else None
        options = WriteOptions(dtype, overwrite, tensor, part_bytes, vocabulary is not None or kind.carries_tokens)
        state = _state(table)
        if vocabulary is not None and kind.carries_tokens and composes_words(vocabulary):
            reader: _Reader | _WordReader = _WordReader(table, vocabulary, limit)
        else:
            reader = _Reader(table, min(limit or table.shape[0], table.shape[0]), vocabulary, options.has_tokens)
        num_rows = reader.num_rows
        with kind(where, num_rows, table.shape[1], options) as writer, closing(reader.blocks()) as blocks:
            for values_MD, tokens in blocks:
                writer.append(values_MD, tokens)
                if progress is not None:
                    progress(writer.rows, num_rows)
            table.refresh()
            _check_same(table, state)
    report = ExportReport(where, kind.format, dtype, num_rows, writer.dim, table.generation, writer.files)
    report.size_bytes = sum(os.path.getsize(path) for path in writer.files)
    report.notes = reader.notes + _notes(reader.not_finite, writer.overflowed, dtype)
    report.seconds = time.monotonic() - began
    return report


class _Reader:
    """Rows in order, block by block; the next block is read while the last one is written.

    Attributes:
        num_rows: how many there will be. not_finite: rows so far that hold NaN or infinity.
        notes: what a user should know.
    """

    def __init__(self, table: Table, num_rows: int, vocabulary: Vocabulary | None, has_tokens: bool) -> None:
        self._table, self.num_rows = table, num_rows
        self._vocabulary, self._has_tokens = vocabulary, has_tokens
        self.notes = []
        if vocabulary is None and has_tokens:
            self.notes.append("the table has no vocabulary, so each row's token is its number.")
        if vocabulary is not None and vocabulary.subwords is not None:
            self.notes.append("rows of words and of subwords are written as they are; words are not composed of them.")
        self._before = _state(table)
        self._step = max(1, min(BLOCK_BYTES // table.spec.record_bytes, MAX_BLOCK_ROWS, num_rows))
        self._values_ME = np.empty((self._step, table.spec.row_width), np.float32)
        self.not_finite = 0

    def blocks(self) -> Generator[Rows, None, None]:
        """Weights, and the tokens where they are asked for. Close it: then nothing reads any more."""
        coming = self._start(0)
        try:
            for start in range(0, self.num_rows, self._step):
                values_MD = self._arrived(start, coming)
                if start + self._step < self.num_rows:
                    coming = self._start(start + self._step)
                stop = start + len(values_MD)
                yield values_MD, _tokens(self._vocabulary, start, stop) if self._has_tokens else None
        finally:
            coming.wait()

    def _rows(self, start: int) -> np.ndarray:
        return np.arange(start, min(start + self._step, self.num_rows))

    def _start(self, start: int) -> threads.Task:
        """Read without the table's lock: a fork holds that while it waits for what runs in the background."""
        row_M = self._rows(start)
        return threads.run_in_background(self._table.read_ahead(row_M).run, self._values_ME[: len(row_M)])

    def _arrived(self, start: int, task: threads.Task) -> np.ndarray:
        """The weights of these rows; what could not be read ahead is read now, or its damage is raised."""
        task.wait()
        row_M = self._rows(start)
        values_ME = self._values_ME[: len(row_M)]
        lost = np.flatnonzero(~task.result) if task.error is None else np.arange(len(row_M))
        if len(lost):
            lost_ME = np.empty((len(lost), values_ME.shape[1]), np.float32)
            try:
                self._table.fetch_rows(row_M[lost], lost_ME)
            except StateMismatch:
                _check_same(self._table, self._before)
                raise
            values_ME[lost] = lost_ME
        _check_same(self._table, self._before)
        values_MD = values_ME[:, : self._table.spec.dim].copy()
        self.not_finite += survey_rows(0, len(row_M), values_MD)[0]
        return values_MD


class _WordReader:
    """As _Reader, the words of a vocabulary that composes them of subwords: formats of words hold nothing else."""

    def __init__(self, table: Table, vocabulary: Vocabulary, limit: int | None) -> None:
        self._table, self._vocabulary = table, vocabulary
        self.num_rows = min(limit or len(vocabulary), len(vocabulary))
        self.not_finite = 0
        self.notes = ["vectors of words were composed of their subwords, whose own rows this format cannot hold."]

    def blocks(self) -> Generator[Rows, None, None]:
        before, left = _state(self._table), self.num_rows
        for words, _, values_MD in word_vectors(self._table, self._vocabulary):
            _check_same(self._table, before)
            self.not_finite += survey_rows(0, min(left, len(words)), values_MD)[0]
            yield values_MD[:left], words.between(0, min(left, len(words)))
            left -= min(left, len(words))
            if not left:
                return


def _state(table: Table) -> tuple[object, ...]:
    """What must stay as it is while rows are read: the commit, and what rows that were never written hold."""
    return table.generation, table.spec


def _check_same(table: Table, before: tuple[object, ...]) -> None:
    """Raises TableMoved if a writer went on since; a reader notices when it looks again."""
    if _state(table) != before:
        raise TableMoved(
            f"{table.path} was committed to while it was exported (generation {before[0]}, now {table.generation}), so "
            "rows would be of different commits. Nothing was written; export again while no writer commits."
        )


def _tokens(vocabulary: Vocabulary | None, start: int, stop: int) -> PackedTokens:
    """The tokens of rows start to stop - 1; a name made of its number for a row that has none."""
    if vocabulary is None:
        return PackedTokens.of([b"%d" % row for row in range(start, stop)])
    packed = vocabulary.packed(start, stop)
    empty_E = np.flatnonzero(packed.length_M == 0)
    missing = [m for m, token in zip(empty_E, vocabulary.tokens(start + empty_E), strict=True) if token is None]
    if not missing:
        return packed
    listed = packed.to_list()
    for m in missing:
        listed[m] = b"row:%d" % (start + m)
    return PackedTokens.of(listed)


def _check_place(target: str, table_path: str | os.PathLike[str]) -> None:
    if target == "-" or os.path.realpath(target).startswith(os.path.realpath(table_path) + os.sep):
        raise InvalidArgument(f"{target} is no place for an export: give a file, outside of the table's folder.")


def _notes(not_finite: int, overflowed: int, dtype: str) -> list[str]:
    notes = []
    if not_finite:
        notes.append(
            f"{not_finite:,} rows hold NaN or infinity; they are written as they are (text that holds them cannot be "
            "converted again)."
        )
    if overflowed:
        notes.append(f"{overflowed:,} values are beyond the range of {dtype} and became infinite.")
    return notes
