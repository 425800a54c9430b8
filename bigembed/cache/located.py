"""What a cache and those around it say to each other: where rows come from, where a batch's rows are, who must stay."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from bigembed.kernels.grouping import group_by_row, take_first
from bigembed.kernels.matching import replaced_by_last
from bigembed.spec import TableSpec


class RowSource(Protocol):
    """Where rows come from and go to: the table's base and journal."""

    @property
    def spec(self) -> TableSpec: ...

    def fetch_rows(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """Fill values_ME (float32) with the newest stored values of these rows (int64, ascending, distinct)."""

    def append_rows(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """Store changed rows (ascending, distinct), all or none of them; the arrays belong to the source afterwards."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where the rows of a batch are, until the cache's next fetch, refresh or drop.

    rows_U: int64, the rows.
    slots_U: int64, the slot of each; S + p means row p of past_PE.
    past_PE: float32, the rows served past the cache, in ascending order of row.
    step: the clock at this fetch.
    moves: how often rows had changed their slots then.
    """

    rows_U: np.ndarray
    slots_U: np.ndarray
    past_PE: torch.Tensor
    step: int
    moves: int

    def for_later(self) -> "Located":
        """What a graph may hold until its backward: without the values past the cache, which are memory."""
        return self if not len(self.past_PE) else replace(self, past_PE=self.past_PE[:0].clone(), moves=-1)

    def without(self, place: int, rows_U: np.ndarray) -> "Located":
        """Without the row at `place`, where the last one is now; rows_U is what is left."""
        return replace(self, rows_U=rows_U, slots_U=replaced_by_last(self.slots_U, place))


@dataclass(frozen=True, slots=True)
class Hits:
    """A batch whose rows were all in the cache. Which of them are distinct is found out when somebody asks.

    ids_N, slots_N: int64, the row and the slot of each position.
    nothing_past: float32 (0, E). step, moves: as in Located.
    """

    ids_N: np.ndarray
    slots_N: np.ndarray
    nothing_past: torch.Tensor
    step: int
    moves: int

    def grouped(self) -> tuple[Located, np.ndarray]:
        """(where the distinct rows are, each position's place among them)."""
        rows_U, inverse_N = group_by_row(self.ids_N)
        slots_U = rows_U
        if self.slots_N is not self.ids_N:
            slots_U = np.empty_like(rows_U)
            take_first(inverse_N, self.slots_N, slots_U)
        return Located(rows_U, slots_U, self.nothing_past, self.step, self.moves), inverse_N


Protect = int | Callable[[], int | None] | None


def oldest_protected(protect_step: Protect, step: int) -> int:
    """The step that `protect_step` means in a fetch at `step`."""
    oldest = protect_step() if callable(protect_step) else protect_step
    return step if oldest is None else oldest
