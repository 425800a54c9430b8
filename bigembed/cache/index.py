"""Which slot of the cache holds which row: policy only, it never touches the bytes of a row.

Two indexes, one contract (`Index`). `SetIndex`, for a table larger than its cache, is set-associative and
evicts from a set the row that its policy names, by default the least recently used one. `IdentityIndex`, for a
table that fits, has slot = row and never evicts. Steps are the cache's clock, from 1 on. The caller guards an
index against concurrent use.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from bigembed import threads
from bigembed.errors import InvalidArgument
from bigembed.kernels import matching, policies, probing
from bigembed.kernels.probing import ABSENT

POLICIES = ("lru", "lfu", "sieve", "s3fifo", "next_use")  # by the numbers they have in `kernels.policies`
LRU = POLICIES.index("lru")
MAX_SETS = (1 << 32) - 1  # what `bucket` can spread rows over


@dataclass(frozen=True, slots=True)
class Admission:
    """What `admit` did, row by row: enough to undo it.

    slots_M: int64, where the row is now, ABSENT for a row without room.
    victims_M: int64, the row that was there before, ABSENT for none.
    victim_scores_M: int64, the victim's score.
    victim_marks_M: int64, what the policy knew of the victim; empty for "lru", which knows the score alone.
    """

    slots_M: np.ndarray
    victims_M: np.ndarray
    victim_scores_M: np.ndarray
    victim_marks_M: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


class Index(Protocol):
    """What the cache asks of an index. Rows and slots are int64 arrays, each without duplicates.

    num_slots: S. used_slots: how many hold a row. bytes_per_slot: the index's own memory, divided by S.
    """

    num_slots: int
    used_slots: int
    bytes_per_slot: int

    def find(self, rows_U: np.ndarray) -> np.ndarray:
        """The slot of each row, ABSENT where it is not in the cache. Changes nothing."""

    def probe(self, rows_U: np.ndarray, step: int, *, count: bool = True) -> np.ndarray:
        """As `find`, and marks the rows found as used at `step`.

        Args:
            count: False only protects them: a second visit on behalf of the same use, which no policy but LRU
                should take for another one.
        """

    def probe_hits(self, ids_N: np.ndarray, step: int) -> tuple[np.ndarray, int] | None:
        """`probe` of rows that may repeat, where all of them are in the cache: their slots, and how many hits to count.

        None where one is not, or where the policy must see each row once; nothing has changed then. The slots may be
        the array given.
        """

    def admit(self, rows_M: np.ndarray, step: int, protect_step: int) -> Admission:
        """Give slots to rows that `probe` missed at this step; evict none used since `protect_step`.

        Empty ways go first. The rest is the policy's, row by row in the order given.
        """

    def expect(self, rows_U: np.ndarray, next_step_U: np.ndarray) -> None:
        """Tell the policy at which step these rows will be used next, 0 for unknown; a hint for "next_use" alone.

        It holds for rows that are in the cache now, so call it for a batch after its `probe` and `admit`. A step
        that has come is unknown again.
        """

    def undo(self, admission: Admission) -> None:
        """Restore what the latest `admit` changed: who is where, its score, what the policy knew of it.

        What the policy remembers of the pass itself stays (the hand, which goes back to the oldest row; the
        queues' order; the ghost; the clock of ageing).
        """

    def forget(self, slots: np.ndarray) -> None:
        """Empty these slots."""

    def clear(self) -> None:
        """Empty every slot."""

    def rows_of(self, slots: np.ndarray) -> np.ndarray:
        """The row in each slot, ABSENT where it is empty."""

    def _check(self, step: int) -> None:
        """Assert every invariant; `step` is the latest one."""


class SetIndex:
    """A set-associative index: `naive.SetIndex` exactly, for "lru" in 16 bytes a slot.

    Args:
        num_sets: sets, below 2**32; a row may be in one of them only.
        ways: slots in a set.
        policy: one of POLICIES; `kernels/policies.py` says what each but "lru" keeps in mark and ghost.
    """

    def __init__(self, num_sets: int, ways: int, policy: str = "lru") -> None:
        assert 1 <= num_sets <= MAX_SETS
        assert ways >= 1
        self.num_slots = num_sets * ways
        self.used_slots = 0
        self.bytes_per_slot = bytes_per_slot(policy)
        self.policy = POLICIES.index(policy)
        self.offered_rows = 0  # to `admit`, ever: the clock by which counts age
        self.key = np.full((num_sets, ways), ABSENT, np.int64)
        self.score = np.zeros((num_sets, ways), np.int64)
        self.mark = np.zeros((num_sets, ways if self.policy != LRU else 0), np.int64)
        self.ghost = np.empty((num_sets, ways if self.policy == policies.S3FIFO else 0), np.int64)
        self._empty_ghost()

    @property
    def epoch(self) -> int:
        """LFU's: how many times as many rows have missed as there are slots."""
        return self.offered_rows // self.num_slots

    def find(self, rows_U: np.ndarray) -> np.ndarray:
        slots_U = np.empty_like(rows_U)
        threads.run(probing.find, rows_U.size, self.key, rows_U, slots_U)
        return slots_U

    def probe(self, rows_U: np.ndarray, step: int, *, count: bool = True) -> np.ndarray:
        slots_U = self.find(rows_U)
        threads.run(probing.touch, slots_U.size, slots_U, step, self.score.reshape(-1), grain=threads.LIGHT_GRAIN)
        if count and self.policy in (policies.LFU, policies.SIEVE, policies.S3FIFO):
            threads.run(policies.use, slots_U.size, self.policy, self.epoch, slots_U, self.mark.reshape(-1))
        return slots_U

    def probe_hits(self, ids_N: np.ndarray, step: int) -> tuple[np.ndarray, int] | None:
        if self.policy != LRU:
            return None
        slots_N = self.find(ids_N)
        if matching.has(slots_N, ABSENT):
            return None
        return slots_N, int(probing.touch_again(slots_N, step, self.score.reshape(-1)))

    def admit(self, rows_M: np.ndarray, step: int, protect_step: int) -> Admission:
        assert protect_step >= 1, "an empty way has score 0 and is never protected"
        owners = max(1, min(threads.get_num_threads(), rows_M.size // threads.GRAIN_ITEMS))
        given = (rows_M, step, min(protect_step, step), self.key, self.score)
        if self.policy == LRU:
            admission = Admission(*(np.empty_like(rows_M) for _ in range(3)))
            threads.run_whole(probing.admit, owners, *given, *_outputs(admission)[:3])
        else:
            admission = Admission(*(np.empty_like(rows_M) for _ in range(4)))
            own = (self.policy, self.epoch, self.mark, self.ghost)
            threads.run_whole(policies.admit, owners, *given, *own, *_outputs(admission))
        self.offered_rows += rows_M.size
        self.used_slots += _slots_filled(admission)
        return admission

    def expect(self, rows_U: np.ndarray, next_step_U: np.ndarray) -> None:
        if self.policy == policies.NEXT_USE:
            slots_U = self.find(rows_U)
            found = slots_U != ABSENT
            self.mark.reshape(-1)[slots_U[found]] = next_step_U[found]

    def undo(self, admission: Admission) -> None:
        given = admission.slots_M != ABSENT
        slots = admission.slots_M[given]
        self.key.reshape(-1)[slots] = admission.victims_M[given]
        self.score.reshape(-1)[slots] = admission.victim_scores_M[given]
        if self.policy != LRU:
            self.mark.reshape(-1)[slots] = admission.victim_marks_M[given]
        if self.policy == policies.SIEVE:
            self.mark[slots // self.key.shape[1]] &= ~policies.BEHIND
        self.used_slots -= _slots_filled(admission)

    def forget(self, slots: np.ndarray) -> None:
        self.used_slots -= int(np.count_nonzero(self.rows_of(slots) != ABSENT))
        self.key.reshape(-1)[slots] = ABSENT
        self.score.reshape(-1)[slots] = 0
        if self.policy != LRU:
            self.mark.reshape(-1)[slots] = 0

    def clear(self) -> None:
        self.used_slots = 0
        self.key.fill(ABSENT)
        self.score.fill(0)
        self.mark.fill(0)
        self._empty_ghost()

    def _empty_ghost(self) -> None:
        self.ghost.fill(ABSENT)
        self.ghost[:, :1] = 0

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
        self._check_marks(used)

    def _check_marks(self, used: np.ndarray) -> None:
        if self.policy != LRU:
            assert (self.mark >= 0).all(), f"a negative mark:\n{self.mark}"
            assert (self.mark[~used] == 0).all(), f"an empty way with a mark:\n{self.mark}"
        if self.policy == policies.LFU:
            assert (self.mark >> policies.EPOCH_SHIFT).max() <= self.epoch, f"an epoch to come:\n{self.mark}"
        if self.policy in (policies.SIEVE, policies.S3FIFO):
            shift = policies.SIEVE_SHIFT if self.policy == policies.SIEVE else policies.S3FIFO_SHIFT
            for mark in self.mark:
                order = mark[mark > 0] >> shift
                assert np.unique(order).size == order.size, f"two rows of a set at one place: {mark}"
                assert (order > 0).all(), f"a used way without a place: {mark}"
        if self.policy == policies.SIEVE:
            ahead = np.where(used & (self.mark & policies.BEHIND == 0), self.mark, np.iinfo(np.int64).max)
            behind = np.where(self.mark & policies.BEHIND > 0, self.mark, 0)
            assert (behind.max(1) < ahead.min(1)).all(), f"a row behind the hand is newer than one ahead:\n{self.mark}"


class IdentityIndex:
    """An index with slot = row, for a table that fits the cache: `naive.IdentityIndex`, in 1 byte a slot."""

    bytes_per_slot = 1

    def __init__(self, num_rows: int) -> None:
        self.num_slots = num_rows
        self.used_slots = 0
        self.loaded = np.zeros(num_rows, np.bool_)

    def find(self, rows_U: np.ndarray) -> np.ndarray:
        slots_U = np.empty_like(rows_U)
        threads.run(probing.find_loaded, rows_U.size, self.loaded, rows_U, slots_U, grain=threads.LIGHT_GRAIN)
        return slots_U

    def probe(self, rows_U: np.ndarray, step: int, *, count: bool = True) -> np.ndarray:
        return self.find(rows_U)

    def probe_hits(self, ids_N: np.ndarray, step: int) -> tuple[np.ndarray, int] | None:
        if self.used_slots < self.num_slots and matching.has(self.find(ids_N), ABSENT):
            return None
        return ids_N, ids_N.size  # nobody evicts, so nobody asks which are distinct

    def admit(self, rows_M: np.ndarray, step: int, protect_step: int) -> Admission:
        self.loaded[rows_M] = True
        self.used_slots += rows_M.size
        return Admission(rows_M.copy(), np.full_like(rows_M, ABSENT), np.zeros_like(rows_M))

    def expect(self, rows_U: np.ndarray, next_step_U: np.ndarray) -> None:
        pass

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


def _outputs(admission: Admission) -> tuple[np.ndarray, ...]:
    return admission.slots_M, admission.victims_M, admission.victim_scores_M, admission.victim_marks_M


def _slots_filled(admission: Admission) -> int:
    """How many slots were empty before."""
    return int(np.count_nonzero((admission.slots_M != ABSENT) & (admission.victims_M == ABSENT)))


def bytes_per_slot(policy: str) -> int:
    """What a `SetIndex` takes for a slot: key and score, for all but "lru" a mark, for "s3fifo" a ghost.

    Raises:
        InvalidArgument: no such policy.
    """
    if policy not in POLICIES:
        raise InvalidArgument(f"policy {policy!r} is not known. Choose one of {', '.join(map(repr, POLICIES))}.")
    return {"lru": 16, "s3fifo": 32}.get(policy, 24)


def make_index(
    num_rows: int,
    row_bytes: int,
    *,
    budget_bytes: int | None,
    capacity_rows: int | None,
    ways: int,
    policy: str = "lru",
) -> Index:
    """An index of as many slots as capacity or budget hold, an `IdentityIndex` where that is every row.

    Args:
        num_rows: V.
        row_bytes: what the cache itself takes for a slot; the index's bytes come on top.
        budget_bytes: bounds slots * (row_bytes + bytes_per_slot), except that there is always one slot.
        capacity_rows: bounds the slots; give this or `budget_bytes`.
        ways: slots of a set; a smaller capacity is one set of as many ways.
        policy: one of POLICIES.

    Raises:
        InvalidArgument: no such policy.
    """
    slot_bytes = row_bytes + bytes_per_slot(policy)
    if capacity_rows is None:
        assert budget_bytes is not None
        fits = num_rows * (row_bytes + IdentityIndex.bytes_per_slot) <= budget_bytes
        capacity_rows = num_rows if fits else max(1, budget_bytes // slot_bytes)
    if capacity_rows >= num_rows:
        return IdentityIndex(num_rows)
    return SetIndex(min(max(1, capacity_rows // ways), MAX_SETS), min(ways, capacity_rows), policy)
