"""What every cache must do, run over RowCache, over DeviceCache, and over the two above each other."""

from types import SimpleNamespace

import numpy as np
import torch
from test_row_cache import ArraySource, D, K, Pair, SourceFailed, add, newest, play, random_delta, random_rows, snapshot

from bigembed.cache.device_cache import DeviceCache
from bigembed.cache.tiers import HostTier, Tiers

__all__ = ["ArraySource", "D", "K", "OnHost", "Pair", "SourceFailed", "add", "newest", "play", "random_delta"]
__all__ += ["random_rows", "snapshot", "tiers"]


def as_array(value):
    return value.cpu().numpy().copy() if isinstance(value, torch.Tensor) else value


class OnHost:
    """A device cache, alone or with a host cache below it, that takes and gives arrays as RowCache does."""

    def __init__(self, device_cache, layer=None):
        self.device_cache, self._layer = device_cache, layer or device_cache
        self.source = device_cache.source if layer is None else layer.host.source

    def __getattr__(self, name):
        return as_array(getattr(self.device_cache if name in ("step", "num_slots", "values_SE") else self._layer, name))

    @property
    def index(self):
        index = self.device_cache.index
        arrays = {name: as_array(getattr(index, name)) for name in ("loaded", "key", "score") if hasattr(index, name)}
        return SimpleNamespace(**arrays, bytes_per_slot=index.bytes_per_slot, num_slots=index.num_slots)

    @property
    def _dirty_S(self):  # noqa: N802
        return as_array(self.device_cache._dirty_S)

    def _tensor(self, array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device_cache.device)

    def stats(self):
        """What says who is where; bytes moved are no state."""
        moved = ("bytes_up", "bytes_down", "locked_bytes", "stalls")
        return {name: value for name, value in self._layer.stats().items() if name not in moved}

    def _check(self):
        self.device_cache._check()
        if self._layer is not self.device_cache:
            self._layer.host._check()

    def fetch(self, rows_U, **options):
        located = self.device_cache.fetch(self._tensor(rows_U), **options)
        rows_P = rows_U[as_array(located.past_P)]
        np.testing.assert_array_equal(rows_P, located.past_rows_P)
        slots_U = as_array(located.slots_U)
        assert located.rows_U.tolist() == list(rows_U)
        return SimpleNamespace(rows_U=rows_U, slots_U=slots_U, past_PE=located.past_PE.cpu(), on_device=located)

    def gather(self, located, inverse_N):
        return self.device_cache.gather(located.on_device, self._tensor(inverse_N)).cpu()

    def update(self, located, kernel, delta_UE):
        assert kernel is add
        self.device_cache.update(located.on_device, torch.add, self._tensor(delta_UE))


def tiers(source, device_rows, host_rows, device="cpu"):
    """Both caches above a source, as one."""
    host = HostTier(source, capacity_rows=host_rows)
    cache = DeviceCache(host, capacity_rows=device_rows, device=device)
    return OnHost(cache, Tiers(cache, host))
