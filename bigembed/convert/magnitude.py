"""Magnitude files: an SQLite database with a row of integers for each key, read in order of its rowid.

The table `magnitude` has key, dim_0 to dim_(D-1), and in most files magnitude, the vector's norm; the table
`magnitude_format` has the number of rows ("size"), D ("dim") and "precision". A value is dim_d / 10**precision, of a
vector of length 1, times the norm.

Source: plasticityai/magnitude, pymagnitude/converter.py and __init__.py (`_db_result_to_vec`).
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import quote

import numpy as np

from bigembed.convert.ahead import AheadSource
from bigembed.convert.source import Block, ReadOptions, Source
from bigembed.errors import BadSource
from bigembed.vocab.packed import PackedTokens

MAGIC = b"SQLite format 3\0"
FETCHED_VALUES = 1 << 16  # integers that are Python objects at one time
MOST_PRECISION = 30


def recognise(head: bytes, path: str) -> str | None:
    return "magnitude" if head.startswith(MAGIC) else None


def open_source(path: str, format: str, options: ReadOptions) -> Source:
    return MagnitudeSource(path, format, options)


class MagnitudeSource(AheadSource):
    """Rows and keys; the database is opened read-only, and what is not the table itself is not looked at."""

    def __init__(self, path: str, format: str, options: ReadOptions) -> None:
        super().__init__(path, format)
        self._database: sqlite3.Connection | None = None
        self._read = 0  # rows of the piece at hand
        self.total_bytes = os.path.getsize(path)
        with open(path, "rb") as file:
            if not file.read(len(MAGIC)).startswith(MAGIC):
                raise self.bad("byte 0", "the file is no SQLite database, which Magnitude files are.")
        try:
            with closing(self._connect()) as database:
                self._open(database, options)
        except sqlite3.Error as error:
            raise self._damaged(error) from error

    def _connect(self) -> sqlite3.Connection:
        """A connection, which may be closed by another thread than the one that read."""
        # Immutable: SQLite then creates no files beside it, and needs no lock. With a log beside the file it would
        # miss what the log holds.
        log = self.path + "-wal"
        is_plain = not os.path.exists(log) or os.path.getsize(log) == 0
        address = f"file:{quote(os.path.abspath(self.path))}?mode=ro{'&immutable=1' if is_plain else ''}"
        database = sqlite3.connect(address, uri=True, check_same_thread=False)
        database.text_factory = bytes
        database.execute("PRAGMA trusted_schema=OFF")
        return database

    def _open(self, database: sqlite3.Connection, options: ReadOptions) -> None:
        for name in ("magnitude", "magnitude_format"):
            found = database.execute("SELECT type, sql FROM sqlite_master WHERE name = ?", (name,)).fetchall()
            if [kind for kind, _ in found] != [b"table"] or not found[0][1].upper().startswith(b"CREATE TABLE"):
                raise self.bad("the database", f"it has no table {name!r}, so it is no Magnitude file.")
        described = database.execute("PRAGMA table_info(magnitude)").fetchall()
        columns = [column.decode("utf-8", "replace") for _, column, *_ in described]
        dim = self._number(database, "dim", 1, len(columns))
        wanted = ["key", *(f"dim_{d}" for d in range(dim))]
        self._has_norms = "magnitude" in columns
        wanted += ["magnitude"] if self._has_norms else []
        missing = [name for name in wanted if name not in columns]
        if missing:
            raise self.bad("the table magnitude", f"it has no column {missing[0]!r}; {dim} dimensions were announced.")
        # Every row takes at least a byte for each column.
        rows = self._number(database, "size", 1, self.total_bytes // len(wanted) if self.total_bytes else 0)
        precision = self._number(database, "precision", 0, MOST_PRECISION)
        self._scale = 10.0**precision
        self._query = f"SELECT {', '.join(wanted)} FROM magnitude ORDER BY rowid"
        self.settle(rows, dim, options)
        self.dtype, self.has_tokens = "decimal", True
        self.facts["precision"] = precision
        self.notes.append(f"The file holds {precision} decimals of vectors of length 1.")
        if not self._has_norms:
            self.notes.append("The file does not hold the vectors' norms: the rows have length 1.")

    def _number(self, database: sqlite3.Connection, key: str, low: int, high: int) -> int:
        """A setting of the file."""
        found = database.execute("SELECT value FROM magnitude_format WHERE key = ?", (key,)).fetchmany(2)
        value = found[0][0] if len(found) == 1 else None
        if not isinstance(value, int) or not low <= value <= high:
            raise self.bad("magnitude_format", f"{key!r} is {value!r}; an integer from {low} to {high} was expected.")
        return value

    def _damaged(self, error: sqlite3.Error) -> BadSource:
        said = str(error)
        if "too many columns" in said:
            said += "; Python's SQLite does not allow as many dimensions"
        return self.bad("the database", f"SQLite cannot read it, it is cut off or damaged: {said}.")

    # --- reading

    def pieces(self) -> Iterator[tuple[sqlite3.Cursor, int]]:
        assert self.num_rows is not None
        start = 0
        try:
            self._database = self._connect()
            cursor = self._database.execute(self._query)
            while start < self.num_rows:
                yield cursor, start
                if self._read < min(self.block_rows, self.num_rows - start):
                    self.notes.append(f"{start + self._read} rows were found; the file announces {self.num_rows}.")
                    return
                start += self._read
            if cursor.fetchone() is not None:
                self.notes.append(f"Rows past the {self.num_rows} that the file announces were left out.")
        except sqlite3.Error as error:
            raise self._damaged(error) from error

    def fill(self, piece: tuple[sqlite3.Cursor, int], buffer_MD: np.ndarray) -> Block:
        cursor, start = piece
        assert self.num_rows is not None
        count, self._read = min(self.block_rows, self.num_rows - start), 0
        keys: list[bytes] = []
        while self._read < count:
            some = min(max(1, FETCHED_VALUES // self.dim), count - self._read)
            try:
                rows = cursor.fetchmany(some)
            except sqlite3.Error as error:
                raise self._damaged(error) from error
            if not rows:
                break
            keys += [self._key(row[0], start + self._read + m) for m, row in enumerate(rows)]
            self._convert(rows, start + self._read, buffer_MD[self._read : self._read + len(rows)])
            self._read += len(rows)
        assert self.total_bytes is not None
        self.done_bytes = self.total_bytes * (start + self._read) // self.num_rows
        return Block(buffer_MD[: self._read], PackedTokens.of(keys))

    def release(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _key(self, key: object, row: int) -> bytes:
        if isinstance(key, bytes):
            return key
        if isinstance(key, int):
            return str(key).encode()
        raise self.bad(f"row {row}", f"its key is {key!r}; text was expected.")

    def _convert(self, rows: list[tuple], start: int, out_MD: np.ndarray) -> None:
        """out_MD = the rows' vectors: float64 throughout, rounded to float32 at the end."""
        try:
            found = np.array([row[1:] for row in rows])
        except (ValueError, TypeError, OverflowError):
            found = np.array([None])
        if found.dtype.kind not in "iuf":
            raise self.bad(f"rows {start} to {start + len(rows) - 1}", "a value is no number, or too large for one.")
        with np.errstate(all="ignore"):  # what float32 cannot hold becomes infinite, and is counted by the converter
            value_MD = found[:, : self.dim].astype(np.float64) / self._scale
            if self._has_norms:
                value_MD *= found[:, self.dim :].astype(np.float64)
            out_MD[:] = value_MD
