"""Which slot of a cache on a device holds which row: the host's indexes in torch ops, equal to them step by step.

The contract is `cache.index.Index`, with tensors for arrays. No operation waits for the device. An operation that
must skip some entries sends them to one more slot behind the last, which nothing ever reads.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from bigembed.cache.device_ops import ABSENT, bucket, rank_in_group
from bigembed.cache.index import MAX_SETS


@dataclass(frozen=True, slots=True)
class DeviceAdmission:
    """`cache.index.Admission`, on the device."""

    slots_M: torch.Tensor
    victims_M: torch.Tensor
    victim_scores_M: torch.Tensor


class DeviceIndex(Protocol):
    """What the device cache asks of an index: `cache.index.Index` on tensors, and `touch`, which is half a `probe`."""

    num_slots: int
    bytes_per_slot: int

    @property
    def used_slots(self) -> int: ...
    def find(self, rows_U: torch.Tensor) -> torch.Tensor: ...
    def touch(self, slots_U: torch.Tensor, step: int, *, count: bool = True) -> None: ...
    def probe(self, rows_U: torch.Tensor, step: int, *, count: bool = True) -> torch.Tensor: ...
    def admit(self, rows_M: torch.Tensor, step: int, protect_step: int) -> DeviceAdmission: ...
    def undo(self, admission: DeviceAdmission) -> None: ...
    def forget(self, slots: torch.Tensor) -> None: ...
    def clear(self) -> None: ...
    def rows_of(self, slots: torch.Tensor) -> torch.Tensor: ...
    def _check(self, step: int) -> None: ...


class DeviceSetIndex:
    """`cache.index.SetIndex` with policy "lru" on a device: its key and score are equal after every step.

    Args:
        num_sets: sets, below 2**32. ways: slots in a set. device: where key and score live.
    """

    bytes_per_slot = 16

    def __init__(self, num_sets: int, ways: int, device: torch.device | str) -> None:
        assert 1 <= num_sets <= MAX_SETS
        assert ways >= 1
        self.num_slots = num_sets * ways
        self._key = torch.full((self.num_slots + 1,), ABSENT, dtype=torch.int64, device=device)
        self._score = torch.zeros_like(self._key)
        self.key = self._key[:-1].view(num_sets, ways)
        self.score = self._score[:-1].view(num_sets, ways)

    @property
    def used_slots(self) -> int:
        """How many slots hold a row. Waits for the device."""
        return int(torch.count_nonzero(self.key != ABSENT))

    def find(self, rows_U: torch.Tensor) -> torch.Tensor:
        """The slot of each row, ABSENT where it is not in the cache; any int64 may be asked for."""
        sets, ways = self.key.shape
        home_U = bucket(rows_U, sets)
        is_here = self.key[home_U] == rows_U.unsqueeze(1)
        way_U = (is_here * torch.arange(ways, device=rows_U.device)).sum(1)  # at most one is here
        return torch.where(is_here.any(1) & (rows_U >= 0), home_U * ways + way_U, ABSENT)

    def touch(self, slots_U: torch.Tensor, step: int, *, count: bool = True) -> None:
        """Mark these slots, ABSENT ones skipped, as used at `step`."""
        self._score.index_fill_(0, self._at(slots_U), step)

    def probe(self, rows_U: torch.Tensor, step: int, *, count: bool = True) -> torch.Tensor:
        slots_U = self.find(rows_U)
        self.touch(slots_U, step, count=count)
        return slots_U

    def admit(self, rows_M: torch.Tensor, step: int, protect_step: int) -> DeviceAdmission:
        assert protect_step >= 1, "an empty way has score 0 and is never protected"
        sets, ways = self.key.shape
        home_M = bucket(rows_M, sets)
        rank_M = rank_in_group(home_M)
        way_M, score_M = _choose(self.score[home_M], rank_M)
        has_room_M = (rank_M < ways) & (score_M < min(protect_step, step))
        slots_M = torch.where(has_room_M, home_M * ways + way_M, ABSENT)
        at_M = self._at(slots_M)
        admission = DeviceAdmission(
            slots_M, torch.where(has_room_M, self._key[at_M], ABSENT), torch.where(has_room_M, score_M, 0)
        )
        self._key.index_copy_(0, at_M, rows_M)
        self._score.index_fill_(0, at_M, step)
        return admission

    def undo(self, admission: DeviceAdmission) -> None:
        at_M = self._at(admission.slots_M)
        self._key.index_copy_(0, at_M, admission.victims_M)
        self._score.index_copy_(0, at_M, admission.victim_scores_M)

    def forget(self, slots: torch.Tensor) -> None:
        """Empty these slots, ABSENT ones skipped."""
        self._key.index_fill_(0, self._at(slots), ABSENT)
        self._score.index_fill_(0, self._at(slots), 0)

    def clear(self) -> None:
        self.key.fill_(ABSENT)
        self.score.fill_(0)

    def rows_of(self, slots: torch.Tensor) -> torch.Tensor:
        return self._key[slots]

    def _at(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.where(slots == ABSENT, self.num_slots, slots)

    def _check(self, step: int) -> None:
        used = self.key != ABSENT
        rows = self.key[used]
        home = torch.arange(self.key.shape[0], device=rows.device).unsqueeze(1).expand_as(self.key)
        assert torch.unique(rows).numel() == rows.numel(), f"a row is in two slots:\n{self.key}"
        assert torch.equal(bucket(rows, self.key.shape[0]), home[used]), f"a row is in a stranger's set:\n{self.key}"
        assert torch.equal(used, self.score > 0), f"a used way without a score, or one with:\n{self.score}"
        assert int(self.score.max()) <= step, f"a score from the future of step {step}:\n{self.score}"


def _choose(score_MW: torch.Tensor, rank_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(way, its score): the least recently used way of a set for its first miss, the next for the second, ..."""
    scores_MW, ways_MW = torch.sort(score_MW, dim=1, stable=True)  # by (score, way)
    nth_M1 = rank_M.clamp(max=score_MW.shape[1] - 1).unsqueeze(1)
    return ways_MW.gather(1, nth_M1).squeeze(1), scores_MW.gather(1, nth_M1).squeeze(1)


class DeviceIdentityIndex:
    """`cache.index.IdentityIndex` on a device: slot = row, for a table that fits the cache."""

    bytes_per_slot = 1

    def __init__(self, num_rows: int, device: torch.device | str) -> None:
        self.num_slots = num_rows
        self._loaded = torch.zeros(num_rows + 1, dtype=torch.bool, device=device)
        self.loaded = self._loaded[:-1]

    @property
    def used_slots(self) -> int:
        """How many slots hold a row. Waits for the device."""
        return int(torch.count_nonzero(self.loaded))

    def find(self, rows_U: torch.Tensor) -> torch.Tensor:
        """The slot of each row, ABSENT where it is not in the cache; any int64 may be asked for."""
        within_U = rows_U.clamp(0, self.num_slots - 1)
        return torch.where((within_U == rows_U) & self.loaded[within_U], rows_U, ABSENT)

    def touch(self, slots_U: torch.Tensor, step: int, *, count: bool = True) -> None:
        pass

    def probe(self, rows_U: torch.Tensor, step: int, *, count: bool = True) -> torch.Tensor:
        return self.find(rows_U)

    def admit(self, rows_M: torch.Tensor, step: int, protect_step: int) -> DeviceAdmission:
        self._loaded.index_fill_(0, rows_M, True)
        return DeviceAdmission(rows_M.clone(), torch.full_like(rows_M, ABSENT), torch.zeros_like(rows_M))

    def undo(self, admission: DeviceAdmission) -> None:
        self.forget(admission.slots_M)

    def forget(self, slots: torch.Tensor) -> None:
        """Empty these slots, ABSENT ones skipped."""
        self._loaded.index_fill_(0, torch.where(slots == ABSENT, self.num_slots, slots), False)

    def clear(self) -> None:
        self.loaded.fill_(False)

    def rows_of(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.where(self.loaded[slots], slots, ABSENT)

    def _check(self, step: int) -> None:
        assert self.loaded.numel() == self.num_slots


def make_device_index(
    num_rows: int,
    row_bytes: int,
    *,
    budget_bytes: int | None,
    capacity_rows: int | None,
    ways: int,
    device: torch.device | str,
) -> DeviceIndex:
    """`cache.index.make_index` on a device; a budget also pays for the slot behind the last one."""
    if capacity_rows is None:
        assert budget_bytes is not None
        fits = (num_rows + 1) * (row_bytes + DeviceIdentityIndex.bytes_per_slot) <= budget_bytes
        slots = budget_bytes // (row_bytes + DeviceSetIndex.bytes_per_slot) - 1
        capacity_rows = num_rows if fits else max(1, slots)
    if capacity_rows >= num_rows:
        return DeviceIdentityIndex(num_rows, device)
    return DeviceSetIndex(min(max(1, capacity_rows // ways), MAX_SETS), min(ways, capacity_rows), device)
