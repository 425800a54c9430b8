"""Base: the Zarr chunks as raw records, read by row and written by the merge."""

from typing import Any

import numpy as np

from bigembed import threads
from bigembed.errors import DamagedRow
from bigembed.kernels.mapped import fill_new, gather_mapped
from bigembed.kernels.records import count_and_sum, first_damaged
from bigembed.spec import TableSpec
from bigembed.storage import files
from bigembed.storage.chunks import ChunkFiles
from bigembed.storage.memory import memory_limit_bytes
from bigembed.storage.readers import ColdReader, MappedReader
from bigembed.storage.record_io import write_records

READERS = ("auto", "cold", "mapped")
MAPPED_BYTES = 256 << 20  # "auto" maps tables up to this size
SCAN_BYTES = 8 << 20


class Base:
    """Records of the base by row number.

    Args:
        reader: "cold", "mapped", or "auto" (mapped where the whole base is at most 256 MiB).
    """

    def __init__(self, table_path: str, spec: TableSpec, reader: str = "auto") -> None:
        self.chunks = ChunkFiles(table_path, spec)
        self._spec = spec
        self.is_mapped = reader == "mapped" or (reader == "auto" and spec.num_chunks * spec.chunk_bytes <= MAPPED_BYTES)
        # Who asks for maps of a large table has it in the page cache: its pages are there once, mapped or not.
        budget_bytes = max(MAPPED_BYTES, memory_limit_bytes() // 2) if reader == "mapped" else MAPPED_BYTES
        self._reader = MappedReader(self.chunks, budget_bytes) if self.is_mapped else ColdReader(self.chunks)
        self._writing: dict[int, files.File] = {}
        self.is_larger_than_memory = len(self.chunks.present) * spec.chunk_bytes > memory_limit_bytes() // 2

    def resize(self, spec: TableSpec) -> None:
        self._spec = self.chunks.spec = spec

    def read(self, rows_M: np.ndarray, out_MW: np.ndarray) -> None:
        """The raw records of ascending rows, zeros where nothing was ever written; checks are the caller's."""
        chunk_M, offset_M = self._spec.locate(rows_M)
        self._reader.read(chunk_M, offset_M, out_MW)

    def gather(self, rows_N: np.ndarray, keys_W: np.ndarray, initial: Any, checks: bool, out_NX: np.ndarray) -> bool:
        """Rows in any order, straight from the maps into out_NX; False where it cannot be done or one is damaged."""
        reader = self._reader
        if not isinstance(reader, MappedReader):
            return False
        try:
            memory = reader.memory()
        except (files.StorageFailed, FileNotFoundError):
            return False  # a writer beside us may be changing the files: who reads by other means looks again
        if memory is None:
            return False
        shift, is_new_N = self._spec.chunk_rows.bit_length() - 1, np.empty(len(rows_N), np.bool_)
        given = rows_N, *memory, shift, keys_W, checks, out_NX.view(np.uint32), is_new_N
        is_sound = max(threads.run(gather_mapped, len(rows_N), *given)) < 0
        reader.touched(len(rows_N), len(keys_W))
        if is_sound and is_new_N.any():
            threads.run(fill_new, len(rows_N), rows_N, is_new_N, initial, out_NX)
        return is_sound

    def read_stretch(self, row: int, count: int) -> np.ndarray:
        """`count` raw records from `row` on, all of one chunk, in one read: uint32 (count, W)."""
        chunk = row // self._spec.chunk_rows
        out = np.zeros((count, self._spec.record_words), np.uint32)
        if chunk in self.chunks.present:
            file = self.chunks.for_reading(chunk)
            offset = (row - chunk * self._spec.chunk_rows) * self._spec.record_bytes
            got = file.pread_into(out, offset)
            if got != out.nbytes:
                raise files.StorageFailed(5, f"{file.path} ends at byte {offset + got}, inside a record")
        return out

    # -- writing, for the merge -----------------------------------------------------------------------------

    def write(self, rows_M: np.ndarray, records_MW: np.ndarray) -> None:
        """Overwrite records of ascending rows; durable after `sync_written`."""
        chunk_M = rows_M // self._spec.chunk_rows
        for chunk in np.unique(chunk_M).tolist():
            start, stop = np.searchsorted(chunk_M, [chunk, chunk + 1])
            offset_M = (rows_M[start:stop] - chunk * self._spec.chunk_rows) * self._spec.record_bytes
            write_records(self._file(chunk), offset_M, records_MW[start:stop])

    def write_stretch(self, row: int, records_MW: np.ndarray) -> None:
        """Overwrite records from `row` on, all of one chunk, in one write."""
        chunk = row // self._spec.chunk_rows
        self._file(chunk).pwrite(records_MW, (row - chunk * self._spec.chunk_rows) * self._spec.record_bytes)

    def _file(self, chunk: int) -> files.File:
        """The chunk's descriptor, kept open from its first write to its sync, so that no error is missed."""
        if chunk not in self._writing:
            self._writing[chunk] = self.chunks.for_writing(chunk)
        return self._writing[chunk]

    def sync_written(self, below_row: int | None = None) -> list[int]:
        """Make written chunks durable, those wholly below a row, or all; returns them."""
        limit = self._spec.num_chunks if below_row is None else below_row // self._spec.chunk_rows
        done = sorted(chunk for chunk in self._writing if chunk < limit)
        for chunk in done:
            self._writing[chunk].sync()
            self._writing.pop(chunk).close()
        return done

    def abandon_writes(self) -> None:
        """Close what is being written, after a failure: nothing of it counts."""
        while self._writing:
            self._writing.popitem()[1].close()

    # -- whole chunks ---------------------------------------------------------------------------------------

    def stretches(self, chunk: int) -> "list[tuple[int, int]]":
        """(first row, count) of stretches of at most 8 MiB that cover the chunk's rows."""
        first = chunk * self._spec.chunk_rows
        last = min(first + self._spec.chunk_rows, self._spec.num_rows)
        step = max(1, SCAN_BYTES // self._spec.record_bytes)
        return [(row, min(step, last - row)) for row in range(first, last, step)]

    def count_chunk(self, chunk: int, keys_W: np.ndarray | None = None) -> tuple[int, int]:
        """(rows written, sum of checks modulo 2**64) of a chunk; with keys every record is checked too.

        Raises:
            DamagedRow: names the file and the row.
        """
        written, total = 0, 0
        for row, count in self.stretches(chunk):
            records = self.read_stretch(row, count)
            if keys_W is not None:
                self.check(np.arange(row, row + count), records, keys_W)
            some, part = count_and_sum(records)
            written, total = written + int(some), (total + int(part)) % (1 << 64)
        return written, total

    def check(self, rows_M: np.ndarray, records_MW: np.ndarray, keys_W: np.ndarray) -> None:
        m = int(first_damaged(0, len(rows_M), rows_M, records_MW, keys_W))
        if m >= 0:
            raise self.damaged(int(rows_M[m]))

    def damaged(self, row: int) -> DamagedRow:
        """The error for a record whose check is wrong."""
        chunk, within = divmod(row, self._spec.chunk_rows)
        return DamagedRow(
            f"row {row} is damaged: its record at byte {within * self._spec.record_bytes} of "
            f"{self.chunks.path(chunk)} fails its check. Restore the file from a backup."
        )

    def close(self) -> None:
        self.abandon_writes()
        self._reader.close()
        self.chunks.close()
