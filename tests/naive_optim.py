"""Slow twins of the optimizer kernels: plain loops over float32 numbers, and dense torch rules in float64."""

import math

import naive
import numpy as np

F = np.float32


def sgd_decayed(rows_SE, slots_U, sums_UD, scale, lr, weight_decay):
    for slot, sum_D in zip(slots_U, sums_UD, strict=True):
        for d, g in enumerate(sum_D * F(scale)):
            rows_SE[slot, d] -= F(lr) * (g + F(weight_decay) * rows_SE[slot, d])


def sgd_momentum(rows_SE, slots_U, sums_UD, scale, lr, weight_decay, momentum, kept, nesterov, has_flag):
    dim = sums_UD.shape[1]
    for slot, sum_D in zip(slots_U, sums_UD, strict=True):
        is_first = has_flag and rows_SE[slot, 2 * dim] == 0
        for d, g in enumerate(sum_D * F(scale)):
            if weight_decay:
                g = g + F(weight_decay) * rows_SE[slot, d]
            b = g if is_first else F(momentum) * rows_SE[slot, dim + d] + F(kept) * g
            rows_SE[slot, dim + d] = b
            rows_SE[slot, d] -= F(lr) * (g + F(momentum) * b if nesterov else b)
        if has_flag:
            rows_SE[slot, 2 * dim] = 1


def _with_decay(rows_SE, slots_U, sums_UD, scale, weight_decay):
    """The gradient with decay in it; slots are distinct, so all can be made before the first is applied."""
    return sums_UD * F(scale) + F(weight_decay) * rows_SE[slots_U, : sums_UD.shape[1]]


def adagrad_decayed(rows_SE, slots_U, sums_UD, scale, lr, eps, weight_decay):
    naive.adagrad(rows_SE, slots_U, _with_decay(rows_SE, slots_U, sums_UD, scale, weight_decay), 1, lr, eps)


def rowwise_adagrad_decayed(rows_SE, slots_U, sums_UD, scale, lr, eps, weight_decay):
    naive.rowwise_adagrad(rows_SE, slots_U, _with_decay(rows_SE, slots_U, sums_UD, scale, weight_decay), 1, lr, eps)


def adam_decayed(rows_SE, slots_U, sums_UD, scale, rate, one_minus_beta1, one_minus_beta2, eps, weight_decay):
    grads_UD = _with_decay(rows_SE, slots_U, sums_UD, scale, weight_decay)
    naive.adam(rows_SE, slots_U, grads_UD, 1, rate, one_minus_beta1, one_minus_beta2, eps)


def adamw(rows_SE, slots_U, sums_UD, scale, rate, one_minus_beta1, one_minus_beta2, eps, keep):
    rows_SE[slots_U, : sums_UD.shape[1]] *= F(keep)
    naive.adam(rows_SE, slots_U, sums_UD, scale, rate, one_minus_beta1, one_minus_beta2, eps)


def row_power_sums(sums_UD, power):
    def term(g):
        g = abs(float(g))
        return g if power == 1 else float(g != 0) if power == 0 else float(np.float64(g) ** power)

    return np.array([sum((term(g) for g in row), 0.0) for row in sums_UD], np.float64)


def row_largest(sums_UD):
    return np.array([math.nan if np.isnan(row).any() else max(abs(float(g)) for g in row) for row in sums_UD])


# --- lazy: one missed step after the other, in extended precision. `steps` are the facts of steps 1, 2, ...


def catch_up_sgd(w_UD, b_UD, steps, last_U):
    """(w, b) after all steps; a step is (lr, momentum, kept, weight_decay, nesterov)."""
    w_UD, b_UD = w_UD.astype(np.longdouble), b_UD.astype(np.longdouble)
    for step, facts in enumerate(np.array(steps, np.longdouble), start=1):
        lr, momentum, kept, decay, nesterov = facts
        missed = last_U < step
        w_MD, b_MD = w_UD[missed], b_UD[missed]
        g_MD = decay * w_MD
        if momentum != 0:
            b_MD = momentum * b_MD + kept * g_MD
            g_MD = g_MD + momentum * b_MD if nesterov else b_MD
        w_UD[missed], b_UD[missed] = w_MD - lr * g_MD, b_MD
    return w_UD, b_UD


def catch_up_adam(w_UD, m_UD, v_UD, steps, last_U):
    """(w, m, v) after all steps; a step is (lr, beta1, beta2, keep, eps)."""
    w_UD, m_UD, v_UD = (x_UD.astype(np.longdouble) for x_UD in (w_UD, m_UD, v_UD))
    for step, facts in enumerate(np.array(steps, np.longdouble), start=1):
        lr, beta1, beta2, keep, eps = facts
        missed = last_U < step
        m_MD, v_MD = beta1 * m_UD[missed], beta2 * v_UD[missed]
        move_MD = lr / (1 - beta1**step) * m_MD / (np.sqrt(v_MD / (1 - beta2**step)) + eps)
        w_UD[missed], m_UD[missed], v_UD[missed] = keep * w_UD[missed] - move_MD, m_MD, v_MD
    return w_UD, m_UD, v_UD


def product(last, now, factors):
    """The product of the 2 x 2 matrices, or numbers, of steps last + 1 to now."""
    total = np.eye(2) if np.ndim(factors[0]) == 2 else 1.0
    for factor in factors[last:now]:
        total = factor @ total if np.ndim(factor) == 2 else factor * total
    return total
