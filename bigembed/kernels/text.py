"""Lines of text to tokens and numbers: a token, then D numbers, each after spaces or tabs.

A buffer holds whole lines, each ended by a line feed, and goes on for `SLACK_BYTES` after the last. What is written
as the tools write it is read here; every line that is not gets the status UNSURE, and Python reads it or says what is
wrong with it (bigembed.convert.lines).
"""

import numba as nb
import numpy as np

from bigembed.kernels.decimals import read_any_number, read_plain_numbers
from bigembed.kernels.tokens import word_at

GOOD, UNSURE, BLANK = 0, 1, 2
U = np.uint64
_ONE, _EIGHT = U(1), U(8)
_TAB, _FEED, _RETURN, _SPACE = 9, 10, 13, 32
_ZERO, _NINE, _PLUS, _MINUS, _POINT = 48, 57, 43, 45, 46


@nb.njit(nogil=True, cache=True)
def find_lines(buffer_B, at, stop, start_L, stop_L):
    """Where the next lines begin and end (their line feed), as many as there is room for; returns how many."""
    count = 0
    start = U(at)
    p = U(at)
    end = U(stop)
    while p < end and count < start_L.shape[0]:
        # A byte of `differs` is 0 where there is a line feed; the lowest such one is found without fail.
        differs = word_at(buffer_B, p) ^ U(0x0A0A0A0A0A0A0A0A)
        if (differs - U(0x0101010101010101)) & ~differs & U(0x8080808080808080) == U(0):
            p += _EIGHT
            continue
        while buffer_B[p] != _FEED:
            p += _ONE
        if p < end:
            start_L[count] = start
            stop_L[count] = p
            count += 1
        p += _ONE
        start = p
    return count


@nb.njit(nogil=True, cache=True, inline="always")
def is_separator(byte):
    return byte in (_SPACE, _TAB)


@nb.njit(nogil=True, cache=True)
def skip_blank(buffer_B, at, stop):
    """The first place from `at` on with something else than spaces, tabs and carriage returns; or stop."""
    p = at
    while p < stop and (is_separator(buffer_B[p]) or buffer_B[p] == _RETURN):
        p += _ONE
    return p


@nb.njit(nogil=True, cache=True)
def read_numbers(buffer_B, at, fives_P2, values_D):
    """Read D numbers, each after separators; returns where the last one ends, or 0 where one is not told here."""
    d, p = read_plain_numbers(buffer_B, at, 0, values_D)
    while d < values_D.shape[0]:
        first = p
        while is_separator(buffer_B[first]):
            first += _ONE
        value, after = read_any_number(buffer_B, first, fives_P2)
        if after == first or first == p:
            return U(0)
        values_D[d] = np.float32(value)
        d, p = read_plain_numbers(buffer_B, after, d + 1, values_D)
    return p


@nb.njit(nogil=True, cache=True)
def token_end(buffer_B, start, stop, fields):
    """Where the token ends that stands before the last `fields` fields of a line; start where there are too few."""
    p = stop
    while p > start and (is_separator(buffer_B[p - _ONE]) or buffer_B[p - _ONE] == _RETURN):
        p -= _ONE
    for _ in range(fields):
        while p > start and not is_separator(buffer_B[p - _ONE]):
            p -= _ONE
        while p > start and is_separator(buffer_B[p - _ONE]):
            p -= _ONE
    return p


@nb.njit(nogil=True, cache=True)
def is_plain_token(buffer_B, start, stop):
    """Whether a token holds no zero byte, and no field after its first that might be a number."""
    first = start  # of the field
    for p in range(start, stop):
        byte = buffer_B[p]
        if byte == 0:
            return False
        if is_separator(byte):
            first = p + _ONE
        elif first > start and (p + _ONE == stop or is_separator(buffer_B[p + _ONE])):
            begins = buffer_B[first]
            may_begin = _ZERO <= begins <= _NINE or begins in (_PLUS, _MINUS, _POINT)
            if may_begin and (_ZERO <= byte <= _NINE or byte == _POINT):
                return False
    return True


@nb.njit(nogil=True, cache=True)
def read_lines(start, stop, buffer_B, start_L, stop_L, row_L, fives_P2, values_MD, token_stop_L, status_L):
    """Read lines: numbers into row row_L[line] of values_MD, the token's end into token_stop_L, and a status.

    A line with row_L < 0 is too short for D numbers; it has no row and is BLANK or UNSURE.
    """
    dim = values_MD.shape[1]
    for line in range(start, stop):
        first, last = U(start_L[line]), U(stop_L[line])
        status_L[line] = UNSURE
        if row_L[line] < 0:
            if skip_blank(buffer_B, first, last) == last:
                status_L[line] = BLANK
            continue
        values_D = values_MD[row_L[line]]
        p = first
        while buffer_B[p] > _SPACE:
            p += _ONE
        after = read_numbers(buffer_B, p, fives_P2, values_D) if p > first else U(0)
        if after == U(0) or skip_blank(buffer_B, after, last) != last:
            # Spaces in the token, or more or fewer fields than there should be: count them from the right.
            p = token_end(buffer_B, first, last, dim)
            if p == first:
                if skip_blank(buffer_B, first, last) == last:
                    status_L[line] = BLANK
                continue
            after = read_numbers(buffer_B, p, fives_P2, values_D)
            if after == U(0) or skip_blank(buffer_B, after, last) != last or not is_plain_token(buffer_B, first, p):
                continue
        token_stop_L[line] = p
        status_L[line] = GOOD


@nb.njit(nogil=True, cache=True)
def pack_tokens(start, stop, buffer_B, start_M, packed_M1, out_B):
    """Copy tokens, each from start_M[m] on, to where packed_M1 says that it begins and ends in out_B."""
    for m in range(start, stop):
        shift = start_M[m] - packed_M1[m]
        for at in range(packed_M1[m], packed_M1[m + 1]):
            out_B[at] = buffer_B[at + shift]
