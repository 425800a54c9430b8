"""The lookup as autograd sees it: rows out, and on the way back their gradients to the table."""

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from bigembed.kernels.grouping import sum_by_row
from bigembed.optim.pending import RowGradient
from bigembed.optim.trainable import TrainableTable


class Lookup(torch.autograd.Function):
    """(N,) checked ids -> (N, D). Its gradient is kept on the table; the handle gets a 0 that says it arrived."""

    @staticmethod
    def forward(
        ctx: Any, handle: torch.Tensor, trainable: TrainableTable, ids_N: np.ndarray, padding_idx: int | None
    ) -> torch.Tensor:
        out_ND, ctx.rows_U, ctx.inverse_N, ctx.ticket = trainable.look_up(ids_N, needs_grad=True)
        ctx.trainable, ctx.padding_idx = trainable, padding_idx
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        grad = grad_ND.detach().to(torch.float32).contiguous().numpy()
        rows_U, sums_UD = ctx.rows_U, sum_by_row(grad, ctx.inverse_N, len(ctx.rows_U))
        if ctx.padding_idx is not None:
            kept = rows_U != ctx.padding_idx
            rows_U, sums_UD = rows_U[kept], sums_UD[kept]
        ctx.trainable.add_gradient(RowGradient(rows_U, sums_UD, ctx.ticket.step), ctx.ticket)
        return torch.zeros(1, dtype=torch.float32, device="cpu"), None, None, None


def look_up(trainable: TrainableTable, ids_N: np.ndarray, padding_idx: int | None) -> torch.Tensor:
    """The rows of checked ids, (N, D), recorded for backward where grad mode and the handle ask for it."""
    handle = trainable.handle
    if torch.is_grad_enabled() and handle.requires_grad:
        return Lookup.apply(handle, trainable, ids_N, padding_idx)
    return trainable.look_up(ids_N, needs_grad=False)[0]
