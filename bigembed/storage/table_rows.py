"""TableRows: the rows of an open table, read and written, within the limits of its journal."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bigembed import threads
from bigembed.errors import InvalidArgument
from bigembed.kernels.grouping import group_by_row
from bigembed.kernels.rows import gather
from bigembed.storage import upkeep
from bigembed.storage.open_table import OpenTable
from bigembed.storage.read_ahead import ReadAhead
from bigembed.storage.rows import checked_out, checked_rows, last_of_each
from bigembed.storage.superblock import Commit


class TableRows(OpenTable):
    """What of a Table is about rows: the newest values, and automatic commits where a limit asks for one."""

    # -- reading and writing --------------------------------------------------------------------------------

    def read(
        self,
        rows: Sequence[int] | np.ndarray,
        *,
        with_state: bool = False,
        check: bool = True,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """The newest values of rows, in the order given.

        Args:
            rows: integers 0 <= row < V, any shape, may repeat.
            with_state: give the K state columns too.
            check: False takes records as they are where the table is mapped (`reader`): faster, but damage is data
                then, and beside a writer a row may be half old and half new.
            out: float32 of the shape returned, C-contiguous, to be filled instead of a new array.

        Returns:
            float32 (*rows.shape, D), or (*rows.shape, D + K). At most M records are read, M distinct rows.

        Raises:
            RowOutOfRange: names the row, its position and the valid range. DamagedRow: names file and row.
            InvalidArgument: out is no such array.
        """
        with self.mutex:
            self._check_open()
            rows_N = checked_rows(rows, self.spec.num_rows)
            width = self.spec.row_width if with_state else self.spec.dim
            out = checked_out(out, (*np.shape(rows), width))
            out_NX = out.reshape(len(rows_N), width)
            if self._cache is None and self._store.gather(rows_N, out_NX, check):
                return out
            rows_U, inverse_N = group_by_row(rows_N)
            order_U = np.argsort(rows_U)
            place_U = np.empty_like(order_U)
            place_U[order_U] = np.arange(len(order_U))
            values_UE = np.empty((len(rows_U), self.spec.row_width), np.float32)
            self._read_newest(rows_U[order_U], values_UE)
            threads.run(gather, len(rows_N), values_UE, values_UE[:0], place_U, inverse_N, out_NX)
        return out

    def write(self, rows: Sequence[int] | np.ndarray, values: Any) -> None:
        """Set the weights of rows, as `weight[rows] = values` would; the rows' optimizer state stays.

        Args:
            rows: integers 0 <= row < V, 1-D; where one repeats the last value counts.
            values: float32, broadcast to (len(rows), D).

        Raises:
            RowOutOfRange, InvalidArgument (shape or dtype), ReadOnlyTable, ForkedTable, DiskFull.
        """
        with self.mutex:
            self.check_writable()
            rows_N = checked_rows(rows, self.spec.num_rows)
            values_ND = self._checked_values(values, len(rows_N))
            rows_M, last_M = last_of_each(rows_N)
            self.safe_point(len(rows_M))
            values_ME = np.empty((len(rows_M), self.spec.row_width), np.float32)
            if self.spec.state_dim:
                self._read_newest(rows_M, values_ME)
            values_ME[:, : self.spec.dim] = values_ND[last_M]
            self.append_rows(rows_M, values_ME)
            if self._cache is not None:
                self._cache.refresh(rows_M, values_ME)

    def _checked_values(self, values: Any, count: int) -> np.ndarray:
        given = np.asarray(values)
        if given.dtype.kind not in "fiu" or (
            given.dtype == np.float64 and np.ndim(values) and not isinstance(values, list)
        ):
            raise InvalidArgument(f"values have dtype {given.dtype}, this table holds float32. Convert them first.")
        try:
            return np.broadcast_to(given.astype(np.float32, copy=False), (count, self.spec.dim))
        except ValueError as error:
            raise InvalidArgument(
                f"values have shape {given.shape}; {count} rows of {self.spec.dim} columns were expected."
            ) from error

    def _read_newest(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        self.fetch_rows(rows_M, values_ME)
        if self._cache is not None:
            self._cache.overlay(rows_M, values_ME)

    # -- below the cache ------------------------------------------------------------------------------------

    def fetch_rows(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """Stored values of ascending distinct rows, below the cache (a cache's RowSource)."""
        with self.mutex:
            self._check_open()
            self._store.fetch(rows_M, values_ME)

    def read_ahead(self, rows_M: np.ndarray) -> ReadAhead:
        """Plan a read of stored values of ascending distinct rows, below the cache; it runs without the mutex."""
        with self.mutex:
            self._check_open()
            return ReadAhead(self._store, rows_M)

    def append_rows(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """Append changed ascending distinct rows to the journal, below the cache (a cache's RowSource)."""
        with self.mutex:
            self.check_writable()
            assert len(rows_M) == 0 or 0 <= rows_M[0] <= rows_M[-1] < self.spec.num_rows, "rows that are not there"
            self._store.append(rows_M, values_ME)
            self._uncommitted_rows += len(rows_M)

    def safe_point(self, coming_rows: int = 0) -> None:
        """Between whole operations: commit and merge where a limit asks for it, or do a part of a merge.

        Args:
            coming_rows: how many rows the next operation may change, so that it still fits the limits.
        """
        with self.mutex:
            self.check_writable()
            dirty = self._cache.dirty_rows if self._cache is not None else 0
            fill = self._store.epoch_fill(dirty + coming_rows)
            if fill >= 1.0:
                if dirty or self._store.journal.has_uncommitted:
                    self._commit("auto", None, explicit=False)
                upkeep.make_room(self._store)
                if self._store.epoch_fill(coming_rows) >= 1.0:  # alone past the limit: at least not beside an epoch
                    upkeep.finish_merges(self._store)
            else:
                upkeep.keep_pace(self._store, fill)

    def _commit(self, note: str, payload: Any, explicit: bool) -> Commit:
        if self._cache is not None:
            self._cache.write_back()
        commit = self._store.commit(note, payload, self.scalars, explicit)
        self._uncommitted_rows = 0
        return commit
