"""Weight decay in front of the rules of rules.py, as range kernels like those: only the rows of a gradient decay.

Each hands one row after another to the rule without decay, so that the two cannot drift apart.
"""

import numba as nb
import numpy as np

from bigembed.kernels import rules
from bigembed.kernels.rules import row_of

_adagrad, _rowwise_adagrad, _adam = rules.adagrad, rules.rowwise_adagrad, rules.adam


@nb.njit(nogil=True, cache=True, inline="always")
def _decayed_gradient(row_E, sum_D, scale, weight_decay, out_D):
    for d in range(out_D.shape[0]):
        out_D[d] = sum_D[d] * scale + weight_decay * row_E[d]


@nb.njit(nogil=True, cache=True)
def adagrad_decayed(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, lr, eps, weight_decay):
    """g += weight_decay * w; then adagrad"""
    one, grad_1D = np.float32(1.0), np.empty((1, sums_UD.shape[1]), np.float32)
    for u in range(start, stop):
        _decayed_gradient(row_of(values_SE, past_PE, slots_U, u, stop), sums_UD[u], scale, weight_decay, grad_1D[0])
        _adagrad(0, 1, values_SE, past_PE, slots_U[u : u + 1], grad_1D, one, lr, eps)


@nb.njit(nogil=True, cache=True)
def rowwise_adagrad_decayed(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, lr, eps, weight_decay):
    """g += weight_decay * w; then rowwise_adagrad"""
    one, grad_1D = np.float32(1.0), np.empty((1, sums_UD.shape[1]), np.float32)
    for u in range(start, stop):
        _decayed_gradient(row_of(values_SE, past_PE, slots_U, u, stop), sums_UD[u], scale, weight_decay, grad_1D[0])
        _rowwise_adagrad(0, 1, values_SE, past_PE, slots_U[u : u + 1], grad_1D, one, lr, eps)


@nb.njit(nogil=True, cache=True)
def adam_decayed(
    start, stop, values_SE, past_PE, slots_U, sums_UD, scale, rate, one_minus_beta1, one_minus_beta2, eps, weight_decay
):
    """g += weight_decay * w; then adam"""
    one, grad_1D = np.float32(1.0), np.empty((1, sums_UD.shape[1]), np.float32)
    for u in range(start, stop):
        _decayed_gradient(row_of(values_SE, past_PE, slots_U, u, stop), sums_UD[u], scale, weight_decay, grad_1D[0])
        _adam(0, 1, values_SE, past_PE, slots_U[u : u + 1], grad_1D, one, rate, one_minus_beta1, one_minus_beta2, eps)


@nb.njit(nogil=True, cache=True)
def adamw(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, rate, one_minus_beta1, one_minus_beta2, eps, keep):
    """w *= keep; then adam. keep = 1 - lr * weight_decay."""
    for u in range(start, stop):
        row_E = row_of(values_SE, past_PE, slots_U, u, stop)
        for d in range(sums_UD.shape[1]):
            row_E[d] *= keep
    _adam(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, rate, one_minus_beta1, one_minus_beta2, eps)
