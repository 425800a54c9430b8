"""Rows from hashes alone: of tokens, and of the last n ids of a sequence. The same on every machine.

All numbers are 64 bits wide and wrap around. `fold(state, x)` is mix64((state + GOLDEN) ^ x), with mix64 and
GOLDEN of bigembed.kernels.hashing: for a given state a bijection of x, and for a given x one of the state.
"""

import numba as nb
import numpy as np

from bigembed.kernels.hashing import GOLDEN, mix64


@nb.njit(nogil=True, cache=True)
def fold(state, x):
    """Mix a number into a state."""
    return mix64((np.uint64(state) + GOLDEN) ^ np.uint64(x))


@nb.njit(nogil=True, cache=True)
def hashes_to_rows(start, stop, hash_N, key_K, num_rows, first_row, out_NK):
    """out_NK[n, k] = first_row + mix64(hash_N[n] ^ key_K[k]) % num_rows."""
    for n in range(start, stop):
        for k in range(key_K.shape[0]):
            mixed = mix64(hash_N[n] ^ key_K[k])
            out_NK[n, k] = first_row + np.int64(mixed % np.uint64(num_rows))


@nb.njit(nogil=True, cache=True)
def ngrams_to_rows(start, stop, ids_N, length, pad, state, order_C, column_C, key_C, size_C, first_C, out_NC):
    """The rows of the n-grams that end at positions start to stop - 1 of sequences of `length` ids (uint64) each.

    The state is folded with the id at the position, then with the one before it, and so on; ids before the sequence
    begins are `pad`. Where the c-th order (order_C ascends) is reached, column column_C[c] of the position gets
    first_C[c] + mix64(state ^ key_C[c]) % size_C[c].
    """
    for n in range(start, stop):
        place = n % length
        folded, c = state, 0
        for back in range(order_C[-1]):
            folded = fold(folded, ids_N[n - back] if back <= place else pad)
            while c < order_C.shape[0] and order_C[c] == back + 1:
                mixed = mix64(folded ^ key_C[c])
                out_NC[n, column_C[c]] = first_C[c] + np.int64(mixed % size_C[c])
                c += 1
