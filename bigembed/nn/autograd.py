"""The lookup as autograd sees it: rows out, and on the way back their gradients to the table."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from bigembed.optim.device_gradient import DeviceRowGradient
from bigembed.optim.pending import RowGradient
from bigembed.optim.trainable import TrainableTable


class Lookup(torch.autograd.Function):
    """(N,) ids -> (N, D). Its gradient is kept on the table; the handle gets a 0 that says it arrived.

    ids_N is what `TrainableTable.look_up` takes: a checked array, or for a device module a tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, handle: torch.Tensor, trainable: TrainableTable, ids_N: Any, padding_idx: int | None
    ) -> torch.Tensor:
        out_ND, ctx.rows_U, ctx.inverse_N, ctx.ticket = trainable.look_up(ids_N, needs_grad=True)
        ctx.trainable, ctx.kept_U = trainable, _kept(ctx.rows_U, padding_idx)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        kind = DeviceRowGradient if isinstance(ctx.rows_U, torch.Tensor) else RowGradient
        grad_ND = grad_ND.detach().to(torch.float32).contiguous()
        gradient = kind.summed(grad_ND, ctx.rows_U, ctx.inverse_N, ctx.ticket.step)
        if ctx.kept_U is not None:
            gradient.rows_U, gradient.sums_UD = gradient.rows_U[ctx.kept_U], gradient.sums_UD[ctx.kept_U]
        ctx.trainable.add_gradient(gradient, ctx.ticket)
        return torch.zeros(1, dtype=torch.float32, device=grad_ND.device), None, None, None


def _kept(rows_U: Any, padding_idx: int | None) -> Any:
    """Which rows get a gradient, None for all; found in the forward, which has just waited for the device anyway."""
    if padding_idx is None:
        return None
    kept_U = rows_U != padding_idx
    return kept_U.nonzero().squeeze(1) if isinstance(kept_U, torch.Tensor) else kept_U


def look_up(trainable: TrainableTable, ids_N: Any, padding_idx: int | None) -> torch.Tensor:
    """The rows of ids, (N, D), recorded for backward where grad mode and the handle ask for it."""
    handle = trainable.handle
    if torch.is_grad_enabled() and handle.requires_grad:
        return Lookup.apply(handle, trainable, ids_N, padding_idx)
    return trainable.look_up(ids_N, needs_grad=False)[0]
