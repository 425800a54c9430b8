"""What steps without a gradient do to a row under a dense optimizer, for all the steps it missed at once.

A row that was last brought up to date after step `last` has missed the steps last + 1 to now. Everything is done in
float64 and rounded once, when the row is stored. Runs of equal steps, facts and products as in step_products.py.

SGD: a step is a 2 x 2 matrix on (w, b), so many are their product.

Adam and AdamW: w is multiplied by the product of keep = 1 - lr * weight_decay, m and v by those of the betas, and on
the way w falls by

    m * sum over j of c_j / (sqrt(v) * r_j + eps),
    c_j = lr_j / (1 - beta1_j**j) * (product of beta1 to j) * (product of keep after j),
    r_j = sqrt((product of beta2 to j) / (1 - beta2_j**j)).

The sum does not factor into steps and columns, because of eps. But r_j changes slowly: while it is within SPREAD of
the r_0 that a segment begins with, 1 / (x r_j + eps) is a geometric series in d_j = r_j / r_0 - 1,

    1 / (x r_j + eps) = i * (1 - y d_j + (y d_j)**2 - ...),  i = 1 / (x r_0 + eps),  y = 1 - eps * i in [0, 1],

so a segment needs of its steps only TERMS sums of c_j * d_j**n, the same for every column. All c_j are positive, so
cutting the series off is wrong by at most SPREAD**TERMS * (1 + SPREAD) / (1 - SPREAD) = 3.1e-7 of the segment's move.
Steps are left out once a bound on all that follow is TAIL of what has been summed. Together less than 1e-6 of
the move, or of the largest it was on the way, while 0 <= lr * weight_decay <= 1. The cost of a long gap is that of the
steps until beta1's product has died away.
"""

import math

import numba as nb
import numpy as np

from bigembed.kernels.rules import row_of
from bigembed.kernels.step_products import (
    BETA1,
    BETA2,
    EPS,
    KEEP,
    LR,
    POWER1,
    POWER2,
    ROOT2,
    integer_power,
    product,
    run_of,
    times,
)

_NOTHING = 1e-17  # 1 less this is 1
_SEGMENTS = 32  # room to begin with
_STEPS_A_LOOK = 16  # so often is it asked whether the rest may be left out
SPREAD, TERMS, TAIL = 0.08, 6, 1e-8


@nb.njit(nogil=True, cache=True, error_model="numpy")
def catch_up_sgd(
    start,
    stop,
    values_SE,
    past_PE,
    slots_U,
    last_U,
    now,
    dim,
    first_R,
    facts_RF,
    whole_R4,
    tree_R4,
    bounds_5,
    oldest,
    forgotten,
):
    """Bring rows from after step last_U[u] to after step `now`; a row is w, then b. bounds_5 is Adam's.

    A row that never had a gradient may be older than the runs: `forgotten` is the product of its steps to `oldest`.
    """
    known, total = -1, (1.0, 0.0, 0.0, 1.0)
    for u in range(start, stop):
        last = last_U[u]
        if last >= now:
            continue
        if last != known:
            known, total = last, product(max(last, oldest), now, first_R, facts_RF, whole_R4, tree_R4, True)
            if last < oldest:
                total = times(total, forgotten, True)
        row_E = row_of(values_SE, past_PE, slots_U, u, stop)
        w_D, b_D = row_E[:dim], row_E[dim : 2 * dim]
        for d in range(dim):
            w, b = np.float64(w_D[d]), np.float64(b_D[d])
            w_D[d] = total[0] * w + total[1] * b
            b_D[d] = total[2] * w + total[3] * b


@nb.njit(nogil=True, cache=True, inline="always")
def _store(segment_C, center, eps, kept, s0, s1, s2, s3, s4, s5):
    segment_C[0], segment_C[1], segment_C[2] = center, eps, kept
    segment_C[3], segment_C[4], segment_C[5] = s0, s1, s2
    segment_C[6], segment_C[7], segment_C[8] = s3, s4, s5


@nb.njit(nogil=True, cache=True, error_model="numpy")
def move_segments(last, now, first_R, facts_RF, bounds_5, segments_GC):
    """(segments_GC or a larger array, how many segments, the last step they cover).

    A segment is r_0, eps, the product of its keep, and the TERMS sums. bounds_5 holds the largest lr,
    beta1 / sqrt(beta2), beta1, eps and 1 / eps of all runs.
    """
    run = run_of(last + 1, first_R)
    ahead = last + 1 - first_R[run]
    power1 = facts_RF[run, POWER1] * integer_power(facts_RF[run, BETA1], ahead)
    power2 = facts_RF[run, POWER2] * integer_power(facts_RF[run, BETA2], ahead)
    product1, root2, summed = 1.0, 1.0, 0.0
    # How much larger 1 / (x r + eps) can become than it was: as much as r or eps can fall.
    falls = max(1.0, bounds_5[3] * bounds_5[4])
    count, covered, center, inverse, eps = 0, last, -1.0, 0.0, -1.0
    kept, s0, s1, s2, s3, s4, s5 = 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0  # of the segment that is being filled
    for step in range(last + 1, now + 1):
        if run + 1 < first_R.shape[0] and step == first_R[run + 1]:
            run += 1
            power1, power2 = facts_RF[run, POWER1], facts_RF[run, POWER2]
        keep = facts_RF[run, KEEP]
        product1 *= facts_RF[run, BETA1]
        root2 *= facts_RF[run, ROOT2]
        if product1 == 0.0:  # m is gone
            break
        r, c = root2, facts_RF[run, LR] * product1
        if power2 > _NOTHING:
            r /= math.sqrt(1.0 - power2)
        if power1 > _NOTHING:
            c /= 1.0 - power1
        d = r * inverse - 1.0 if center > 0.0 else 0.0
        if count == 0 or abs(d) > SPREAD or (center == 0.0) != (r == 0.0) or facts_RF[run, EPS] != eps:
            if count > 0:
                _store(segments_GC[count - 1], center, eps, kept, s0, s1, s2, s3, s4, s5)
            if count == segments_GC.shape[0]:
                larger = np.empty((2 * count, segments_GC.shape[1]))
                larger[:count] = segments_GC
                segments_GC = larger
            count += 1
            center, eps, d = r, facts_RF[run, EPS], 0.0
            inverse = 1.0 / center if center > 0.0 else 0.0
            kept, s0, s1, s2, s3, s4, s5 = 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        square = d * d
        kept *= keep
        s0 = s0 * keep + c
        s1 = s1 * keep + c * d
        s2 = s2 * keep + c * square
        s3 = s3 * keep + c * (square * d)
        s4 = s4 * keep + c * (square * square)
        s5 = s5 * keep + c * (square * square * d)
        summed, covered = summed * keep + c, step
        falls = max(falls, r)
        if (step - last) % _STEPS_A_LOOK == 0 and root2 > 0.0 and bounds_5[1] < 1.0:
            # 1 - beta1**j is at least 0.63 of the smaller of 1 and j * (1 - beta1).
            rate = bounds_5[0] / (0.63 * min(1.0, (step + 1) * (1.0 - bounds_5[2])))
            if rate * falls * (product1 / root2) * bounds_5[1] / (1.0 - bounds_5[1]) <= TAIL * summed:
                break
        power1 *= facts_RF[run, BETA1]
        power2 *= facts_RF[run, BETA2]
    if count > 0:
        _store(segments_GC[count - 1], center, eps, kept, s0, s1, s2, s3, s4, s5)
    return segments_GC, count, covered


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _add_segment(segment_C, root_D, moved_D):
    center, eps, keep = segment_C[0], segment_C[1], segment_C[2]
    s0, s1, s2, s3, s4, s5 = segment_C[3], segment_C[4], segment_C[5], segment_C[6], segment_C[7], segment_C[8]
    for d in range(root_D.shape[0]):
        inverse = 1.0 / (root_D[d] * center + eps)
        y = 1.0 - eps * inverse
        series = s0 - y * (s1 - y * (s2 - y * (s3 - y * (s4 - y * s5))))
        moved_D[d] = moved_D[d] * keep + inverse * series


@nb.njit(nogil=True, cache=True, error_model="numpy")
def catch_up_adam(
    start,
    stop,
    values_SE,
    past_PE,
    slots_U,
    last_U,
    now,
    dim,
    first_R,
    facts_RF,
    whole_R4,
    tree_R4,
    bounds_5,
    oldest,
    forgotten,
):
    """Bring rows from after step last_U[u] to after step `now`; a row is w, then m, then v.

    `oldest` and `forgotten` as for `catch_up_sgd`.
    """
    root_D, moved_D = np.empty(dim), np.empty(dim)
    segments_GC = np.empty((_SEGMENTS, 3 + TERMS))
    known, count, after, total = -1, -1, 1.0, (1.0, 1.0, 1.0, 1.0)
    for u in range(start, stop):
        last = last_U[u]
        if last >= now:
            continue
        if last != known:
            known, count = last, -1
            total = product(max(last, oldest), now, first_R, facts_RF, whole_R4, tree_R4, False)
            if last < oldest:
                total = times(total, forgotten, False)
        row_E = row_of(values_SE, past_PE, slots_U, u, stop)
        w_D, m_D, v_D = row_E[:dim], row_E[dim : 2 * dim], row_E[2 * dim : 3 * dim]
        rests = True
        for d in range(dim):
            rests = rests and m_D[d] == 0
        if rests:  # as rows that never had a gradient do
            for d in range(dim):
                w_D[d] = total[0] * w_D[d]
                v_D[d] = total[2] * v_D[d]
            continue
        if count < 0:
            segments_GC, count, covered = move_segments(last, now, first_R, facts_RF, bounds_5, segments_GC)
            after = product(covered, now, first_R, facts_RF, whole_R4, tree_R4, False)[0]
        for d in range(dim):
            root_D[d], moved_D[d] = math.sqrt(np.float64(v_D[d])), 0.0
        for g in range(count):
            _add_segment(segments_GC[g], root_D, moved_D)
        for d in range(dim):
            m = np.float64(m_D[d])
            w_D[d] = total[0] * w_D[d] - m * (moved_D[d] * after)
            m_D[d] = total[1] * m
            v_D[d] = total[2] * v_D[d]
