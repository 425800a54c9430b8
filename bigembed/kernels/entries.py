"""Tokens cut out of a stretch of a file's dictionary: ended by a zero byte, or preceded by their length."""

import numba as nb
import numpy as np

COUNT_BYTES = 4  # of the length before a counted token


@nb.njit(nogil=True, cache=True)
def cut_ended(buffer_B, first, last, most, tail_bytes, token_B, end_M, kind_M):
    """Whole entries of buffer_B[first:last]: bytes, a zero, `tail_bytes` bytes of which the last one is its kind.

    Returns how many there were, at most `most`, where the next one begins, and the bytes written to token_B, which has
    room for last - first. end_M[m] is where token m ends there.
    """
    count, at, out = 0, first, 0
    while count < most:
        stop = at
        while stop < last and buffer_B[stop] != 0:
            stop += 1
        if stop + 1 + tail_bytes > last:
            break
        for b in range(at, stop):
            token_B[out + b - at] = buffer_B[b]
        out += stop - at
        end_M[count] = out
        kind_M[count] = buffer_B[stop + tail_bytes]
        count += 1
        at = stop + 1 + tail_bytes
    return count, at, out


@nb.njit(nogil=True, cache=True)
def cut_counted(buffer_B, first, last, most, token_B, end_M):
    """Whole entries of buffer_B[first:last]: a length of 4 bytes, the low one first, and as many bytes.

    Returns as `cut_ended` does.
    """
    count, at, out = 0, first, 0
    while count < most and at + COUNT_BYTES <= last:
        length = np.int64(0)
        for b in range(COUNT_BYTES):
            length |= np.int64(buffer_B[at + b]) << (8 * b)
        if at + COUNT_BYTES + length > last:
            break
        at += COUNT_BYTES
        for b in range(length):
            token_B[out + b] = buffer_B[at + b]
        out += int(length)
        end_M[count] = out
        count += 1
        at += int(length)
    return count, at, out
