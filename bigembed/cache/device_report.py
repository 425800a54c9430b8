"""The one report that a fetch waits for: how many rows a batch has, which of them missed, and a bad id if any."""

import numpy as np
import torch

from bigembed.cache.device_ops import ABSENT, Batch, compact
from bigembed.cache.transfer import Transfer
from bigembed.errors import RowOutOfRange

FIRST_REPORT_ROWS = 1024  # missed rows that the first report has room for


class MissReport:
    """Asks the device, with one copy down; with two where more rows miss than there was room for.

    Args:
        transfer: brings the report down. num_rows: V.
    """

    def __init__(self, transfer: Transfer, num_rows: int) -> None:
        self._transfer, self._num_rows = transfer, num_rows
        self._room_rows = FIRST_REPORT_ROWS

    def read(self, batch: Batch, slots_N: torch.Tensor) -> tuple[int, torch.Tensor, np.ndarray]:
        """(U, where in rows_N the missed rows are, the missed rows ascending on the host). Waits for the device.

        Args:
            slots_N: the slot of each of the batch's rows_N, ABSENT for a missed one.

        Raises:
            RowOutOfRange: an id of the batch.
        """
        count = slots_N.numel()
        is_missed_N = (slots_N == ABSENT) & (torch.arange(count, device=slots_N.device) < batch.num_unique)
        missed_N = compact(is_missed_N)
        facts = torch.stack([batch.num_unique, is_missed_N.sum(), batch.bad_position, batch.bad_id])
        rows_N = batch.rows_N[missed_N]
        report = self._transfer.download(torch.cat([facts, rows_N[: self._room_rows]])).wait()
        num_unique, num_missed, bad_position, bad_id = (int(fact) for fact in report[:4])
        if bad_position < count:
            raise _out_of_range(bad_id, bad_position, self._num_rows)
        if num_missed > self._room_rows:
            rows_M = self._transfer.download(rows_N[:num_missed]).wait()
        else:
            rows_M = report[4 : 4 + num_missed]
        self._room_rows = max(FIRST_REPORT_ROWS, 2 * num_missed)  # the next batch will be much like this one
        return num_unique, missed_N[:num_missed], np.sort(rows_M)


def _out_of_range(row: int, position: int, num_rows: int) -> RowOutOfRange:
    """The error of `storage.rows.check_range`, for an id that was found on the device."""
    return RowOutOfRange(
        f"ids contain {row} (at position {position}), but this table has {num_rows} rows (valid ids "
        f"are 0 to {num_rows - 1}). Map unknown ids to a row of your own before the lookup, or grow the table."
    )
