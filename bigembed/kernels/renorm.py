"""max_norm: by how much rows are too long, and the shortening. Range kernels: each range writes only its own outputs.

The norm is summed as torch's CPU kernels do it on x86 (`norm_kernel_tensor_iterator_impl` in
aten/src/ATen/native/cpu/ReduceOpsKernel.cpp, as compiled in the wheels): the 2-norm in 8 lanes of float32, of the
columns left over whole fours in order, and the last three by fused multiply-add; other norms in float32 in column
order. So norms 0, 1, 2 and inf equal torch's bit by bit there; here they are the same on every processor. Other
exponents may differ from torch's in the last bits: its float32 power is not rounded correctly.
"""

import numba as nb
import numpy as np

LANES = 8
EPSILON = 1e-7  # torch's, so that a row of norm 0 is not divided by it


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _two_norm(row_D, lanes_J):
    """sqrt(sum of x**2); lanes_J is scratch."""
    dim = row_D.shape[0]
    whole = dim - dim % LANES
    lanes_J[:] = 0
    for d in range(0, whole, LANES):
        for j in range(LANES):
            lanes_J[j] += row_D[d + j] * row_D[d + j]
    total = lanes_J[0]
    for j in range(1, LANES):
        total += lanes_J[j]
    fours = dim - dim % 4
    for d in range(whole, fours):
        total += row_D[d] * row_D[d]
    for d in range(fours, dim):
        x = np.float64(row_D[d])  # a product of two float32 is exact in float64, so this is a fused multiply-add
        total = np.float32(np.float64(total) + x * x)
    return np.sqrt(total)


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _largest(row_D, sign):
    """max |x|, or min |x| for sign -1; NaN where a value is."""
    found = np.float32(0.0) if sign > 0 else np.float32(np.inf)
    for d in range(row_D.shape[0]):
        x = abs(row_D[d])
        if np.isnan(x):
            return x
        if (x > found) == (sign > 0):
            found = x
    return found


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _power_norm(row_D, p):
    """(sum of |x|**p)**(1/p); each power is taken in float64 and rounded to float32."""
    total = np.float32(0.0)
    exponent = np.float64(np.float32(p))
    root = np.float64(np.float32(1.0) / np.float32(p))
    for d in range(row_D.shape[0]):
        total += np.float32(np.float64(abs(row_D[d])) ** exponent)
    return np.float32(np.float64(total) ** root)


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _norm(row_D, p, lanes_J):
    """The p-norm in float32."""
    total = np.float32(0.0)
    if p == 0.0:
        for d in range(row_D.shape[0]):
            total += np.float32(row_D[d] != 0)
        return total
    if np.isinf(p):
        return _largest(row_D, np.sign(p))
    if row_D.shape[0] == 1:
        return abs(row_D[0])  # neither overflows nor vanishes
    if p == 2.0:
        return _two_norm(row_D, lanes_J)
    if p == 1.0:
        for d in range(row_D.shape[0]):
            total += abs(row_D[d])
        return total
    return _power_norm(row_D, p)


@nb.njit(nogil=True, cache=True, error_model="numpy")
def row_scales(start, stop, rows_UD, max_norm, norm_type, scale_U):
    """scale_U[u] = what a row longer than max_norm is to be multiplied by, max_norm / (norm + 1e-7); 1 for others.

    rows_UD and scale_U are float32, max_norm and norm_type float64; the division is in float64.
    """
    lanes_J = np.empty(LANES, np.float32)
    for u in range(start, stop):
        norm = np.float64(_norm(rows_UD[u], norm_type, lanes_J))
        scale_U[u] = np.float32(max_norm / (norm + EPSILON)) if norm > max_norm else np.float32(1.0)


@nb.njit(nogil=True, cache=True, error_model="numpy")
def scale_weights(start, stop, values_SE, past_PE, slots_U, scale_U, dim):
    """The first dim values (the weights) of row u *= scale_U[u]; it is in slot slots_U[u], as in kernels/rules.py."""
    slots = values_SE.shape[0]
    for u in range(start, stop):
        slot = slots_U[u]
        if slot < slots:
            for d in range(dim):
                values_SE[slot, d] *= scale_U[u]
        else:
            for d in range(dim):
                past_PE[slot - slots, d] *= scale_U[u]
