"""MurmurHash over bytes: the 64-bit one that numbers spaCy's strings, and the 128-bit one of floret.

Source: Austin Appleby, MurmurHash2.cpp (`MurmurHash64A`) and MurmurHash3.cpp (`MurmurHash3_x64_128`), public domain.
"""

import numba as nb
import numpy as np

_M = np.uint64(0xC6A4A7935BD1E995)
_R = np.uint64(47)
_C1, _C2 = np.uint64(0x87C37B91114253D5), np.uint64(0x4CF5AD432745937F)
_F1, _F2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_A1, _A2 = np.uint64(0x52DCE729), np.uint64(0x38495AB5)
_FIVE, _S33 = np.uint64(5), np.uint64(33)


@nb.njit(nogil=True, cache=True, inline="always")
def _word(bytes_B, first, count):
    """The little-endian number of `count` bytes, at most 8."""
    value = np.uint64(0)
    for b in range(count):
        value |= np.uint64(bytes_B[first + b]) << np.uint64(8 * b)
    return value


@nb.njit(nogil=True, cache=True)
def murmur64a(bytes_B, first, last, seed):
    """MurmurHash64A of bytes_B[first:last]."""
    value = np.uint64(seed) ^ (np.uint64(last - first) * _M)
    while first + 8 <= last:
        word = _word(bytes_B, first, 8) * _M
        value = (value ^ ((word ^ (word >> _R)) * _M)) * _M
        first += 8
    if first < last:
        value = (value ^ _word(bytes_B, first, last - first)) * _M
    value = (value ^ (value >> _R)) * _M
    return value ^ (value >> _R)


@nb.njit(nogil=True, cache=True)
def hash_strings(start, stop, bytes_B, start_M1, seed, out_M):
    """out_M[m] (uint64) = MurmurHash64A of string m; with seed 1 it is the key that spaCy gives a string."""
    for m in range(start, stop):
        out_M[m] = murmur64a(bytes_B, start_M1[m], start_M1[m + 1], seed)


@nb.njit(nogil=True, cache=True, inline="always")
def _rotate(x, bits):
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


@nb.njit(nogil=True, cache=True, inline="always")
def _finish(x):
    x = (x ^ (x >> _S33)) * _F1
    x = (x ^ (x >> _S33)) * _F2
    return x ^ (x >> _S33)


@nb.njit(nogil=True, cache=True)
def murmur128(bytes_B, first, last, seed):
    """MurmurHash3_x64_128 of bytes_B[first:last], as two uint64."""
    count = np.uint64(last - first)
    one, two = np.uint64(seed), np.uint64(seed)
    while first + 16 <= last:
        one ^= _rotate(_word(bytes_B, first, 8) * _C1, 31) * _C2
        one = (_rotate(one, 27) + two) * _FIVE + _A1
        two ^= _rotate(_word(bytes_B, first + 8, 8) * _C2, 33) * _C1
        two = (_rotate(two, 31) + one) * _FIVE + _A2
        first += 16
    if first + 8 < last:
        two ^= _rotate(_word(bytes_B, first + 8, last - first - 8) * _C2, 33) * _C1
    if first < last:
        one ^= _rotate(_word(bytes_B, first, min(8, last - first)) * _C1, 31) * _C2
    one ^= count
    two ^= count
    one += two
    two += one
    one, two = _finish(one), _finish(two)
    one += two
    return one, two + one
