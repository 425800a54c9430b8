"""ComingUses: which lookups have been announced, so that the policy "next_use" keeps what they will need.

Belady's rule within the window that `prefetch` opens: a row's next use is the first announced batch that names it.
Costs a sort and a few matches of the batch, so it is asked for by name.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from bigembed.cache.index import ABSENT, Index
from bigembed.kernels.matching import match

APART_STEPS = 1 << 10  # announced batches are set so many steps apart: one that is not looked up by then never will be


@dataclass(frozen=True, slots=True, eq=False)
class _Announced:
    """A batch to come: its rows, ascending, and the step by which the index orders it among the others."""

    rows_M: np.ndarray
    step: int


class ComingUses:
    """Keeps an index's marks of next use: `naive.next_uses` of the announced batches.

    Args:
        index: the cache's.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._announced: deque[_Announced] = deque()

    def announce(self, rows_U: np.ndarray, now_step: int) -> None:
        """These distinct rows will be looked up, after all that was announced before."""
        while self._announced and self._announced[0].step <= now_step:
            self._announced.popleft()
        last_step = self._announced[-1].step if self._announced else now_step
        batch = _Announced(np.sort(rows_U), last_step + APART_STEPS)
        self._announced.append(batch)
        next_M = self._next_steps(batch.rows_M)
        first = next_M == batch.step  # the others have an earlier use
        self._index.expect(batch.rows_M[first], next_M[first])

    def looked_up(self, rows_U: np.ndarray) -> None:
        """These distinct rows were just looked up: if that was announced, the announcement is fulfilled."""
        if not self._announced:
            return
        rows_M = np.sort(rows_U)
        for batch in self._announced:
            if np.array_equal(batch.rows_M, rows_M):
                self._announced.remove(batch)
                break
        self._index.expect(rows_M, self._next_steps(rows_M))

    def _next_steps(self, rows_M: np.ndarray) -> np.ndarray:
        """The step of the first announced batch that names each row, 0 for none."""
        next_M = np.zeros(rows_M.size, np.int64)
        for batch in reversed(self._announced):
            at_M = np.empty_like(rows_M)
            if match(rows_M, batch.rows_M, np.ones(batch.rows_M.size, np.bool_), at_M):
                next_M[at_M != ABSENT] = batch.step
        return next_M

    def forget(self) -> None:
        """Nothing is announced any more."""
        self._announced.clear()
