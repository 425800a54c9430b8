"""Initial values of never-written rows: a counter-based generator, exact on every machine.

Value (seed, row, column) is a function of those three numbers alone, so rows may be made in any order, by any
thread, any number of times. Only IEEE + - * / and sqrt on float64 are used, in a fixed order (Numba's and
NumPy's log and cos differ in the last bits), so `tests/naive.py` equals it to the last bit.

Source: the normal quantile is algorithm AS 241 (PPND16) of Wichura, Applied Statistics 37 (1988) 477-484.
"""

from typing import NamedTuple

import numba as nb
import numpy as np

from bigembed.init import KINDS
from bigembed.kernels.hashing import GOLDEN, mix64, mixed
from bigembed.spec import TableSpec

NORMAL, UNIFORM, CONSTANT = (KINDS.index(kind) for kind in ("normal", "uniform", "constant"))
_ROW_STEP = GOLDEN
_COLUMN_STEP = np.uint64(0xD1342543DE82EF95)
_S12 = np.uint64(12)
_S52 = np.uint64(52)
_EXPONENT_MASK = np.uint64(0x7FF)
_MANTISSA_MASK = np.uint64(0x000FFFFFFFFFFFFF)
_HALF_BITS = np.uint64(0x3FE0000000000000)
_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476


class InitialRows(NamedTuple):
    """What a never-written row holds, in the form kernels take."""

    kind: int
    a: float
    b: float
    seed_mix: np.uint64
    padding_row: int  # -1 for none
    dim: int
    state_K: np.ndarray  # float32


def initial_rows(spec: TableSpec) -> InitialRows:
    """The initial values of `spec`'s rows, weight and state."""
    return InitialRows(
        KINDS.index(spec.init.kind),
        spec.init.a,
        spec.init.b,
        np.uint64(mixed(np.uint64(spec.seed))),
        -1 if spec.padding_idx is None else spec.padding_idx,
        spec.dim,
        np.array(spec.state_initial, dtype=np.float32),
    )


@nb.njit(nogil=True, cache=True, inline="always")
def uniform_01(seed_mix, row, column):
    """A float64 strictly between 0 and 1, on the grid (k + 0.5) * 2**-52, where k + 0.5 is exact."""
    bits = mix64(mix64(seed_mix + np.uint64(row) * _ROW_STEP) + np.uint64(column + 1) * _COLUMN_STEP)
    return (np.float64(bits >> _S12) + 0.5) * 2.220446049250313e-16


@nb.njit(nogil=True, cache=True)
def log_01(p, scratch_1):
    """Natural logarithm of a normal float64 in (0, 1): exponent by its bits, mantissa by the atanh series."""
    scratch_1[0] = p
    bits = scratch_1.view(np.uint64)[0]
    exponent = np.int64((bits >> _S52) & _EXPONENT_MASK) - 1022
    scratch_1.view(np.uint64)[0] = (bits & _MANTISSA_MASK) | _HALF_BITS
    m = scratch_1[0]  # in [0.5, 1)
    if m < _SQRT_HALF:
        m = m * 2.0
        exponent -= 1
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    total = 0.0
    for k in range(10, -1, -1):
        total = total * t + 1.0 / (2.0 * k + 1.0)
    return np.float64(exponent) * _LN2 + 2.0 * s * total


@nb.njit(nogil=True, cache=True)
def normal_quantile(p, scratch_1):
    """The x with P(N(0,1) <= x) = p, to about 1e-16 relative."""
    q = p - 0.5
    if -0.425 <= q <= 0.425:
        r = 0.180625 - q * q
        top = 2509.0809287301227 * r + 33430.575583588128
        top = (((top * r + 67265.770927008700) * r + 45921.953931549871) * r + 13731.693765509461) * r
        top = ((top + 1971.5909503065514) * r + 133.14166789178438) * r + 3.3871328727963667
        bottom = 5226.4952788528546 * r + 28729.085735721943
        bottom = (((bottom * r + 39307.895800092711) * r + 21213.794301586596) * r + 5394.1960214247511) * r
        bottom = ((bottom + 687.18700749205790) * r + 42.313330701600911) * r + 1.0
        return q * top / bottom
    r = np.sqrt(-log_01(p if q < 0.0 else 1.0 - p, scratch_1))
    if r <= 5.0:
        r = r - 1.6
        top = 7.7454501427834141e-4 * r + 0.022723844989269184
        top = (((top * r + 0.24178072517745061) * r + 1.2704582524523684) * r + 3.6478483247632045) * r
        top = ((top + 5.7694972214606914) * r + 4.6303378461565453) * r + 1.4234371107496836
        bottom = 1.0507500716444169e-9 * r + 5.4759380849953450e-4
        bottom = (((bottom * r + 0.015198666563616457) * r + 0.14810397642748008) * r + 0.68976733498510000) * r
        bottom = ((bottom + 1.6763848301838038) * r + 2.0531916266377588) * r + 1.0
    else:
        r = r - 5.0
        top = 2.0103343992922881e-7 * r + 2.7115555687434876e-5
        top = (((top * r + 0.0012426609473880784) * r + 0.026532189526576123) * r + 0.29656057182850489) * r
        top = ((top + 1.7848265399172913) * r + 5.4637849111641144) * r + 6.6579046435011038
        bottom = 2.0442631033899397e-15 * r + 1.4215117583164459e-7
        bottom = (((bottom * r + 1.8463183175100547e-5) * r + 7.8686913114561326e-4) * r + 0.014875361290850615) * r
        bottom = ((bottom + 0.13692988092273581) * r + 0.59983220655588794) * r + 1.0
    return -top / bottom if q < 0.0 else top / bottom


@nb.njit(nogil=True, cache=True)
def fill_initial_row(row, initial, out_E, scratch_1):
    """Write the initial weight and state of one row into out_E."""
    dim = initial.dim
    if row == initial.padding_row:
        for d in range(dim):
            out_E[d] = 0.0
    elif initial.kind == CONSTANT:
        for d in range(dim):
            out_E[d] = initial.a
    elif initial.kind == UNIFORM:
        for d in range(dim):
            out_E[d] = initial.a + (initial.b - initial.a) * uniform_01(initial.seed_mix, row, d)
    else:
        for d in range(dim):
            out_E[d] = initial.a + initial.b * normal_quantile(uniform_01(initial.seed_mix, row, d), scratch_1)
    for k in range(initial.state_K.shape[0]):
        out_E[dim + k] = initial.state_K[k]


@nb.njit(nogil=True, cache=True)
def fill_initial(start, stop, rows_M, initial, out_ME):
    """Write the initial values of rows_M into out_ME."""
    scratch_1 = np.empty(1, np.float64)
    for m in range(start, stop):
        fill_initial_row(rows_M[m], initial, out_ME[m], scratch_1)
