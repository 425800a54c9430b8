"""max_norm: before a lookup, the rows it names are shortened in the table; what `torch.embedding_renorm_` does.

A lookup writes then: the shortened rows are dirty in the cache and go to the journal as an optimizer's would.
"""

import math
from typing import Any

import numpy as np
import torch

from bigembed import threads
from bigembed.cache.device_ops import group, sum_segments
from bigembed.errors import ReadOnlyTable
from bigembed.kernels import renorm as kernels
from bigembed.kernels.grouping import group_by_row
from bigembed.nn.options import checked_number
from bigembed.optim.trainable import TrainableTable

GRAIN_ROWS = 256  # rows whose norms are worth a thread


class MaxNormNeedsWriting(ReadOnlyTable):
    """A lookup with max_norm on a table that may only be read: it would change rows."""


def renorm(trainable: TrainableTable, ids_N: Any, max_norm: float, norm_type: float) -> None:
    """Bring the rows of ids whose norm is above max_norm down to it, each once; equals `torch.embedding_renorm_`.

    row *= max_norm / (norm + 1e-7), in float32, with the norm in float32 too (see kernels/renorm.py). Only rows that
    change become dirty. Optimizer state stays as it is, and so does a pending gradient.

    Args:
        trainable: the table. ids_N: as `TrainableTable.look_up` takes them.
        max_norm: a number; True is 1.0, as torch has it. norm_type: the p of the p-norm, also 0 and inf.

    Raises:
        MaxNormNeedsWriting: the table may only be read, whether or not a row is too long.
        RowOutOfRange: an id, where they are not checked yet. Whatever reading and storing rows raises.
    """
    limits = checked_number("max_norm", max_norm), checked_number("norm_type", norm_type)
    table = trainable.table
    check_writable(trainable)
    with table.mutex:
        trainable._check_open()
        scales = _scales_on_device if trainable.has_device_tier else _scales_on_host
        rows_U, scale_U, changed = scales(trainable, ids_N, *limits)
        if not len(changed):
            return
        table.safe_point(len(changed))
        located = trainable.caches.fetch(rows_U[changed], **trainable._how_to_fetch(), count=False)
        dim = table.shape[1]
        trainable.caches.update(located, kernels.scale_weights, scale_weights, scale_U[changed], dim)


def check_writable(trainable: TrainableTable) -> None:
    """Raises MaxNormNeedsWriting: the table may only be read."""
    try:
        trainable.table.check_writable()
    except ReadOnlyTable as error:
        raise MaxNormNeedsWriting(
            f"max_norm shortens rows in the table, and this one may only be read: {error} Or set max_norm=None and "
            "shorten what is looked up: torch.renorm(emb(ids), 2, 0, max_norm)."
        ) from error


def _scales_on_host(trainable: TrainableTable, ids_N: np.ndarray, *limits: float) -> tuple[Any, Any, Any]:
    """(rows_U, scale_U, which of them change)."""
    rows_U, _ = group_by_row(ids_N)
    caches = trainable.caches
    located = caches.fetch(rows_U, **trainable._how_to_fetch())
    rows_UD = caches.rows.gather(located, np.arange(len(rows_U))).numpy()
    scale_U = np.empty(len(rows_U), np.float32)
    threads.run(kernels.row_scales, len(rows_U), rows_UD, *limits, scale_U, grain=GRAIN_ROWS)
    return rows_U, scale_U, np.flatnonzero(scale_U != 1.0)


# -- on a device ------------------------------------------------------------------------------------------------


def _scales_on_device(trainable: TrainableTable, ids_N: torch.Tensor, *limits: float) -> tuple[Any, Any, Any]:
    """As `_scales_on_host`; waits for the device."""
    caches: Any = trainable.caches
    located = caches.fetch(group(ids_N, trainable.table.shape[0]), **trainable._how_to_fetch())
    every_U = torch.arange(located.rows_U.numel(), device=located.rows_U.device)
    scale_U = row_scales(caches.hot.gather(located, every_U), *limits)
    return located.rows_U, scale_U, torch.nonzero(scale_U != 1.0).squeeze(1)


def row_scales(rows_UD: torch.Tensor, max_norm: float, norm_type: float) -> torch.Tensor:
    """`kernels.renorm.row_scales` in torch ops: equal bit by bit for the norms 0, 1, 2 and inf."""
    norm_U = row_norms(rows_UD, norm_type).double()
    # Divided by a tensor: CUDA turns a number divided into a multiplication by its reciprocal.
    scale_U = torch.full_like(norm_U, max_norm).div_(norm_U + kernels.EPSILON)
    return torch.where(norm_U > max_norm, scale_U, 1.0).float()


def row_norms(rows_UD: torch.Tensor, p: float) -> torch.Tensor:
    """The p-norm of each row, float32 (U,), summed in the order that kernels/renorm.py says."""
    if p == 0:
        return (rows_UD != 0).sum(1).float()
    if math.isinf(p):
        return rows_UD.abs().amax(1) if p > 0 else rows_UD.abs().amin(1)
    if rows_UD.shape[1] == 1:
        return rows_UD[:, 0].abs()
    if p == 2:
        return _two_norms(rows_UD)
    if p == 1:
        return _sum_columns(rows_UD.abs())
    exponent = float(np.float32(p))
    with np.errstate(divide="ignore", over="ignore"):
        root = float(np.float32(1.0) / np.float32(p))
    total_U = _sum_columns(rows_UD.abs().double().pow(exponent).float())
    return total_U.double().pow(root).float()


def _two_norms(rows_UD: torch.Tensor) -> torch.Tensor:
    count, dim = rows_UD.shape
    lanes, whole, fours = kernels.LANES, dim - dim % kernels.LANES, dim - dim % 4
    squares_UD = rows_UD * rows_UD
    by_lane = squares_UD[:, :whole].reshape(count, -1, lanes) if count else squares_UD.new_empty(0, 0, lanes)
    by_lane = by_lane.transpose(1, 2).flatten(0, 1)
    lanes_UJ = _sum_columns(by_lane).reshape(count, lanes)
    total_U = lanes_UJ[:, 0].clone()
    for j in range(1, lanes):
        total_U += lanes_UJ[:, j]
    for d in range(whole, fours):
        total_U += squares_UD[:, d]
    for d in range(fours, dim):
        x_U = rows_UD[:, d].double()
        total_U = total_U.double().add_(x_U * x_U).float()
    return total_U.double().sqrt().float()


def _sum_columns(terms_UD: torch.Tensor) -> torch.Tensor:
    """(U,): each row's terms added in column order in float32."""
    count, dim = terms_UD.shape
    if not count or not dim:
        return terms_UD.new_zeros(count)
    lengths = torch.full((1,), dim, dtype=torch.int64, device=terms_UD.device)
    return sum_segments(terms_UD.T.contiguous(), lengths).reshape(count)


def scale_weights(rows_UE: torch.Tensor, scale_U: torch.Tensor, dim: int) -> torch.Tensor:
    """`kernels.renorm.scale_weights` on gathered rows; in place."""
    rows_UE[:, :dim] *= scale_U.unsqueeze(1)
    return rows_UE
