"""The reduction of bags as autograd sees it: a row for each bag out, and on the way back gradients to the table."""

from typing import Any

import numpy as np
import torch
from torch import nn

from bigembed import threads
from bigembed.cache.located import Located
from bigembed.cache.row_cache import RowCache
from bigembed.kernels import bags as kernels
from bigembed.kernels.grouping import NONE_F
from bigembed.nn.autograd import look_up
from bigembed.nn.bags import Bags, check_weights
from bigembed.nn.compiled import look_up as look_up_in_graph
from bigembed.nn.frequency import divided_by_count
from bigembed.nn.transforms import FirstDerivative, check_backward, handle_gradient
from bigembed.optim.pending import RowGradient
from bigembed.optim.trainable import TrainableTable

GRAIN_VALUES = 1 << 16  # values read below which another thread is not worth its dispatch


class Reduction:
    """What one forward does with the rows while they are in the cache; afterwards, what its backward needs of them.

    Args:
        bags: on the host. mode: of torch's three. keeps_rows: for the gradient of the factors.
    """

    def __init__(self, bags: Bags, mode: str, keeps_rows: bool) -> None:
        self.starts_B1, self.mode, self._keeps_rows = bags.starts_B1, mode, keeps_rows
        self._factor_N = NONE_F if bags.factor_N is None else bags.factor_N.detach().contiguous().numpy()
        self.rows_UD: np.ndarray | None = None
        self.places_BD: np.ndarray | None = None

    def take(self, rows: RowCache, located: Located, inverse_N: np.ndarray) -> torch.Tensor:
        """(B, D): each bag reduced, straight from the cache's slots."""
        num_bags = len(self.starts_B1) - 1
        out_BD = np.empty((num_bags, rows.dim), np.float32)
        # So many bags that on average they are worth a thread.
        grain = max(1, GRAIN_VALUES * num_bags // max(1, inverse_N.size * rows.dim))
        if self.mode == "max":
            self.places_BD = np.empty((num_bags, rows.dim), np.int32)
            given: tuple[Any, ...] = inverse_N, self.starts_B1, out_BD, self.places_BD
            rows.run_on(located, kernels.max_bags, num_bags, *given, grain=grain)
        else:
            given = inverse_N, self.starts_B1, self._factor_N, self.mode == "mean", out_BD
            rows.run_on(located, kernels.sum_bags, num_bags, *given, grain=grain)
        if self._keeps_rows:
            self.rows_UD = rows.gather(located, np.arange(len(located.rows_U))).numpy()
        return torch.from_numpy(out_BD)


class BagLookup(torch.autograd.Function):
    """Bags on the host -> (B, D). Rows' gradients are kept on the table; the handle gets a 0 that says they arrived."""

    @staticmethod
    def forward(
        ctx: Any,
        handle: torch.Tensor,
        factor_N: torch.Tensor | None,
        trainable: TrainableTable,
        bags: Bags,
        mode: str,
        scale_grad_by_freq: bool,
    ) -> torch.Tensor:
        trains, ctx.factors_train = ctx.needs_input_grad[:2]
        ctx.reduction = Reduction(bags, mode, keeps_rows=ctx.factors_train)
        take = ctx.reduction.take
        out_BD, located, ctx.inverse_N, ctx.ticket = trainable.look_up(bags.ids_N, needs_grad=trains, take=take)
        ctx.located = located.for_later()
        ctx.trainable, ctx.scale_grad_by_freq = trainable, scale_grad_by_freq
        ctx.save_for_backward(*(() if factor_N is None else (factor_N,)))
        return out_BD

    @staticmethod
    def backward(ctx: Any, grad_BD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, grad_BD = grad_BD, grad_BD.detach().to(torch.float32).contiguous()
        starts_B1 = ctx.reduction.starts_B1
        bag_N = np.repeat(np.arange(len(starts_B1) - 1), np.diff(starts_B1))
        to_handle = to_factors = None
        if ctx.factors_train:
            gradient_N = np.empty(len(bag_N), np.float32)
            given = ctx.reduction.rows_UD, ctx.inverse_N, bag_N, grad_BD.numpy(), gradient_N
            threads.run(kernels.factor_gradients, len(bag_N), *given)
            to_factors = differentiable_once(torch.from_numpy(gradient_N), grad)
        if ctx.ticket is not None:
            check_backward(ctx.next_functions[0][0])
            ctx.trainable.add_gradient(_row_gradient(ctx, grad_BD, bag_N), ctx.ticket)
            to_handle = handle_gradient(grad)
        return to_handle, to_factors, None, None, None, None


def differentiable_once(gradient: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient made of `grad`, which refuses to be differentiated."""
    return FirstDerivative.apply(gradient, grad) if torch.is_grad_enabled() and grad.requires_grad else gradient


def max_gradient(
    grad_BD: torch.Tensor, rows_U: np.ndarray, places_BD: np.ndarray, step: int, located: Located | None = None
) -> RowGradient:
    """The gradient of each row under max: that of the bags and columns in which it was the largest."""
    sums_UD = np.zeros((len(rows_U), grad_BD.shape[1]), np.float32)
    threads.run(kernels.sum_max_gradients, grad_BD.shape[1], grad_BD.numpy(), places_BD, sums_UD, grain=32)
    return RowGradient(rows_U, sums_UD, step, located=located)


def _row_gradient(ctx: Any, grad_BD: torch.Tensor, bag_N: np.ndarray) -> RowGradient:
    """The gradient of each row: the sum over its positions of factor times the bag's gradient, in their order."""
    located, step = ctx.located, ctx.ticket.step
    rows_U, places_BD = located.rows_U, ctx.reduction.places_BD
    if places_BD is not None:
        return max_gradient(grad_BD, rows_U, places_BD, step, located)
    given = grad_BD, rows_U, ctx.inverse_N, step
    weights = ctx.saved_tensors[0] if ctx.saved_tensors else None
    how = ctx.reduction.mode, ctx.scale_grad_by_freq
    factor_N = bag_factors(ctx.reduction.starts_B1, bag_N, ctx.inverse_N, weights, *how)
    return RowGradient.summed(*given, located=located, source_N=bag_N, factor_N=factor_N)


def bag_factors(
    starts_B1: np.ndarray,
    bag_N: np.ndarray,
    inverse_N: np.ndarray,
    weights: torch.Tensor | None,
    mode: str,
    scale_grad_by_freq: bool,
) -> np.ndarray | None:
    """What each position's gradient is multiplied by, None for 1: made in float64 and rounded once, as torch's.

    Args:
        starts_B1: where bags begin. bag_N: each position's bag. inverse_N: its place among the distinct rows.
        weights: per_sample_weights, (N,). mode: "sum" or "mean".
    """
    if weights is None and not scale_grad_by_freq and mode == "sum":
        return None
    factor_N = np.ones(len(bag_N)) if weights is None else weights.detach().double().numpy()
    if scale_grad_by_freq:
        factor_N = factor_N / np.bincount(inverse_N)[inverse_N]
    if mode == "mean":
        factor_N = factor_N / np.diff(starts_B1)[bag_N]
    return factor_N.astype(np.float32)


def reduce_bags(trainable: TrainableTable, bags: Bags, mode: str, scale_grad_by_freq: bool) -> torch.Tensor:
    """(B, D): what each bag's rows come to, recorded for backward where grad mode and handle or factors ask for it."""
    if trainable.has_device_tier:
        return _reduce_on_device(trainable, bags, mode, scale_grad_by_freq)
    handle, factor_N = trainable.handle, bags.factor_N
    wants_grad = handle.requires_grad or (factor_N is not None and factor_N.requires_grad)
    if torch.is_grad_enabled() and wants_grad:
        return BagLookup.apply(handle, factor_N, trainable, bags, mode, scale_grad_by_freq)
    take = Reduction(bags, mode, keeps_rows=False).take
    return trainable.look_up(bags.ids_N, needs_grad=False, take=take)[0]


def _reduce_on_device(trainable: TrainableTable, bags: Bags, mode: str, scale_grad_by_freq: bool) -> torch.Tensor:
    """The rows are gathered, (N, D), and reduced in torch's ops: a position of the batch is a row of this array."""
    rows_ND = look_up(trainable, bags.ids_N, None)
    if scale_grad_by_freq and rows_ND.requires_grad:
        rows_ND = divided_by_count(rows_ND, bags.ids_N)
    places_N = torch.arange(rows_ND.shape[0], device=rows_ND.device)
    starts_B1 = torch.from_numpy(bags.starts_B1).to(rows_ND.device)
    rows_ND = _times_factors(rows_ND, bags.factor_N)
    return nn.functional.embedding_bag(places_N, rows_ND, starts_B1, mode=mode, include_last_offset=True)


def _times_factors(rows_ND: torch.Tensor, factor_N: torch.Tensor | None) -> torch.Tensor:
    """A product rounded before the sum, as the kernel's, where torch's per_sample_weights may be fused with it."""
    return rows_ND if factor_N is None else rows_ND * factor_N.unsqueeze(1)


def reduce_in_graph(
    module: Any, ids: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None
) -> torch.Tensor:
    """(B, D): what `EmbeddingBag.forward` gives, inside a graph; the rows are gathered there, as on a device.

    Positions stand in for ids, with 0 for those in no bag, and torch checks offsets when the graph runs.
    """
    if weights is not None:
        check_weights(ids, weights, module.mode)
    include_last_offset = module.include_last_offset and ids.dim() == 1
    if ids.is_nested:
        nested: Any = ids
        ids, offsets, include_last_offset = nested.values(), nested.offsets(), True
        weights = None if weights is None else weights.values()
    rows_ND = look_up_in_graph(module, ids.reshape(-1))
    rows_ND = _times_factors(rows_ND, None if weights is None else weights.reshape(-1))
    places_N = torch.arange(1, rows_ND.shape[0] + 1, device=rows_ND.device)
    if module.padding_idx is not None:
        places_N = torch.where(ids.reshape(-1).to(rows_ND.device) == module.padding_idx, 0, places_N)
    if include_last_offset and offsets is not None:
        places_N = torch.where(places_N > offsets[-1], 0, places_N)
    rows_ND = torch.cat([rows_ND.new_zeros(1, rows_ND.shape[1]), rows_ND])
    how = {"mode": module.mode, "include_last_offset": include_last_offset, "padding_idx": 0}
    return nn.functional.embedding_bag(places_N.view(ids.shape), rows_ND, offsets, **how)
