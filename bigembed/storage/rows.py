"""Checks at the border: rows that a user passes, before anything below trusts them."""

from typing import Any

import numpy as np

from bigembed.errors import InvalidArgument, InvalidIds, RowOutOfRange
from bigembed.kernels.matching import first_outside


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
    if rows_N.dtype == np.int64:
        position = first_outside(rows_N, num_rows)
    else:  # a kernel would be compiled for every type of integer
        position = next(iter(np.flatnonzero((rows_N < 0) | (rows_N >= num_rows))), -1)
    if position >= 0:
        raise RowOutOfRange(
            f"ids contain {rows_N[position]} (at position {position}), but this table has {num_rows} rows (valid ids "
            f"are 0 to {num_rows - 1}). Map unknown ids to a row of your own before the lookup, or grow the table."
        )


def checked_out(out: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """An array for results: the given one, or a new one.

    Raises:
        InvalidArgument: it is not float32, C-contiguous and writeable, of this shape.
    """
    if out is None:
        return np.empty(shape, np.float32)
    fits = isinstance(out, np.ndarray) and out.dtype == np.float32 and out.shape == shape
    if not fits or not out.flags.c_contiguous or not out.flags.writeable:
        given = f"{out.dtype} of shape {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise InvalidArgument(f"out is {given}; a C-contiguous, writeable float32 array of shape {shape} is needed.")
    return out


def last_of_each(rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct rows ascending, the last position of each)."""
    rows_M, first_M = np.unique(rows_N[::-1], return_index=True)
    return rows_M, len(rows_N) - 1 - first_M
