"""From any file of embeddings to a table: read in blocks, written aside, renamed into place when whole."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigembed import threads
from bigembed.convert.formats import open_source
from bigembed.convert.options import ConvertOptions, check_applies, check_rows, checked_options
from bigembed.convert.provenance import Provenance
from bigembed.convert.source import ReadOptions, SkippedLines, Source
from bigembed.convert.writers.vocab_text import VOCAB_SUFFIX, read_vocab_lines
from bigembed.errors import BadSource, InvalidArgument, TableExists
from bigembed.init import normal
from bigembed.kernels.norms import normalize_rows, survey_rows
from bigembed.spec import StateColumns
from bigembed.storage.bulk import BulkTable
from bigembed.vocab.builder import BuildReport, VocabBuilder
from bigembed.vocab.packed import PackedTokens

Progress = Callable[[int, int | None], None]  # (bytes of the source read, their total where known)


@dataclass
class ConvertReport:
    """What a conversion did.

    Args:
        source, target: as the user gave them. format, dtype: of the source. rows, dim: read. num_rows: V of the table.
        vocabulary: tokens and duplicates; None where there is none.
        spread: of the values read (their root mean square); rows that are new start at random with this spread.
        skipped: lines left out. notes: what a user should know. seconds: all of it. is_dry: nothing was written.
    """

    source: str
    target: str
    format: str
    dtype: str
    dim: int
    rows: int = 0
    num_rows: int = 0
    vocabulary: BuildReport | None = None
    spread: float = 0.0
    skipped: SkippedLines = field(default_factory=SkippedLines)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    is_dry: bool = False


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> ConvertReport:
    """Bring a file of embeddings into a new table, in bounded memory, with its vocabulary and where it came from.

    The target appears only when it is whole: an error or Ctrl-C leaves nothing. Row r of the table is row r of the
    source (a token that comes twice keeps both rows; the first one is found by the token).

    Args:
        source: a file, a model's folder, or "-" for standard input.
        target: the folder of the new table.
        options: see ConvertOptions; single ones may be given by name instead.
        progress: called with the bytes read so far, and their total where it is known.

    Raises:
        BadSource: the file is not what its format asks for; names line or byte. UnknownFormat, MissingLibrary.
        TableExists: something stands at the target. InvalidArgument: options that contradict each other.

    Example:
        >>> import tempfile, numpy as np, bigembed
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/rows.npy", np.eye(3, dtype=np.float32))
        >>> report = bigembed.convert_file(folder + "/rows.npy", folder + "/rows.bigembed")
        >>> report.rows, report.dim, report.format
        (3, 3, 'npy')
    """
    options = checked_options(options, more)
    began = time.monotonic()
    path, where = os.fspath(source), os.path.abspath(os.fspath(target))
    if os.path.lexists(where) and not (options.overwrite or options.dry_run):
        raise TableExists(f"{where} exists. Choose another target, or pass overwrite=True (--overwrite).")
    if path != "-" and os.path.realpath(path).startswith(os.path.realpath(where) + os.sep):
        raise InvalidArgument(f"{path} lies inside the target {where}. Choose a target elsewhere.")
    how = ReadOptions(options.dim, options.tensor, options.skip_bad_lines, options.limit)
    with open_source(path, options.format, how) as reader:
        check_applies(reader, options)
        owner, state = _state(options.optimizer, reader.dim)
        report = ConvertReport(path, where, reader.format, reader.dtype, reader.dim, is_dry=options.dry_run)
        report.skipped = reader.skipped
        if options.dry_run:
            _pump(reader, None, options, report, progress)
        else:
            _build(reader, where, owner, state, options, report, progress)
        report.notes += reader.notes
    report.seconds = time.monotonic() - began
    return report


def _state(optimizer: str | None, dim: int) -> tuple[str | None, tuple[StateColumns, ...]]:
    """(owner, state columns) that the new records have."""
    if optimizer is None:
        return None, (StateColumns("reserved", 1),)
    from bigembed.optim.reserve import state_of_rule  # needs torch

    return state_of_rule(optimizer, dim)


def _build(
    reader: Source,
    where: str,
    owner: str | None,
    state: tuple[StateColumns, ...],
    options: ConvertOptions,
    report: ConvertReport,
    progress: Progress | None,
) -> None:
    """Make the table."""
    words = None if reader.has_tokens or reader.subwords or not options.vocabulary else _words_beside(reader)
    if options.unknown is not None and not (words or (options.vocabulary and reader.has_tokens)):
        raise InvalidArgument(f"unknown={options.unknown!r}: there is no vocabulary, for which it would be.")
    provenance = Provenance([*reader.files, *([words] if words else [])])
    try:
        with BulkTable(
            where,
            reader.dim,
            num_rows=reader.num_rows if options.limit is None else None,
            state=state,
            owner=owner,
            seed=options.seed,
            overwrite=options.overwrite,
        ) as made:
            tokens = None
            if words or (options.vocabulary and (reader.has_tokens or reader.subwords is not None)):
                tokens = VocabBuilder(os.path.join(made.folder, "vocab"))
            _pump(reader, _Target(made, tokens), options, report, progress)
            if words and tokens is not None:
                report.notes.append(f"the tokens are those of {words}.")
                _append_words(tokens, words, report.rows, options.limit is not None)
            if tokens is not None:
                report.vocabulary = tokens.finish(options.unknown, _subwords(reader, report))
            origin = _origin(reader, provenance.result(), options, report)
            made.finish(report.num_rows, init=normal(0.0, report.spread), attributes={"source": origin})
    finally:
        provenance.stop()


def _origin(
    reader: Source, files: list[dict[str, Any]], options: ConvertOptions, report: ConvertReport
) -> dict[str, Any]:
    """Where the rows came from, for the table's attributes."""
    facts = dict(reader.facts)
    if not files:  # what could be read only once was summed on the way
        name = "standard input" if reader.path == "-" else os.path.basename(reader.path)
        files = [{"name": name, **{key: facts.pop(key) for key in ("size", "sha256") if key in facts}}]
    said = {"rows": report.rows, "normalized": options.normalize}
    return {"format": reader.format, "dtype": reader.dtype, "files": files, **said, **facts}


def _words_beside(reader: Source) -> str | None:
    """The file of tokens that `export` puts beside a format without any."""
    path = reader.path.rstrip(os.sep) + VOCAB_SUFFIX
    return path if os.path.isfile(path) else None


def _append_words(tokens: VocabBuilder, path: str, rows: int, is_limited: bool) -> None:
    """The first `rows` tokens of a file.

    Raises:
        BadSource: it has fewer, or (where all rows were read) more.
    """
    left, more = rows, 0
    for some in read_vocab_lines(path):
        tokens.append(some.between(0, min(left, len(some))))
        more += max(0, len(some) - left)
        left -= min(left, len(some))
    if left or (more and not is_limited):
        raise BadSource(
            f"{path} has {rows - left + more} tokens, but there are {rows} rows. Leave it out with vocabulary=False "
            "(--no-vocabulary)."
        )


def _subwords(reader: Source, report: ConvertReport) -> dict[str, Any] | None:
    """How rows of subwords are found, if those rows were read."""
    if reader.subwords is not None and report.rows != reader.num_rows:
        report.notes.append("rows of subwords were left out: a word's vector is its own row, not fastText's.")
        return None
    return reader.subwords


@dataclass
class _Target:
    """Where rows and tokens go."""

    table: BulkTable
    tokens: VocabBuilder | None

    def append(self, values_MD: np.ndarray, tokens: PackedTokens | None) -> None:
        first = self.table.next_row
        self.table.append(values_MD)
        if self.tokens is not None and tokens is not None:
            self.tokens.append(tokens, np.arange(first, first + len(tokens)))


def _pump(
    reader: Source, target: _Target | None, options: ConvertOptions, report: ConvertReport, progress: Progress | None
) -> None:
    """Every block, from the reader to the target; fills in the report."""
    limit = np.inf if options.limit is None else options.limit
    not_finite, squares = 0, 0.0
    for block in reader.blocks():
        count = int(min(len(block.values_MD), limit - report.rows))
        values_MD = block.values_MD[:count]
        if options.normalize:
            unit_MD = np.empty_like(values_MD)
            threads.run(normalize_rows, count, values_MD, unit_MD, grain=256)
            values_MD = unit_MD
        for worse, more in threads.run(survey_rows, count, values_MD, grain=256):
            not_finite, squares = not_finite + worse, squares + more
        if target is not None:
            target.append(values_MD, None if block.tokens is None else block.tokens.between(0, count))
        report.rows += count
        check_rows(reader, options, report.rows)
        if progress is not None:
            progress(reader.done_bytes, reader.total_bytes)
        if report.rows >= limit:
            break
    report.num_rows = _num_rows(reader, options, report.rows)
    # Rounded, so that it does not show in which order threads added.
    report.spread = float(f"{math.sqrt(squares / max(1, report.rows - not_finite) / reader.dim):.3g}")
    if not_finite:
        report.notes.append(f"{not_finite:,} rows hold NaN or infinity; they are kept as they are.")
    if target is not None and target.tokens is not None:
        for tokens, row_M in reader.more_tokens():
            kept = np.flatnonzero(row_M < report.rows)
            target.tokens.append(tokens if len(kept) == len(row_M) else tokens.select(kept), row_M[kept])


def _num_rows(reader: Source, options: ConvertOptions, read: int) -> int:
    """V of the table."""
    if read == 0:
        raise BadSource(f"{reader.path} holds no rows that can be read; at least one was expected.")
    return max(read, options.rows or 0)
