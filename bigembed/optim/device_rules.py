"""Optimizer rules in torch ops over gathered rows: the rules of kernels/, for rows on a device.

Each is `rule(rows_UE, sums_UD, scale, ...)`: it changes rows_UE (a row is its D weights w, then its state) in place
and returns it; g is the gradient sums_UD times scale, plus weight_decay * w where there is any. The operations are
those of the kernels, one by one and in their order, none of them fused, so that on a CPU every bit is equal; on another
device, where the operations round as IEEE 754 says.
"""

import torch


def sgd(
    rows_UE: torch.Tensor,
    sums_UD: torch.Tensor,
    scale: float,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    kept: float = 1.0,
    nesterov: bool = False,
    has_flag: bool = False,
) -> torch.Tensor:
    """w -= lr * g; with momentum as `kernels.momentum.sgd_momentum`"""
    dim = sums_UD.shape[1]
    weight_UD = rows_UE[:, :dim]
    g_UD = _gradient(weight_UD, sums_UD, scale, weight_decay)
    if momentum == 0:
        weight_UD -= g_UD.mul_(float(lr))
        return rows_UE
    b_UD = rows_UE[:, dim : 2 * dim]
    moved_UD = b_UD * float(momentum) + g_UD * float(kept)
    if has_flag:
        is_first_U = rows_UE[:, 2 * dim] == 0
        moved_UD = torch.where(is_first_U.unsqueeze(1), g_UD, moved_UD)
        rows_UE[:, 2 * dim] = 1.0
    b_UD.copy_(moved_UD)
    weight_UD -= (g_UD.add_(moved_UD.mul_(float(momentum))) if nesterov else moved_UD).mul_(float(lr))
    return rows_UE


def adagrad(
    rows_UE: torch.Tensor, sums_UD: torch.Tensor, scale: float, lr: float, eps: float, weight_decay: float = 0.0
) -> torch.Tensor:
    """s += g**2; w -= lr * g / (sqrt(s) + eps)"""
    dim = sums_UD.shape[1]
    weight_UD, s_UD = rows_UE[:, :dim], rows_UE[:, dim : 2 * dim]
    g_UD = _gradient(weight_UD, sums_UD, scale, weight_decay)
    s_UD += g_UD * g_UD
    weight_UD -= g_UD.div_(_root(s_UD).add_(float(eps))).mul_(float(lr))
    return rows_UE


def rowwise_adagrad(
    rows_UE: torch.Tensor, sums_UD: torch.Tensor, scale: float, lr: float, eps: float, weight_decay: float = 0.0
) -> torch.Tensor:
    """s += mean(g**2); w -= lr * g / (sqrt(s) + eps); s is one number a row, the squares added up in halves."""
    dim = sums_UD.shape[1]
    weight_UD, s_U = rows_UE[:, :dim], rows_UE[:, dim]
    g_UD = _gradient(weight_UD, sums_UD, scale, weight_decay)
    # Divided by a tensor: CUDA turns a division by a number into a multiplication by its reciprocal.
    s_U += sum_in_halves(g_UD * g_UD) / torch.full_like(s_U, dim)
    rate_U = torch.full_like(s_U, float(lr)).div_(_root(s_U).add_(float(eps)))
    weight_UD -= g_UD.mul_(rate_U.unsqueeze(1))
    return rows_UE


def adam(
    rows_UE: torch.Tensor,
    sums_UD: torch.Tensor,
    scale: float,
    rate: float,
    one_minus_beta1: float,
    one_minus_beta2: float,
    eps: float,
    weight_decay: float = 0.0,
) -> torch.Tensor:
    """m += (1 - b1)(g - m); v += (1 - b2)(g**2 - v); w -= rate * m / (sqrt(v) + eps)

    rate = lr * sqrt(1 - b2**t) / (1 - b1**t), as in kernels/rules.py.
    """
    dim = sums_UD.shape[1]
    weight_UD, m_UD, v_UD = rows_UE[:, :dim], rows_UE[:, dim : 2 * dim], rows_UE[:, 2 * dim : 3 * dim]
    g_UD = _gradient(weight_UD, sums_UD, scale, weight_decay)
    m_UD += (g_UD - m_UD).mul_(float(one_minus_beta1))
    v_UD += g_UD.mul_(g_UD).sub_(v_UD).mul_(float(one_minus_beta2))
    weight_UD -= (m_UD / _root(v_UD).add_(float(eps))).mul_(float(rate))
    return rows_UE


def adamw(
    rows_UE: torch.Tensor,
    sums_UD: torch.Tensor,
    scale: float,
    rate: float,
    one_minus_beta1: float,
    one_minus_beta2: float,
    eps: float,
    keep: float,
) -> torch.Tensor:
    """w *= keep; then adam"""
    rows_UE[:, : sums_UD.shape[1]] *= float(keep)
    return adam(rows_UE, sums_UD, scale, rate, one_minus_beta1, one_minus_beta2, eps)


def scale_rows(sums_UD: torch.Tensor, scale: float) -> torch.Tensor:
    """sums_UD *= scale"""
    return sums_UD.mul_(float(scale))


def row_squares(sums_UD: torch.Tensor) -> torch.Tensor:
    """(U,) float64: the sum of squares of each row, added up in halves."""
    g_UD = sums_UD.double()
    return sum_in_halves(g_UD.mul_(g_UD))


def norm(sums_UD: torch.Tensor) -> torch.Tensor:
    """The 2-norm as a float32 tensor of no dimension, added up in float64 in an order fixed for each device."""
    return row_squares(sums_UD).sum().sqrt().float()


def _gradient(weight_UD: torch.Tensor, sums_UD: torch.Tensor, scale: float, weight_decay: float) -> torch.Tensor:
    """g, a new tensor."""
    g_UD = sums_UD * float(scale)
    if weight_decay != 0:
        g_UD += weight_UD * float(weight_decay)
    return g_UD


def _root(x: torch.Tensor) -> torch.Tensor:
    """The correctly rounded square root in float32, as the kernels take it; a new tensor."""
    if x.device.type == "cpu":  # torch's own is one unit off in 1 of 150 there
        return x.double().sqrt().float()
    return x.sqrt()


def sum_in_halves(terms_UD: torch.Tensor) -> torch.Tensor:
    """(U,): `kernels.rules.sum_in_halves` of each row; terms_UD changes."""
    count = terms_UD.shape[1]
    while count > 1:
        half = (count + 1) // 2
        terms_UD[:, : count - half] += terms_UD[:, half:count]
        count = half
    return terms_UD[:, 0].clone()
