"""Reduce bags of rows straight from a cache's slots, and take gradients of bags apart again.

No array of N x D is made, neither forward nor backward. Bag b is the positions from starts_B1[b] (inclusive) to
starts_B1[b + 1] (exclusive); position n names row u = inverse_N[n] of the batch. Rows are where kernels/rows.py says.
Range kernels: each range writes only its own outputs, and adds in order of position, or of bag.
"""

import numba as nb
import numpy as np

NO_PLACE = -1  # of an empty bag, whose maximum is no row's


@nb.njit(nogil=True, cache=True)
def sum_bags(start, stop, values_SE, past_PE, slots_U, inverse_N, starts_B1, factor_N, divides, out_BD):
    """out_BD[b] = the sum of the bag's rows from 0.0 on, divided by their number where `divides`; 0 if it has none.

    factor_N: float32, what each position's row is multiplied by first; of length 0 it is 1 for all.
    """
    slots = values_SE.shape[0]
    dim = out_BD.shape[1]
    for b in range(start, stop):
        out_D = out_BD[b]
        out_D[:] = np.float32(0.0)
        for n in range(starts_B1[b], starts_B1[b + 1]):
            slot = slots_U[inverse_N[n]]
            row_E = values_SE[slot] if slot < slots else past_PE[slot - slots]
            if factor_N.shape[0]:
                factor = factor_N[n]
                for d in range(dim):
                    out_D[d] += row_E[d] * factor
            else:
                for d in range(dim):
                    out_D[d] += row_E[d]
        if divides and starts_B1[b + 1] > starts_B1[b]:
            count = np.float32(starts_B1[b + 1] - starts_B1[b])
            for d in range(dim):
                out_D[d] /= count


@nb.njit(nogil=True, cache=True)
def max_bags(start, stop, values_SE, past_PE, slots_U, inverse_N, starts_B1, out_BD, places_BD):
    """out_BD[b] = the largest value of each column among the bag's rows, places_BD[b] = the u it is of; 0 if empty.

    Of equal values the first counts. A NaN stays where it is the bag's first row, and is passed over elsewhere.
    """
    slots = values_SE.shape[0]
    dim = out_BD.shape[1]
    for b in range(start, stop):
        first = starts_B1[b]
        out_D, places_D = out_BD[b], places_BD[b]
        out_D[:] = np.float32(0.0)
        places_D[:] = NO_PLACE
        for n in range(first, starts_B1[b + 1]):
            u = inverse_N[n]
            slot = slots_U[u]
            row_E = values_SE[slot] if slot < slots else past_PE[slot - slots]
            for d in range(dim):
                if n == first or row_E[d] > out_D[d]:
                    out_D[d] = row_E[d]
                    places_D[d] = u


@nb.njit(nogil=True, cache=True)
def sum_max_gradients(start, stop, grad_BD, places_BD, sums_UD):
    """sums_UD[places_BD[b, d], d] += grad_BD[b, d], in order of bag; a range of columns has one writer."""
    for b in range(grad_BD.shape[0]):
        for d in range(start, stop):
            u = places_BD[b, d]
            if u != NO_PLACE:
                sums_UD[u, d] += grad_BD[b, d]


@nb.njit(nogil=True, cache=True)
def factor_gradients(start, stop, rows_UD, inverse_N, bag_N, grad_BD, out_N):
    """out_N[n] = the product of position n's row and its bag's gradient, added in float64 in column order."""
    for n in range(start, stop):
        row_D, grad_D = rows_UD[inverse_N[n]], grad_BD[bag_N[n]]
        total = 0.0
        for d in range(row_D.shape[0]):
            total += np.float64(row_D[d]) * np.float64(grad_D[d])
        out_N[n] = np.float32(total)
