"""CacheStack: what stands between a table and its modules, from the rows read ahead up to the hot rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bigembed.cache.coming import ComingUses
from bigembed.cache.index import ABSENT
from bigembed.cache.located import Located
from bigembed.cache.row_cache import RowCache
from bigembed.cache.staging import PlanningSource, Staging
from bigembed.kernels.grouping import group_by_row

DEFAULT_PREFETCH_BYTES = 64 << 20
DEFAULT_DEVICE_BYTES = 1 << 30
CPU = torch.device("cpu")
UPDATE_GRAIN_ROWS = 256  # rows of an update that are worth a thread
Take = Callable[[RowCache, Located, np.ndarray], torch.Tensor]


@dataclass(frozen=True)
class CacheOptions:
    """What a user can choose about the caches of a table. A move to another device changes `device` alone.

    Args:
        host_bytes: memory on the host for hot rows and the journal's index, together.
        prefetch_bytes: memory for rows read ahead, beside it; taken only while there are such rows.
        policy: who stays in the host's cache, see cache/index.py.
        cache_rows: slots of the host's cache instead of bytes, for experiments.
        device: where rows are served.
        device_bytes: memory for hot rows there, where that is not the host; None is the default.
        device_rows: slots of a cache on the device instead of bytes, for experiments; it exists on the cpu too then.
    """

    host_bytes: int
    prefetch_bytes: int = DEFAULT_PREFETCH_BYTES
    policy: str = "lru"
    cache_rows: int | None = None
    device: torch.device = CPU
    device_bytes: int | None = None
    device_rows: int | None = None

    @property
    def has_device_tier(self) -> bool:
        return self.device.type != "cpu" or self.device_rows is not None

    @property
    def device_budget_bytes(self) -> int:
        return DEFAULT_DEVICE_BYTES if self.device_bytes is None else self.device_bytes


class CacheStack:
    """The caches of one table, made anew when its rows or their width change. A table's CacheLayer.

    Args:
        source: the table. index_bytes: what of the budget the journal's index may take.
    """

    _host_cache = RowCache

    def __init__(self, source: PlanningSource, options: CacheOptions, index_bytes: int) -> None:
        self.staging = Staging(source, options.prefetch_bytes)
        budget_bytes = max(1, options.host_bytes - index_bytes) if options.cache_rows is None else None
        self.rows = self._host_cache(
            self.staging, budget_bytes=budget_bytes, capacity_rows=options.cache_rows, policy=options.policy
        )
        # Where everything fits nobody leaves, so nobody asks what comes.
        chooses = options.policy == "next_use" and self.rows.num_slots < source.spec.num_rows
        self._coming = ComingUses(self.rows.index) if chooses else None

    # -- rows of a batch ------------------------------------------------------------------------------------

    def prefetch(self, rows_U: np.ndarray) -> None:
        """Start reading those of these distinct rows that are not in the cache; evicts nothing from it."""
        self._announce(rows_U)
        self._read_ahead(rows_U)

    def _announce(self, rows_U: np.ndarray) -> None:
        if self._coming is not None:
            self._coming.announce(rows_U, self.rows.step)

    def _read_ahead(self, rows_U: np.ndarray) -> None:
        missed = rows_U[self.rows.index.find(rows_U) == ABSENT]
        missed.sort()
        self.staging.prefetch(missed)

    def look_up(
        self, ids_N: Any, take: "Take | None" = None, *, keep: bool = True, **how: Any
    ) -> tuple[torch.Tensor, Any, Any]:
        """(the rows of checked ids as (N, D), where they are, each position's place among them).

        Where all rows were found in the cache the last two may be `Hits` and None: what is not known yet.

        Args:
            keep: whether the last two are kept, for a backward.
            take: what to make of the rows in place of (N, D): `take(rows, located, inverse_N)`; not on a device.
            how: as in `RowCache.fetch`.
        """
        if take is None and how["admit"] and how["count"]:
            found = self.rows.gather_hits(ids_N, keep)
            if found is not None:
                self.staging.tick()
                return *found, None
        rows_U, inverse_N = group_by_row(ids_N)
        located = self.rows.fetch(rows_U, **how)
        self.staging.tick()
        if self._coming is not None:
            self._coming.looked_up(rows_U)
        out = self.rows.gather(located, inverse_N) if take is None else take(self.rows, located, inverse_N)
        return out, located, inverse_N

    def fetch(self, rows_U: Any, **how: Any) -> Any:
        """`RowCache.fetch` where rows are served: what `update` needs."""
        return self.rows.fetch(rows_U, **how)

    def fetch_again(self, gradient: Any, **how: Any) -> Any:
        """`fetch` of a gradient's rows; without a search where no row has moved since its forward."""
        located = None if gradient.located is None else self.rows.located_again(gradient.located)
        return located if located is not None else self.fetch(gradient.rows_U, **how, count=False)

    def update(
        self, located: Any, kernel: Callable[..., Any], device_rule: Callable[..., torch.Tensor], *args: Any
    ) -> None:
        """Change rows by an optimizer's rule, which comes as a kernel for the host and in torch ops for a device."""
        assert isinstance(located, Located)
        self.rows.update(located, kernel, *args, count_grain=UPDATE_GRAIN_ROWS)

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
        """The host cache's."""
        return self.rows.stats()

    def device_stats(self) -> dict[str, Any]:
        """The device cache's, empty where there is none."""
        return {}

    def _check(self) -> None:
        """Assert every invariant."""
        self.staging._check()
        self.rows._check()
