"""Optimizer rules in torch ops over gathered rows: the rules of kernels/rules.py, for rows on a device.

Each is `rule(rows_UE, sums_UD, scale, ...)`: it changes rows_UE (a row is its D weights w, then its state) in place
and returns it; g is the gradient sums_UD times scale. The operations are those of the kernels, one by one and in
their order, none of them fused, so that on a CPU every bit is equal; on another device, where the operations round as
IEEE 754 says.
"""

import torch

from bigembed.cache.device_ops import sum_segments


def sgd(rows_UE: torch.Tensor, sums_UD: torch.Tensor, scale: float, lr: float) -> torch.Tensor:
    """w -= lr * g"""
    rows_UE[:, : sums_UD.shape[1]] -= (sums_UD * float(scale)).mul_(float(lr))
    return rows_UE


def adagrad(rows_UE: torch.Tensor, sums_UD: torch.Tensor, scale: float, lr: float, eps: float) -> torch.Tensor:
    """s += g**2; w -= lr * g / (sqrt(s) + eps)"""
    dim = sums_UD.shape[1]
    weight_UD, s_UD = rows_UE[:, :dim], rows_UE[:, dim : 2 * dim]
    g_UD = sums_UD * float(scale)
    s_UD += g_UD * g_UD
    weight_UD -= g_UD.div_(_root(s_UD).add_(float(eps))).mul_(float(lr))
    return rows_UE


def rowwise_adagrad(rows_UE: torch.Tensor, sums_UD: torch.Tensor, scale: float, lr: float, eps: float) -> torch.Tensor:
    """s += mean(g**2); w -= lr * g / (sqrt(s) + eps); s is one number a row, the mean added up in column order."""
    dim = sums_UD.shape[1]
    weight_UD, s_U = rows_UE[:, :dim], rows_UE[:, dim]
    g_UD = sums_UD * float(scale)
    # Divided by a tensor: CUDA turns a division by a number into a multiplication by its reciprocal.
    s_U += _sum_columns(g_UD * g_UD) / torch.full_like(s_U, dim)
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
) -> torch.Tensor:
    """m += (1 - b1)(g - m); v += (1 - b2)(g**2 - v); w -= rate * m / (sqrt(v) + eps)

    rate = lr * sqrt(1 - b2**t) / (1 - b1**t), as in kernels/rules.py.
    """
    dim = sums_UD.shape[1]
    weight_UD, m_UD, v_UD = rows_UE[:, :dim], rows_UE[:, dim : 2 * dim], rows_UE[:, 2 * dim : 3 * dim]
    g_UD = sums_UD * float(scale)
    m_UD += (g_UD - m_UD).mul_(float(one_minus_beta1))
    v_UD += g_UD.mul_(g_UD).sub_(v_UD).mul_(float(one_minus_beta2))
    weight_UD -= (m_UD / _root(v_UD).add_(float(eps))).mul_(float(rate))
    return rows_UE


def scale_rows(sums_UD: torch.Tensor, scale: float) -> torch.Tensor:
    """sums_UD *= scale"""
    return sums_UD.mul_(float(scale))


def row_squares(sums_UD: torch.Tensor) -> torch.Tensor:
    """(U,) float64: the sum of squares of each row, added up in column order."""
    g_UD = sums_UD.double()
    return _sum_columns(g_UD.mul_(g_UD))


def norm(sums_UD: torch.Tensor) -> torch.Tensor:
    """The 2-norm as a float32 tensor of no dimension, added up in float64 in an order fixed for each device."""
    return row_squares(sums_UD).sum().sqrt().float()


def _root(x: torch.Tensor) -> torch.Tensor:
    """The correctly rounded square root in float32, as the kernels take it; a new tensor."""
    if x.device.type == "cpu":  # torch's own is one unit off in 1 of 150 there
        return x.double().sqrt().float()
    return x.sqrt()


def _sum_columns(terms_UD: torch.Tensor) -> torch.Tensor:
    """(U,): each row's terms added in column order: as one segment of D rows of the transpose."""
    num_rows, dim = terms_UD.shape
    if not num_rows:
        return terms_UD.new_zeros(0)
    lengths = torch.full((1,), dim, dtype=torch.int64, device=terms_UD.device)
    return sum_segments(terms_UD.T.contiguous(), lengths).reshape(num_rows)
