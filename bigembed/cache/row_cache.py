"""RowCache: the hot rows of one table, weight and state together, with the changes that are not stored yet.

It may never lie and never lose: what `fetch` serves equals the newest values of each row, wherever they are,
and a changed row stays here until the source has taken it, whatever the source raises. Who stays is up to an
index (`cache/index.py`), which never sees a value.

One tensor of S slots of E float32 values, plus the index and one dirty byte a slot; a missed row's bytes are
read once, a changed row's written once when it leaves. The caller (the table) guards against concurrent use.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bigembed import threads
from bigembed.cache.index import ABSENT, Admission, make_index
from bigembed.cache.located import Hits, Located, Protect, RowSource, oldest_protected
from bigembed.cache.slots import allocated
from bigembed.errors import InvalidArgument
from bigembed.kernels import rows as row_kernels
from bigembed.kernels.matching import places_of

APPEND_BYTES = 16 << 20  # what `write_back` hands over at once: large writes, little memory
_caches = itertools.count()


class RowCache:
    """The cache of a table's rows: reads and updates through it equal those on the whole table in memory.

    Args:
        source: where rows are stored.
        budget_bytes: bounds the memory of values, index and dirty flags (there is always room for one row).
        capacity_rows: the slots, instead of a budget; rounded down to whole sets.
        ways: slots of a set; fewer than 16 hit measurably less often than true LRU.
        policy: who makes room, one of `index.POLICIES`.

    Where the whole table fits, slot = row and nothing is ever evicted.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        budget_bytes: int | None = None,
        capacity_rows: int | None = None,
        ways: int = 16,
        policy: str = "lru",
    ) -> None:
        if (budget_bytes is None) == (capacity_rows is None):
            raise InvalidArgument("A cache needs either budget_bytes or capacity_rows.")
        for name, value in (("budget_bytes", budget_bytes), ("capacity_rows", capacity_rows), ("ways", ways)):
            if value is not None and value < 1:
                raise InvalidArgument(f"{name} must be at least 1, not {value}.")
        self.source = source
        self.dim, self.width = source.spec.dim, source.spec.row_width
        try:
            self.index = make_index(
                source.spec.num_rows,
                4 * self.width + 1,
                budget_bytes=budget_bytes,
                capacity_rows=capacity_rows,
                ways=ways,
                policy=policy,
            )
            self.num_slots = self.index.num_slots
            self._values_SE = allocated(self.num_slots, self.width)
        except (MemoryError, RuntimeError, ValueError) as error:  # numpy's and torch's ways to say that there is none
            given = f"budget_bytes={budget_bytes}" if budget_bytes is not None else f"capacity_rows={capacity_rows}"
            raise InvalidArgument(f"a cache of {given} cannot be had: {error}. Make cache_bytes smaller.") from error
        self.step = 0
        self._moves = next(_caches) << 40  # how often a row may have left its slot, or come to one; as no other cache's
        self._expects_hits = False  # whether the last fetch found all of its rows
        self._nothing_past = torch.empty((0, self.width), dtype=torch.float32, device="cpu")
        self.values_SE = torch.from_numpy(self._values_SE)  # the same memory
        self._dirty_S = np.zeros(self.num_slots, np.bool_)
        self._dirty_slots = 0
        # Rows changed past the cache that the source has not taken yet; None but after a failure.
        self._unsaved: tuple[np.ndarray, np.ndarray] | None = None
        self._hits = self._misses = self._evictions = self._write_backs = self._past = 0

    @property
    def dirty_rows(self) -> int:
        """How many rows hold changes that the source does not have."""
        return self._dirty_slots + (0 if self._unsaved is None else self._unsaved[0].size)

    def fetch(
        self, rows_U: np.ndarray, *, protect_step: Protect = None, admit: bool = True, count: bool = True
    ) -> Located:
        """Bring up the newest values of these rows, missed ones with one sorted read; starts a new step.

        Args:
            rows_U: int64, distinct.
            protect_step: rows used at this step or later are not evicted, or a function that says so, which is called
                where rows miss; None protects only this batch.
            admit: False serves missed rows past the cache and changes nothing in it, not even the step.
            count: False leaves hits and misses out of `stats`: an optimizer's second visit to a forward's rows,
                which nearly always hits, is no lookup.

        Raises:
            Whatever the source raises. No change is lost, and the fetch may be tried again.
        """
        if admit:
            self._append_unsaved()
            self.step += 1
            slots_U = self.index.probe(rows_U, self.step, count=count)
        else:
            slots_U = self.index.find(rows_U)
        missed = places_of(slots_U, ABSENT)
        self._expects_hits = not missed.size
        if not missed.size:
            self._hits += rows_U.size if admit and count else 0
            return Located(rows_U, slots_U, self._nothing_past, self.step, self._moves)
        rows_M = rows_U[missed]
        order = np.argsort(rows_M)
        if admit:
            self._moves += 1
            oldest = oldest_protected(protect_step, self.step)
            admission = self.index.admit(rows_M, self.step, oldest)
            values_ME = self._exchange(admission, rows_M, order)
            slots_M = admission.slots_M[order]
        else:
            values_ME = self._read(rows_M[order])
            slots_M = np.full_like(rows_M, ABSENT)
        past = np.flatnonzero(slots_M == ABSENT)
        slots_M[past] = self.num_slots + np.arange(past.size)
        slots_U[missed[order]] = slots_M
        if admit and count:
            self._hits += rows_U.size - missed.size
            self._misses += missed.size
            self._past += past.size
        past_PE = values_ME if past.size == missed.size else values_ME[past]
        return Located(rows_U, slots_U, torch.from_numpy(past_PE), self.step, self._moves)

    def gather_hits(self, ids_N: np.ndarray, keep: bool) -> tuple[torch.Tensor, Hits] | None:
        """(the weights at each position, (N, D); where they are), if all rows are here; else None, as if never asked.

        What `fetch` and `gather` of the distinct rows would do, but for finding out which these are.

        Args:
            ids_N: int64, checked; may be memory of the caller's user.
            keep: whether the second is kept, so that it needs ids of its own.
        """
        if not self._expects_hits or self._unsaved is not None:
            return None
        self.step += 1  # before the index takes it for a row's last use, whatever comes between
        found = self.index.probe_hits(ids_N, self.step)
        if found is None:
            self.step -= 1
            self._expects_hits = False  # until a fetch finds all of its rows again
            return None
        slots_N, hits = found
        self._hits += hits
        out_ND = torch.empty((ids_N.size, self.dim), dtype=torch.float32, device="cpu")
        self._run(row_kernels.gather_slots, ids_N.size, slots_N, out_ND.numpy())
        if keep:
            own_N = ids_N.copy()
            ids_N, slots_N = own_N, own_N if slots_N is ids_N else slots_N
        return out_ND, Hits(ids_N, slots_N, self._nothing_past, self.step, self._moves)

    def located_again(self, located: Located) -> Located | None:
        """What `fetch` of the same rows would return, without a search: None where it would have to look.

        A second visit on behalf of the same use, such as an optimizer's; no policy takes note of it.
        """
        if located.moves != self._moves or located.past_PE.shape[0] or self._unsaved is not None:
            return None
        return Located(located.rows_U, located.slots_U, located.past_PE, self.step, self._moves)

    def run_on(
        self, located: Located, kernel: Callable[..., Any], count: int, *args: Any, grain: int = threads.GRAIN_ITEMS
    ) -> None:
        """Run `kernel(start, stop, values_SE, past_PE, slots_U, *args)` over 0..count: for reading rows."""
        assert located.step == self.step, "these rows were located before the latest fetch, refresh or drop"
        self._run(kernel, count, located.past_PE.numpy(), located.slots_U, *args, grain=grain)

    def gather(self, located: Located, inverse_N: np.ndarray) -> torch.Tensor:
        """A new (N, D) tensor: the weight of row `rows_U[inverse_N[n]]` at position n."""
        out_ND = torch.empty((inverse_N.size, self.dim), dtype=torch.float32, device="cpu")
        self.run_on(located, row_kernels.gather, inverse_N.size, inverse_N, out_ND.numpy())
        return out_ND

    def update(
        self,
        located: Located,
        kernel: Callable[..., Any],
        *args: Any,
        count_grain: int = threads.GRAIN_ITEMS,
    ) -> None:
        """Change rows in place by `kernel(start, stop, values_SE, past_PE, slots_U, *args)` over 0..U.

        Raises:
            Whatever the source raises while it stores the rows past the cache. The change is made all the
            same, so do not repeat it: those rows wait here and go first with the next fetch or write_back.
        """
        assert located.step == self.step, "these rows were located before the latest fetch, refresh or drop"
        assert self._unsaved is None, "an update failed to store rows; fetch again first"
        # Marked before they change, so that no interruption leaves a changed row that counts as stored.
        self._set_dirty(located.slots_U, True)
        past_PE = located.past_PE.numpy()
        if past_PE.shape[0]:
            past = np.flatnonzero(located.slots_U >= self.num_slots)
            rows_P = np.empty_like(past)
            rows_P[located.slots_U[past] - self.num_slots] = located.rows_U[past]
            self._unsaved = rows_P, past_PE
        self._run(kernel, located.slots_U.size, past_PE, located.slots_U, *args, grain=count_grain)
        self._append_unsaved()

    def write_back(self) -> None:
        """Give every changed row to the source, in ascending order of row, about 16 MiB at a time.

        Raises:
            Whatever the source raises; the rows it has not taken stay dirty.
        """
        self._append_unsaved()
        slots = np.flatnonzero(self._dirty_S)
        rows = self.index.rows_of(slots)
        order = np.argsort(rows)
        batch_rows = max(1, APPEND_BYTES // (4 * self.width))
        for start in range(0, order.size, batch_rows):
            part = order[start : start + batch_rows]
            self._append_slots(rows[part], slots[part])

    def overlay(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """Replace stored values by the newer ones that are here, where there are any. Changes no score."""
        self._run(row_kernels.take_rows, rows_M.size, self.index.find(rows_M), values_ME)
        self._overlay_unsaved(rows_M, values_ME)

    def refresh(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """Take over the values just stored for these distinct rows; copies in the cache become clean."""
        self.step += 1  # rows located before may be copies past the cache, which are old now
        slots_M = self.index.find(rows_M)
        self._put(slots_M, values_ME)
        self._set_dirty(slots_M, False)
        if self._unsaved is not None:
            rows_P, values_PE = self._unsaved
            kept = ~np.isin(rows_P, rows_M)
            self._unsaved = (rows_P[kept], values_PE[kept]) if kept.any() else None

    def drop(self) -> None:
        """Forget every row, changed ones too: the next fetch reads what the source has."""
        self.step += 1
        self._moves += 1
        self.index.clear()
        self._dirty_S.fill(False)
        self._dirty_slots = 0
        self._unsaved = None

    def stats(self) -> dict[str, int]:
        """Sizes now; hits, misses, evictions, write-backs and rows past the cache so far, in unique rows.

        Where the whole table fits, a lookup that finds all of its rows counts a hit for each position.
        """
        bytes_per_slot = 4 * self.width + 1 + self.index.bytes_per_slot
        return {
            "capacity_rows": self.num_slots,
            "capacity_bytes": self.num_slots * bytes_per_slot,
            "used_rows": self.index.used_slots,
            "dirty_rows": self.dirty_rows,
            "hits": self._hits,
            "misses": self._misses,
            "evictions": self._evictions,
            "write_backs": self._write_backs,
            "past": self._past,
        }

    def _exchange(self, admission: Admission, rows_M: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Victims out, missed rows in; returns the values of rows_M[order]. Or nothing has happened."""
        try:
            self._write_back_victims(admission)
            values_ME = self._read(rows_M[order])
        except BaseException:
            self.index.undo(admission)  # the victims' values are still in their slots
            raise
        try:
            self._put(admission.slots_M[order], values_ME)
        except BaseException:
            self.index.forget(admission.slots_M[admission.slots_M != ABSENT])  # half overwritten, and all stored
            raise
        self._evictions += int(np.count_nonzero(admission.victims_M != ABSENT))
        return values_ME

    def _write_back_victims(self, admission: Admission) -> None:
        """Store the dirty victims with one append. They are clean then, whether or not they leave."""
        evicting = np.flatnonzero(admission.victims_M != ABSENT)
        leaving = evicting[self._dirty_S[admission.slots_M[evicting]]]
        if leaving.size:
            leaving = leaving[np.argsort(admission.victims_M[leaving])]
            self._append_slots(admission.victims_M[leaving], admission.slots_M[leaving])

    def _append_slots(self, rows_M: np.ndarray, slots_M: np.ndarray) -> None:
        """Store what these slots hold, and mark them clean."""
        values_ME = np.empty((rows_M.size, self.width), np.float32)
        self._run(row_kernels.take_rows, rows_M.size, slots_M, values_ME)
        self.source.append_rows(rows_M, values_ME)
        self._set_dirty(slots_M, False)
        self._write_backs += rows_M.size

    def _append_unsaved(self) -> None:
        """Store the rows changed past the cache; until the source has taken them they stay here."""
        if self._unsaved is not None:
            rows_P, values_PE = self._unsaved
            self.source.append_rows(rows_P, values_PE.copy())  # whoever located these rows still holds the array
            self._write_backs += self._unsaved[0].size
            self._unsaved = None

    def _overlay_unsaved(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        if self._unsaved is not None:
            rows_P, values_PE = self._unsaved
            at = np.minimum(np.searchsorted(rows_P, rows_M), rows_P.size - 1)
            found = rows_P[at] == rows_M
            values_ME[found] = values_PE[at[found]]

    def _read(self, rows_M: np.ndarray) -> np.ndarray:
        """The newest values of ascending rows that are in no slot."""
        values_ME = np.empty((rows_M.size, self.width), np.float32)
        if rows_M.size:
            self.source.fetch_rows(rows_M, values_ME)
            self._overlay_unsaved(rows_M, values_ME)
        return values_ME

    def _put(self, slots_M: np.ndarray, values_ME: np.ndarray) -> None:
        self._run(row_kernels.put_rows, slots_M.size, slots_M, values_ME)

    def _set_dirty(self, slots_M: np.ndarray, value: bool) -> None:
        counts = threads.run(
            row_kernels.set_flags, slots_M.size, self._dirty_S, slots_M, value, grain=threads.LIGHT_GRAIN
        )
        changed = sum(counts)
        self._dirty_slots += changed if value else -changed

    def _run(self, kernel: Callable[..., Any], count: int, *args: Any, grain: int = threads.GRAIN_ITEMS) -> None:
        """Run a range kernel on the values in slots, where they live."""
        threads.run(kernel, count, self._values_SE, *args, grain=grain)

    def _check(self) -> None:
        """Assert every invariant of the cache and its index."""
        self.index._check(self.step)
        dirty = np.flatnonzero(self._dirty_S)
        assert dirty.size == self._dirty_slots, f"{dirty.size} slots are dirty, not {self._dirty_slots}"
        assert (self.index.rows_of(dirty) != ABSENT).all(), f"an empty slot is dirty: {dirty}"
        if self._unsaved is not None:
            rows_P, values_PE = self._unsaved
            assert rows_P.size == values_PE.shape[0] > 0
            assert (np.diff(rows_P) > 0).all(), f"unsaved rows are not ascending: {rows_P}"
            assert (self.index.find(rows_P) == ABSENT).all(), f"a row is unsaved and in a slot: {rows_P}"
