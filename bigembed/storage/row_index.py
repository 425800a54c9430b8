"""RowIndex: row -> place of its newest record in the journal, in memory."""

import numpy as np

from bigembed import threads
from bigembed.kernels.row_map import map_find, map_put

NOWHERE = -1
SLOT_BYTES = 16
MAX_FILL = 0.75


def index_rows(limit_bytes: int) -> int:
    """How many rows an epoch may index so that two epochs, and a sorted copy of one, take at most `limit_bytes`.

    The map doubles, so a full one of 2**k slots is what counts: 2 * 16 * 2**k for the maps, 16 * 0.75 * 2**k sorted.
    """
    slot_bytes = 2 * SLOT_BYTES + 16 * MAX_FILL
    slots = max(2, int(limit_bytes // slot_bytes))
    return int(MAX_FILL * (1 << (slots.bit_length() - 1)))


class RowIndex:
    """A growing map from row to place; equals a dict of ints. 21 to 43 bytes per row.

    A place is (segment's sequence << 40) | byte offset, so places compare in the order they were written.
    """

    def __init__(self) -> None:
        self._allocate(1024)

    def _allocate(self, capacity: int) -> None:
        self._key_C = np.full(capacity, -1, np.int64)
        self._place_C = np.zeros(capacity, np.int64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def memory_bytes(self) -> int:
        return self._key_C.nbytes + self._place_C.nbytes

    def find(self, rows_M: np.ndarray) -> np.ndarray:
        """int64 places, NOWHERE for rows that are not in the index."""
        out_M = np.empty(len(rows_M), np.int64)
        if self._count == 0:
            out_M.fill(NOWHERE)
        else:
            threads.run(map_find, len(rows_M), rows_M, self._key_C, self._place_C, out_M)
        return out_M

    def put(self, rows_M: np.ndarray, places_M: np.ndarray) -> np.ndarray:
        """Set the places; returns the places before (NOWHERE for rows new to the index)."""
        needed = (self._count + len(rows_M)) / MAX_FILL
        if needed > len(self._key_C):
            rows, places = self.items()
            self._allocate(1 << int(np.ceil(np.log2(needed))))
            self._count = map_put(rows, places, self._key_C, self._place_C, np.empty(len(rows), np.int64))
        old_M = np.empty(len(rows_M), np.int64)
        self._count += map_put(rows_M, places_M, self._key_C, self._place_C, old_M)
        return old_M

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows, places), in no order."""
        used = self._key_C >= 0
        return self._key_C[used], self._place_C[used]

    def sorted_items(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows ascending, places)."""
        rows, places = self.items()
        order = np.argsort(rows)
        return rows[order], places[order]
