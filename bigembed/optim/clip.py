"""clip_grad_norm_ that knows what is pending on tables, so that any norm is right; torch's sees only its 2-norm."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from bigembed import threads
from bigembed.errors import InvalidArgument
from bigembed.kernels.gradient_norms import row_largest, row_power_sums
from bigembed.optim.trainable import TrainableTable, open_trainables


@torch.no_grad()
def clip_grad_norm_(
    parameters: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scale all gradients in place so that their joint norm is at most max_norm, as torch's function of that name does.

    Equals that function on a model with the dense twins of the tables. Call it between backward and step, as often as
    you like.

    Args:
        parameters: modules or parameters or both, one or an iterable of them. What occurs twice counts once.
        max_norm: the largest norm that is left. norm_type: p of the p-norm, at least 0, or inf for the
            largest entry.
        error_if_nonfinite: raise instead of scaling by what is no number.
        foreach: torch's argument; it changes nothing here.

    Returns:
        The joint norm before scaling, a tensor of no dimension.

    Raises:
        RuntimeError: the norm is inf or nan, with error_if_nonfinite. InvalidArgument: neither a module nor a tensor,
            or a norm_type below 0: most rows of a table have no gradient, so that norm is 0.

    Note:
        For the 2-norm torch's own function does the same. Others read each pending gradient once, in float64.
    """
    norm_type = float(norm_type)
    if not norm_type >= 0:
        raise InvalidArgument(f"norm_type must be at least 0, not {norm_type}.")
    given = list(dict.fromkeys(_parameters_in(parameters)))
    with_grad = [parameter for parameter in given if parameter.grad is not None]
    if not with_grad:
        return torch.tensor(0.0)
    total = _joint_norm(with_grad, norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite ({total.item()}), so "
            "it cannot be clipped. To scale them by it all the same, set `error_if_nonfinite=False`."
        )
    factor = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0)
    for parameter in with_grad:
        parameter.grad.mul_(factor.to(parameter.device))  # type: ignore[union-attr]
    return total


def _parameters_in(given: Any) -> Iterator[torch.Tensor]:
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, nn.Module):
        yield from given.parameters()
    elif isinstance(given, Iterable):
        for part in given:
            yield from _parameters_in(part)
    else:
        raise InvalidArgument(f"a {type(given).__name__} is neither a module nor a parameter nor a list of these.")


def _joint_norm(parameters: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    # The handle's grad is the 2-norm, and one number's 2-norm is itself. Not so for the others.
    tables = {} if norm_type == 2.0 else {id(table.handle): table for table in list(open_trainables.values())}
    norms = []
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        table = tables.get(id(parameter))
        norm = torch.linalg.vector_norm(grad, norm_type) if table is None else _norm_of(table, norm_type)
        norms.append(norm.to(parameters[0].grad.device))  # type: ignore[union-attr]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def _norm_of(table: TrainableTable, norm_type: float) -> torch.Tensor:
    """The norm of what is pending, float32."""
    found = table.pending.current()
    if found is None:
        return torch.zeros((), device=table.handle.device)
    gradient, scale = found
    norm = pending_norm(gradient.sums_UD, norm_type) * (abs(scale) if norm_type else 1)
    return torch.as_tensor(norm, dtype=torch.float32, device=table.handle.device)


def pending_norm(sums_UD: Any, norm_type: float) -> Any:
    """The p-norm of all entries, in float64: a number for an array, a tensor for a tensor."""
    if isinstance(sums_UD, torch.Tensor):
        return torch.linalg.vector_norm(sums_UD, norm_type, dtype=torch.float64)
    out_U = np.empty(len(sums_UD))
    if not out_U.size:
        return 0.0
    if math.isinf(norm_type):
        threads.run(row_largest, len(out_U), sums_UD, out_U)
        return float(out_U.max())  # NaN where there is one
    threads.run(row_power_sums, len(out_U), sums_UD, norm_type, out_U)
    total = float(out_U.sum())
    return total if norm_type == 0 else float(np.power(total, 1 / norm_type))
