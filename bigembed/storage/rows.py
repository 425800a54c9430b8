"""Checks at the border: rows that a user passes, before anything below trusts them."""

from typing import Any

import numpy as np

from bigembed.errors import InvalidIds, RowOutOfRange


def checked_rows(rows: Any, num_rows: int) -> np.ndarray:
    """The rows as int64 (N,), each 0 <= row < num_rows.

    Raises:
        InvalidIds: not integers. RowOutOfRange: names the value, its position and the valid range.
    """
    given = np.asarray(rows)
    if given.size == 0 and given.dtype.kind == "f" and not isinstance(rows, np.ndarray):
        given = given.astype(np.int64)  # an empty list has no dtype of its own
    if given.dtype.kind not in "iu":
        raise InvalidIds(f"rows have dtype {given.dtype}; integers are needed (int32 or int64).")
    flat = np.ascontiguousarray(given.reshape(-1))
    check_range(flat, num_rows)
    return flat.astype(np.int64, copy=False)


def check_range(rows_N: np.ndarray, num_rows: int) -> None:
    """Raises RowOutOfRange for the first row that is negative or not below num_rows."""
    if rows_N.size and (rows_N.min() < 0 or rows_N.max() >= num_rows):
        position = int(np.flatnonzero((rows_N < 0) | (rows_N >= num_rows))[0])
        raise RowOutOfRange(
            f"ids contain {rows_N[position]} (at position {position}), but this table has {num_rows} rows (valid ids "
            f"are 0 to {num_rows - 1}). Map unknown ids to a row of your own before the lookup, or grow the table."
        )


def last_of_each(rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct rows ascending, the last position of each)."""
    rows_M, first_M = np.unique(rows_N[::-1], return_index=True)
    return rows_M, len(rows_N) - 1 - first_M
