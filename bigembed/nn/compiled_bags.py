"""Bags under torch.compile: custom operators as in compiled.py, equal bit for bit to the eager reduction.

`look_up_bags` is pure and reduces as in eager, straight from the cache's slots; `keep_bag_gradient` is effectful. What
backward needs of the rows goes through the graph: the places of max, and where the per-sample weights train the rows
themselves, as (N, D) because a graph's shapes cannot depend on how many distinct rows a batch has. On the host alone:
with a cache on a device, and for nested input, the module runs as it is, between two graphs.
"""

from typing import Any

import numpy as np
import torch

from bigembed import threads
from bigembed.kernels import bags as kernels
from bigembed.kernels.grouping import group_by_row
from bigembed.nn.bag_lookup import Reduction, bag_factors, max_gradient
from bigembed.nn.bags import Bags, check_mode, checked_bags
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
from bigembed.nn.max_norm import renorm
from bigembed.nn.options import checked_padding
from bigembed.optim.pending import RowGradient
from bigembed.optim.trainable import TrainableTable

Given = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def takes(module: Any, input: Any, offsets: Any, weights: Any) -> bool:
    """Whether `look_up_bags` can be in a graph for these; else the eager forward serves them, or says what is wrong."""
    if module.trainable.has_device_tier or not isinstance(input, torch.Tensor) or input.is_nested:
        return False
    if not isinstance(weights, torch.Tensor | None):
        return False
    if input.dim() == 1:
        return isinstance(offsets, torch.Tensor) and offsets.dim() == 1
    return input.dim() == 2 and offsets is None


def look_up_bags(
    module: Any, input: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None
) -> torch.Tensor:
    """Each bag's rows reduced, (B, D), inside a graph; equals `EmbeddingBag.forward` in eager."""
    named: GraphKey = module.graph_key
    ends = bool(module.include_last_offset)
    if module.max_norm is not None:
        limits = float(module.max_norm), float(module.norm_type)
        input = torch.ops.bigembed.renorm_bags(named.key, input, offsets, ends, *limits)
    needs_grad = torch.is_grad_enabled() and module.handle.requires_grad
    weights_train = weights is not None and torch.is_grad_enabled() and weights.requires_grad
    how = module.mode, ends, module.padding_idx, bool(module.scale_grad_by_freq), needs_grad, weights_train
    return torch.ops.bigembed.look_up_bags(named.key, module.handle, input, offsets, weights, named.dim, *how)[0]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")  # whatever torch's defaults are set to


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _bags(trainable: TrainableTable, given: Given, mode: str, ends: bool, padding_idx: int | None) -> Bags:
    """The bags without padding."""
    input, offsets, weights = given
    padding_idx = checked_padding(padding_idx, trainable.table.shape[0])
    bags = checked_bags(trainable, input, offsets, None if weights is None else weights.detach(), mode, ends)
    return bags if padding_idx is None else bags.without(padding_idx)


@operator("renorm_bags")
def _renorm_bags(
    key: torch.Tensor,
    input: torch.Tensor,
    offsets: torch.Tensor | None,
    ends: bool,
    max_norm: float,
    norm_type: float,
) -> torch.Tensor:
    """Shorten the rows of bags, see max_norm.py; returns the input, for the lookup to wait for."""
    trainable = table_of(key)
    renorm(trainable, _bags(trainable, (input, offsets, None), "sum", ends, None).ids_N, max_norm, norm_type)
    return input.clone(memory_format=torch.contiguous_format)


@_renorm_bags.register_fake
def _(
    key: torch.Tensor,
    input: torch.Tensor,
    offsets: torch.Tensor | None,
    ends: bool,
    max_norm: float,
    norm_type: float,
) -> torch.Tensor:
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


register_effect("renorm_bags")


@operator("look_up_bags")
def _look_up_bags(
    key: torch.Tensor,
    handle: torch.Tensor,
    input: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    dim: int,
    mode: str,
    ends: bool,
    padding_idx: int | None,
    by_frequency: bool,
    needs_grad: bool,
    weights_train: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(each bag reduced, a stamp for backward, the places of max, the distinct rows where weights train)."""
    trainable = table_of(key)
    check_mode(mode, by_frequency, sparse=False)
    bags = _bags(trainable, (input, offsets, weights), mode, ends, padding_idx)
    reduction = Reduction(bags, mode, keeps_rows=weights_train)
    out_BD, _, _, ticket = trainable.look_up(bags.ids_N, needs_grad=True, take=reduction.take)
    assert ticket is not None
    if needs_grad:
        looked_up_at(trainable, ticket.step)
    places = _empty(0, dim, dtype=torch.int32)
    if reduction.places_BD is not None:
        places = torch.from_numpy(reduction.places_BD)
    rows = _zeros(input.numel() if weights_train else 0, dim)
    if reduction.rows_UD is not None:
        rows[: len(reduction.rows_UD)] = torch.from_numpy(reduction.rows_UD)
    return out_BD, stamp_of(ticket), places, rows


@_look_up_bags.register_fake
def _(
    key: torch.Tensor,
    handle: torch.Tensor,
    input: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    dim: int,
    mode: str,
    ends: bool,
    padding_idx: int | None,
    by_frequency: bool,
    needs_grad: bool,
    weights_train: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    count = input.shape[0] if offsets is None else offsets.shape[0] - int(ends)
    places = _empty(count if mode == "max" else 0, dim, dtype=torch.int32)
    rows = _empty(input.numel() if weights_train else 0, dim)
    return _empty(count, dim), empty_stamp(), places, rows


# -- backward ---------------------------------------------------------------------------------------------------


@operator("keep_bag_gradient")
def _keep_bag_gradient(
    key: torch.Tensor,
    grad: torch.Tensor,
    input: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    kept: list[torch.Tensor],
    mode: str,
    ends: bool,
    padding_idx: int | None,
    by_frequency: bool,
    needs_grad: bool,
    weights_train: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the gradient of bags pending; returns the handle's gradient, the 0 that says it arrived, and the weights'.

    Args:
        kept: what the lookup returned beside the bags.
    """
    trainable, (stamp, places, rows) = table_of(key), kept
    check_in_pass(trainable)
    bags = _bags(trainable, (input, offsets, weights), mode, ends, padding_idx)
    rows_U, inverse_N = group_by_row(bags.ids_N)
    bag_N = np.repeat(np.arange(len(bags.starts_B1) - 1), np.diff(bags.starts_B1))
    grad_BD = grad.detach().to(torch.float32).contiguous()
    if needs_grad:
        step = oldest_step(trainable)
        if mode == "max":
            gradient = max_gradient(grad_BD, rows_U, places.numpy(), step)
        else:
            factor_N = bag_factors(bags.starts_B1, bag_N, inverse_N, bags.factor_N, mode, by_frequency)
            gradient = RowGradient.summed(grad_BD, rows_U, inverse_N, step, source_N=bag_N, factor_N=factor_N)
        trainable.add_gradient(gradient, ticket_of(stamp, step))
        forget_after_pass(trainable)
    if not weights_train:
        return _zeros(1), _zeros(0)
    gradient_N = np.empty(len(bag_N), np.float32)
    threads.run(kernels.factor_gradients, len(bag_N), rows.numpy(), inverse_N, bag_N, grad_BD.numpy(), gradient_N)
    whole = _bags(trainable, (input, offsets, None), mode, ends, None)
    to_weights = _zeros(*input.shape)  # padding, and what is past the last bag's end, get 0
    kept_K = _kept(whole, checked_padding(padding_idx, trainable.table.shape[0]))
    to_weights.view(-1)[kept_K] = torch.from_numpy(gradient_N)
    return _zeros(1), to_weights


def _kept(whole: Bags, padding_idx: int | None) -> torch.Tensor:
    """The positions that are no padding, as `Bags.without` keeps them."""
    positions_N = np.arange(len(whole.ids_N))
    return torch.from_numpy(positions_N if padding_idx is None else positions_N[whole.ids_N != padding_idx])


@_keep_bag_gradient.register_fake
def _(
    key: torch.Tensor,
    grad: torch.Tensor,
    input: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    kept: list[torch.Tensor],
    mode: str,
    ends: bool,
    padding_idx: int | None,
    by_frequency: bool,
    needs_grad: bool,
    weights_train: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(1), _empty(*(input.shape if weights_train else (0,)))


register_effect("keep_bag_gradient")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    key, _, input, offsets, weights, _, *ctx.how = inputs
    ctx.has_offsets, ctx.has_weights = offsets is not None, weights is not None
    given = [tensor for tensor in (offsets, weights) if tensor is not None]
    ctx.save_for_backward(key, input, *output[1:], *given)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    key, input, stamp, places, rows, *given = ctx.saved_tensors
    offsets = given.pop(0) if ctx.has_offsets else None
    weights = given.pop(0) if ctx.has_weights else None
    handle_grad, to_weights = torch.ops.bigembed.keep_bag_gradient(
        key, grad, input, offsets, weights, [stamp, places, rows], *ctx.how
    )
    weights_train, needs_grad = ctx.how[-1], ctx.how[-2]
    return None, handle_grad if needs_grad else None, None, None, to_weights if weights_train else None, *[None] * 7


_look_up_bags.register_autograd(_backward, setup_context=_save)
