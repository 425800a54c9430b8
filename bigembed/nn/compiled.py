"""The lookup under torch.compile: custom operators that a graph may hold, equal bit for bit to the eager lookup.

`look_up` is pure: the same table gives the same rows. Its backward is `keep_gradient`, which makes a gradient pending.
That one is registered as effectful, so that no pass of the compiler drops it, runs it twice, moves it past another, or
merges two equal ones: as pure operators two equal lookups with equal gradients would become one, and half of the
gradient would be lost. `renorm`, for max_norm, writes to the table and is effectful too; the lookup takes its output,
so it cannot run first. How a graph names a table: graph_key.py.
"""

from typing import Any

import torch

from bigembed.cache.device_ops import group_by_row as group_on_device
from bigembed.kernels.grouping import group_by_row
from bigembed.nn.frequency import factors
from bigembed.nn.graph_key import (
    GraphKey,
    check_in_pass,
    empty_stamp,
    forget_after_pass,
    looked_up_at,
    oldest_step,
    operator,
    register_effect,
    stamp_of,
    table_of,
    ticket_of,
)
from bigembed.nn.ids import checked_ids, ids_on
from bigembed.nn.max_norm import renorm
from bigembed.nn.options import checked_padding
from bigembed.optim.device_gradient import DeviceRowGradient
from bigembed.optim.pending import Gradient, RowGradient
from bigembed.optim.trainable import TrainableTable


def look_up(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """The rows of ids, (*ids.shape, D), inside a graph; equals `Embedding.forward` in eager.

    Args:
        module: whose `handle`, `graph_key`, `padding_idx`, `max_norm`, `norm_type`, `scale_grad_by_freq` are read.
    """
    named: GraphKey = module.graph_key
    if module.max_norm is not None:
        ids = torch.ops.bigembed.renorm(named.key, ids, float(module.max_norm), float(module.norm_type))
    needs_grad = torch.is_grad_enabled() and module.handle.requires_grad
    rows, _ = torch.ops.bigembed.look_up(
        named.key, module.handle, ids, named.dim, needs_grad, module.padding_idx, bool(module.scale_grad_by_freq)
    )
    return rows


def _flat(trainable: TrainableTable, ids: torch.Tensor) -> Any:
    """The ids as `TrainableTable.look_up` takes them."""
    if trainable.has_device_tier:
        return ids_on(trainable.device, ids)
    return checked_ids(ids, trainable.table.shape[0])


def _grouped(trainable: TrainableTable, ids: torch.Tensor) -> tuple[Any, Any]:
    """(the distinct rows, each position's place among them), arrays or on a device tensors."""
    ids_N = _flat(trainable, ids)
    return group_on_device(ids_N) if trainable.has_device_tier else group_by_row(ids_N)


# -- forward ----------------------------------------------------------------------------------------------------


@operator("renorm")
def _renorm(key: torch.Tensor, ids: torch.Tensor, max_norm: float, norm_type: float) -> torch.Tensor:
    """Shorten the rows of ids, see max_norm.py; returns the ids, for the lookup to wait for."""
    trainable = table_of(key)
    renorm(trainable, _flat(trainable, ids), max_norm, norm_type)
    return ids.clone(memory_format=torch.contiguous_format)


@_renorm.register_fake
def _(key: torch.Tensor, ids: torch.Tensor, max_norm: float, norm_type: float) -> torch.Tensor:
    return torch.empty(ids.shape, dtype=ids.dtype, device=ids.device)


register_effect("renorm")


@operator("look_up")
def _look_up(
    key: torch.Tensor,
    handle: torch.Tensor,
    ids: torch.Tensor,
    dim: int,
    needs_grad: bool,
    padding_idx: int | None,
    by_frequency: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of ids, (*, D), and a stamp for backward.

    What is only for backward is here because autograd sees no more than the operator's arguments.
    """
    trainable = table_of(key)
    checked_padding(padding_idx, trainable.table.shape[0])  # one that is no row raises here, not in backward
    out_ND, _, _, ticket = trainable.look_up(_flat(trainable, ids), needs_grad=True)
    assert ticket is not None
    if needs_grad:
        looked_up_at(trainable, ticket.step)
    return out_ND.view(*ids.shape, dim), stamp_of(ticket)


@_look_up.register_fake
def _(
    key: torch.Tensor,
    handle: torch.Tensor,
    ids: torch.Tensor,
    dim: int,
    needs_grad: bool,
    padding_idx: int | None,
    by_frequency: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty((*ids.shape, dim), dtype=torch.float32, device=handle.device), empty_stamp()


# -- backward ---------------------------------------------------------------------------------------------------


@operator("keep_gradient")
def _keep_gradient(
    key: torch.Tensor,
    grad: torch.Tensor,
    ids: torch.Tensor,
    stamp: torch.Tensor,
    padding_idx: int | None,
    by_frequency: bool,
) -> torch.Tensor:
    """Make the gradient of a lookup pending; returns the handle's gradient, the 0 that says it arrived."""
    trainable = table_of(key)
    check_in_pass(trainable)
    rows_U, inverse_N = _grouped(trainable, ids)
    grad_ND = grad.detach().to(torch.float32).reshape(len(inverse_N), grad.shape[-1]).contiguous()
    if by_frequency:
        grad_ND = grad_ND * factors(inverse_N, len(rows_U)).unsqueeze(1)
    padding_idx, step = checked_padding(padding_idx, trainable.table.shape[0]), oldest_step(trainable)
    gradient: Gradient
    if trainable.has_device_tier:
        gradient = DeviceRowGradient.summed(grad_ND, rows_U, inverse_N, step)
        if padding_idx is not None:
            kept_U = rows_U != padding_idx
            gradient.rows_U, gradient.sums_UD = gradient.rows_U[kept_U], gradient.sums_UD[kept_U]
    else:
        gradient = RowGradient.summed(grad_ND, rows_U, inverse_N, step, padding_idx=padding_idx)
    trainable.add_gradient(gradient, ticket_of(stamp, step))
    forget_after_pass(trainable)
    return torch.zeros(1, dtype=torch.float32, device=grad.device)


@_keep_gradient.register_fake
def _(
    key: torch.Tensor,
    grad: torch.Tensor,
    ids: torch.Tensor,
    stamp: torch.Tensor,
    padding_idx: int | None,
    by_frequency: bool,
) -> torch.Tensor:
    return torch.empty(1, dtype=torch.float32, device=grad.device)


register_effect("keep_gradient")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    key, _, ids, _, _, ctx.padding_idx, ctx.by_frequency = inputs
    ctx.save_for_backward(key, ids, output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    key, ids, stamp = ctx.saved_tensors
    handle_grad = torch.ops.bigembed.keep_gradient(key, grad, ids, stamp, ctx.padding_idx, ctx.by_frequency)
    return None, handle_grad, *[None] * 5


_look_up.register_autograd(_backward, setup_context=_save)
