"""Records of word2vec's binary format: a token, a space, D float32; line feeds may stand before a token."""

import numba as nb

TOKEN_BYTES = 1 << 20  # the longest token; without a bound a damaged file would be searched to its end
_FEED, _SPACE = 10, 32


@nb.njit(nogil=True, cache=True)
def find_records(buffer_B, at, stop, vector_bytes, token_start_M, token_stop_M):
    """Where the tokens of the next whole records begin and end, as many as there is room for.

    Returns (how many, where the rest begins, where a token goes wrong or -1: a zero byte, or no space for too long).
    """
    count = 0
    while count < token_start_M.shape[0]:
        first = at
        while first < stop and buffer_B[first] == _FEED:
            first += 1
        p = first
        while p < stop and buffer_B[p] != _SPACE:
            if buffer_B[p] == 0 or p - first >= TOKEN_BYTES:
                return count, at, p
            p += 1
        if p + 1 + vector_bytes > stop:
            break
        token_start_M[count] = first
        token_stop_M[count] = p
        count += 1
        at = p + 1 + vector_bytes
    return count, at, -1


@nb.njit(nogil=True, cache=True)
def copy_vectors(start, stop, buffer_B, token_stop_M, out_MB):
    """Copy the bytes of each record's vector, which begins one byte after its token ends."""
    for m in range(start, stop):
        from_B, out_B = buffer_B[token_stop_M[m] + 1 :], out_MB[m]
        for b in range(out_B.shape[0]):
            out_B[b] = from_B[b]
