"""Optimizer rules as range kernels over the rows of a pending gradient, in float32.

Each is `rule(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, ...)`: row u is in slot slots_U[u] of
values_SE, or past the cache in past_PE; g is the gradient sums_UD[u] times scale. A row is its D weights w, then its
state. Every row has one writer, so the bits do not depend on the thread count.

What keeps these loops vectors (each worth 2 to 6 times): NumPy's error model, as Python's puts a branch for zero into
every division; weight and state as views of their own; no sum along a row but in halves, see `sum_in_halves`.
"""

import numba as nb
import numpy as np

from bigembed.kernels.bare import BARE, BARE_NUMPY
from bigembed.kernels.prefetch import ROWS_AHEAD, prefetch_row


@nb.njit(**BARE, inline="always")
def row_of(values_SE, past_PE, slots_U, u, stop):
    """Row u, wherever it is; and asks for one that the loop to `stop` will come to."""
    if u + ROWS_AHEAD < stop:
        prefetch_row(values_SE, slots_U[u + ROWS_AHEAD], values_SE.shape[1])
    slot = slots_U[u]
    return values_SE[slot] if slot < values_SE.shape[0] else past_PE[slot - values_SE.shape[0]]


@nb.njit(**BARE, inline="always")
def sum_in_halves(terms_D):
    """Their sum, the upper half added to the lower one until one is left; terms_D, not empty, changes.

    An order that every processor can follow with vectors, and that loses less than adding one by one.
    """
    count = terms_D.shape[0]
    while count > 1:
        half = (count + 1) // 2
        low, high = terms_D[: count - half], terms_D[half:count]
        for d in range(low.shape[0]):
            low[d] += high[d]
        count = half
    return terms_D[0]


@nb.njit(**BARE_NUMPY)
def sgd(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, lr):
    """w -= lr * g"""
    dim = sums_UD.shape[1]
    for u in range(start, stop):
        w_D = row_of(values_SE, past_PE, slots_U, u, stop)[:dim]
        sum_D = sums_UD[u]
        for d in range(dim):
            w_D[d] -= lr * (sum_D[d] * scale)


@nb.njit(**BARE_NUMPY)
def adagrad(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, lr, eps):
    """s += g**2; w -= lr * g / (sqrt(s) + eps)"""
    dim = sums_UD.shape[1]
    for u in range(start, stop):
        row_E = row_of(values_SE, past_PE, slots_U, u, stop)
        w_D, s_D, sum_D = row_E[:dim], row_E[dim : 2 * dim], sums_UD[u]
        for d in range(dim):
            g = sum_D[d] * scale
            s = s_D[d] + g * g
            s_D[d] = s
            w_D[d] -= lr * (g / (np.sqrt(s) + eps))


@nb.njit(nogil=True, cache=True)
def rowwise_adagrad(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, lr, eps):
    """s += mean(g**2); w -= lr * g / (sqrt(s) + eps); s is one number a row, the squares added up in halves."""
    squares_D = np.empty(sums_UD.shape[1], np.float32)
    _rowwise_adagrad(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, lr, eps, squares_D)


@nb.njit(**BARE_NUMPY)
def _rowwise_adagrad(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, lr, eps, squares_D):
    dim = sums_UD.shape[1]
    for u in range(start, stop):
        row_E = row_of(values_SE, past_PE, slots_U, u, stop)
        w_D, sum_D = row_E[:dim], sums_UD[u]
        for d in range(dim):
            g = sum_D[d] * scale
            squares_D[d] = g * g
        s = row_E[dim] + sum_in_halves(squares_D) / np.float32(dim)
        row_E[dim] = s
        rate = lr / (np.sqrt(s) + eps)
        for d in range(dim):
            w_D[d] -= rate * (sum_D[d] * scale)


@nb.njit(**BARE_NUMPY)
def adam(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, rate, one_minus_beta1, one_minus_beta2, eps):
    """m += (1 - b1)(g - m); v += (1 - b2)(g**2 - v); w -= rate * m / (sqrt(v) + eps)

    rate = lr * sqrt(1 - b2**t) / (1 - b1**t), so eps stands outside the bias correction, as in torch's SparseAdam.
    """
    dim = sums_UD.shape[1]
    for u in range(start, stop):
        row_E = row_of(values_SE, past_PE, slots_U, u, stop)
        w_D, m_D, v_D, sum_D = row_E[:dim], row_E[dim : 2 * dim], row_E[2 * dim : 3 * dim], sums_UD[u]
        for d in range(dim):
            g = sum_D[d] * scale
            m = m_D[d] + (g - m_D[d]) * one_minus_beta1
            v = v_D[d] + (g * g - v_D[d]) * one_minus_beta2
            m_D[d] = m
            v_D[d] = v
            w_D[d] -= rate * (m / (np.sqrt(v) + eps))


@nb.njit(**BARE)
def scale_rows(start, stop, sums_UD, scale):
    """sums_UD *= scale"""
    for u in range(start, stop):
        for d in range(sums_UD.shape[1]):
            sums_UD[u, d] *= scale
