"""DeviceStack: the caches of a table whose rows are served on a device: a cache there, one on the host, the table."""

from typing import Any

import numpy as np
import torch

from bigembed.cache.device_cache import DeviceCache, DeviceLocated
from bigembed.cache.device_ops import group
from bigembed.cache.index import ABSENT
from bigembed.cache.stack import CacheOptions, CacheStack, Take
from bigembed.cache.staging import PlanningSource
from bigembed.cache.tiers import HostTier, Tiers


class DeviceStack(CacheStack):
    """As CacheStack, with the hottest rows on a device; ids, rows and slots are tensors there.

    `rows` is the host's cache, which takes what leaves the device and to which the policy applies; the device keeps
    what was used last.
    """

    rows: HostTier
    _host_cache = HostTier

    def __init__(self, source: PlanningSource, options: CacheOptions, index_bytes: int) -> None:
        super().__init__(source, options, index_bytes)
        budget_bytes = options.device_budget_bytes if options.device_rows is None else None
        self.hot = DeviceCache(
            self.rows, budget_bytes=budget_bytes, capacity_rows=options.device_rows, device=options.device
        )
        self._tiers = Tiers(self.hot, self.rows)

    def prefetch(self, rows_U: np.ndarray) -> None:
        """Start reading those of these distinct rows that are in no cache. Waits for the device, to ask it."""
        self._announce(rows_U)
        slots_U = self.hot.index.find(torch.from_numpy(rows_U).to(self.hot.device)).cpu().numpy()
        self._read_ahead(rows_U[slots_U == ABSENT])

    def look_up(
        self, ids_N: torch.Tensor, take: Take | None = None, *, keep: bool = True, **how: Any
    ) -> tuple[torch.Tensor, DeviceLocated, torch.Tensor]:
        """As `CacheStack.look_up`, on the device.

        Raises:
            RowOutOfRange: an id; nothing has changed.
        """
        assert take is None
        batch = group(ids_N, self.rows.spec.num_rows)
        located = self.hot.fetch(batch, **how)
        self.staging.tick()
        if self._coming is not None:
            self._coming.looked_up(located.rows_U.cpu().numpy())
        return self.hot.gather(located, batch.inverse_N), located, batch.inverse_N

    def fetch(self, rows_U: torch.Tensor, **how: Any) -> DeviceLocated:
        return self.hot.fetch(rows_U, **how)

    def fetch_again(self, gradient: Any, **how: Any) -> DeviceLocated:
        return self.fetch(gradient.rows_U, **how, count=False)

    def update(self, located: DeviceLocated, kernel: Any, device_rule: Any, *args: Any) -> None:
        self.hot.update(located, device_rule, *args)

    # -- a table's CacheLayer -------------------------------------------------------------------------------

    @property
    def dirty_rows(self) -> int:
        return self._tiers.dirty_rows

    def write_back(self) -> None:
        self._tiers.write_back()

    def overlay(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        self._tiers.overlay(rows_M, values_ME)

    def refresh(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        super().refresh(rows_M, values_ME)
        self.hot.refresh(rows_M, values_ME)

    def drop(self) -> None:
        super().drop()
        self.hot.drop()

    def device_stats(self) -> dict[str, Any]:
        return self.hot.stats()

    def _check(self) -> None:
        """Assert every invariant."""
        super()._check()
        self.hot._check()


def make_stack(source: PlanningSource, options: CacheOptions, index_bytes: int) -> CacheStack:
    """The caches that these options ask for."""
    kind = DeviceStack if options.has_device_tier else CacheStack
    return kind(source, options, index_bytes)
