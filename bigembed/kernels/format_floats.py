"""float32 numbers as text: the shortest decimal that gives the same float32 back, and of these the closest.

All arithmetic is in int64 without overflow, so the kernels are the same with and without the compiler.

Source: Raffaello Giulietti, "The Schubfach way to render doubles", 2020, with the constants for 24-bit significands.
"""

import numba as nb
import numpy as np

NUMBER_BYTES = 20  # of the longest text, "-1000000000000000.0", and one separator

_LEAST_POWER, _LARGEST_POWER = -31, 45  # of ten, that a float32 can ask for
_MINUS, _DOT, _ZERO = 45, 46, 48
_SPACE, _NEWLINE = 32, 10

# Numbers are positional from 1e-4 to below 1e16, as Python writes its own: the bits of the first float32 that is not
# below each (the float32 nearest to 1e-4 is below it, that nearest to 1e16 above).
_FIRST_POSITIONAL = int(np.nextafter(np.float32(1e-4), np.float32(1)).view(np.uint32))
_FIRST_LARGE = int(np.float32(1e16).view(np.uint32))
_INFINITE = 0x7F800000


def _powers() -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower 32 bits of 10**k, scaled by a power of two to 64 bits and rounded up."""
    high, low = [], []
    for k in range(_LEAST_POWER, _LARGEST_POWER + 1):
        shift = 63 - ((k * 1741647) >> 19)  # 63 - floor(log2(10**k))
        scaled = 10 ** max(k, 0) << max(shift, 0)
        divisor = 10 ** max(-k, 0) << max(-shift, 0)
        whole = -(-scaled // divisor)
        assert whole.bit_length() == 64
        high.append(whole >> 32)
        low.append(whole & 0xFFFFFFFF)
    return np.array(high, np.int64), np.array(low, np.int64)


_HIGH_K, _LOW_K = _powers()


@nb.njit(nogil=True, cache=True)
def _scaled(high, low, factor):
    """floor(power * factor / 2**64), its last bit set where the rest is not zero: rounded to odd."""
    product = high * factor + ((low * factor) >> 32)
    return (product >> 32) | np.int64((product & 0xFFFFFFFF) > 1)


@nb.njit(nogil=True, cache=True)
def shortest_decimal(bits):
    """(digits, exponent): the shortest digits * 10**exponent in the interval that rounds to a positive float32.

    Args:
        bits: int64, of a finite float32 above zero. Digits may end in zeros.
    """
    fraction = bits & 0x7FFFFF
    biased = bits >> 23
    if biased != 0:
        c, q = fraction | 0x800000, biased - 150
        if -24 < q <= 0 and c & ((1 << -q) - 1) == 0:
            return c >> -q, np.int64(0)  # a small integer
    else:
        c, q = fraction, np.int64(-149)
    odd = c & 1  # the ends of the interval belong to an even significand
    is_irregular = np.int64(fraction == 0 and biased > 1)  # below a power of two floats lie twice as close
    k = (q * 1262611 - is_irregular * 524031) >> 22  # floor(log10(2**q)), or of 3/4 of that
    h = q + ((-k * 1741647) >> 19) + 1
    high, low = _HIGH_K[-k - _LEAST_POWER], _LOW_K[-k - _LEAST_POWER]
    lower = _scaled(high, low, (4 * c - 2 + is_irregular) << h) + odd
    value = _scaled(high, low, (4 * c) << h)
    upper = _scaled(high, low, (4 * c + 2) << h) - odd
    # In units of a quarter of 10**k: is a multiple of 10**(k + 1) inside, or else one of 10**k?
    digits = value >> 2
    if digits >= 10:
        tens = digits // 10
        below, above = lower <= 40 * tens, 40 * tens + 40 <= upper
        if below != above:
            return tens + np.int64(above), k + 1
    below, above = lower <= 4 * digits, 4 * digits + 4 <= upper
    if below != above:
        return digits + np.int64(above), k
    middle = 4 * digits + 2
    return digits + np.int64(value > middle or (value == middle and digits & 1 == 1)), k


@nb.njit(nogil=True, cache=True)
def _write_digits(digits, count, out_B, at):
    """The last `count` decimal digits, ending before out_B[at + count]."""
    for place in range(at + count - 1, at - 1, -1):
        rest = digits // 10
        out_B[place] = _ZERO + digits - 10 * rest
        digits = rest


@nb.njit(nogil=True, cache=True)
def _write_word(first, second, third, out_B, at):
    out_B[at], out_B[at + 1], out_B[at + 2] = first, second, third
    return at + 3


@nb.njit(nogil=True, cache=True)
def _write_positional(digits, count, point, out_B, at):
    """0.000ddd, dd.ddd or ddd000.0: `point` digits stand before the point."""
    if point <= 0:
        out_B[at], out_B[at + 1] = _ZERO, _DOT
        at += 2
        for _ in range(-point):
            out_B[at] = _ZERO
            at += 1
        _write_digits(digits, count, out_B, at)
        return at + count
    if point >= count:
        _write_digits(digits, count, out_B, at)
        for place in range(at + count, at + point):
            out_B[place] = _ZERO
        out_B[at + point], out_B[at + point + 1] = _DOT, _ZERO
        return at + point + 2
    _write_digits(digits, count, out_B, at + 1)
    for place in range(at, at + point):
        out_B[place] = out_B[place + 1]
    out_B[at + point] = _DOT
    return at + count + 1


@nb.njit(nogil=True, cache=True)
def _write_scientific(digits, count, exponent, out_B, at):
    """d.ddde-07: at least two digits of exponent."""
    _write_digits(digits, count, out_B, at + 1)
    out_B[at] = out_B[at + 1]
    at += 1
    if count > 1:
        out_B[at] = _DOT
        at += count
    out_B[at] = 101  # e
    out_B[at + 1] = _MINUS if exponent < 0 else 43
    _write_digits(abs(exponent), 2, out_B, at + 2)
    return at + 4


@nb.njit(nogil=True, cache=True)
def write_float(bits, out_B, at):
    """Write the float32 of these bits (int64) from out_B[at] on, so that reading it gives the same; returns its end."""
    size = bits & 0x7FFFFFFF
    if size > _INFINITE:
        return _write_word(110, 97, 110, out_B, at)  # nan
    if bits != size:
        out_B[at] = _MINUS
        at += 1
    if size == _INFINITE:
        return _write_word(105, 110, 102, out_B, at)  # inf
    if size == 0:
        return _write_word(_ZERO, _DOT, _ZERO, out_B, at)
    digits, exponent = shortest_decimal(size)
    while digits % 10 == 0:
        digits //= 10
        exponent += 1
    count, bound = 1, np.int64(10)
    while digits >= bound:
        count += 1
        bound *= 10
    if _FIRST_POSITIONAL <= size < _FIRST_LARGE:
        return _write_positional(digits, count, count + exponent, out_B, at)
    return _write_scientific(digits, count, count + exponent - 1, out_B, at)


@nb.njit(nogil=True, cache=True)
def format_lines(start, stop, values_MD, bytes_B, start_M1, out_B):
    """Write a line for each row, "token number number ...\\n"; returns (first byte, byte after the last) in out_B.

    Row m's line begins no later than `line_offset(m)`, so each range has bytes of its own and its lines follow each
    other without a gap.
    """
    words_MD = values_MD.view(np.uint32)
    first = line_offset(start, values_MD.shape[1], start_M1)
    at = first
    for m in range(start, stop):
        for b in range(start_M1[m], start_M1[m + 1]):
            out_B[at] = bytes_B[b]
            at += 1
        for d in range(words_MD.shape[1]):
            out_B[at] = _SPACE
            at = write_float(np.int64(words_MD[m, d]), out_B, at + 1)
        out_B[at] = _NEWLINE
        at += 1
    return first, at


@nb.njit(nogil=True, cache=True)
def line_offset(m, dim, start_M1):
    """A bound on the bytes of all lines before line m, whatever the numbers are."""
    return start_M1[m] - start_M1[0] + m * (dim * NUMBER_BYTES + 1)
