"""Merge: folding committed records into the base, in row order, in bounded slices.

A slice reads the new records (from the journal, sorted frames make that long reads), the old ones from the base,
saves to undo what the retained generation still needs, and only then overwrites the base. Where more than 22 % of
a stretch's pages change, the stretch is read and written whole; elsewhere records are read with advice ahead and
written one by one. Nothing counts until the superblock names the new generation.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from bigembed import threads
from bigembed.kernels.records import first_damaged
from bigembed.spec import TableSpec
from bigembed.storage.base import Base
from bigembed.storage.journal import Epoch, Journal
from bigembed.storage.record_io import PAGE_BYTES
from bigembed.storage.row_index import NOWHERE, RowIndex
from bigembed.storage.superblock import Superblock
from bigembed.storage.undo import Undo

SLICE_BYTES = 8 << 20  # of new records, and of a dense stretch of the base
DENSE_FRACTION = 0.22


class Source(Protocol):
    """Where a merge takes its records from."""

    total_rows: int
    memory_bytes: int

    def parts(self) -> Iterator[np.ndarray]:
        """Ascending rows, in ascending parts."""

    def read(self, rows_M: np.ndarray) -> np.ndarray:
        """The records of some ascending rows of the current part: uint32 (M, W)."""


class EpochSource:
    """A frozen epoch's newest records."""

    def __init__(self, journal: Journal, epoch: Epoch, keys_W: np.ndarray) -> None:
        self._journal, self._keys_W = journal, keys_W
        self._rows, self._places = epoch.index.sorted_items()
        self.total_rows = len(self._rows)
        self.memory_bytes = self._rows.nbytes + self._places.nbytes

    def parts(self) -> Iterator[np.ndarray]:
        yield self._rows

    def places(self, rows_M: np.ndarray) -> np.ndarray:
        return self._places[np.searchsorted(self._rows, rows_M)]

    def read(self, rows_M: np.ndarray) -> np.ndarray:
        return self._journal.read(self.places(rows_M), rows_M, self._keys_W)


class RollbackSource:
    """Every row that may differ from the retained generation, with its record as of it.

    Args:
        journal: recovered up to the retained generation only.
    """

    def __init__(self, spec: TableSpec, journal: Journal, undo: Undo, keys_W: np.ndarray) -> None:
        self._spec, self._journal, self._undo, self._keys_W = spec, journal, undo, keys_W
        self._rows, self._places = journal.active.index.sorted_items()
        self.total_rows = len(self._rows) + undo.rows
        self.memory_bytes = self._rows.nbytes + self._places.nbytes

    def parts(self) -> Iterator[np.ndarray]:
        for first in range(0, self._spec.num_rows, self._spec.chunk_rows):
            last = min(first + self._spec.chunk_rows, self._spec.num_rows) - 1
            a, b = np.searchsorted(self._rows, [first, last + 1])
            kept = self._undo.rows_between(first, last)
            if b > a or len(kept):
                yield np.union1d(self._rows[a:b], kept)

    def read(self, rows_M: np.ndarray) -> np.ndarray:
        places_M = self._journal.find(rows_M)
        here_M = places_M != NOWHERE
        records_MW = np.empty((len(rows_M), self._spec.record_words), np.uint32)
        records_MW[here_M] = self._journal.read(places_M[here_M], rows_M[here_M], self._keys_W)
        records_MW[~here_M] = self._undo.read(rows_M[~here_M], self._keys_W)
        return records_MW


class UndoNeeds:
    """Decides which old records the retained generation still needs, and saves them."""

    def __init__(self, journal: Journal, undo: Undo, epoch: Epoch, source: EpochSource, keys_W: np.ndarray) -> None:
        self._journal, self._undo, self._epoch = journal, undo, epoch
        self._source, self._keys_W = source, keys_W

    def save(self, rows_M: np.ndarray, old_MW: np.ndarray, check: Callable[[np.ndarray, np.ndarray], None]) -> None:
        """Save, durably, before the base is overwritten."""
        needed_M = self._source.places(rows_M) >= self._journal.retained_place
        needed_M &= ~self._undo.contains(rows_M)
        if not needed_M.any():
            return
        rows, records = rows_M[needed_M], old_MW[needed_M]
        places = self._superseded().find(rows)
        in_journal = places != NOWHERE
        if in_journal.any():
            records[in_journal] = self._journal.read(places[in_journal], rows[in_journal], self._keys_W)
        check(rows[~in_journal], records[~in_journal])
        self._undo.save(rows, records)

    def _superseded(self) -> RowIndex:
        return self._epoch.superseded


class Merge:
    """One merge under way; `advance` does a part of it.

    Args:
        superblock: its sums are brought up to date chunk by chunk; the caller writes it when the merge is done.
        save_undo: called with (rows, old records, check) before they are overwritten; None to keep nothing.
        recount: chunk sums are not to be believed (an earlier merge broke off): count touched chunks anew.
    """

    def __init__(
        self,
        spec: TableSpec,
        base: Base,
        source: Source,
        superblock: Superblock,
        keys_W: np.ndarray,
        save_undo: Callable[..., None] | None,
        recount: bool,
    ) -> None:
        self._spec, self._base, self._source = spec, base, source
        self.superblock, self._keys_W, self._save_undo = superblock, keys_W, save_undo
        self._recount = recount
        self._recount_chunks: set[int] = set()
        self.rows_done = 0
        self._slices = self._run()

    def advance(self, rows: int) -> bool:
        """Merge about `rows` more rows; True when all are merged and durable."""
        goal = self.rows_done + rows
        while self.rows_done < goal:
            count = next(self._slices, None)
            if count is None:
                return True
            self.rows_done += count
        return False

    @property
    def total_rows(self) -> int:
        return self._source.total_rows

    @property
    def memory_bytes(self) -> int:
        """The sorted copy of the index."""
        return self._source.memory_bytes

    def _run(self) -> Iterator[int]:
        for rows in self._source.parts():
            start = 0
            while start < len(rows):
                stop, is_dense = self._slice_end(rows, start)
                self._merge_slice(rows[start:stop], is_dense)
                yield stop - start
                start = stop
                self._finish_chunks(int(rows[start]) if start < len(rows) else int(rows[-1]) + 1)
        self._finish_chunks(None)

    def _slice_end(self, rows: np.ndarray, start: int) -> tuple[int, bool]:
        """Where the slice from `start` ends, and whether it is a dense stretch of one chunk."""
        most = max(1, SLICE_BYTES // self._spec.record_bytes)
        first = int(rows[start])
        chunk_end = (first // self._spec.chunk_rows + 1) * self._spec.chunk_rows
        stop = start + int(np.searchsorted(rows[start : start + most], min(first + most, chunk_end)))
        pages = rows[start:stop] * self._spec.record_bytes // PAGE_BYTES
        span = int(pages[-1] - pages[0]) + 1
        touched = 1 + int(np.count_nonzero(np.diff(pages)))
        if stop - start > 1 and touched > DENSE_FRACTION * span:
            return stop, True
        return min(start + most, len(rows)), False

    def _merge_slice(self, rows_M: np.ndarray, is_dense: bool) -> None:
        new_MW = self._source.read(rows_M)
        first = int(rows_M[0])
        if is_dense:
            stretch = self._base.read_stretch(first, int(rows_M[-1]) - first + 1)
            old_MW = stretch[rows_M - first]
        else:
            old_MW = np.empty_like(new_MW)
            self._base.read(rows_M, old_MW)
        if self._save_undo is not None:
            self._save_undo(rows_M, old_MW, self._check_old)
        self._account(rows_M, old_MW, new_MW)
        if is_dense:
            stretch[rows_M - first] = new_MW
            self._base.write_stretch(first, stretch)
        else:
            self._base.write(rows_M, new_MW)

    def _check_old(self, rows_M: np.ndarray, records_MW: np.ndarray) -> None:
        self._base.check(rows_M, records_MW, self._keys_W)

    def _account(self, rows_M: np.ndarray, old_MW: np.ndarray, new_MW: np.ndarray) -> None:
        """Bring the counts and sums of the chunks from the old records to the new ones."""
        chunk_M = rows_M // self._spec.chunk_rows
        if self._recount:
            self._recount_chunks.update(np.unique(chunk_M).tolist())
            return
        if max(threads.run(first_damaged, len(rows_M), rows_M, old_MW, self._keys_W)) >= 0:
            self._recount_chunks.update(np.unique(chunk_M).tolist())  # overwritten by sound ones, sum unknown
        old, new = old_MW[:, -1].astype(np.uint64), new_MW[:, -1].astype(np.uint64)
        np.add.at(self.superblock.written_C, chunk_M, (new != 0).astype(np.int64) - (old != 0))
        np.add.at(self.superblock.sums_C, chunk_M, new - old)  # modulo 2**64, as it should be

    def _finish_chunks(self, below_row: int | None) -> None:
        for chunk in self._base.sync_written(below_row):
            if chunk in self._recount_chunks:
                written, total = self._base.count_chunk(chunk)
                self.superblock.written_C[chunk] = written
                self.superblock.sums_C[chunk] = total
