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
        self._map = _empty_map(1024)

    @property
    def _keys(self) -> np.ndarray:
        return self._map[0]

    @property
    def _places(self) -> np.ndarray:
        return self._map[1]

    def __len__(self) -> int:
        return int(self._map[2][0])

    @property
    def memory_bytes(self) -> int:
        return self._keys.nbytes + self._places.nbytes

    def find(self, rows_M: np.ndarray) -> np.ndarray:
        """int64 places, NOWHERE for rows that are not in the index."""
        out_M = np.empty(len(rows_M), np.int64)
        if len(self) == 0:
            out_M.fill(NOWHERE)
        else:
            threads.run(map_find, len(rows_M), rows_M, self._keys, self._places, out_M)
        return out_M

    def put(self, rows_M: np.ndarray, places_M: np.ndarray) -> np.ndarray:
        """Set the places; returns the places before (NOWHERE for rows new to the index)."""
        needed = (len(self) + len(rows_M)) / MAX_FILL
        if needed > len(self._keys):
            self._map = self._grown(1 << int(np.ceil(np.log2(needed))))
        old_M = np.empty(len(rows_M), np.int64)
        map_put(rows_M, places_M, *self._map, old_M)
        return old_M

    def _grown(self, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same map with more room, made aside."""
        rows, places = self.items()
        grown = _empty_map(capacity)
        map_put(rows, places, *grown, np.empty(len(rows), np.int64))
        return grown

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows, places), in no order."""
        used = self._keys >= 0
        return self._keys[used], self._places[used]

    def sorted_items(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows ascending, places)."""
        rows, places = self.items()
        order = np.argsort(rows)
        return rows[order], places[order]


def _empty_map(capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(key_C, place_C, count_1). The count is the kernel's, as a Ctrl-C may come between a kernel and its caller."""
    return np.full(capacity, -1, np.int64), np.zeros(capacity, np.int64), np.zeros(1, np.int64)
