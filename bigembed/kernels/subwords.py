"""The rows of a word's character n-grams: the rules of fastText, finalfusion and floret.

Each rule is one kernel, run twice over padded words ("<word>"): first it counts (`fill` is 0: at_M1[m + 1] becomes
the number of rows of word m), then, with the counts summed up, it writes rows_F from at_M1[m] on. A word's own row
comes first where it has one. A character is a byte that is no UTF-8 continuation, and the continuations after it.
"""

import numba as nb
import numpy as np

from bigembed.kernels.murmur import murmur128

_BASIS32, _PRIME32 = np.uint64(2166136261), np.uint64(16777619)
_BASIS64, _PRIME64 = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_LOW32, _LOW8, _HIGH24 = np.uint64(0xFFFFFFFF), np.uint64(0xFF), np.uint64(0xFFFFFF00)
_S32 = np.uint64(32)
ABSENT = -1


@nb.njit(nogil=True, cache=True)
def pad_words(start, stop, bytes_B, start_M1, before_B, after_B, out_B, out_M1):
    """out_B[out_M1[m] : out_M1[m + 1]] = before, word m, after; out_M1 is given."""
    for m in range(start, stop):
        at = out_M1[m]
        for b in range(before_B.shape[0]):
            out_B[at + b] = before_B[b]
        at += before_B.shape[0] - start_M1[m]
        for b in range(start_M1[m], start_M1[m + 1]):
            out_B[at + b] = bytes_B[b]
        at += start_M1[m + 1]
        for b in range(after_B.shape[0]):
            out_B[at + b] = after_B[b]


@nb.njit(nogil=True, cache=True, inline="always")
def _continues(byte):
    return (byte & 0xC0) == 0x80


@nb.njit(nogil=True, cache=True, inline="always")
def _is_end_of_sentence(bytes_B, first, last):
    """Whether a padded word is "<</s>>"."""
    return (
        last - first == 6
        and bytes_B[first + 1] == 60  # "<", "/", "s", ">"
        and bytes_B[first + 2] == 47
        and bytes_B[first + 3] == 115
        and bytes_B[first + 4] == 62
    )


@nb.njit(nogil=True, cache=True, inline="always")
def _step32(state, byte):
    """FNV-1a with the byte's sign spread over 32 bits, as a C compiler with signed chars makes it."""
    wide = np.uint64(byte)
    if byte >= 128:
        wide |= _HIGH24
    return ((state ^ wide) * _PRIME32) & _LOW32


@nb.njit(nogil=True, cache=True)
def _row_kept(bucket, bucket_P, row_P):
    """row_P at the place of `bucket` in the ascending bucket_P, or ABSENT."""
    low, high = 0, bucket_P.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if bucket_P[middle] < bucket:
            low = middle + 1
        else:
            high = middle
    return row_P[low] if low < bucket_P.shape[0] and bucket_P[low] == bucket else np.int64(ABSENT)


@nb.njit(nogil=True, cache=True)
def fasttext_rows(start, stop, bytes_B, start_M1, word_row_M, rule, bucket_P, row_P, fill, at_M1, rows_F):
    """Rows of the n-grams of minn to maxn characters, from left to right, short before long.

    rule is (minn, maxn, buckets, first_row, edges, words_alone, is_pruned): `edges` also takes single characters at
    the padding, and n-grams of "</s>"; `words_alone` gives a known word its own row only; where `is_pruned`, the
    bucket bucket_P[p] has row row_P[p], and the others none.
    """
    minn, maxn, buckets, first_row, edges, words_alone, is_pruned = rule
    for m in range(start, stop):
        first, last = start_M1[m], start_M1[m + 1]
        at, count = at_M1[m] * fill, 0
        if word_row_M[m] >= 0:
            if fill:
                rows_F[at] = word_row_M[m]
            count = 1
        is_whole = (count and words_alone) or (not edges and _is_end_of_sentence(bytes_B, first, last))
        for i in range(last if is_whole or buckets == 0 else first, last):
            if _continues(bytes_B[i]):
                continue
            j, state = i, _BASIS32
            for n in range(1, maxn + 1):
                if j == last:
                    break
                state = _step32(state, bytes_B[j])
                j += 1
                while j < last and _continues(bytes_B[j]):
                    state = _step32(state, bytes_B[j])
                    j += 1
                if n < minn or (not edges and n == 1 and (i == first or j == last)):
                    continue
                row = np.int64(state % np.uint64(buckets))
                if is_pruned:
                    row = _row_kept(row, bucket_P, row_P)
                if row >= 0:
                    if fill:
                        rows_F[at + count] = first_row + row
                    count += 1
        if not fill:
            at_M1[m + 1] = count


@nb.njit(nogil=True, cache=True)
def _code_points(bytes_B, first, last, out_C):
    """The Unicode numbers of the characters; returns how many. (Of bytes that are no UTF-8, some number.)"""
    count = 0
    for b in range(first, last):
        byte = np.uint64(bytes_B[b])
        if count and _continues(bytes_B[b]):
            out_C[count - 1] = ((out_C[count - 1] << np.uint64(6)) | (byte & np.uint64(0x3F))) & _LOW32
            continue
        if byte >= np.uint64(0xF0):
            byte &= np.uint64(0x07)
        elif byte >= np.uint64(0xE0):
            byte &= np.uint64(0x0F)
        elif byte >= np.uint64(0xC0):
            byte &= np.uint64(0x1F)
        out_C[count] = byte
        count += 1
    return count


@nb.njit(nogil=True, cache=True, inline="always")
def _steps64(state, value, count):
    """FNV-1a over the `count` low bytes of a number, the lowest first."""
    for _ in range(count):
        state = (state ^ (value & _LOW8)) * _PRIME64
        value >>= np.uint64(8)
    return state


@nb.njit(nogil=True, cache=True)
def finalfusion_rows(start, stop, bytes_B, start_M1, word_row_M, rule, fill, at_M1, rows_F):
    """Rows of the n-grams of minn to maxn characters, from left to right, long before short; a known word's own only.

    rule is (minn, maxn, exponent, first_row): 64-bit FNV-1a over the number of characters (8 bytes) and each one's
    Unicode number (4 bytes), of which the low `exponent` bits are the bucket.
    """
    minn, maxn, exponent, first_row = rule
    mask = (np.uint64(1) << np.uint64(exponent)) - np.uint64(1)
    for m in range(start, stop):
        first, last = start_M1[m], start_M1[m + 1]
        at, count = at_M1[m] * fill, 0
        if word_row_M[m] >= 0:
            if fill:
                rows_F[at] = word_row_M[m]
            count = 1
        else:
            point_C = np.empty(last - first, np.uint64)
            length = _code_points(bytes_B, first, last, point_C)
            for i in range(length):
                for n in range(min(maxn, length - i), minn - 1, -1):
                    if fill:
                        state = _steps64(_BASIS64, np.uint64(n), 8)
                        for c in range(i, i + n):
                            state = _steps64(state, point_C[c], 4)
                        rows_F[at + count] = first_row + np.int64(state & mask)
                    count += 1
        if not fill:
            at_M1[m + 1] = count


@nb.njit(nogil=True, cache=True, inline="always")
def _put_hashes(bytes_B, first, last, seed, hashes, num_rows, first_row, rows_F, at):
    """Write the rows of one n-gram: its 128-bit hash, cut into four, the lowest first."""
    low, high = murmur128(bytes_B, first, last, seed)
    for k in range(hashes):
        half = low if k < 2 else high
        part = half & _LOW32 if k % 2 == 0 else half >> _S32
        rows_F[at + k] = first_row + np.int64(part % np.uint64(num_rows))


@nb.njit(nogil=True, cache=True)
def floret_rows(start, stop, bytes_B, start_M1, padding, rule, fill, at_M1, rows_F):
    """Rows of the padded word, then of its n-grams, short before long, from left to right; `hashes` rows each.

    rule is (minn, maxn, hashes, seed, num_rows, first_row). `padding` is its bytes: a word of no more has no rows.
    """
    minn, maxn, hashes, seed, num_rows, first_row = rule
    for m in range(start, stop):
        first, last = start_M1[m], start_M1[m + 1]
        at, count = at_M1[m] * fill, 0
        if last - first > padding:
            edge_C = np.empty(last - first + 1, np.int64)  # where each character begins, and the end
            length = 0
            for b in range(first, last):
                if b == first or not _continues(bytes_B[b]):
                    edge_C[length] = b
                    length += 1
            edge_C[length] = last
            if fill:
                _put_hashes(bytes_B, first, last, seed, hashes, num_rows, first_row, rows_F, at)
            count = hashes
            for n in range(max(minn, 1), maxn + 1):
                for i in range(length - n + 1):
                    if fill:
                        a, b = edge_C[i], edge_C[i + n]
                        _put_hashes(bytes_B, a, b, seed, hashes, num_rows, first_row, rows_F, at + count)
                    count += hashes
        if not fill:
            at_M1[m + 1] = count
