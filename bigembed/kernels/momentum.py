"""SGD with momentum and weight decay, as range kernels like those of rules.py: only the rows of a gradient change.

A row is its D weights w, then D columns of momentum b, then where dampening is used one column that says whether b
was ever set: 0 or 1.
"""

import numba as nb
import numpy as np

from bigembed.kernels.bare import BARE_NUMPY
from bigembed.kernels.rules import row_of


@nb.njit(**BARE_NUMPY)
def sgd_decayed(start, stop, values_SE, past_PE, slots_U, sums_UD, scale, lr, weight_decay):
    """w -= lr * (g + weight_decay * w)"""
    dim = sums_UD.shape[1]
    for u in range(start, stop):
        w_D, sum_D = row_of(values_SE, past_PE, slots_U, u, stop)[:dim], sums_UD[u]
        for d in range(dim):
            w_D[d] -= lr * (sum_D[d] * scale + weight_decay * w_D[d])


@nb.njit(**BARE_NUMPY)
def sgd_momentum(
    start, stop, values_SE, past_PE, slots_U, sums_UD, scale, lr, weight_decay, momentum, kept, nesterov, has_flag
):
    """g += weight_decay * w; b = momentum * b + kept * g; w -= lr * b, or lr * (g + momentum * b) with nesterov.

    kept is 1 - dampening. With has_flag the column after b is 0 until the row's first gradient, for which b = g.
    """
    dim = sums_UD.shape[1]
    for u in range(start, stop):
        row_E = row_of(values_SE, past_PE, slots_U, u, stop)
        w_D, b_D, sum_D = row_E[:dim], row_E[dim : 2 * dim], sums_UD[u]
        is_first = has_flag and row_E[2 * dim] == 0
        for d in range(dim):
            g = sum_D[d] * scale
            if weight_decay != 0:
                g = g + weight_decay * w_D[d]
            b = g if is_first else momentum * b_D[d] + kept * g
            b_D[d] = b
            w_D[d] -= lr * (g + momentum * b if nesterov else b)
        if has_flag:
            row_E[2 * dim] = np.float32(1.0)
