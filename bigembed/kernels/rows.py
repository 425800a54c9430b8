"""Copy rows between the slots of a cache and batches. Range kernels: each range writes only its own outputs.

values_SE are the rows in slots, past_PE the rows served past the cache; slot S + p means row p of past_PE.
"""

import numba as nb

from bigembed.kernels.bare import BARE
from bigembed.kernels.prefetch import ROWS_AHEAD, prefetch_item, prefetch_row

FLAGS_AHEAD = 32


@nb.njit(**BARE)
def gather(start, stop, values_SE, past_PE, slots_U, inverse_N, out_ND):
    """out_ND[n] = the first D values of the row in slot slots_U[inverse_N[n]]."""
    slots = values_SE.shape[0]
    dim = out_ND.shape[1]
    for n in range(start, stop):
        if n + ROWS_AHEAD < stop:
            prefetch_row(values_SE, slots_U[inverse_N[n + ROWS_AHEAD]], dim)
        slot = slots_U[inverse_N[n]]
        row_E, out_D = values_SE[slot] if slot < slots else past_PE[slot - slots], out_ND[n]
        for d in range(dim):
            out_D[d] = row_E[d]


@nb.njit(**BARE)
def gather_slots(start, stop, values_SE, slots_N, out_ND):
    """out_ND[n] = the first D values of the row in slot slots_N[n]."""
    dim = out_ND.shape[1]
    for n in range(start, stop):
        if n + ROWS_AHEAD < stop:
            prefetch_row(values_SE, slots_N[n + ROWS_AHEAD], dim)
        row_E, out_D = values_SE[slots_N[n]], out_ND[n]
        for d in range(dim):
            out_D[d] = row_E[d]


@nb.njit(**BARE)
def take_rows(start, stop, values_SE, slots_M, out_ME):
    """out_ME[m] = values_SE[slots_M[m]]; where the slot is ABSENT, out_ME[m] stays as it is."""
    width = out_ME.shape[1]
    for m in range(start, stop):
        if m + ROWS_AHEAD < stop:
            prefetch_row(values_SE, slots_M[m + ROWS_AHEAD], width)
        slot = slots_M[m]
        if slot >= 0:
            for e in range(width):
                out_ME[m, e] = values_SE[slot, e]


@nb.njit(**BARE)
def put_rows(start, stop, values_SE, slots_M, rows_ME):
    """values_SE[slots_M[m]] = rows_ME[m], skipping ABSENT; slots are distinct, so each has one writer."""
    width = rows_ME.shape[1]
    for m in range(start, stop):
        slot = slots_M[m]
        if slot >= 0:
            for e in range(width):
                values_SE[slot, e] = rows_ME[m, e]


@nb.njit(**BARE)
def set_flags(start, stop, flags_S, slots_M, value):
    """flags_S = value at each slot below S, skipping ABSENT; slots are distinct. Returns how many changed."""
    slots = flags_S.shape[0]
    changed = 0
    for m in range(start, stop):
        if m + FLAGS_AHEAD < stop:
            prefetch_item(flags_S, slots_M[m + FLAGS_AHEAD])
        slot = slots_M[m]
        if 0 <= slot < slots:  # nothing that a processor would have to guess
            changed += flags_S[slot] != value
            flags_S[slot] = value
    return changed
