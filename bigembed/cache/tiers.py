"""The caches of a table with a device: rows move device <-> host <-> table, and the newest value wins.

A row that is read is kept in both caches where there is room; a dirty row that must leave the device becomes a dirty
row of the host cache, and only from there it goes to the table.
"""

from typing import Any

import numpy as np

from bigembed.cache.device_cache import DeviceCache
from bigembed.cache.index import ABSENT
from bigembed.cache.located import Located
from bigembed.cache.row_cache import RowCache
from bigembed.kernels import rows as row_kernels


class HostTier(RowCache):
    """A RowCache that is itself the RowSource of a cache above it."""

    @property
    def spec(self) -> Any:
        return self.source.spec

    def fetch_rows(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """Fill values_ME with the newest values of these rows, as a lookup of them (they are admitted)."""
        self._copy(self.fetch(rows_M), values_ME)

    def peek_rows(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """As `fetch_rows`, and changes nothing here."""
        self._copy(self.fetch(rows_M, admit=False), values_ME)

    def _copy(self, located: Located, values_ME: np.ndarray) -> None:
        every = np.arange(located.rows_U.size)
        self.run_on(located, row_kernels.gather, every.size, every, values_ME)

    def append_rows(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """Keep changed rows (ascending, distinct): they replace what is here, and are dirty now.

        Rows that are not here are admitted without a read, after the dirty rows that make room for them have gone to
        the source; those without room go to the source at once.

        Raises:
            Whatever the source raises; none of the rows is taken then, and no other change is lost.
        """
        self._append_unsaved()
        self.step += 1
        self._moves += 1
        slots_M = self.index.probe(rows_M, self.step)
        missed = np.flatnonzero(slots_M == ABSENT)
        admission = self.index.admit(rows_M[missed], self.step, self.step)
        try:
            self._write_back_victims(admission)
            past = missed[admission.slots_M == ABSENT]
            if past.size:
                self.source.append_rows(rows_M[past], values_ME[past])
                self._write_backs += past.size
        except BaseException:
            self.index.undo(admission)  # the victims' values are still in their slots
            raise
        slots_M[missed] = admission.slots_M
        try:
            self._set_dirty(slots_M, True)
            self._put(slots_M, values_ME)
        except BaseException:
            # Half overwritten; the caller still has every row of them, and all victims are stored.
            given = admission.slots_M[admission.slots_M != ABSENT]
            self._set_dirty(given, False)
            self.index.forget(given)
            raise
        self._evictions += int(np.count_nonzero(admission.victims_M != ABSENT))


class Tiers:
    """A device cache above a host cache, as the one cache layer that a table knows (`storage.table.CacheLayer`)."""

    def __init__(self, device: DeviceCache, host: HostTier) -> None:
        assert device.source is host
        self.device, self.host = device, host

    @property
    def dirty_rows(self) -> int:
        """Rows with changes that the table does not have; one that is dirty in both caches counts twice."""
        return self.device.dirty_rows + self.host.dirty_rows

    def write_back(self) -> None:
        """Give every changed row to the table.

        Raises:
            Whatever the table raises; the rows it has not taken stay dirty.
        """
        self.device.write_back()
        self.host.write_back()

    def overlay(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """Replace stored values by the newest ones that are in a cache."""
        self.host.overlay(rows_M, values_ME)
        self.device.overlay(rows_M, values_ME)

    def refresh(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """Take over the values just stored for these distinct rows; their copies become clean."""
        self.host.refresh(rows_M, values_ME)
        self.device.refresh(rows_M, values_ME)

    def drop(self) -> None:
        """Forget every row, changed ones too."""
        self.device.drop()
        self.host.drop()

    def stats(self) -> dict[str, Any]:
        """The device cache's stats, with the dirty rows of both, and the host cache's under "host"."""
        return {**self.device.stats(), "dirty_rows": self.dirty_rows, "host": self.host.stats()}
