"""Staging: rows that are read in the background for lookups to come, between a cache and its source.

It is a RowSource itself, and what it fetches equals at every moment what its source would give: a staged row that the
source takes a newer value of is forgotten, in flight or not. Which rows are staged is decided in the order of the
calls; only bytes move in the background. So results do not depend on it, and neither does who stays in the cache,
whose index a prefetch does not touch.

A batch of staged rows goes when all its rows were taken, when it has waited too long, or when a newer batch needs its
room: a prefetch whose lookup never comes costs nothing lasting.
"""

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bigembed import threads
from bigembed.kernels import rows as row_kernels
from bigembed.kernels.matching import ABSENT, match
from bigembed.spec import TableSpec

FEW_ROWS = 1 / 16  # of a batch on its way: so few are read now, which takes less than the rest of the batch
LONGEST_WAIT_LOOKUPS = 64  # a prefetch is for the next few batches; after so many lookups it was for none


class PlannedRead(Protocol):
    """A read of rows that needs no lock (storage's ReadAhead)."""

    def run(self, out_ME: np.ndarray) -> np.ndarray: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...


class PlanningSource(Protocol):
    """A RowSource that can plan reads."""

    @property
    def spec(self) -> TableSpec: ...
    def fetch_rows(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None: ...
    def append_rows(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None: ...
    def read_ahead(self, rows_M: np.ndarray) -> PlannedRead:
        """Plan to read the values that these rows (ascending, distinct) have now."""


@dataclass(eq=False)
class _Batch:
    """Rows on their way, or here.

    rows_M: int64, ascending. values_ME: float32, filled by `task`, whose result says which rows are sound.
    wanted_M: bool, False once a row was taken or the source has a newer value.
    """

    rows_M: np.ndarray
    values_ME: np.ndarray
    wanted_M: np.ndarray
    read: PlannedRead
    task: threads.Task
    born_lookup: int

    @property
    def memory_bytes(self) -> int:
        return self.rows_M.nbytes + self.values_ME.nbytes + 2 * self.wanted_M.nbytes


class Staging:
    """Rows read ahead of their lookup. The caller (the table) guards it against concurrent use.

    Args:
        source: where rows are stored.
        budget_bytes: bounds what is staged; rows for which there is no room are not read ahead. Nothing is taken
            before the first prefetch.
    """

    def __init__(self, source: PlanningSource, budget_bytes: int) -> None:
        self.source = source
        self.budget_bytes = budget_bytes
        self._batches: list[_Batch] = []
        self._lookups = 0
        counted = ("requested", "staged", "taken", "rewritten", "overtaken", "expired", "refused", "stalls")
        self._counts = dict.fromkeys(counted, 0)
        self._stall_seconds = 0.0

    @property
    def spec(self) -> TableSpec:
        return self.source.spec

    # -- ahead ----------------------------------------------------------------------------------------------

    def prefetch(self, rows_M: np.ndarray) -> None:
        """Start reading these rows (ascending, distinct), except those that are staged already. Returns at once."""
        self._counts["requested"] += rows_M.size
        for batch in self._batches:
            at_M = np.empty_like(rows_M)
            if match(rows_M, batch.rows_M, batch.wanted_M, at_M):
                rows_M = rows_M[at_M == ABSENT]
        row_bytes = 4 * self.spec.row_width + 10  # as _Batch.memory_bytes counts
        while self._batches and self.memory_bytes + rows_M.size * row_bytes > self.budget_bytes:
            if self._lookups - self._batches[0].born_lookup <= len(self._batches):
                break  # what waits there is still wanted soon
            self._expire(self._batches[0])
        room = max(0, self.budget_bytes - self.memory_bytes) // row_bytes
        self._counts["refused"] += max(0, rows_M.size - room)
        rows_M = rows_M[:room]
        if rows_M.size:
            self._start(rows_M)

    def _start(self, rows_M: np.ndarray) -> None:
        read = self.source.read_ahead(rows_M)
        values_ME = np.empty((rows_M.size, self.spec.row_width), np.float32)
        task = threads.run_in_background(read.run, values_ME)
        wanted_M = np.ones(rows_M.size, np.bool_)
        self._batches.append(_Batch(rows_M, values_ME, wanted_M, read, task, self._lookups))
        self._counts["staged"] += rows_M.size

    def tick(self) -> None:
        """A lookup begins: batches that have waited for too many of them go."""
        self._lookups += 1
        while self._batches and self._lookups - self._batches[0].born_lookup > LONGEST_WAIT_LOOKUPS:
            self._expire(self._batches[0])

    # -- a RowSource ----------------------------------------------------------------------------------------

    def fetch_rows(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """As the source's: what is staged is taken from there, the rest read now."""
        missing = np.ones(rows_M.size, np.bool_)
        for batch in list(self._batches):
            self._take(batch, rows_M, values_ME, missing)
        if missing.all():
            self.source.fetch_rows(rows_M, values_ME)
        elif missing.any():
            rest = np.flatnonzero(missing)
            rest_ME = np.empty((rest.size, values_ME.shape[1]), np.float32)
            self.source.fetch_rows(rows_M[rest], rest_ME)
            values_ME[rest] = rest_ME

    def append_rows(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """As the source's."""
        self.forget(rows_M)
        self.source.append_rows(rows_M, values_ME)

    def _take(self, batch: _Batch, rows_M: np.ndarray, values_ME: np.ndarray, missing: np.ndarray) -> None:
        """Copy what this batch has of the rows, and strike them off `missing`."""
        at_M = np.empty_like(rows_M)
        if not match(rows_M, batch.rows_M, batch.wanted_M, at_M):
            return
        here = np.flatnonzero(at_M != ABSENT)
        if not batch.task.is_done and here.size < FEW_ROWS * batch.rows_M.size:
            # Read ahead for a later lookup. Mostly they were evicted just now, so they are in the system's page cache.
            batch.wanted_M[at_M[here]] = False
            self._counts["overtaken"] += here.size
            return
        arrived_M = self._arrived(batch)
        batch.wanted_M[at_M[here]] = False  # lost ones too: they are read now
        lost = here[~arrived_M[at_M[here]]]
        at_M[lost] = ABSENT
        threads.run(row_kernels.take_rows, rows_M.size, batch.values_ME, at_M, values_ME)
        missing[at_M != ABSENT] = False
        self._counts["taken"] += here.size - lost.size
        self._remove_if_done(batch)

    def _arrived(self, batch: _Batch) -> np.ndarray:
        """Wait for the batch; bool (M,), which of its rows were read and are sound."""
        if not batch.task.is_done:
            start = time.perf_counter()
            batch.task.wait()
            self._counts["stalls"] += 1
            self._stall_seconds += time.perf_counter() - start
        return np.zeros(batch.rows_M.size, np.bool_) if batch.task.error is not None else batch.task.result

    # -- forgetting -----------------------------------------------------------------------------------------

    def forget(self, rows_M: np.ndarray) -> None:
        """The source takes newer values of these rows (ascending): what is staged of them, or in flight, is old."""
        for batch in list(self._batches):
            at_M = np.empty_like(rows_M)
            if match(rows_M, batch.rows_M, batch.wanted_M, at_M):
                old = at_M[at_M != ABSENT]
                batch.wanted_M[old] = False
                self._counts["rewritten"] += old.size
                self._remove_if_done(batch)

    def drop(self) -> None:
        """Forget everything: the source has gone to another generation."""
        while self._batches:
            self._remove(self._batches[0])

    def _expire(self, batch: _Batch) -> None:
        self._counts["expired"] += int(np.count_nonzero(batch.wanted_M))
        self._remove(batch)

    def _remove_if_done(self, batch: _Batch) -> None:
        if not batch.wanted_M.any():
            self._remove(batch)

    def _remove(self, batch: _Batch) -> None:
        self._batches.remove(batch)
        batch.read.cancel()
        if batch.task.is_done:  # in a forked child it may be done without having run; else it closes what it uses
            batch.read.close()

    # -- accounts -------------------------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        return sum(batch.memory_bytes for batch in self._batches)

    def stats(self) -> dict[str, Any]:
        """Rows so far: asked for, staged, taken by lookups, rewritten before that, read by a lookup before they came,
        expired, without room; stalls."""
        return {
            **self._counts,
            "stall_seconds": self._stall_seconds,
            "batches": len(self._batches),
            "memory_bytes": self.memory_bytes,
            "limit_bytes": self.budget_bytes,
        }

    def _check(self) -> None:
        """Assert every invariant."""
        for batch in self._batches:
            assert (np.diff(batch.rows_M) > 0).all(), f"staged rows are not ascending: {batch.rows_M}"
            assert batch.wanted_M.any(), "a batch of which nothing is wanted"
        wanted = np.concatenate([np.empty(0, np.int64), *(b.rows_M[b.wanted_M] for b in self._batches)])
        assert np.unique(wanted).size == wanted.size, "a row is staged twice"
        assert self.memory_bytes <= self.budget_bytes, "more is staged than the budget holds"
