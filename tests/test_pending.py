"""PendingGradient by itself: sums, norms, what a changed grad means, and passes that fail or nest."""

import math

import naive
import numpy as np
import pytest
import torch
from torch import nn

import bigembed
from bigembed import threads
from bigembed.kernels.rules import scale_rows
from bigembed.optim.pending import PendingGradient, RowGradient, add_gradients

D = 3


def random_gradient(seed, rows, step=1):
    rows_U = np.random.default_rng(seed).permutation(20)[:rows]
    return RowGradient(rows_U, np.random.default_rng(seed).standard_normal((rows, D)).astype(np.float32), step)


def as_dict(gradient):
    return {int(row): values.tobytes() for row, values in zip(gradient.rows_U, gradient.sums_UD, strict=True)}


def test_kernels_equal_their_oracles():
    sums_UD = random_gradient(0, 9).sums_UD
    expected = sums_UD.copy()
    naive.scale_rows(expected, 0.3)
    scale_rows(2, 9, sums_UD, np.float32(0.3))
    assert sums_UD[2:].tobytes() == expected[2:].tobytes()
    assert sums_UD[:2].tobytes() != expected[:2].tobytes()


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_the_norm_is_the_same_for_any_number_of_threads(num_threads, monkeypatch):
    gradient = RowGradient(np.arange(500), np.random.default_rng(0).standard_normal((500, D)).astype(np.float32), 1)
    run, before = threads.run, bigembed.get_num_threads()
    monkeypatch.setattr(threads, "run", lambda *args, **_: run(*args, grain=10))
    bigembed.set_num_threads(num_threads)
    try:
        norm = gradient.norm()
    finally:
        bigembed.set_num_threads(before)
    assert norm == float(np.float32(math.sqrt(naive.square_by_block(gradient.sums_UD).sum())))
    assert norm == pytest.approx(float(np.linalg.norm(gradient.sums_UD.astype(np.float64))))


def test_the_norm_neither_overflows_nor_vanishes_before_float32_does():
    for size in (1e-30, 1e-20, 1e20, 1e37):
        gradient = RowGradient(np.arange(4), np.full((4, 1), size, np.float32), 1)
        assert gradient.norm() == pytest.approx(2 * size)
    assert RowGradient(np.arange(4), np.full((4, 1), 3e38, np.float32), 1).norm() == math.inf
    assert RowGradient(np.arange(0), np.empty((0, D), np.float32), 1).norm() == 0.0


def test_adding_gradients_sums_by_row_in_order_of_first_mention():
    first, second = random_gradient(1, 12, step=5), random_gradient(2, 15, step=3)
    total = add_gradients(first, second)
    expected = {}
    for gradient in (first, second):
        for row, values in zip(gradient.rows_U.tolist(), gradient.sums_UD, strict=True):
            expected[row] = expected.get(row, np.zeros(D, np.float32)) + values
    assert total.rows_U.tolist() == list(expected)
    assert as_dict(total) == {row: values.tobytes() for row, values in expected.items()}
    assert total.step == 3


# -- with the handle --------------------------------------------------------------------------------------------


class Bring(torch.autograd.Function):
    """A lookup without a table: its backward brings one gradient, and may do or raise something first."""

    @staticmethod
    def forward(ctx, handle, pending, gradient, before):
        ctx.facts = pending, gradient, before
        return torch.zeros(())

    @staticmethod
    def backward(ctx, grad):
        pending, gradient, before = ctx.facts
        if before is not None:
            before()
        pending.add(gradient)
        return torch.zeros(1), None, None, None


@pytest.fixture
def handle():
    return nn.Parameter(torch.zeros(1))


@pytest.fixture
def pending(handle):
    pending = PendingGradient(handle)
    handle.register_post_accumulate_grad_hook(lambda _: pending.arrived())
    return pending


@pytest.fixture
def bring(handle, pending):
    """A backward that brings these gradients, the last one given first, as autograd does."""

    def backward(*gradients, before=None):
        sum(Bring.apply(handle, pending, gradient, before) for gradient in gradients).backward()

    return backward


def current_dict(pending):
    gradient, scale = pending.current()
    assert scale == 1.0
    return as_dict(gradient)


def test_nothing_is_pending_at_first(pending):
    assert pending.current() is None
    assert pending.oldest_step is None
    assert pending.memory_bytes == 0


def test_the_grad_shows_the_norm_of_what_is_pending(pending, handle, bring):
    first, second = random_gradient(1, 5, step=7), random_gradient(2, 6, step=4)
    bring(first)
    assert handle.grad.item() == first.norm()
    assert current_dict(pending) == as_dict(first)
    assert pending.oldest_step == 7
    assert pending.memory_bytes == first.rows_U.nbytes + first.sums_UD.nbytes
    bring(second)
    assert current_dict(pending) == as_dict(add_gradients(first, second))
    assert handle.grad.item() == add_gradients(first, second).norm()
    assert pending.oldest_step == 4


def test_memory_is_bounded_by_distinct_rows(pending, bring):
    for seed in range(30):
        bring(random_gradient(seed, 15))
    assert pending.memory_bytes <= 20 * (8 + 4 * D)


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0, 0.37, 1e-10])
def test_a_scaled_grad_is_the_factor_and_later_gradients_keep_theirs(pending, handle, bring, factor):
    first, second = random_gradient(1, 5), random_gradient(2, 6)
    bring(random_gradient(1, 5))
    handle.grad.mul_(factor)
    gradient, scale = pending.current()
    assert as_dict(gradient) == as_dict(first)
    assert scale == pytest.approx(factor, rel=1e-7)
    bring(second)
    scaled = RowGradient(first.rows_U, first.sums_UD * np.float32(scale), 1)
    assert current_dict(pending) == as_dict(add_gradients(scaled, second))


def test_powers_of_two_scale_exactly(pending, handle, bring):
    bring(random_gradient(1, 5))
    handle.grad.mul_(2.0**-16)
    assert pending.current()[1] == 2.0**-16


@pytest.mark.parametrize("clear", ["none", "zero"])
def test_cleared_is_gone_for_good(pending, handle, bring, clear):
    bring(random_gradient(1, 5))
    if clear == "none":
        handle.grad = None
    else:
        handle.grad.zero_()
    assert pending.current() is None
    second = random_gradient(2, 6)
    bring(second)
    assert current_dict(pending) == as_dict(second)


def test_a_gradient_of_zeros_is_pending_all_the_same(pending, handle, bring):
    zeros = RowGradient(np.arange(3), np.zeros((3, D), np.float32), 1)
    bring(zeros)
    assert handle.grad.item() == 0.0
    assert current_dict(pending) == as_dict(zeros)
    handle.grad.mul_(0.5)
    assert current_dict(pending) == as_dict(zeros)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_show_and_stay_as_they_are(pending, handle, bring, bad):
    gradient = RowGradient(np.arange(2), np.array([[bad] * D, [1.0] * D], np.float32), 1)
    bring(gradient)
    assert not math.isfinite(handle.grad.item())
    assert current_dict(pending) == as_dict(gradient)


def test_a_pass_that_fails_brings_nothing(pending, handle, bring):
    kept = random_gradient(1, 5)
    bring(kept)

    def fail():
        if len(pending._incoming) > 0:
            raise ArithmeticError("after the first of two")

    for _ in range(3):
        with pytest.raises(ArithmeticError):
            bring(random_gradient(2, 6), random_gradient(3, 6), before=fail)
        assert current_dict(pending) == as_dict(kept)
        pending._incoming.clear()
    with pytest.raises(ArithmeticError):
        bring(random_gradient(2, 6), random_gradient(3, 6), before=fail)
    later = random_gradient(4, 6)
    bring(later)
    assert current_dict(pending) == as_dict(add_gradients(kept, later))
    handle.grad = None
    pending.drop()
    assert pending._incoming == {}


@pytest.mark.parametrize("had_grad", [False, True])
def test_a_pass_inside_a_pass_loses_neither(pending, bring, had_grad):
    """As with reentrant checkpoints: the inner one begins when the outer one has brought a gradient."""
    before, outer, late, inner = (random_gradient(seed, 6) for seed in range(4))
    if had_grad:
        bring(before)
    calls = []

    def run_inner():
        calls.append(1)
        if len(calls) == 2:
            with torch.enable_grad():
                bring(inner)

    bring(late, outer, before=run_inner)
    expected = add_gradients(outer, late)
    for earlier in (inner, *([before] if had_grad else [])):
        expected = add_gradients(earlier, expected)
    got = dict(zip(pending.current()[0].rows_U.tolist(), pending.current()[0].sums_UD, strict=True))
    assert set(got) == set(expected.rows_U.tolist())
    for row, values in zip(expected.rows_U.tolist(), expected.sums_UD, strict=True):
        np.testing.assert_allclose(got[row], values, rtol=1e-5, atol=1e-6)
    assert pending._incoming == {}


def test_an_optimizer_may_step_inside_the_backward(pending, handle, bring):
    """A hook of the user's own, after ours, that takes the gradient and clears it."""
    taken = []

    def take(parameter):
        taken.append(current_dict(pending))
        parameter.grad = None

    handle.register_post_accumulate_grad_hook(take)
    for seed in range(3):
        bring(random_gradient(seed, 5))
    assert taken == [as_dict(random_gradient(seed, 5)) for seed in range(3)]
    assert pending.current() is None
