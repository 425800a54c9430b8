"""Tokens on their way into a file: those that it cannot hold, and records of a token and its numbers."""

import numba as nb
import numpy as np

INSIDE, FIRST, LAST = 1, 2, 4  # where a byte may not stand in a token

_SPACE = 32


@nb.njit(nogil=True, cache=True)
def first_refused(start, stop, bytes_B, start_M1, refused_256):
    """The first token that holds a byte where it may not stand, or -1.

    Args:
        refused_256: uint8, for each byte a sum of INSIDE (anywhere), FIRST and LAST.
    """
    for m in range(start, stop):
        first, end = start_M1[m], start_M1[m + 1]
        found = np.uint8(0)
        for b in range(first, end):
            found |= refused_256[bytes_B[b]]
        if found == 0:
            continue
        if found & INSIDE or refused_256[bytes_B[first]] & FIRST or refused_256[bytes_B[end - 1]] & LAST:
            return m
    return -1


@nb.njit(nogil=True, cache=True)
def pack_records(start, stop, bytes_B, start_M1, numbers_MB, out_B):
    """Write "token", a space and the bytes of the numbers for each row, one after the other, from out_B[0] on."""
    width = numbers_MB.shape[1]
    for m in range(start, stop):
        at = start_M1[m] - start_M1[0] + m * (width + 1)
        for b in range(start_M1[m], start_M1[m + 1]):
            out_B[at] = bytes_B[b]
            at += 1
        out_B[at] = _SPACE
        at += 1
        for b in range(width):
            out_B[at + b] = numbers_MB[m, b]
