"""scale_grad_by_freq: the gradient of a row divided by how often the batch names it."""

from typing import Any

import numpy as np
import torch

from bigembed.cache.device_ops import group_by_row as group_on_device
from bigembed.kernels.grouping import group_by_row


def factors(inverse_N: Any, num_unique: int) -> torch.Tensor:
    """(N,) float32: 1 / count of each position's row in the batch.

    Args:
        inverse_N: int64, each position's place among the distinct rows; an array, or a tensor on a device.
    """
    places_N = torch.from_numpy(inverse_N) if isinstance(inverse_N, np.ndarray) else inverse_N
    counts_U = torch.bincount(places_N, minlength=num_unique)
    return counts_U.double().reciprocal_().float()[places_N]


class TimesFactors(torch.autograd.Function):
    """The identity on looked-up rows; the gradient of position n is multiplied by factor_N[n]."""

    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, factor_N: torch.Tensor) -> torch.Tensor:
        ctx.factor_N = factor_N
        ctx.mark_dirty(rows_ND)  # not changed; a view could not be changed in place by the user
        return rows_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_ND * ctx.factor_N.unsqueeze(1), None


def divided_by_count(rows_ND: torch.Tensor, ids_N: Any) -> torch.Tensor:
    """The same rows, with the gradient of scale_grad_by_freq=True; equals torch's where counts are powers of two.

    Elsewhere torch's CPU adds each `grad * (1 / count)` by a fused multiply-add where the processor has one, and here
    the product is rounded first, everywhere alike.
    """
    group = group_by_row if isinstance(ids_N, np.ndarray) else group_on_device
    rows_U, inverse_N = group(ids_N)
    return TimesFactors.apply(rows_ND, factors(inverse_N, len(rows_U)))
