"""Checks at the border: the ids that a user passes to a module."""

import numpy as np
import torch

from bigembed.errors import InvalidIds
from bigembed.storage.rows import check_range


class IdsNotTensor(InvalidIds, TypeError):
    """Ids are a list or an array (torch raises TypeError for this too)."""


def checked_ids(ids: torch.Tensor, num_rows: int, device: torch.device | None = None) -> np.ndarray:
    """The ids flattened, on the host: int64 (N,), each 0 <= id < num_rows.

    Args:
        device: the module's, whose ids are welcome too.

    Raises:
        IdsNotTensor, InvalidIds: no tensor; not int32 or int64; on another device.
        RowOutOfRange: names the id, its position and the valid range.
    """
    check_tensor(ids, torch.device("cpu") if device is None else device)
    flat = ids.detach().reshape(-1)
    if flat.dtype != torch.int64 or flat.device.type != "cpu":
        flat = flat.to("cpu", torch.int64)
    ids_N = flat.contiguous().numpy()
    check_range(ids_N, num_rows)
    return ids_N


def ids_on(device: torch.device, ids: torch.Tensor) -> torch.Tensor:
    """The ids flattened, on the device: int64 (N,), of any values; the lookup checks them there.

    Raises:
        IdsNotTensor, InvalidIds: no tensor; not int32 or int64; neither on the host nor on the device.
    """
    check_tensor(ids, device)
    return ids.detach().reshape(-1).to(device).to(torch.int64).contiguous()


def check_tensor(ids: torch.Tensor, device: torch.device) -> None:
    """Raises IdsNotTensor, InvalidIds: no tensor; not int32 or int64; neither on the host nor on the device."""
    if not isinstance(ids, torch.Tensor):
        raise IdsNotTensor(f"ids must be a tensor of int32 or int64, not {type(ids).__name__}. Use torch.tensor(ids).")
    if ids.dtype not in (torch.int64, torch.int32):
        raise InvalidIds(
            f"ids have dtype {ids.dtype}; int64 or int32 is needed. Convert them with ids.long() if they are whole."
        )
    if ids.device.type != "cpu" and ids.device != device:
        raise InvalidIds(f"ids are on {ids.device}, this table's rows are served on the {device}. Use ids.cpu().")
