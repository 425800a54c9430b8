"""ReadAhead: a read of rows that is planned at one moment and carried out in any thread, without the table's lock.

The plan is made under the lock: where each row's newest record is, and descriptors of its own for the files. From then
on the table may append, commit and merge as it likes. A row that is appended meanwhile is the caller's to forget; for
every other row the planned place keeps its bytes (a merge writes only rows that the journal has), so what arrives is
what the table would give. Nothing is raised: a row that cannot be had, for whatever reason, is said not to be sound,
and the table's own read of it later says why.
"""

from typing import TYPE_CHECKING

import numpy as np

from bigembed.kernels.records import unseal_sound
from bigembed.storage.places import read_places, sequences_of
from bigembed.storage.readers import ColdReader
from bigembed.storage.row_index import NOWHERE

if TYPE_CHECKING:
    from bigembed.storage.store import RecordStore

RECENT_BYTES = 64 << 20  # of a segment: what was evicted last may be asked for again at once
SLICE_BYTES = 8 << 20  # of records under way; with the advice window far shorter, long enough to keep the disk busy


class ReadAhead:
    """A planned read of some rows of a store, to be run once, or closed.

    Args:
        store: the table's records; the caller holds the table's lock until the constructor returns.
        rows_M: int64, ascending, distinct.
    """

    def __init__(self, store: "RecordStore", rows_M: np.ndarray) -> None:
        self._rows_M = rows_M
        self._spec, self._keys_W, self._initial = store.spec, store.keys_W, store.initial
        self._places_M = store.journal.find(rows_M)
        self._chunks = store.base.chunks.again()
        in_journal_M = self._places_M[self._places_M != NOWHERE]
        newest = store.journal.active.sequences[-1:]
        self._segments = store.journal.segments_again({*sequences_of(in_journal_M), *newest})
        self._behind = store.journal.behind.tasks
        self._is_larger_than_memory = store.base.is_larger_than_memory
        self.is_cancelled = False

    def run(self, out_ME: np.ndarray) -> np.ndarray:
        """Write the rows' values into out_ME; returns bool (M,): which of them are there and sound."""
        sound_M = np.zeros(len(self._rows_M), np.bool_)
        step = max(1, SLICE_BYTES // self._spec.record_bytes)
        scratch_MW = np.empty((min(step, len(self._rows_M)), self._spec.record_words), np.uint32)
        try:
            for task in self._behind:  # rows that are on their way to the journal
                task.wait()
            for start in range(0, len(self._rows_M), step):
                if self.is_cancelled:
                    break
                part = slice(start, start + step)
                self._read(part, scratch_MW[: len(self._rows_M[part])], out_ME[part], sound_M[part])
            if self._is_larger_than_memory:
                self._give_pages_back()
        except OSError:  # the rows that are still missing are read again, and then it is raised
            pass
        finally:
            self.close()
        return sound_M

    def _read(self, part: slice, records_MW: np.ndarray, out_ME: np.ndarray, sound_M: np.ndarray) -> None:
        rows_M, places_M = self._rows_M[part], self._places_M[part]
        in_journal = np.flatnonzero(places_M != NOWHERE)
        in_base = np.flatnonzero(places_M == NOWHERE)
        if not len(in_journal):
            self._read_base(rows_M, records_MW)
        else:
            records_MW[in_journal] = read_places(self._segments, places_M[in_journal], self._spec.record_words)
            base_MW = np.empty((len(in_base), self._spec.record_words), np.uint32)
            self._read_base(rows_M[in_base], base_MW)
            records_MW[in_base] = base_MW
        unseal_sound(rows_M, records_MW, self._keys_W, self._initial, out_ME, sound_M)
        sound_M[in_journal] &= records_MW[in_journal, -1] != 0  # none is appended unwritten: that is a lost page

    def _read_base(self, rows_M: np.ndarray, records_MW: np.ndarray) -> None:
        chunk_M, offset_M = self._spec.locate(rows_M)
        ColdReader(self._chunks).read(chunk_M, offset_M, records_MW)

    def _give_pages_back(self) -> None:
        """Pages of a base that memory cannot hold are not worth keeping, nor those of the journal but for its end.

        Where a control group's memory is full, whoever allocates must reclaim first. With the pages of 15,000 rows a
        step left behind a dense model took 1.6 times as long, with them given back about as long as alone
        (benchmarks/README.md).
        """
        self._chunks.forget_pages()
        for file in self._segments.values():
            file.forget_pages(keep_bytes=RECENT_BYTES)

    def cancel(self) -> None:
        """Let a run in another thread end soon; what it returns then is of no use."""
        self.is_cancelled = True

    def close(self) -> None:
        """Give the descriptors back. Only for the thread that runs it, or where none ever will."""
        self._chunks.close()
        for file in self._segments.values():
            file.close()
