"""CacheStack: what stands between a table and its modules, from the rows read ahead up to the hot rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bigembed.cache.coming import ComingUses
from bigembed.cache.index import ABSENT
from bigembed.cache.row_cache import RowCache
from bigembed.cache.staging import PlanningSource, Staging

DEFAULT_PREFETCH_BYTES = 64 << 20


@dataclass(frozen=True)
class CacheOptions:
    """What a user can choose about the caches of a table.

    Args:
        cache_bytes: memory for hot rows and the journal's index, together.
        prefetch_bytes: memory for rows read ahead, beside it; taken only while there are such rows.
        policy: who stays in the cache, see cache/index.py.
        cache_rows: slots of the cache instead of bytes, for experiments.
    """

    cache_bytes: int
    prefetch_bytes: int = DEFAULT_PREFETCH_BYTES
    policy: str = "lru"
    cache_rows: int | None = None


class CacheStack:
    """The caches of one table, made anew when its rows or their width change. A table's CacheLayer.

    Args:
        source: the table. index_bytes: what of the budget the journal's index may take.
    """

    def __init__(self, source: PlanningSource, options: CacheOptions, index_bytes: int) -> None:
        self.staging = Staging(source, options.prefetch_bytes)
        budget_bytes = max(1, options.cache_bytes - index_bytes) if options.cache_rows is None else None
        self.rows = RowCache(
            self.staging, budget_bytes=budget_bytes, capacity_rows=options.cache_rows, policy=options.policy
        )

        self._coming = ComingUses(self.rows.index) if options.policy == "next_use" else None

    def prefetch(self, rows_U: np.ndarray) -> None:
        """Start reading those of these distinct rows that are not in the cache; evicts nothing from it."""
        if self._coming is not None:
            self._coming.announce(rows_U, self.rows.step)
        missed = rows_U[self.rows.index.find(rows_U) == ABSENT]
        missed.sort()
        self.staging.prefetch(missed)

    def looked_up(self, rows_U: np.ndarray) -> None:
        """A forward has fetched these distinct rows."""
        self.staging.tick()
        if self._coming is not None:
            self._coming.looked_up(rows_U)

    # -- a table's CacheLayer -------------------------------------------------------------------------------

    @property
    def dirty_rows(self) -> int:
        return self.rows.dirty_rows

    def write_back(self) -> None:
        self.rows.write_back()

    def overlay(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        self.rows.overlay(rows_M, values_ME)

    def refresh(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        self.staging.forget(rows_M)
        self.rows.refresh(rows_M, values_ME)

    def drop(self) -> None:
        self.staging.drop()
        self.rows.drop()
        if self._coming is not None:
            self._coming.forget()

    def stats(self) -> dict[str, Any]:
        return self.rows.stats()
