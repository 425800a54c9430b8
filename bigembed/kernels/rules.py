"""Optimizer rules as range kernels over the rows of a pending gradient, in float32.

Each is `rule(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, ...)`: row u is in slot slots_U[u] of
values_SE, or past the cache in past_PE; g is the gradient sums_UD[u] times scale. A row is its D weights w, then its
state. Every row has one writer, so the bits do not depend on the thread count.
"""

import numba as nb
import numpy as np


@nb.njit(nogil=True, cache=True, inline="always")
def _row(values_SE, past_PE, slot):
    slots = values_SE.shape[0]
    return values_SE[slot] if slot < slots else past_PE[slot - slots]


@nb.njit(nogil=True, cache=True)
def sgd(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, lr):
    """w -= lr * g"""
    for u in range(start, stop):
        row_E = _row(values_SE, past_PE, slots_U[u])
        for d in range(sums_UD.shape[1]):
            row_E[d] -= lr * (sums_UD[u, d] * scale)


@nb.njit(nogil=True, cache=True)
def adagrad(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, lr, eps):
    """s += g**2; w -= lr * g / (sqrt(s) + eps)"""
    dim = sums_UD.shape[1]
    for u in range(start, stop):
        row_E = _row(values_SE, past_PE, slots_U[u])
        for d in range(dim):
            g = sums_UD[u, d] * scale
            s = row_E[dim + d] + g * g
            row_E[dim + d] = s
            row_E[d] -= lr * (g / (np.sqrt(s) + eps))


@nb.njit(nogil=True, cache=True)
def rowwise_adagrad(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, lr, eps):
    """s += mean(g**2); w -= lr * g / (sqrt(s) + eps); s is one number a row, the mean added up in column order."""
    dim = sums_UD.shape[1]
    for u in range(start, stop):
        row_E = _row(values_SE, past_PE, slots_U[u])
        total = np.float32(0.0)
        for d in range(dim):
            g = sums_UD[u, d] * scale
            total += g * g
        s = row_E[dim] + total / np.float32(dim)
        row_E[dim] = s
        rate = lr / (np.sqrt(s) + eps)
        for d in range(dim):
            row_E[d] -= rate * (sums_UD[u, d] * scale)


@nb.njit(nogil=True, cache=True)
def adam(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, rate, one_minus_beta1, one_minus_beta2, eps):
    """m += (1 - b1)(g - m); v += (1 - b2)(g**2 - v); w -= rate * m / (sqrt(v) + eps)

    rate = lr * sqrt(1 - b2**t) / (1 - b1**t), so eps stands outside the bias correction, as in torch's SparseAdam.
    """
    dim = sums_UD.shape[1]
    for u in range(start, stop):
        row_E = _row(values_SE, past_PE, slots_U[u])
        for d in range(dim):
            g = sums_UD[u, d] * scale
            m = row_E[dim + d]
            v = row_E[2 * dim + d]
            m = m + (g - m) * one_minus_beta1
            v = v + (g * g - v) * one_minus_beta2
            row_E[dim + d] = m
            row_E[2 * dim + d] = v
            row_E[d] -= rate * (m / (np.sqrt(v) + eps))


@nb.njit(nogil=True, cache=True)
def scale_rows(start, stop, sums_UD, scale):
    """sums_UD *= scale"""
    for u in range(start, stop):
        for d in range(sums_UD.shape[1]):
            sums_UD[u, d] *= scale


@nb.njit(nogil=True, cache=True)
def row_squares(start, stop, sums_UD, out_U):
    """out_U[u] = the sum of squares of sums_UD[u], in float64."""
    for u in range(start, stop):
        total = 0.0
        for d in range(sums_UD.shape[1]):
            g = np.float64(sums_UD[u, d])
            total += g * g
        out_U[u] = total
