"""Rows of a product quantiser: each code stands for a piece of the row, one of a few that were learned."""

import numba as nb
import numpy as np


@nb.njit(nogil=True, cache=True)
def decode_rows(start, stop, code_MQ, piece_F, choices, piece_dim, out_MD):
    """out_MD[m] = the pieces that its codes name, one after the other.

    Quantiser q's pieces lie in piece_F from q * choices * piece_dim on, piece_dim values each, fewer for the last
    one where they do not divide D. Every code is below `choices`.
    """
    dim = out_MD.shape[1]
    for m in range(start, stop):
        for q in range(code_MQ.shape[1]):
            first = q * piece_dim
            width = min(piece_dim, dim - first)
            at = first * choices + np.int64(code_MQ[m, q]) * width
            for d in range(width):
                out_MD[m, first + d] = piece_F[at + d]
