"""The lookup as autograd sees it: rows out, and on the way back their gradients to the table."""

from typing import Any

import torch

from bigembed.nn.transforms import check_backward, handle_gradient
from bigembed.optim.device_gradient import DeviceRowGradient
from bigembed.optim.pending import Gradient, RowGradient
from bigembed.optim.trainable import TrainableTable


class Lookup(torch.autograd.Function):
    """(N,) ids -> (N, D). Its gradient is kept on the table; the handle gets a 0 that says it arrived.

    ids_N is what `TrainableTable.look_up` takes: a checked array, or for a device module a tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, handle: torch.Tensor, trainable: TrainableTable, ids_N: Any, padding_idx: int | None, count: bool
    ) -> torch.Tensor:
        out_ND, located, inverse_N, ctx.ticket = trainable.look_up(ids_N, needs_grad=True, count=count)
        ctx.trainable, ctx.padding_idx, ctx.inverse_N = trainable, padding_idx, inverse_N
        if trainable.has_device_tier:
            ctx.rows_U, ctx.kept_U = located.rows_U, _kept(located.rows_U, padding_idx)
        else:
            ctx.located = located if inverse_N is None else located.for_later()
        return out_ND

    @staticmethod
    def backward(ctx: Any, given_ND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        check_backward(ctx.next_functions[0][0])
        grad_ND = given_ND.detach().to(torch.float32).contiguous()
        # What the forward saved says where it ran; the rows may be served elsewhere by now.
        gradient_of = _device_gradient if isinstance(ctx.inverse_N, torch.Tensor) else _host_gradient
        ctx.trainable.add_gradient(gradient_of(ctx, grad_ND), ctx.ticket)
        return handle_gradient(given_ND), None, None, None, None


def _host_gradient(ctx: Any, grad_ND: torch.Tensor) -> Gradient:
    located, inverse_N = (ctx.located, ctx.inverse_N) if ctx.inverse_N is not None else ctx.located.grouped()
    known = {"padding_idx": ctx.padding_idx, "located": located}
    return RowGradient.summed(grad_ND, located.rows_U, inverse_N, ctx.ticket.step, **known)


def _device_gradient(ctx: Any, grad_ND: torch.Tensor) -> Gradient:
    gradient = DeviceRowGradient.summed(grad_ND, ctx.rows_U, ctx.inverse_N, ctx.ticket.step)
    if ctx.kept_U is not None:
        gradient.rows_U, gradient.sums_UD = gradient.rows_U[ctx.kept_U], gradient.sums_UD[ctx.kept_U]
    return gradient


def _kept(rows_U: torch.Tensor, padding_idx: int | None) -> torch.Tensor | None:
    """Which rows get a gradient, None for all; found in the forward, which has just waited for the device anyway."""
    return None if padding_idx is None else (rows_U != padding_idx).nonzero().squeeze(1)


def look_up(trainable: TrainableTable, ids_N: Any, padding_idx: int | None, count: bool = True) -> torch.Tensor:
    """The rows of ids, (N, D), recorded for backward where grad mode and the handle ask for it.

    Args:
        count: False where the rows were just looked up for another purpose, and counted.
    """
    handle = trainable.handle
    if torch.is_grad_enabled() and handle.requires_grad:
        return Lookup.apply(handle, trainable, ids_N, padding_idx, count)
    return trainable.look_up(ids_N, needs_grad=False, count=count)[0]
