"""Products of what many steps without a gradient do to a row, in float64.

Steps count from 1. Hyperparameters come as runs of equal steps: run r begins with step first_R[r] and has the facts
facts_RF[r]. A step is linear in SGD's (w, b), so its effect is a 2 x 2 matrix; Adam's is a factor for each of w, m and
v, apart from w's move. Either is four numbers here.

Facts of SGD: lr, momentum, kept = 1 - dampening, weight_decay, nesterov. Of Adam and AdamW: lr, beta1, beta2,
keep = 1 - lr * weight_decay, eps, beta1**first, beta2**first, sqrt(beta2).
"""

import numba as nb

LR, BETA1, BETA2, KEEP, EPS, POWER1, POWER2, ROOT2 = range(8)  # Adam's facts


@nb.njit(nogil=True, cache=True, error_model="numpy")
def times(later, earlier, is_matrix):
    """The product of two: 2 x 2 matrices by rows, or four numbers by themselves."""
    a, b, c, d = later
    e, f, g, h = earlier
    if is_matrix:
        return a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h
    return a * e, b * f, c * g, d * h


@nb.njit(nogil=True, cache=True, error_model="numpy")
def identity(is_matrix):
    """The product of no steps."""
    return (1.0, 0.0, 0.0, 1.0) if is_matrix else (1.0, 1.0, 1.0, 1.0)


@nb.njit(nogil=True, cache=True, error_model="numpy")
def power(base, exponent, is_matrix):
    """`base` times itself, by squaring."""
    result = identity(is_matrix)
    while exponent > 0:
        if exponent & 1:
            result = times(result, base, is_matrix)
        base = times(base, base, is_matrix)
        exponent >>= 1
    return result


@nb.njit(nogil=True, cache=True, error_model="numpy")
def integer_power(base, exponent):
    """`base` times itself, by squaring: the same bits everywhere, which the C library's pow does not promise."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


@nb.njit(nogil=True, cache=True, error_model="numpy")
def one_step(facts_F, is_matrix):
    """What a step without gradient does: SGD's matrix on (w, b), or Adam's factors of w, m and v."""
    if not is_matrix:
        return facts_F[KEEP], facts_F[BETA1], facts_F[BETA2], 1.0
    lr, momentum, kept, decay, nesterov = facts_F[0], facts_F[1], facts_F[2], facts_F[3], facts_F[4]
    if momentum == 0:
        return 1 - lr * decay, 0.0, 0.0, 1.0
    if nesterov:
        return 1 - lr * decay * (1 + momentum * kept), -lr * momentum * momentum, kept * decay, momentum
    return 1 - lr * kept * decay, -lr * momentum, kept * decay, momentum


@nb.njit(nogil=True, cache=True, error_model="numpy")
def add_run(run, count, facts_F, whole_R4, tree_R4, is_matrix):
    """Note that run number `run` was of `count` steps.

    whole_R4[r] is the product of run r. tree_R4[r] is that of the runs that end with r, as many as the lowest bit of
    r + 1 says (a Fenwick tree, in which nothing ever changes).
    """
    total = power(one_step(facts_F, is_matrix), count, is_matrix)
    whole_R4[run] = total
    end, first = run, (run + 1) & run
    while end > first:
        total = times(total, _four(tree_R4, end - 1), is_matrix)
        end &= end - 1
    tree_R4[run] = total


@nb.njit(nogil=True, cache=True, inline="always")
def _four(array_R4, run):
    return array_R4[run, 0], array_R4[run, 1], array_R4[run, 2], array_R4[run, 3]


@nb.njit(nogil=True, cache=True, error_model="numpy")
def run_of(step, first_R):
    """The run that a step is in."""
    low, high = 0, first_R.shape[0]
    while high - low > 1:
        middle = (low + high) // 2
        if first_R[middle] <= step:
            low = middle
        else:
            high = middle
    return low


@nb.njit(nogil=True, cache=True, error_model="numpy")
def product(last, now, first_R, facts_RF, whole_R4, tree_R4, is_matrix):
    """The product of the steps last + 1 to now."""
    if last >= now:
        return identity(is_matrix)
    begin, end = run_of(last + 1, first_R), run_of(now, first_R)
    if begin == end:
        return power(one_step(facts_RF[begin], is_matrix), now - last, is_matrix)
    total = power(one_step(facts_RF[end], is_matrix), now - first_R[end] + 1, is_matrix)
    run = end  # the runs from begin + 1 to run - 1 are still to come
    while run > begin + 1:
        before = run & (run - 1)
        if before > begin:
            total = times(total, _four(tree_R4, run - 1), is_matrix)
            run = before
        else:
            total = times(total, _four(whole_R4, run - 1), is_matrix)
            run -= 1
    rest = first_R[begin + 1] - last - 1
    return times(total, power(one_step(facts_RF[begin], is_matrix), rest, is_matrix), is_matrix)
