"""Slow twins of kernels/bags.py: each says in the plainest words what the fast thing of the same name computes."""

import numpy as np

NO_PLACE = -1


def _rows(values_SE, past_PE, slots_U, dim):
    return np.concatenate([values_SE, past_PE])[slots_U, :dim]


def sum_bags(values_SE, past_PE, slots_U, inverse_N, starts_B1, factor_N, divides, dim):
    rows_UD = _rows(values_SE, past_PE, slots_U, dim)
    out_BD = np.zeros((len(starts_B1) - 1, dim), np.float32)
    for b, out_D in enumerate(out_BD):
        positions = range(starts_B1[b], starts_B1[b + 1])
        for n in positions:
            row_D = rows_UD[inverse_N[n]]
            out_D += row_D * factor_N[n] if len(factor_N) else row_D
        if divides and len(positions):
            out_D /= np.float32(len(positions))
    return out_BD


def max_bags(values_SE, past_PE, slots_U, inverse_N, starts_B1, dim):
    rows_UD = _rows(values_SE, past_PE, slots_U, dim)
    out_BD = np.zeros((len(starts_B1) - 1, dim), np.float32)
    places_BD = np.full(out_BD.shape, NO_PLACE, np.int32)
    for b in range(len(out_BD)):
        for d in range(dim):
            for n in range(starts_B1[b], starts_B1[b + 1]):
                value = rows_UD[inverse_N[n], d]
                if places_BD[b, d] == NO_PLACE or value > out_BD[b, d]:
                    out_BD[b, d], places_BD[b, d] = value, inverse_N[n]
    return out_BD, places_BD


def sum_max_gradients(grad_BD, places_BD, num_unique):
    sums_UD = np.zeros((num_unique, grad_BD.shape[1]), np.float32)
    for (b, d), u in np.ndenumerate(places_BD):
        if u != NO_PLACE:
            sums_UD[u, d] += grad_BD[b, d]
    return sums_UD


def factor_gradients(rows_UD, inverse_N, bag_N, grad_BD):
    out_N = np.zeros(len(inverse_N), np.float32)
    for n, (u, b) in enumerate(zip(inverse_N, bag_N, strict=True)):
        total = 0.0
        for x, g in zip(rows_UD[u], grad_BD[b], strict=True):
            total += float(x) * float(g)
        out_N[n] = total
    return out_N
