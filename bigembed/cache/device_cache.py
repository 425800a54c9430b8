"""DeviceCache: the hot rows of one table on a device; `RowCache` in torch ops, equal to it in every slot and value.

Index, values and dirty flags are tensors, allocated once; a hit never touches the host. Missed rows come from a
source on the host, which is the table or another cache above it, and dirty victims go down to it. As in `RowCache`,
nothing is lost whatever the source raises. The caller (the table) guards against concurrent use.

Cost of a fetch: 8 bytes down for each missed row, 8 more and 4 E up where it is read, 4 E down for each dirty victim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bigembed.cache import row_cache
from bigembed.cache.device_index import DeviceAdmission, make_device_index
from bigembed.cache.device_ops import ABSENT, Batch, compact, distinct
from bigembed.cache.device_report import MissReport
from bigembed.cache.located import Protect, RowSource, oldest_protected
from bigembed.cache.transfer import Transfer, checked_device
from bigembed.errors import InvalidArgument

LAST_ROW = (1 << 63) - 1  # sorts behind every row

Rule = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class DeviceLocated:
    """Where the rows of a batch are, until the cache's next fetch, refresh or drop; `row_cache.Located` on a device.

    rows_U: int64, the rows.
    slots_U: int64, the slot of each; S + p means row p of past_PE.
    past_PE: float32, the rows served past the cache, in ascending order of row.
    past_P: int64, where in rows_U these are. past_rows_P: the rows themselves, on the host.
    step: the clock at this fetch.
    """

    rows_U: torch.Tensor
    slots_U: torch.Tensor
    past_PE: torch.Tensor
    past_P: torch.Tensor
    past_rows_P: np.ndarray
    step: int


class DeviceCache:
    """The cache of a table's rows on a device: reads and updates equal those of `RowCache` on the same source.

    Args:
        source: where rows are stored, on the host.
        budget_bytes: bounds the device memory of values, index and dirty flags (there is always room for one row).
        capacity_rows: the slots, instead of a budget; rounded down to whole sets.
        device: where they live.
        ways: slots of a set.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        budget_bytes: int | None = None,
        capacity_rows: int | None = None,
        device: str | torch.device,
        ways: int = 16,
    ) -> None:
        if (budget_bytes is None) == (capacity_rows is None):
            raise InvalidArgument("A cache needs either budget_bytes or capacity_rows.")
        for name, value in (("budget_bytes", budget_bytes), ("capacity_rows", capacity_rows), ("ways", ways)):
            if value is not None and value < 1:
                raise InvalidArgument(f"{name} must be at least 1, not {value}.")
        self.device = checked_device(device)
        self.transfer = Transfer(self.device)
        self.source = source
        self.dim, self.width = source.spec.dim, source.spec.row_width
        sizes = {"budget_bytes": budget_bytes, "capacity_rows": capacity_rows}
        row_bytes = 4 * self.width + 1
        try:
            with torch.inference_mode(False):  # they will be changed outside of it too
                self.index = make_device_index(source.spec.num_rows, row_bytes, **sizes, ways=ways, device=self.device)
                self.num_slots = self.index.num_slots
                # One slot more than there are: what must go nowhere goes there, and nothing ever comes from it.
                self._values = torch.empty((self.num_slots + 1, self.width), dtype=torch.float32, device=self.device)
                self._dirty = torch.zeros(self.num_slots + 1, dtype=torch.bool, device=self.device)
        except (MemoryError, RuntimeError) as error:  # torch's ways to say that there is none
            given = ", ".join(f"{name}={value}" for name, value in sizes.items() if value is not None)
            raise InvalidArgument(f"a cache of {given} cannot be had: {error}. Make it smaller.") from error
        self.values_SE, self._dirty_S = self._values[:-1], self._dirty[:-1]
        self.step = 0
        self._report = MissReport(self.transfer, source.spec.num_rows)
        # Rows changed past the cache that the source has not taken yet; None but after a failure.
        self._unsaved: tuple[np.ndarray, torch.Tensor] | None = None
        self._hits = self._misses = self._evictions = self._write_backs = self._past = 0

    @property
    def dirty_rows(self) -> int:
        """How many rows hold changes that the source does not have. Waits for the device."""
        return int(torch.count_nonzero(self._dirty_S)) + (0 if self._unsaved is None else self._unsaved[0].size)

    def fetch(
        self,
        rows: torch.Tensor | Batch,
        *,
        protect_step: Protect = None,
        admit: bool = True,
        count: bool = True,
    ) -> DeviceLocated:
        """Bring up the newest values of these rows, missed ones with one sorted read; starts a new step.

        Waits for the device once where all rows hit: for one report that says how many rows there are, the first id
        out of range, and which rows missed (it is read twice where more miss than it had room for). Where rows miss,
        it waits for what admission did, and, where dirty rows leave, for their values.

        Args:
            rows: int64, distinct, or the batch of any ids.
            protect_step, admit, count: as in `RowCache.fetch`.

        Raises:
            RowOutOfRange: an id of the batch; nothing has changed.
            Whatever the source raises. No change is lost, and the fetch may be tried again.
        """
        batch = rows if isinstance(rows, Batch) else distinct(rows)
        if admit:
            self._append_unsaved()
        slots_N = self.index.find(batch.rows_N)
        num_unique, missed_M, rows_M = self._report.read(batch, slots_N)
        rows_U, slots_U = batch.rows_N[:num_unique], slots_N[:num_unique]
        if admit:
            self.step += 1
            self.index.touch(slots_U, self.step, count=count)
        located = self._locate_all_hit(rows_U, slots_U)
        if rows_M.size:
            located = self._fetch_missed(located, missed_M, rows_M, protect_step, admit)
        if admit and count:
            self._hits += num_unique - rows_M.size
            self._misses += rows_M.size
            self._past += located.past_rows_P.size
        return located

    def gather(self, located: DeviceLocated, inverse_N: torch.Tensor) -> torch.Tensor:
        """A new (N, D) tensor: the weight of row `rows_U[inverse_N[n]]` at position n."""
        assert located.step == self.step, "these rows were located before the latest fetch, refresh or drop"
        slots_N = located.slots_U[inverse_N]
        out_ND = self._values[:, : self.dim].index_select(0, slots_N.clamp(max=self.num_slots))
        if located.past_rows_P.size:
            past_ND = located.past_PE[:, : self.dim].index_select(0, (slots_N - self.num_slots).clamp(min=0))
            out_ND = torch.where((slots_N >= self.num_slots).unsqueeze(1), past_ND, out_ND)
        return out_ND

    def update(self, located: DeviceLocated, rule: Rule, *args: Any) -> None:
        """Replace the rows (U, E) by `rule(rows_UE, *args)`, which may change what it is given in place.

        Raises:
            Whatever the source raises while it stores the rows past the cache. The change is made all the
            same, so do not repeat it: those rows wait here and go first with the next fetch or write_back.
        """
        assert located.step == self.step, "these rows were located before the latest fetch, refresh or drop"
        assert self._unsaved is None, "an update failed to store rows; fetch again first"
        at_U = located.slots_U.clamp(max=self.num_slots)
        # Marked before they change, so that no interruption leaves a changed row that counts as stored.
        self._dirty.index_fill_(0, at_U, True)
        if located.past_rows_P.size:
            self._unsaved = located.past_rows_P, located.past_PE
        self._apply(located, at_U, rule, args)
        self._append_unsaved()

    def _apply(self, located: DeviceLocated, at_U: torch.Tensor, rule: Rule, args: tuple[Any, ...]) -> None:
        """Rows out, through the rule, and in again; a fused kernel would change them where they are, from here."""
        rows_UE = self._values[at_U]
        rows_UE.index_copy_(0, located.past_P, located.past_PE)
        rows_UE = rule(rows_UE, *args)
        self._values.index_copy_(0, at_U, rows_UE)
        located.past_PE.copy_(rows_UE[located.past_P])

    def write_back(self) -> None:
        """Give every changed row to the source, in ascending order of row, about 16 MiB at a time.

        The values of the next part come down while the source takes those of this one.

        Raises:
            Whatever the source raises; the rows it has not taken stay dirty.
        """
        self._append_unsaved()
        slots = torch.nonzero(self._dirty_S).squeeze(1)
        rows, order = torch.sort(self.index.rows_of(slots))
        rows_host, slots = rows.cpu().numpy(), slots[order]
        batch_rows = max(1, row_cache.APPEND_BYTES // (4 * self.width))
        parts = [slice(start, start + batch_rows) for start in range(0, rows_host.size, batch_rows)]
        downloads = (self.transfer.download(self._values[slots[part]]) for part in parts)
        coming = next(downloads, None)
        for part in parts:
            assert coming is not None
            values, coming = coming, next(downloads, None)
            self._append(rows_host[part], values.wait())
            self._dirty.index_fill_(0, slots[part], False)

    def overlay(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """Replace stored values (on the host) by the newer ones that are here. Changes no score."""
        slots_M = self.index.find(self._on_device(rows_M)).cpu().numpy()
        found = np.flatnonzero(slots_M != ABSENT)
        values_ME[found] = self._values[self._on_device(slots_M[found])].cpu().numpy()
        self._overlay_unsaved(rows_M, values_ME)

    def refresh(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """Take over the values just stored (on the host) for these distinct rows; copies here become clean."""
        self.step += 1  # rows located before may be copies past the cache, which are old now
        slots_M = self.index.find(self._on_device(rows_M))
        self._put(slots_M, self._on_device(values_ME))
        self._dirty.index_fill_(0, self._at(slots_M), False)
        if self._unsaved is not None:
            rows_P, values_PE = self._unsaved
            kept = np.flatnonzero(~np.isin(rows_P, rows_M))
            self._unsaved = (rows_P[kept], values_PE[self._on_device(kept)]) if kept.size else None

    def drop(self) -> None:
        """Forget every row, changed ones too: the next fetch reads what the source has."""
        self.step += 1
        self.index.clear()
        self._dirty.fill_(False)
        self._unsaved = None

    def stats(self) -> dict[str, int]:
        """`RowCache.stats`, with bytes up and down, page-locked bytes, and waits for a buffer in use."""
        return {
            "capacity_rows": self.num_slots,
            "capacity_bytes": self.num_slots * (4 * self.width + 1 + self.index.bytes_per_slot),
            "used_rows": self.index.used_slots,
            "dirty_rows": self.dirty_rows,
            "hits": self._hits,
            "misses": self._misses,
            "evictions": self._evictions,
            "write_backs": self._write_backs,
            "past": self._past,
            "bytes_up": self.transfer.bytes_up,
            "bytes_down": self.transfer.bytes_down,
            "locked_bytes": self.transfer.buffer_bytes,
            "stalls": self.transfer.stalls,
        }

    # -- a fetch, step by step ------------------------------------------------------------------------------

    def _locate_all_hit(self, rows_U: torch.Tensor, slots_U: torch.Tensor) -> DeviceLocated:
        nothing = rows_U.new_empty(0)
        return DeviceLocated(rows_U, slots_U, self._values[:0], nothing, np.empty(0, np.int64), self.step)

    def _fetch_missed(
        self, located: DeviceLocated, missed_M: torch.Tensor, rows_M: np.ndarray, protect_step: Protect, admit: bool
    ) -> DeviceLocated:
        """Slots or places past the cache for the missed rows, rows_M in ascending order on the host."""
        rows_device = located.rows_U[missed_M]
        order = torch.argsort(rows_device)
        if admit:
            oldest = oldest_protected(protect_step, self.step)
            admission = self.index.admit(rows_device, self.step, oldest)
            values_ME, slots_host = self._exchange(admission, rows_M, order)
            slots_M = admission.slots_M[order]
        else:
            values_ME, slots_host = self._read(rows_M, admit), np.full_like(rows_M, ABSENT)
            slots_M = torch.full_like(rows_device, ABSENT)
        past_rows_P = rows_M[slots_host == ABSENT]
        is_past = slots_M == ABSENT
        slots_M = torch.where(is_past, self.num_slots - 1 + torch.cumsum(is_past, 0), slots_M)
        at_M = missed_M[order]
        located.slots_U.index_copy_(0, at_M, slots_M)
        past = compact(is_past)[: past_rows_P.size]
        past_PE = values_ME if past_rows_P.size == rows_M.size else values_ME[past]
        return DeviceLocated(located.rows_U, located.slots_U, past_PE, at_M[past], past_rows_P, self.step)

    def _exchange(
        self, admission: DeviceAdmission, rows_M: np.ndarray, order: torch.Tensor
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Victims out, missed rows in; their values and slots, in ascending order of row. Or nothing has happened."""
        try:
            slots_host, evictions = self._write_back_victims(admission, order)
            values_ME = self._read(rows_M, admit=True)
        except BaseException:
            self.index.undo(admission)  # the victims' values are still in their slots
            raise
        try:
            self._put(admission.slots_M[order], values_ME)
        except BaseException:
            self.index.forget(admission.slots_M)  # half overwritten, and all stored
            raise
        self._evictions += evictions
        return values_ME, slots_host

    def _write_back_victims(self, admission: DeviceAdmission, order: torch.Tensor) -> tuple[np.ndarray, int]:
        """Store the dirty victims with one append; the slots given, in that order, and how many rows leave."""
        slots_M, victims_M = admission.slots_M, admission.victims_M
        is_evicted = victims_M != ABSENT
        is_leaving = is_evicted & self._dirty[self._at(slots_M)]
        leaving_M, leaving_order = torch.sort(torch.where(is_leaving, victims_M, LAST_ROW))
        report = torch.cat([slots_M[order], leaving_M, is_evicted.sum().reshape(1)])
        told = self.transfer.download(report).wait()
        slots_host, leaving, evictions = told[: order.numel()].copy(), told[order.numel() : -1], int(told[-1])
        leaving = leaving[leaving != LAST_ROW].copy()
        if leaving.size:
            slots = slots_M[leaving_order[: leaving.size]]
            self._append(leaving, self.transfer.download(self._values[slots]).wait())
            self._dirty.index_fill_(0, slots, False)
        return slots_host, evictions

    def _append(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        self.source.append_rows(rows_M, values_ME)
        self._write_backs += rows_M.size

    def _append_unsaved(self) -> None:
        """Store the rows changed past the cache; until the source has taken them they stay here."""
        if self._unsaved is not None:
            rows_P, values_PE = self._unsaved
            self._append(rows_P, self.transfer.download(values_PE).wait())
            self._unsaved = None

    def _overlay_unsaved(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        if self._unsaved is not None:
            rows_P, values_PE = self._unsaved
            at = np.minimum(np.searchsorted(rows_P, rows_M), rows_P.size - 1)
            found = np.flatnonzero(rows_P[at] == rows_M)
            values_ME[found] = values_PE[self._on_device(at[found])].cpu().numpy()

    def _read(self, rows_M: np.ndarray, admit: bool) -> torch.Tensor:
        """The newest values of ascending rows that are in no slot, on the device."""
        values_ME = self.transfer.stage(rows_M.size, self.width)
        fetch = self.source.fetch_rows if admit else getattr(self.source, "peek_rows", self.source.fetch_rows)
        fetch(rows_M, values_ME)
        self._overlay_unsaved(rows_M, values_ME)
        return self.transfer.upload()

    def _put(self, slots_M: torch.Tensor, values_ME: torch.Tensor) -> None:
        self._values.index_copy_(0, self._at(slots_M), values_ME)

    def _at(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.where(slots == ABSENT, self.num_slots, slots)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _check(self) -> None:
        """Assert every invariant of the cache and its index."""
        self.index._check(self.step)
        dirty = torch.nonzero(self._dirty_S).squeeze(1)
        assert bool((self.index.rows_of(dirty) != ABSENT).all()), f"an empty slot is dirty: {dirty}"
        if self._unsaved is not None:
            rows_P, values_PE = self._unsaved
            assert rows_P.size == values_PE.shape[0] > 0
            assert (np.diff(rows_P) > 0).all(), f"unsaved rows are not ascending: {rows_P}"
            slots_P = self.index.find(self._on_device(rows_P))
            assert bool((slots_P == ABSENT).all()), f"a row is unsaved and in a slot: {rows_P}"
