"""Columns of rows: "parquet" and "arrow" (IPC files, also Feather version 2, and IPC streams), read through pyarrow.

The rows are a column of lists of numbers, or columns of numbers whose names differ in one number (dim_0, dim_1, ...).
A column of text named token, word, key or text gives the tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigembed.convert import arrow_batches, arrow_columns
from bigembed.convert.ahead import AheadSource
from bigembed.convert.candidates import Candidate, choose, note_of_choice
from bigembed.convert.libraries import load_library
from bigembed.convert.number_types import NumberType, of_numpy
from bigembed.convert.source import BLOCK_BYTES, Block, ReadOptions, Source
from bigembed.errors import BadSource, BigembedError

TOKEN_NAMES = ("token", "word", "key", "text")
STREAM_MAGIC = b"\xff\xff\xff\xff"


def recognise(head: bytes, path: str) -> str | None:
    if head.startswith((b"PAR1", b"PARE")):
        return "parquet"
    is_stream = head.startswith(STREAM_MAGIC) and 0 < int.from_bytes(head[4:8], "little") < 1 << 31
    return "arrow" if head.startswith(b"ARROW1") or is_stream else None


def open_source(path: str, format: str, options: ReadOptions) -> Source:
    load_library("pyarrow", "Parquet and Arrow")
    try:
        opener = arrow_batches.ParquetBatches if format == "parquet" else arrow_batches.IpcBatches
        batches = opener(path)
        candidates, columns = _candidates(batches.schema, batches.num_rows)
        chosen = choose(path, candidates, options.tensor)
        source = ColumnSource(path, format, batches, columns[chosen.name], chosen.shape[1], options)
    except BigembedError:
        raise
    except Exception as error:  # pyarrow's errors are of many classes, ArrowInvalid, OSError and KeyError among them
        raise _damaged(path, error) from error
    source.facts["tensor"] = chosen.name
    source.notes += note_of_choice(chosen, candidates, options.tensor)
    return source


def _damaged(path: str, error: BaseException) -> BadSource:
    return BadSource(f"{path}: pyarrow cannot read it, it is cut off or damaged: {type(error).__name__}: {error}")


def _candidates(schema: Any, num_rows: int | None) -> tuple[list[Candidate], dict[str, list[str]]]:
    """What may be the table, and the columns that each is made of."""
    rows = -1 if num_rows is None else num_rows
    found, columns = [], {}
    for name in dict.fromkeys(schema.names):
        type = arrow_columns.plain_type(schema.field(schema.get_field_index(name)).type)
        size = arrow_columns.list_size(type)
        shape = (rows,) if size is None else (rows, size)
        found.append(Candidate(name, shape, arrow_columns.number_name(type)))
        columns[name] = [name]
    if not any(len(each.shape) == 2 for each in found):
        for pattern, names in arrow_columns.numbered(found).items():
            dtype = next(each.dtype for each in found if each.name == names[0])
            found.append(Candidate(pattern, (rows, len(names)), dtype))
            columns[pattern] = names
    return found, columns


@dataclass(frozen=True)
class Slice:
    """Some rows of a batch; `row` is the number of the first."""

    batch: Any
    row: int


class ColumnSource(AheadSource):
    """Rows of one column of lists, or of many columns of numbers, batch by batch."""

    def __init__(
        self, path: str, format: str, batches: Any, columns: list[str], dim: int, options: ReadOptions
    ) -> None:
        super().__init__(path, format)
        self._batches, self._columns = batches, columns
        schema = batches.schema
        type = arrow_columns.plain_type(schema.field(columns[0]).type)
        self._type = _known(type)
        self.dtype = self._type.name
        lowered = {name.lower(): name for name in schema.names if arrow_columns.is_text(schema.field(name).type)}
        self._token_column = next((lowered[name] for name in TOKEN_NAMES if name in lowered), None)
        self.has_tokens = self._token_column is not None
        if dim < 0:
            dim = self._first_length()
        self.settle(batches.num_rows, dim, options)
        if batches.num_rows is not None:
            self.total_bytes = batches.num_rows * dim * self._type.stored.itemsize
        if self._token_column is not None:
            self.notes.append(f"The tokens are from the column {self._token_column!r}.")

    def _first_length(self) -> int:
        """The length of the first list: all others must have it too."""
        for batch in self._batches.read(self._columns, 1, 1 << 62):
            if batch.num_rows:
                try:
                    return arrow_columns.first_length(batch.column(self._columns[0]))
                except arrow_columns.BadRow as error:
                    raise self.bad("row 0", error.problem) from error
        raise self.bad("its shape", "there are no rows.")

    @property
    def block_rows(self) -> int:
        """Half as many as elsewhere: pyarrow holds a batch in several shapes at once."""
        return max(1, BLOCK_BYTES // (8 * self.dim))

    def pieces(self) -> Iterator[Slice]:
        row_bytes = self.dim * self._type.stored.itemsize
        names = self._columns + ([self._token_column] if self._token_column else [])
        row = 0
        try:
            for batch in self._batches.read(names, self.block_rows, row_bytes):
                if batch.num_rows:
                    yield Slice(batch, row)
                row += batch.num_rows
        except BigembedError:
            raise
        except Exception as error:
            raise _damaged(self.path, error) from error
        if row == 0 or self.num_rows not in (None, row):
            raise self.bad(f"row {row}", f"the rows end here; there should be {self.num_rows or 'some'}.")
        if self._batches.lacks_end:
            self.notes.append("The stream has no end mark: if it was cut off between two batches, rows are missing.")

    def fill(self, piece: Slice, buffer_MD: np.ndarray) -> Block:
        out_MD = buffer_MD[: piece.batch.num_rows]
        try:
            if len(self._columns) == 1:
                values = arrow_columns.list_values(piece.batch.column(self._columns[0]), self.dim)
                self._type.to_float32(values, out_MD, self.losses)
            else:
                self._fill_columns(piece.batch, out_MD)
            tokens = None
            if self._token_column is not None:
                tokens = arrow_columns.packed_tokens(piece.batch.column(self._token_column))
        except arrow_columns.BadRow as error:
            raise self.bad(f"row {piece.row + error.row}", error.problem) from error
        except BigembedError:
            raise
        except Exception as error:
            raise _damaged(self.path, error) from error
        self.done_bytes += out_MD.size * self._type.stored.itemsize
        return Block(out_MD, tokens)

    def _fill_columns(self, batch: Any, out_MD: np.ndarray) -> None:
        column_M = np.empty(len(out_MD), np.float32)
        for d, name in enumerate(self._columns):
            values = arrow_columns.list_values(batch.column(name), None)
            self._type.to_float32(values, column_M, self.losses)
            out_MD[:, d] = column_M

    def release(self) -> None:
        self._batches.close()


def _known(type: Any) -> NumberType:
    known = of_numpy(arrow_columns.number_dtype(type))
    assert known is not None, "only candidates of a readable dtype are chosen"
    return known
