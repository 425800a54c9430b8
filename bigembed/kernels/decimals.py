"""Decimal text to float64, correctly rounded: every number equals Python's float() of the same characters.

Up to 19 significant digits are one integer; it is multiplied or divided by a power of ten where both are exact in
float64, else by a power of five in 128 bits. Text that this cannot decide, and whatever is no finite float32, is left
to the caller. A buffer must go on for `SLACK_BYTES` past its last number.

Source: Clinger, "How to read floating point numbers accurately", PLDI 1990 (the exact case); Lemire, "Number parsing
at a gigabyte per second", Software: Practice and Experience 51 (2021), and Mushtak, Lemire, "Fast number parsing
without fallback", the same 53 (2023) (128 bits are enough; eight digits at once).
"""

import math
from functools import cache

import numba as nb
import numpy as np

from bigembed.kernels.tokens import word_at

SLACK_BYTES = 16
U = np.uint64
FIRST_POWER, LAST_POWER = -342, 308
FIRST_RAISED = -27  # 5**27 is the last power that fits 64 bits
# Below this a float64 rounds to a finite float32: half a unit past the largest one.
FLOAT32_END = 3.4028235677973366e38
_TENS = np.array([10.0**k for k in range(23)])
_TENS_U = np.array([10**k for k in range(8)], np.uint64)
_ZERO, _NINE, _TEN, _ONE = U(48), U(9), U(10), U(1)
_PLUS, _MINUS, _POINT, _E = 43, 45, 46, 101
_TAB, _SPACE = 9, 32
_LARGEST_EXACT = U(1 << 53)
_MOST_DIGITS = 19
_MANTISSA_BITS = 52
_MOST_EXPONENT = 100_000  # far beyond every float64; keeps the exponent's own digits from wrapping around
_S1, _S8, _S16, _S32, _S56, _S63 = U(1), U(8), U(16), U(32), U(56), U(63)
_LOW_32 = U(0xFFFFFFFF)
_FULL_9 = U(0x1FF)


@cache
def powers_of_five() -> np.ndarray:
    """uint64 (P, 2): the first 128 bits of 5**q for q = FIRST_POWER to LAST_POWER, high word first.

    Cut, but for FIRST_RAISED <= q < 0 raised to the next integer: for these the proof takes them as reciprocals.
    """
    rows = []
    for q in range(FIRST_POWER, LAST_POWER + 1):
        power = 5 ** abs(q)
        if q >= 0:
            bits = power << 128 >> power.bit_length()
        else:
            bits = (1 << (127 + (power - 1).bit_length())) // power + (q >= FIRST_RAISED)
        rows.append((bits >> 64, bits & (2**64 - 1)))
    return np.array(rows, np.uint64)


@nb.njit(nogil=True, cache=True, inline="always")
def eight_digits(digits):
    """The number whose decimal digits are the eight bytes, the first lowest."""
    digits = digits * _TEN + (digits >> _S8)
    odd = (digits >> _S16) & U(0x000000FF000000FF)
    return ((digits & U(0x000000FF000000FF)) * U(0x000F424000000064) + odd * U(0x0000271000000001)) >> _S32


@nb.njit(nogil=True, cache=True)
def multiply_128(a, b):
    """(high, low) of the product of two 64-bit integers."""
    a_high, a_low, b_high, b_low = a >> _S32, a & _LOW_32, b >> _S32, b & _LOW_32
    middle = a_high * b_low + ((a_low * b_low) >> _S32)
    other = a_low * b_high + (middle & _LOW_32)
    return a_high * b_high + (middle >> _S32) + (other >> _S32), a * b


@nb.njit(nogil=True, cache=True)
def leading_zeros(x):
    """Zero bits before the first one of a 64-bit integer that is not 0."""
    count = U(0)
    for shift in (U(32), U(16), U(8), U(4), U(2), U(1)):
        if x >> (U(64) - shift) == U(0):
            count += shift
            x = x << shift
    return count


@nb.njit(nogil=True, cache=True)
def scale(mantissa, tens, fives_P2):
    """The float64 nearest to mantissa * 10**tens, ties to even; infinite where that is too large."""
    if mantissa == U(0) or tens < FIRST_POWER:
        return 0.0
    if tens > LAST_POWER:
        return math.inf
    zeros = leading_zeros(mantissa)
    mantissa = mantissa << zeros
    high, low = multiply_128(mantissa, fives_P2[tens - FIRST_POWER, 0])
    if high & _FULL_9 == _FULL_9:  # the next word of the power may still carry into the bits that count
        more, _ = multiply_128(mantissa, fives_P2[tens - FIRST_POWER, 1])
        low = low + more
        if more > low:
            high += _ONE
    upper = high >> _S63
    shift = upper + U(64 - _MANTISSA_BITS - 3)
    bits = high >> shift  # one bit more than the mantissa: the one that rounds
    # (217706 * tens) >> 16 is floor(tens * log2(10))
    exponent = ((217706 * tens) >> 16) + 63 + np.int64(upper) - np.int64(zeros) + 1023
    if exponent <= 0:  # subnormal
        if exponent <= -63:
            return 0.0
        bits = bits >> U(1 - exponent)
        bits = (bits + (bits & _ONE)) >> _S1
        return math.ldexp(np.float64(np.int64(bits)), -1022 - _MANTISSA_BITS)
    if low <= _ONE and -4 <= tens <= 23 and bits & U(3) == _ONE and bits << shift == high:
        bits &= ~_ONE  # exactly between two: down to the even one
    bits = (bits + (bits & _ONE)) >> _S1
    if exponent >= 2047 or (exponent == 2046 and bits >> U(_MANTISSA_BITS + 1) != U(0)):
        return math.inf
    return math.ldexp(np.float64(np.int64(bits)), int(exponent - 1023 - _MANTISSA_BITS))


@nb.njit(nogil=True, cache=True)
def decimal_value(mantissa, tens, fives_P2):
    """The float64 nearest to mantissa * 10**tens: one exact operation where there is one."""
    if mantissa > _LARGEST_EXACT or tens < -22 or tens > 22:
        return scale(mantissa, tens, fives_P2)
    if tens < 0:
        return np.float64(np.int64(mantissa)) / _TENS[-tens]
    return np.float64(np.int64(mantissa)) * _TENS[tens]


@nb.njit(nogil=True, cache=True)
def read_exponent(buffer_B, at):
    """(exponent, after) of "e-5" and the like; (0, at) where there is none or it has no digits."""
    if buffer_B[at] | 32 != _E:
        return 0, at
    p = at + _ONE
    is_negative = buffer_B[p] == _MINUS
    if is_negative or buffer_B[p] == _PLUS:
        p += _ONE
    first = p
    exponent = np.int64(0)
    digit = U(buffer_B[p]) - _ZERO
    while digit <= _NINE:
        if exponent < _MOST_EXPONENT:
            exponent = exponent * 10 + np.int64(digit)
        p += _ONE
        digit = U(buffer_B[p]) - _ZERO
    if p == first:
        return 0, at
    return (-exponent if is_negative else exponent), p


@nb.njit(nogil=True, cache=True)
def read_any_number(buffer_B, at, fives_P2):
    """(value, after): the number that begins at `at`, in any form, and where it ends; after == at if Python must look.

    Digit by digit: for what `read_plain_numbers` stops at.
    """
    p = at
    if buffer_B[p] == _MINUS or buffer_B[p] == _PLUS:
        p += _ONE
    mantissa = U(0)
    kept = 0  # digits of the mantissa, without zeros in front
    digits = 0
    tens = 0
    is_cut = False
    for part in range(2):  # before the point, after it
        digit = U(buffer_B[p]) - _ZERO
        while digit <= _NINE:
            if kept < _MOST_DIGITS:
                mantissa = mantissa * _TEN + digit
                kept += mantissa != U(0)
                tens -= part
            else:
                is_cut |= digit != U(0)
                tens += 1 - part
            digits += 1
            p += _ONE
            digit = U(buffer_B[p]) - _ZERO
        if part == 1 or buffer_B[p] != _POINT:
            break
        p += _ONE
    exponent, p = read_exponent(buffer_B, p)
    value = decimal_value(mantissa, tens + exponent, fives_P2)
    # With digits cut off the truth lies between this mantissa and the next one.
    is_sure = not is_cut or value == decimal_value(mantissa + _ONE, tens + exponent, fives_P2)
    if digits == 0 or not is_sure or not value < FLOAT32_END:
        return 0.0, at
    return (-value if buffer_B[at] == _MINUS else value), p


@nb.njit(nogil=True, cache=True)
def read_plain_numbers(buffer_B, at, d, values_D):
    """Read numbers d, d + 1, ... of values_D as long as each is written like -0.0123, after spaces or tabs.

    Returns (the d it stops at, where the last one ends). The fast path: eight digits at a time, and one function, since
    the compiler would count references to the arrays at each call.
    """
    while d < values_D.shape[0]:
        p = at
        while buffer_B[p] == _SPACE or buffer_B[p] == _TAB:
            p += _ONE
        if p == at:
            break
        is_negative = buffer_B[p] == _MINUS
        p += U(is_negative)
        first = p
        mantissa = U(0)
        digit = U(buffer_B[p]) - _ZERO
        while digit <= _NINE:
            mantissa = mantissa * _TEN + digit
            p += _ONE
            digit = U(buffer_B[p]) - _ZERO
        digits = p - first
        decimals = U(0)
        if buffer_B[p] == _POINT:
            p += _ONE
            point = p
            while True:
                word = word_at(buffer_B, p) ^ U(0x3030303030303030)
                others = ((word + U(0x7676767676767676)) | word) & U(0x8080808080808080)
                if others != U(0):
                    break
                mantissa = mantissa * U(100_000_000) + eight_digits(word)
                p += U(8)
            # The lowest set bit says how many digits come first; the multiplication turns its place into a count.
            count = (((others & (U(0) - others)) >> U(7)) * U(0x0001020304050607)) >> _S56
            word = (word << (_S56 - _S8 * count)) << _S8
            mantissa = mantissa * _TENS_U[count] + eight_digits(word)
            p += count
            decimals = p - point
            digits += decimals
        if digits - _ONE >= U(_MOST_DIGITS) or mantissa > _LARGEST_EXACT or buffer_B[p] | 32 == _E:
            break
        value = np.float64(np.int64(mantissa)) / _TENS[np.int64(decimals)]
        values_D[d] = np.float32(-value if is_negative else value)
        d += 1
        at = p
    return d, at
