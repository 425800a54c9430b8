"""Checks at the border: the ids that a user passes to a module."""

import numpy as np
import torch

from bigembed.errors import InvalidIds
from bigembed.storage.rows import check_range


class IdsNotTensor(InvalidIds, TypeError):
    """Ids are a list or an array (torch raises TypeError for this too)."""


def checked_ids(ids: torch.Tensor, num_rows: int) -> np.ndarray:
    """The ids flattened: int64 (N,), each 0 <= id < num_rows.

    Raises:
        IdsNotTensor, InvalidIds: no tensor; not int32 or int64.
        RowOutOfRange: names the id, its position and the valid range.
    """
    if not isinstance(ids, torch.Tensor):
        raise IdsNotTensor(f"ids must be a tensor of int32 or int64, not {type(ids).__name__}. Use torch.tensor(ids).")
    if ids.dtype not in (torch.int64, torch.int32):
        raise InvalidIds(
            f"ids have dtype {ids.dtype}; int64 or int32 is needed. Convert them with ids.long() if they are whole."
        )
    if ids.device.type != "cpu":
        raise InvalidIds(f"ids are on {ids.device}, this table's rows are served on the cpu. Use ids.cpu().")
    ids_N = ids.detach().reshape(-1).to(torch.int64).contiguous().numpy()
    check_range(ids_N, num_rows)
    return ids_N
