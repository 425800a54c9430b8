"""Which slot of the cache holds which row: policy only, it never touches the bytes of a row.

Two indexes, one contract (`Index`). `SetIndex`, for a table larger than its cache, is set-associative and
evicts the least recently used row of a set. `IdentityIndex`, for a table that fits, has slot = row and never
evicts. Steps are the cache's clock, from 1 on. The caller guards an index against concurrent use.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bigembed import threads
from bigembed.kernels import probing
from bigembed.kernels.probing import ABSENT

MAX_SETS = (1 << 32) - 1  # what `bucket` can spread rows over


@dataclass(frozen=True, slots=True)
class Admission:
    """What `admit` did, row by row: enough to undo it.

    slots_M: int64, where the row is now, ABSENT for a row without room.
    victims_M: int64, the row that was there before, ABSENT for none.
    victim_scores_M: int64, the victim's score.
    """

    slots_M: np.ndarray
    victims_M: np.ndarray
    victim_scores_M: np.ndarray


class Index(Protocol):
    """What the cache asks of an index. Rows and slots are int64 arrays, each without duplicates.

    num_slots: S. used_slots: how many hold a row. bytes_per_slot: the index's own memory, divided by S.
    """

    num_slots: int
    used_slots: int
    bytes_per_slot: int

    def find(self, rows_U: np.ndarray) -> np.ndarray:
        """The slot of each row, ABSENT where it is not in the cache. Changes nothing."""

    def probe(self, rows_U: np.ndarray, step: int) -> np.ndarray:
        """As `find`, and marks the rows found as used at `step`."""

    def admit(self, rows_M: np.ndarray, step: int, protect_step: int) -> Admission:
        """Give slots to rows that `probe` missed at this step; evict none used since `protect_step`."""

    def undo(self, admission: Admission) -> None:
        """Restore what the latest `admit` changed."""

    def forget(self, slots: np.ndarray) -> None:
        """Empty these slots."""

    def clear(self) -> None:
        """Empty every slot."""

    def rows_of(self, slots: np.ndarray) -> np.ndarray:
        """The row in each slot, ABSENT where it is empty."""

    def _check(self, step: int) -> None:
        """Assert every invariant; `step` is the latest one."""


class SetIndex:
    """A set-associative LRU index: `naive.SetIndex` exactly, in 16 bytes a slot.

    Args:
        num_sets: sets, below 2**32; a row may be in one of them only.
        ways: slots in a set.
    """

    bytes_per_slot = 16

    def __init__(self, num_sets: int, ways: int) -> None:
        assert 1 <= num_sets <= MAX_SETS
        assert ways >= 1
        self.num_slots = num_sets * ways
        self.used_slots = 0
        self.key = np.full((num_sets, ways), ABSENT, np.int64)
        self.score = np.zeros((num_sets, ways), np.int64)

    def find(self, rows_U: np.ndarray) -> np.ndarray:
        slots_U = np.empty_like(rows_U)
        threads.run(probing.find, rows_U.size, self.key, rows_U, slots_U)
        return slots_U

    def probe(self, rows_U: np.ndarray, step: int) -> np.ndarray:
        slots_U = self.find(rows_U)
        threads.run(probing.touch, slots_U.size, slots_U, step, self.score.reshape(-1))
        return slots_U

    def admit(self, rows_M: np.ndarray, step: int, protect_step: int) -> Admission:
        assert protect_step >= 1, "an empty way has score 0 and is never protected"
        admission = Admission(*(np.empty_like(rows_M) for _ in range(3)))
        threads.run_whole(
            probing.admit,
            max(1, min(threads.get_num_threads(), rows_M.size // threads.GRAIN_ITEMS)),
            rows_M,
            step,
            min(protect_step, step),
            self.key,
            self.score,
            admission.slots_M,
            admission.victims_M,
            admission.victim_scores_M,
        )
        self.used_slots += _slots_filled(admission)
        return admission

    def undo(self, admission: Admission) -> None:
        given = admission.slots_M != ABSENT
        slots = admission.slots_M[given]
        self.key.reshape(-1)[slots] = admission.victims_M[given]
        self.score.reshape(-1)[slots] = admission.victim_scores_M[given]
        self.used_slots -= _slots_filled(admission)

    def forget(self, slots: np.ndarray) -> None:
        self.used_slots -= int(np.count_nonzero(self.rows_of(slots) != ABSENT))
        self.key.reshape(-1)[slots] = ABSENT
        self.score.reshape(-1)[slots] = 0

    def clear(self) -> None:
        self.used_slots = 0
        self.key.fill(ABSENT)
        self.score.fill(0)

    def rows_of(self, slots: np.ndarray) -> np.ndarray:
        return self.key.reshape(-1)[slots]

    def _check(self, step: int) -> None:
        used = self.key != ABSENT
        rows = self.key[used]
        assert np.unique(rows).size == rows.size, f"a row is in two slots:\n{self.key}"
        assert probing.count_misplaced(self.key) == 0, f"a row is in a stranger's set:\n{self.key}"
        assert rows.size == self.used_slots, f"{rows.size} slots are used, not {self.used_slots}"
        assert np.array_equal(used, self.score > 0), f"a used way without a score, or one with:\n{self.score}"
        assert self.score.max() <= step, f"a score from the future of step {step}:\n{self.score}"


class IdentityIndex:
    """An index with slot = row, for a table that fits the cache: `naive.IdentityIndex`, in 1 byte a slot."""

    bytes_per_slot = 1

    def __init__(self, num_rows: int) -> None:
        self.num_slots = num_rows
        self.used_slots = 0
        self.loaded = np.zeros(num_rows, np.bool_)

    def find(self, rows_U: np.ndarray) -> np.ndarray:
        return np.where(self.loaded[rows_U], rows_U, ABSENT)

    def probe(self, rows_U: np.ndarray, step: int) -> np.ndarray:
        return self.find(rows_U)

    def admit(self, rows_M: np.ndarray, step: int, protect_step: int) -> Admission:
        self.loaded[rows_M] = True
        self.used_slots += rows_M.size
        return Admission(rows_M.copy(), np.full_like(rows_M, ABSENT), np.zeros_like(rows_M))

    def undo(self, admission: Admission) -> None:
        self.forget(admission.slots_M)

    def forget(self, slots: np.ndarray) -> None:
        self.used_slots -= int(np.count_nonzero(self.loaded[slots]))
        self.loaded[slots] = False

    def clear(self) -> None:
        self.used_slots = 0
        self.loaded.fill(False)

    def rows_of(self, slots: np.ndarray) -> np.ndarray:
        return np.where(self.loaded[slots], slots, ABSENT)

    def _check(self, step: int) -> None:
        assert np.count_nonzero(self.loaded) == self.used_slots, f"not {self.used_slots} rows are loaded"


def _slots_filled(admission: Admission) -> int:
    """How many slots were empty before."""
    return int(np.count_nonzero((admission.slots_M != ABSENT) & (admission.victims_M == ABSENT)))


def make_index(
    num_rows: int, row_bytes: int, *, budget_bytes: int | None, capacity_rows: int | None, ways: int
) -> Index:
    """An index of as many slots as capacity or budget hold, an `IdentityIndex` where that is every row.

    Args:
        num_rows: V.
        row_bytes: what the cache itself takes for a slot; the index's bytes come on top.
        budget_bytes: bounds slots * (row_bytes + bytes_per_slot), except that there is always one slot.
        capacity_rows: bounds the slots; give this or `budget_bytes`.
        ways: slots of a set; a smaller capacity is one set of as many ways.
    """
    if capacity_rows is None:
        assert budget_bytes is not None
        fits = num_rows * (row_bytes + IdentityIndex.bytes_per_slot) <= budget_bytes
        capacity_rows = num_rows if fits else max(1, budget_bytes // (row_bytes + SetIndex.bytes_per_slot))
    if capacity_rows >= num_rows:
        return IdentityIndex(num_rows)
    return SetIndex(min(max(1, capacity_rows // ways), MAX_SETS), min(ways, capacity_rows))
