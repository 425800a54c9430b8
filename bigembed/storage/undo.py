"""Undo: the base's old records, kept so that the retained generation stays restorable after merges.

Each row is kept at most once per retained generation, so undo is never larger than what the base held then.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bigembed import threads
from bigembed.errors import DamagedTable
from bigembed.kernels.records import first_damaged
from bigembed.spec import TableSpec
from bigembed.storage import files
from bigembed.storage.segments import (
    FRAME_BYTES,
    NULLS,
    ROWS,
    UNDO,
    SegmentReader,
    SegmentWriter,
    list_segments,
    segment_name,
)


@dataclass(frozen=True)
class _Part:
    """One frame: ascending rows from first to last, whose ids and records start at these offsets."""

    file: files.File
    first: int
    last: int
    count: int
    ids_offset: int
    records_offset: int  # 0: all records are zero

    def rows(self) -> np.ndarray:
        return np.frombuffer(self.file.pread(self.count * 8, self.ids_offset), "<i8").astype(np.int64)


class Undo:
    """Old records that restore one generation.

    Args:
        generation: the retained one; segments of any other are stale.

    Raises:
        DamagedTable: something before a valid frame is invalid.
    """

    def __init__(self, folder: str, spec: TableSpec, generation: int) -> None:
        self._folder = folder
        self._spec = spec
        self.generation = generation
        self._parts: list[_Part] = []
        self._files: dict[int, files.File] = {}
        self._writer: SegmentWriter | None = None
        self.stale: list[int] = []
        self.rows = 0
        try:
            for sequence in list_segments(folder):
                self._load(sequence)
        except BaseException:
            self.close()
            raise

    def _load(self, sequence: int) -> None:
        reader = SegmentReader(self._folder, UNDO, sequence, self._spec)
        if reader.is_torn_header or reader.generation != self.generation:
            self.stale.append(sequence)
            reader.close()
            return
        self._files[sequence] = reader.file
        for frame in reader.frames():
            assert frame.rows_M is not None
            self._add_part(reader.file, frame.offset, frame.rows_M, frame.records_offset)
        beyond = max(reader.valid_frame_beyond(kind) for kind in (ROWS, NULLS))
        if beyond >= 0:
            raise DamagedTable(
                f"{reader.file.path} is damaged between byte {reader.end} and the frame at byte {beyond}. "
                f"Generation {self.generation} cannot be restored; restore the file from a backup."
            )

    def _add_part(self, file: files.File, offset: int, rows_M: np.ndarray, records_offset: int) -> None:
        if len(rows_M):
            first, last = int(rows_M[0]), int(rows_M[-1])
            self._parts.append(_Part(file, first, last, len(rows_M), offset + FRAME_BYTES, records_offset))
            self.rows += len(rows_M)

    # -- saving ---------------------------------------------------------------------------------------------

    def contains(self, rows_M: np.ndarray) -> np.ndarray:
        """bool (M,): which of these ascending rows are kept already. Reads only frames that overlap them."""
        found_M = np.zeros(len(rows_M), bool)
        if len(rows_M):
            for part in self._overlapping(int(rows_M[0]), int(rows_M[-1])):
                found_M |= np.isin(rows_M, part.rows(), assume_unique=True)
        return found_M

    def save(self, rows_M: np.ndarray, records_MW: np.ndarray) -> None:
        """Keep old records of ascending rows, durably.

        No commit record follows, so the order makes a valid frame vouch for itself and all before it: rows without
        a record, then records, sync, then the head of the records' frame, sync.
        """
        if not len(rows_M):
            return
        if self._writer is None:
            sequence = max(list_segments(self._folder), default=0) + 1
            self._writer = SegmentWriter(self._folder, UNDO, sequence, self.generation, self._spec)
            self._files[sequence] = self._writer.file
        writer = self._writer
        null_M = records_MW[:, -1] == 0
        added = []
        if null_M.any():
            added.append((writer.end, rows_M[null_M], 0))
            writer.append_nulls(rows_M[null_M])
        if not null_M.all():
            offset, rows, records = writer.end, rows_M[~null_M], records_MW[~null_M]
            total = int(records[:, -1].sum(dtype=np.uint64))
            added.append((offset, rows, writer.append_rows(rows, records, total, records_first=True)))
        writer.file.sync()
        for offset, rows, records_offset in added:
            self._add_part(writer.file, offset, rows, records_offset)

    def end_segment(self) -> None:
        """The next save starts a new segment (after a merge, or a failed one)."""
        self._writer = None

    # -- restoring ------------------------------------------------------------------------------------------

    def _overlapping(self, first: int, last: int) -> Iterator[_Part]:
        return (part for part in self._parts if part.first <= last and part.last >= first)

    def rows_between(self, first: int, last: int) -> np.ndarray:
        """The kept rows from first to last, both inclusive: ascending, distinct."""
        found = [part.rows() for part in self._overlapping(first, last)]
        rows = np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
        return rows[(rows >= first) & (rows <= last)]

    def read(self, rows_M: np.ndarray, keys_W: np.ndarray) -> np.ndarray:
        """The old records of ascending kept rows, checked: uint32 (M, W).

        Raises:
            DamagedTable: a kept record fails its check.
        """
        records_MW = np.zeros((len(rows_M), self._spec.record_words), np.uint32)
        if not len(rows_M):
            return records_MW
        is_lost = False
        for part in self._overlapping(int(rows_M[0]), int(rows_M[-1])):
            if part.records_offset == 0:
                continue
            rows = part.rows()
            a, b = np.searchsorted(rows, [rows_M[0], rows_M[-1] + 1])
            if a == b:
                continue
            stretch = np.zeros((b - a, self._spec.record_words), np.uint32)
            part.file.pread_into(stretch, part.records_offset + int(a) * self._spec.record_bytes)
            _, here, there = np.intersect1d(rows_M, rows[a:b], assume_unique=True, return_indices=True)
            records_MW[here] = stretch[there]
            is_lost |= not stretch[there, -1].all()  # records that are zero were kept without their bytes
        if is_lost or max(threads.run(first_damaged, len(rows_M), rows_M, records_MW, keys_W)) >= 0:
            raise DamagedTable(
                f"{self._folder}: an old record between rows {rows_M[0]} and {rows_M[-1]} is damaged, so generation "
                f"{self.generation} cannot be restored. Restore the folder from a backup."
            )
        return records_MW

    def verify(self, keys_W: np.ndarray) -> int:
        """Check every kept record; returns their number."""
        for part in self._parts:
            if part.records_offset:
                self.read(part.rows(), keys_W)
        return self.rows

    # -- housekeeping ---------------------------------------------------------------------------------------

    def start_anew(self, generation: int) -> None:
        """From now on keep what restores `generation`; what was kept for another is removed."""
        sequences = [*self._files, *self.stale]
        self.close()
        self._parts, self._writer, self.stale, self.rows = [], None, [], 0
        self.generation = generation
        self._remove(sequences)

    def remove_stale(self) -> None:
        self._remove(self.stale)
        self.stale = []

    def _remove(self, sequences: list[int]) -> None:
        for sequence in sequences:
            files.unlink(os.path.join(self._folder, segment_name(sequence)))
        if sequences:
            files.sync_directory(self._folder)

    @property
    def files(self) -> list[files.File]:
        return list(self._files.values())

    @property
    def disk_bytes(self) -> int:
        return sum(file.size_bytes() for file in self._files.values())

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
