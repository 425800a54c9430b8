"""The gradient that waits for a step, as a tensor to look at."""

from typing import Any

import numpy as np
import torch

from bigembed.optim.trainable import TrainableTable


def pending_gradient(trainable: TrainableTable) -> torch.Tensor | None:
    """A copy of what the next step would apply, sparse (V, D) and coalesced; None where nothing is pending.

    Scaled by whatever was done to the handle's grad since (clipping, a GradScaler's unscale_). It takes memory for the
    rows that have a gradient, not for V.
    """
    found = trainable.pending.current()
    if found is None:
        return None
    gradient, scale = found
    given = gradient.rows_U, gradient.sums_UD
    given_U, sums_UD = (torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in given)
    rows_U, order_U = torch.sort(given_U)
    known: dict[str, Any] = {"is_coalesced": True, "check_invariants": False, "device": sums_UD.device}
    shape = tuple(trainable.table.shape)
    return torch.sparse_coo_tensor(rows_U.unsqueeze(0), sums_UD[order_U] * scale, shape, **known)
