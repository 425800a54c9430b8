"""Integer hashing that is the same on every machine: the finalizer of splitmix64.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; Stafford's variant 13.
"""

import numba as nb
import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S32 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32)


@nb.njit(nogil=True, cache=True, inline="always")
def mix64(x):
    """A bijection of 64-bit integers in which every input bit moves about half of the output bits."""
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


def mixed(x):
    """`mix64` of a uint64 or an array of them without compiled code: opening a table need not wake Numba (0.4 s)."""
    with np.errstate(over="ignore"):
        return getattr(mix64, "py_func", mix64)(x)


@nb.njit(nogil=True, cache=True, inline="always")
def bucket(row, count):
    """A bucket 0..count-1 for a row; count < 2**32. Multiply-shift, so count need not be a power of two."""
    high = mix64(np.uint64(row) * GOLDEN) >> _S32
    return np.int64((high * np.uint64(count)) >> _S32)
