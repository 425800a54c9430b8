"""Rows that missed steps are brought to where torch's dense optimizers in float64 would have left them.

The kernels know no types, so most tests give them rows in float64: what is left then is their own error. Rows in
float32, as a table has them, add a rounding at each touch. The errors are printed (pytest -s).
"""

import json
import math

import naive_optim
import numpy as np
import pytest
import torch

from bigembed import threads
from bigembed.errors import InvalidArgument
from bigembed.kernels import decay, momentum, step_products
from bigembed.optim.lazy import AdamHistory, AdamWHistory, SGDHistory

D = 5
STEPS = 1000
MOVE_BOUND = 1e-6  # of the move of the missed steps


def group(lr, beta=0.9, **facts):
    """A param_group of any of the rules; `beta` is momentum, or beta1."""
    common = {"lr": lr, "momentum": beta, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    return {**common, "betas": (beta, 0.999), "eps": 1e-8, **facts}


def constant(step):
    return 0.01, 0.9


def cosine(step):
    return 0.01 * (1 + math.cos(math.pi * step / STEPS)) / 2, 0.9


def one_cycle(step):
    """Warm-up, then down; momentum against it, as OneCycleLR."""
    part = step / STEPS
    up = part / 0.3 if part < 0.3 else (1 - part) / 0.7
    return 4e-4 + 0.0196 * up, 0.95 - 0.1 * up


def steps_with_pauses(step):
    """Equal for a while, then other: runs of many lengths; sometimes nothing moves or decays."""
    return [0.01, 0.02, 0.0, 0.005][(step * step // 97) % 4], [0.9, 0.5, 0.9][(step // 131) % 3]


SCHEDULES = {"constant": constant, "cosine": cosine, "one-cycle": one_cycle, "pauses": steps_with_pauses}

# -- the parts --------------------------------------------------------------------------------------------------


def random_runs(rng, runs):
    return [int(count) for count in rng.choice([1, 1, 1, 2, 3, 17, 100], runs)]


@pytest.mark.parametrize("is_matrix", [True, False])
def test_the_product_of_any_stretch_equals_its_oracle(is_matrix):
    rng = np.random.default_rng(0)
    counts = random_runs(rng, 45)
    facts_RF = rng.uniform(0.5, 1.0, (45, 7))
    facts_RF[:, 0] /= 10
    facts_RF[3, 1] = 0.0  # a step without momentum
    facts_RF[::2, 4] = 0.0
    whole_R4, tree_R4 = np.full((45, 4), np.nan), np.full((45, 4), np.nan)
    first_R = 1 + np.concatenate([[0], np.cumsum(counts)[:-1]])
    for run, count in enumerate(counts[:-1]):  # the last is open
        step_products.add_run(run, count, facts_RF[run], whole_R4, tree_R4, is_matrix)
    factors = []
    for count, facts_F in zip(counts, facts_RF, strict=True):
        four = np.array(step_products.one_step(facts_F, is_matrix))
        factors += count * [four.reshape(2, 2) if is_matrix else four]
    total = sum(counts)
    for last, now in [(0, total), (0, 0), (total, total), *rng.integers(0, total + 1, (300, 2)).tolist()]:
        last, now = min(last, now), max(last, now)
        got = step_products.product(last, now, first_R, facts_RF, whole_R4, tree_R4, is_matrix)
        expected = np.ones(4) * naive_optim.product(last, now, factors).reshape(-1) if last < now else None
        if expected is None:
            expected = [1, 0, 0, 1] if is_matrix else [1, 1, 1, 1]
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-300 if not is_matrix else 1e-16)


def test_integer_power_and_the_run_of_a_step():
    for base in (0.0, 0.5, 0.9, 0.999, 1.0):
        for exponent in (0, 1, 2, 3, 1000, 12345):
            assert step_products.integer_power(base, exponent) == pytest.approx(base**exponent, rel=1e-12, abs=1e-300)
    first_R = np.array([1, 2, 5, 40])
    assert [step_products.run_of(step, first_R) for step in (1, 2, 4, 5, 39, 40, 99)] == [0, 1, 1, 2, 2, 3, 3]


# -- catching up, against one step after the other --------------------------------------------------------------


def caught_up(history, blocks, last):
    """Rows of blocks (w, b) or (w, m, v), each (U, D), brought up to date; and they are not changed themselves."""
    values = np.concatenate(blocks, axis=1)
    width = values.shape[1]
    half = len(values) // 2
    in_slots, past = values[half:].copy(), values[:half].copy()  # in another order than the rows, and half past
    slots_U = np.concatenate([len(in_slots) + np.arange(half), np.arange(len(in_slots))])
    history.catch_up(in_slots, past, slots_U, np.asarray(last), D)
    return np.split(np.concatenate([past, in_slots]), width // D, axis=1)


SGD_FACTS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "nesterov": True},
    {"weight_decay": 0.3, "dampening": 0.4},
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("facts", SGD_FACTS)
def test_sgd_equals_one_step_after_the_other(facts, schedule):
    history, steps = SGDHistory(), []
    for step in range(1, STEPS + 1):
        lr, beta = SCHEDULES[schedule](step)
        history.append(group(lr, beta, **facts))
        kept = 1 - facts.get("dampening", 0.0) if step > 1 else 1.0
        steps.append((lr, beta, kept, facts.get("weight_decay", 0.0), facts.get("nesterov", False)))
    rng = np.random.default_rng(1)
    last = np.concatenate([[0, 0, 1, STEPS - 1, STEPS], rng.integers(0, STEPS, 30)])
    w_UD, b_UD = rng.standard_normal((2, 35, D))
    got = caught_up(history, [w_UD, b_UD], last)
    for one, other in zip(got, naive_optim.catch_up_sgd(w_UD, b_UD, steps, last), strict=True):
        np.testing.assert_allclose(one, other.astype(float), rtol=1e-11, atol=1e-13)
    assert got[0][4].tobytes() == w_UD[4].tobytes(), "up to date already"


BETAS = [(0.9, 0.999), (0.5, 0.9), (0.9, 0.5), (0.99, 0.9999), (0.95, 0.98), (0.0, 0.9), (0.9, 0.0), (0.0, 0.0)]


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("betas", BETAS)
def test_adams_move_keeps_its_bound_and_its_factors_are_exact(betas, eps):
    """For roots from 1e-15 to 1e3, around eps too. Rows begin at w = 0, so that nothing hides the move."""
    rng = np.random.default_rng(2)
    last = np.array([0, 0, 1, 2, 5, 50, 300, 690, STEPS - 9, STEPS - 1, *rng.integers(0, STEPS, 10)])
    m_UD, v_UD = rng.standard_normal((20, D)), 10.0 ** rng.uniform(-30, 6, (20, D))
    worst = 0.0
    for name in SCHEDULES:
        history, steps = AdamWHistory(), []
        for step in range(1, STEPS + 1):
            lr, beta1 = SCHEDULES[name](step)[0], betas[0]
            if name == "one-cycle":
                beta1 *= SCHEDULES[name](step)[1]
            history.append(group(lr, betas=(beta1, betas[1]), eps=eps, weight_decay=0.1))
            steps.append((lr, beta1, betas[1], 1 - lr * 0.1, eps))
        moved, m, v = caught_up(history, [np.zeros((20, D)), m_UD, v_UD], last)
        expected = naive_optim.catch_up_adam(np.zeros((20, D)), m_UD, v_UD, steps, last)
        error, move = np.abs(moved - expected[0]), np.abs(expected[0])
        assert (error <= MOVE_BOUND * move).all()
        worst = max(worst, float((error / np.maximum(move, 1e-300)).max()))
        for one, other in zip((m, v), expected[1:], strict=True):
            np.testing.assert_allclose(one, other.astype(float), rtol=1e-11, atol=1e-300)
    print(f"\nlazy Adam, betas {betas}, eps {eps:g}: the worst error of a skipped move is {worst:.1e} of it")


def random_group(rng):
    lr, decay = rng.choice([0.0, 1e-6, 1e-3, 0.1, 1.0]), rng.choice([0.0, 0.01, 0.5, 1.0])
    betas = rng.choice([0.0, 0.5, 0.9, 0.95, 0.99, 0.999]), rng.choice([0.0, 0.5, 0.9, 0.99, 0.999, 0.9999])
    return group(lr, betas=betas, eps=rng.choice([1e-10, 1e-8, 1e-3]), weight_decay=decay)


@pytest.mark.parametrize("seed", range(40))
def test_adams_move_keeps_its_bound_whatever_the_hyperparameters_do(seed):
    """They jump at random, at every step or once in a while: rates to 0 and back, betas that never let a move end."""
    rng = np.random.default_rng(seed)
    history, steps = AdamWHistory(), []
    current, restless = random_group(rng), rng.choice([0.005, 0.05, 1.0])
    for _ in range(rng.integers(1, 300)):
        if rng.random() < restless:
            current = random_group(rng)
        history.append(current)
        steps.append((current["lr"], *current["betas"], 1 - current["lr"] * current["weight_decay"], current["eps"]))
    last = np.concatenate([[0], rng.integers(0, len(steps) + 1, 11)])
    m_UD, v_UD = rng.standard_normal((12, D)), 10.0 ** rng.uniform(-30, 6, (12, D))
    got = caught_up(history, [np.zeros((12, D)), m_UD, v_UD], last)
    expected = naive_optim.catch_up_adam(np.zeros((12, D)), m_UD, v_UD, steps, last)
    assert (np.abs(got[0] - expected[0]) <= MOVE_BOUND * np.abs(expected[0]) + 1e-290).all()
    for one, other in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(one, other.astype(float), rtol=1e-10, atol=1e-300)


def test_20000_idle_steps_move_a_row_where_float32_stands_still():
    """lr * weight_decay is below half a unit in float32's last place: step by step nothing would ever change."""
    history = AdamWHistory()
    for _ in range(20_000):
        history.append(group(1e-6, weight_decay=0.01))
    row = np.concatenate([np.ones(D), np.zeros(2 * D)]).astype(np.float32)[None]
    history.catch_up(row, np.empty((0, 3 * D), np.float32), np.array([0]), np.array([0]), D)
    assert np.float32(1.0) * np.float32(1 - 1e-8) == 1.0
    assert (row[0, :D] == np.float32(math.exp(-2e-4))).all()


def test_what_never_had_a_gradient_and_what_is_no_number():
    history = AdamWHistory()
    for step in range(1, 51):
        history.append(group(cosine(step)[0], weight_decay=0.1))
    w_UD = np.ones((6, D))
    m_UD, v_UD = np.ones((6, D)), np.ones((6, D))
    m_UD[0], v_UD[0] = 0.0, 0.0
    m_UD[1, 0], v_UD[2, 0], v_UD[3, 0], w_UD[4, 0] = np.nan, np.inf, np.nan, np.inf
    got = caught_up(history, [w_UD, m_UD, v_UD], np.zeros(6, np.int64))
    kept = math.prod(1 - cosine(step)[0] * 0.1 for step in range(1, 51))
    np.testing.assert_allclose(got[0][0], kept, rtol=1e-13)
    assert not got[1][0].any()
    assert np.isnan(got[0][1, 0])
    assert not np.isnan(got[0][1, 1:]).any()
    assert got[0][2, 0] == pytest.approx(kept), "an infinite v lets nothing move"
    assert np.isnan(got[0][3, 0])
    assert np.isinf(got[0][4, 0])
    assert np.isfinite(got[0][5]).all()


# -- a whole training, against torch's dense optimizer in float64 -----------------------------------------------

RULES = {
    "SGD momentum": (torch.optim.SGD, SGDHistory, {"momentum": 0.9}),
    "SGD decay": (torch.optim.SGD, SGDHistory, {"momentum": 0.9, "weight_decay": 0.1}),
    "SGD dampened": (torch.optim.SGD, SGDHistory, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "SGD nesterov": (torch.optim.SGD, SGDHistory, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, AdamHistory, {}),
    "AdamW": (torch.optim.AdamW, AdamWHistory, {"weight_decay": 0.1}),
}
SCHEDULERS = {
    "constant": lambda opt: torch.optim.lr_scheduler.ConstantLR(opt, 1.0),
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS),
    "one-cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=STEPS + 1),
}


def apply_gradient(history, facts, values_VE, rows_U, grads_UD):
    """The touched rows' own step, which is the last of the history; by the kernels of the sparse meaning."""
    number, dtype = values_VE.dtype.type, values_VE.dtype
    nothing = np.empty((0, values_VE.shape[1]), dtype)
    args = 0, len(rows_U), values_VE, nothing, rows_U, grads_UD.astype(dtype), number(1.0)
    lr = facts["lr"]
    if isinstance(history, SGDHistory):
        kept = history._facts_RF[history._count - 1, 2]
        numbers = map(number, (lr, facts["weight_decay"], facts["momentum"], kept))
        momentum.sgd_momentum(*args, *numbers, facts["nesterov"], False)
        return
    beta1, beta2 = facts["betas"]
    root, rest = math.sqrt(1 - beta2**history.steps), 1 - beta1**history.steps
    numbers = lr * root / rest, 1 - beta1, 1 - beta2, facts["eps"] * root, 1 - lr * facts["weight_decay"]
    decay.adamw(*args, *map(number, numbers))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("rule", RULES)
def test_training_lands_where_dense_torch_in_float64_does(rule, scheduler):
    """1,000 steps, Zipf ids, a loss that depends on the rows, so that every read has to catch up."""
    make, make_history, facts = RULES[rule]
    rng = np.random.default_rng(3)
    num_rows, blocks = 300, 2 if make is torch.optim.SGD else 3
    start_VD, target_VD = rng.standard_normal((2, num_rows, D))
    weight = torch.nn.Parameter(torch.from_numpy(start_VD.copy()))
    opt = make([weight], lr=0.01, foreach=False, **facts)
    schedule = SCHEDULERS[scheduler](opt)
    tables = {}
    for dtype in (np.float64, np.float32):
        values_VE = np.zeros((num_rows, blocks * D), dtype)
        values_VE[:, :D] = start_VD
        tables[dtype] = (values_VE, np.zeros(num_rows, np.int64), make_history())
    for _ in range(STEPS):
        ids = np.unique(np.minimum(rng.zipf(1.3, 12) - 1, num_rows - 1))
        noise_UD = rng.standard_normal((len(ids), D))
        weight.grad = torch.zeros_like(weight)
        weight.grad[ids] = torch.from_numpy(noise_UD + weight.detach().numpy()[ids] - target_VD[ids])
        for values_VE, last_V, history in tables.values():
            history.catch_up(values_VE, np.empty((0, blocks * D), values_VE.dtype), ids, last_V[ids], D)
            grads_UD = noise_UD + values_VE[ids, :D] - target_VD[ids]
            history.append(opt.param_groups[0])
            apply_gradient(history, opt.param_groups[0], values_VE, ids, grads_UD)
            last_V[ids] = history.steps
        opt.step()
        schedule.step()
    expected_VD, errors = weight.detach().numpy(), {}
    assert len(np.unique(tables[np.float64][1])) > 100, "rows of many ages"
    for dtype, (values_VE, last_V, history) in tables.items():
        everything = np.arange(num_rows)
        history.catch_up(values_VE, np.empty((0, blocks * D), dtype), everything, last_V, D)
        errors[dtype] = np.abs(values_VE[:, :D] - expected_VD).max()
    moved = np.abs(expected_VD - start_VD).max()
    print(f"\n{rule}, {scheduler}: float64 rows {errors[np.float64]:.1e}, float32 rows {errors[np.float32]:.1e}")
    assert moved > 0.1
    assert errors[np.float64] < (1e-11 if blocks == 2 else 1e-6)
    assert errors[np.float32] < 2e-5


# -- the history ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SGDHistory, AdamWHistory])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bits_depend_neither_on_threads_nor_on_a_restart_nor_on_the_company(make, schedule, monkeypatch):
    monkeypatch.setattr(threads, "GRAIN_ITEMS", 1)
    monkeypatch.setattr(threads.run, "__kwdefaults__", {"grain": 8})
    whole, restarted = make(), make()
    for step in range(1, 301):
        lr, beta = SCHEDULES[schedule](step)
        for history in (whole, restarted):
            history.append(group(lr, beta, betas=(beta, 0.99), weight_decay=0.1, dampening=0.25))
        if step % 50 == 25:
            restarted = make.from_scalars(json.loads(json.dumps(restarted.scalars())))
    rng = np.random.default_rng(4)
    width = 2 * D if make is SGDHistory else 3 * D
    rows = np.abs(rng.standard_normal((64, width))).astype(np.float32)
    last = rng.integers(0, 301, 64)
    results, before = [], threads.get_num_threads()
    for history, count in ((whole, 1), (whole, 3), (restarted, 1)):
        threads.set_num_threads(count)
        got = rows.copy()
        history.catch_up(got, np.empty((0, width), np.float32), np.arange(64), last, D)
        results.append(got.tobytes())
    threads.set_num_threads(before)
    alone = rows.copy()
    for u in range(64):
        whole.catch_up(alone, np.empty((0, width), np.float32), np.array([u]), last[u : u + 1], D)
    assert {*results, alone.tobytes()} == {results[0]}


def test_a_constant_rate_is_one_run_and_a_moving_one_a_run_a_step():
    for make in (SGDHistory, AdamWHistory):
        for schedule, runs in ((constant, 1), (cosine, 100)):
            history = make()
            for step in range(1, 101):
                history.append(group(*schedule(step)))
            assert len(history.scalars()["first"]) == runs


def test_forgetting_begins_anew():
    kept, forgets = AdamWHistory(), AdamWHistory()
    row = np.ones((1, 3 * D))
    nothing, slot = np.empty((0, 3 * D)), np.array([0])
    ahead = row.copy()
    for step in range(1, 61):
        for history in (kept, forgets):
            history.append(group(*cosine(step), weight_decay=0.1))
        if step == 20:
            forgets.catch_up(ahead, nothing, slot, np.array([0]), D)
            forgets.forget()
            assert forgets.scalars()["first"] == []
    kept.catch_up(row, nothing, slot, np.array([0]), D)
    forgets.catch_up(ahead, nothing, slot, np.array([20]), D)
    np.testing.assert_allclose(ahead, row, rtol=1e-7)
    with pytest.raises(InvalidArgument, match="a row is of step 19, but the history has steps 20 to 60"):
        forgets.catch_up(ahead, nothing, slot, np.array([19]), D)
    with pytest.raises(InvalidArgument, match="of step 61"):
        forgets.catch_up(ahead, nothing, slot, np.array([61]), D)
    again = AdamWHistory.from_scalars(forgets.scalars())
    assert again.scalars() == forgets.scalars()


@pytest.mark.parametrize("make", [SGDHistory, AdamWHistory])
def test_rows_without_a_gradient_are_made_up_for_from_the_start_whatever_is_forgotten(make):
    whole, forgets = make(), make()
    for step in range(1, 101):
        for history in (whole, forgets):
            history.append(group(*cosine(step), weight_decay=0.1, dampening=0.25))
        if step in (1, 30, 31, 100):
            forgets.forget()
            forgets = make.from_scalars(json.loads(json.dumps(forgets.scalars())))
        if step in (1, 2, 31, 70, 100):
            results = []
            for history in (whole, forgets):
                row = np.concatenate([np.ones(D), np.zeros(2 * D)])[None]
                history.catch_up(row, np.empty((0, 3 * D)), np.array([0]), np.array([0]), D)
                results.append(row)
            np.testing.assert_allclose(results[1], results[0], rtol=1e-12)
            assert results[0][0, 0] < 1


def test_sgds_buffer_is_born_undampened_whenever_momentum_begins():
    """And the step count of a history that forgets does not make it be born again."""
    history = SGDHistory()
    for beta in (0.0, 0.5, 0.5, 0.0, 0.5):
        history.append(group(0.1, beta, dampening=0.25))
    assert [facts[2] for facts in history.scalars()["facts"]] == [1.0, 1.0, 0.75, 0.75, 0.75]
    history.forget()
    history = SGDHistory.from_scalars(history.scalars())
    history.append(group(0.1, 0.5, dampening=0.25))
    assert history.scalars()["facts"][0][2] == 0.75


def test_nothing_to_do():
    history = AdamWHistory()
    empty = np.empty((0, 3 * D))
    history.catch_up(empty, empty, np.empty(0, np.int64), np.empty(0, np.int64), D)
    row = np.ones((1, 3 * D))
    history.catch_up(row, empty, np.array([0]), np.array([0]), D)
    assert (row == 1).all()


@pytest.mark.parametrize("facts", [{"weight_decay": 0.1}, {"amsgrad": True}])
def test_what_cannot_be_made_up_for(facts):
    history = AdamHistory()
    with pytest.raises(InvalidArgument, match=r'lazy="exact" cannot make up for steps'):
        history.append(group(0.1, **facts))
    assert history.steps == 0
