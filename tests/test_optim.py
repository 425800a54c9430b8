"""Optimizers: kernels equal their oracles to the last bit, training equals torch's optimizers on sparse gradients."""

import itertools
import math

import naive
import numpy as np
import pytest
import torch
from torch import nn
from training import (
    CACHE_ROWS,
    RULES,
    batches,
    coefficients,
    plain_twin,
    rows_and_state,
    small_embedding,
    small_table,
    weights,
)

import bigembed
from bigembed import optim
from bigembed.errors import InvalidArgument, StateMismatch
from bigembed.kernels import rules
from bigembed.spec import StateColumns

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, once a process

D = 4
RULES = {name: RULES[name] for name in ("SGD", "Adagrad", "RowwiseAdagrad", "Adam")}  # the others: test_momentum.py
KERNEL_DIM = 5  # no power of two, so that dividing by it is not exact
KERNELS = {
    "sgd": (0, (0.3,)),
    "adagrad": (KERNEL_DIM, (0.3, 1e-10)),
    "rowwise_adagrad": (1, (0.3, 1e-10)),
    "adam": (2 * KERNEL_DIM, (0.03, 0.1, 0.001, 1e-8)),
}
TWINS = {
    "SGD": (optim.SGD, torch.optim.SGD, {"lr": 0.3}),
    "SGD uphill": (optim.SGD, torch.optim.SGD, {"lr": 0.3, "maximize": True}),
    "Adagrad": (optim.Adagrad, torch.optim.Adagrad, {"lr": 0.3}),
    "Adagrad decaying": (
        optim.Adagrad,
        torch.optim.Adagrad,
        {"lr": 0.3, "lr_decay": 0.1, "initial_accumulator_value": 0.7, "eps": 1e-3, "maximize": True},
    ),
    "Adam": (optim.Adam, torch.optim.SparseAdam, {"lr": 0.1}),
    "Adam otherwise": (
        optim.Adam,
        torch.optim.SparseAdam,
        {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1e-3, "maximize": True},
    ),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_kernel_equals_its_oracle_in_slots_and_past_them(name, num_threads):
    state_dim, facts = KERNELS[name]
    rng = np.random.default_rng(1)
    slots, past = 40, 9
    values_SE = rng.random((slots + past, KERNEL_DIM + state_dim), np.float32)
    slots_U = rng.permutation(slots + past)[:30]
    sums_UD = rng.standard_normal((30, KERNEL_DIM)).astype(np.float32)
    sums_UD[3] = 0.0
    expected = values_SE.copy()
    getattr(naive, name)(expected, slots_U, sums_UD, -0.7, *facts)
    in_slots, past_them = values_SE[:slots].copy(), values_SE[slots:].copy()
    edges = [30 * n // num_threads for n in range(num_threads + 1)]
    args = (in_slots, past_them, slots_U, sums_UD, *map(np.float32, (-0.7, *facts)))
    for start, stop in itertools.pairwise(edges):
        getattr(rules, name)(start, stop, *args)
    assert np.concatenate([in_slots, past_them]).tobytes() == expected.tobytes()


def oracle_step(name, facts, values_VE, ids, grad_ND, step):
    """One step of a rule on the whole table in memory, by tests/naive.py."""
    rows_U, inverse_N = naive.group_by_row(ids.reshape(-1).numpy())
    sums_UD = naive.sum_by_row(grad_ND, inverse_N, len(rows_U))
    lr = facts["lr"]
    if name == "SGD":
        naive.sgd(values_VE, rows_U, sums_UD, 1.0, lr)
    elif name == "Adagrad":
        naive.adagrad(values_VE, rows_U, sums_UD, 1.0, lr / (1 + (step - 1) * facts["lr_decay"]), 1e-10)
    elif name == "RowwiseAdagrad":
        naive.rowwise_adagrad(values_VE, rows_U, sums_UD, 1.0, lr, 1e-10)
    else:
        beta1, beta2 = facts["betas"]
        rate = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        naive.adam(values_VE, rows_U, sums_UD, 1.0, rate, 1 - beta1, 1 - beta2, 1e-8)


@pytest.mark.parametrize("cache_rows", CACHE_ROWS)
@pytest.mark.parametrize("name", RULES)
def test_training_equals_the_oracle_bit_for_bit(tmp_path, name, cache_rows):
    make, facts = RULES[name]
    emb = small_embedding(tmp_path, cache_rows=cache_rows)
    opt = make(emb, **facts)
    expected_VE = rows_and_state(emb)
    rng = np.random.default_rng(2)
    for step, ids in enumerate(batches(8), start=1):
        grad = torch.from_numpy(rng.standard_normal((*ids.shape, D)).astype(np.float32))
        emb(ids).backward(grad)
        opt.step()
        opt.zero_grad()
        oracle_step(name, facts, expected_VE, ids, grad.reshape(-1, D).numpy(), step)
        assert rows_and_state(emb).tobytes() == expected_VE.tobytes()


def linear_loss(rows, ids):
    """Its gradient does not depend on the rows, and is a multiple of 1/8."""
    return (rows * coefficients(ids, D)).sum()


def train_twins(emb, plain, ours, theirs, ids, loss_of):
    """One step of both; returns both losses."""
    losses = []
    for module, opt in ((emb, ours), (plain, theirs)):
        loss = loss_of(module(ids), ids)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("cache_rows", CACHE_ROWS)
@pytest.mark.parametrize("name", TWINS)
def test_twin_with_exact_gradients_has_the_same_state_bits(tmp_path, name, cache_rows):
    """Gradients are multiples of a power of two, so that sums are exact and only the rule itself could differ.

    State is equal to the last bit. Weights are equal to rounding: torch's vectorised sqrt is off by one in the last
    place on some machines, and its sparse SGD subtracts each of a row's gradients by itself.
    """
    make, make_torch, facts = TWINS[name]
    emb = small_embedding(tmp_path, cache_rows=cache_rows, padding_idx=2)
    plain = plain_twin(emb, sparse=True)
    ours, theirs = make(emb, **facts), make_torch(plain.parameters(), **facts)
    for ids in batches(10):
        a, b = train_twins(emb, plain, ours, theirs, ids, linear_loss)
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(weights(emb), weights(plain), rtol=1e-6, atol=1e-6)
    assert not weights(emb)[2].any()
    state = theirs.state[plain.weight]
    expected = [state[key] for key in ("sum", "exp_avg", "exp_avg_sq") if key in state]
    if expected:
        assert torch.equal(torch.from_numpy(rows_and_state(emb)[:, D:]), torch.cat(expected, dim=1))


@pytest.mark.parametrize("cache_rows", CACHE_ROWS)
@pytest.mark.parametrize("facts", [{}, {"maximize": True}])
def test_twin_of_dense_sgd_has_the_same_bits(tmp_path, facts, cache_rows):
    """With a power of two as lr, too, so that it does not matter whether lr * g is rounded before it is subtracted."""
    emb = small_embedding(tmp_path, cache_rows=cache_rows, padding_idx=2)
    plain = plain_twin(emb)
    ours, theirs = optim.SGD(emb, lr=0.25, **facts), torch.optim.SGD(plain.parameters(), lr=0.25, **facts)
    for ids in batches(10):
        a, b = train_twins(emb, plain, ours, theirs, ids, linear_loss)
        assert a == b
    assert torch.equal(weights(emb), weights(plain))


@pytest.mark.parametrize("cache_rows", CACHE_ROWS)
@pytest.mark.parametrize("name", [name for name in TWINS if not name.startswith("Adam") and "uphill" not in name])
def test_twin_with_a_loss_that_bends(tmp_path, name, cache_rows):
    make, make_torch, facts = TWINS[name]
    facts = {**facts, "maximize": False}  # uphill this loss has no end
    emb = bigembed.Embedding.open(small_table(tmp_path), cache_rows=cache_rows, padding_idx=-3)
    assert emb.padding_idx == 47
    plain = plain_twin(emb, sparse=True)
    ours, theirs = make(emb, **facts), make_torch(plain.parameters(), **facts)

    def loss_of(rows, ids):
        return (rows.tanh() - coefficients(ids, D)).pow(2).mean()

    for ids in batches(12, size=(5, 3)):
        ids[0, 0] = 47
        a, b = train_twins(emb, plain, ours, theirs, ids, loss_of)
        assert a == pytest.approx(b, rel=1e-6)
    torch.testing.assert_close(weights(emb), weights(plain), rtol=1e-5, atol=1e-6)
    assert torch.equal(weights(emb)[47], weights(plain)[47])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam"])
def test_twin_for_ids_of_any_shape(tmp_path, name, shape, dtype):
    make, make_torch, facts = TWINS[name]
    emb = small_embedding(tmp_path)
    plain = plain_twin(emb, sparse=True)
    ours, theirs = make(emb, **facts), make_torch(plain.parameters(), **facts)
    for ids in batches(3, size=shape):
        ids = ids.to(dtype)
        assert emb(ids).shape == plain(ids).shape == (*shape, D)
        a, b = train_twins(emb, plain, ours, theirs, ids, linear_loss)
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(weights(emb), weights(plain), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam"])
def test_twin_of_one_weight_used_by_two_modules(tmp_path, name):
    make, make_torch, facts = TWINS[name]
    first = small_embedding(tmp_path)
    second = bigembed.Embedding.open(first.table, padding_idx=4)
    plain_first = plain_twin(first, sparse=True)
    plain_second = nn.Embedding(*plain_first.weight.shape, 4, sparse=True, _weight=weights(first))
    plain_second.weight = plain_first.weight
    ours, theirs = make(nn.ModuleList([first, second]), **facts), make_torch(plain_first.parameters(), **facts)
    for ids in batches(6):
        for one, two, opt in ((first, second, ours), (plain_first, plain_second, theirs)):
            ((one(ids) + two(ids.flip(0))) * coefficients(ids, D)).sum().backward()
            opt.step()
            opt.zero_grad()
    torch.testing.assert_close(weights(first), weights(plain_first), rtol=1e-6, atol=1e-6)


def test_a_step_without_rows_counts_as_in_torch(tmp_path):
    """A batch of padding only, or of nothing, is a step of SparseAdam all the same."""
    make, make_torch, facts = TWINS["Adam"]
    emb = small_embedding(tmp_path, padding_idx=0)
    plain = plain_twin(emb, sparse=True)
    ours, theirs = make(emb, **facts), make_torch(plain.parameters(), **facts)
    for ids in (torch.tensor([1, 2]), torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([2])):
        train_twins(emb, plain, ours, theirs, ids, linear_loss)
    torch.testing.assert_close(weights(emb), weights(plain), rtol=1e-6, atol=1e-6)
    assert emb.table.scalars["step"] == 4


# -- state columns ----------------------------------------------------------------------------------------------


def step_once(emb, opt, ids=(1, 3, 5)):
    emb(torch.tensor(ids)).sum().backward()
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("name", RULES)
def test_attaching_to_an_empty_table_writes_no_row(tmp_path, name):
    make, facts = RULES[name]
    emb = small_embedding(tmp_path, 10_000_000)
    before = emb.table.read([0, 9_999_999])
    make(emb, **facts)
    assert not emb.table.has_rows
    assert emb.table.read([0, 9_999_999]).tobytes() == before.tobytes()
    owner = {"Adagrad": "adagrad", "RowwiseAdagrad": "rowwise_adagrad", "Adam": "adam", "SGD": None}[name]
    assert emb.table.spec.owner == owner
    assert emb.table.spec.state_dim == {"Adagrad": 4, "RowwiseAdagrad": 1, "Adam": 8, "SGD": 1}[name]


def test_the_reserved_column_makes_rowwise_adagrad_free(tmp_path):
    emb = small_embedding(tmp_path)
    step_once(emb, optim.SGD(emb))
    emb.commit()
    generation, before = emb.table.generation, weights(emb)
    optim.RowwiseAdagrad(emb)
    assert emb.table.generation == generation
    assert torch.equal(weights(emb), before)
    assert not rows_and_state(emb)[:, D:].any()


@pytest.mark.parametrize("cache_rows", CACHE_ROWS)
def test_widening_keeps_every_weight_also_uncommitted_ones(tmp_path, cache_rows):
    emb = small_embedding(tmp_path, cache_rows=cache_rows)
    sgd = optim.SGD(emb, lr=0.1)
    step_once(emb, sgd)
    emb.commit()
    step_once(emb, sgd, (3, 7, 9))
    emb.weight[11] = torch.ones(D)
    before, dirty = weights(emb), emb.table.stats()["cache"]["dirty_rows"]
    assert dirty > 0
    opt = optim.Adam(emb, lr=0.1)
    assert torch.equal(weights(emb), before)
    assert emb.table.spec.state == (StateColumns("exp_avg", D), StateColumns("exp_avg_sq", D))
    assert not rows_and_state(emb)[:, D:].any()
    emb.table.verify()
    plain = nn.Embedding.from_pretrained(before, freeze=False, sparse=True)
    theirs = torch.optim.SparseAdam(plain.parameters(), lr=0.1)
    train_twins(emb, plain, opt, theirs, torch.tensor([3, 4, 3]), linear_loss)
    torch.testing.assert_close(weights(emb), weights(plain), rtol=1e-6, atol=1e-6)


def test_another_rule_needs_leave_to_give_the_state_up(tmp_path):
    emb = small_embedding(tmp_path)
    step_once(emb, optim.Adam(emb))
    emb.commit()
    before, generation = rows_and_state(emb), emb.table.generation
    for make in (optim.Adagrad, optim.RowwiseAdagrad, optim.SGD):
        with pytest.raises(StateMismatch, match=r"hold the state of adam.*reset_state=True"):
            make(emb)
    assert rows_and_state(emb).tobytes() == before.tobytes()
    assert emb.table.generation == generation
    opt = optim.Adagrad(emb, initial_accumulator_value=0.5, reset_state=True)
    assert rows_and_state(emb)[:, :D].tobytes() == before[:, :D].tobytes()
    assert (rows_and_state(emb)[:, D:] == 0.5).all()
    step_once(emb, opt)
    assert emb.table.scalars["step"] == 1


def test_reset_state_gives_up_the_state_of_the_same_rule_too(tmp_path):
    emb = small_embedding(tmp_path)
    step_once(emb, optim.Adam(emb))
    before = weights(emb)
    opt = optim.Adam(emb, reset_state=True)
    assert torch.equal(weights(emb), before)
    assert not rows_and_state(emb)[:, D:].any()
    assert emb.table.scalars == {}
    step_once(emb, opt)
    assert rows_and_state(emb)[1, D:].any()


def test_one_table_that_does_not_fit_leaves_all_as_they_were(tmp_path):
    fits, does_not = small_embedding(tmp_path), small_embedding(tmp_path)
    old, other = optim.SGD(fits), optim.Adam(does_not)
    step_once(does_not, other)
    with pytest.raises(StateMismatch):
        optim.Adagrad([fits, does_not])
    assert fits.table.spec.owner is None
    step_once(fits, old)  # it still trains the table
    step_once(does_not, other)
    with pytest.raises(InvalidArgument, match="lr must be at least 0"):
        optim.SGD(fits, lr=-1.0)
    step_once(fits, old)


@pytest.mark.parametrize(
    ("make", "facts", "text"),
    [
        (optim.SGD, {"lr": -0.1}, "lr must be at least 0, not -0.1"),
        (optim.SGD, {"lr": math.nan}, "lr must be at least 0, not nan"),
        (optim.Adagrad, {"lr_decay": -1.0}, "lr_decay must be at least 0"),
        (optim.RowwiseAdagrad, {"eps": -1.0}, "eps must be at least 0"),
        (optim.Adam, {"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1"),
        (optim.Adam, {"eps": 0.0}, "eps must be above 0"),
    ],
)
def test_hyperparameters_that_cannot_be(tmp_path, make, facts, text):
    emb = small_embedding(tmp_path)
    with pytest.raises(InvalidArgument, match=text):
        make(emb, **facts)
    assert emb.table.spec.owner is None


@pytest.mark.parametrize("name", RULES)
def test_state_and_step_count_travel_with_commits_and_rollbacks(tmp_path, name):
    make, facts = RULES[name]
    table = small_table(tmp_path)
    emb = bigembed.Embedding.open(table, cache_rows=3)
    opt = make(emb, **facts)
    for ids in batches(3):
        step_once(emb, opt, ids.tolist())
    first = emb.commit("first")
    kept, scalars = rows_and_state(emb), dict(table.scalars)
    assert scalars["step"] == 3
    assert scalars["rule"] == opt.rule
    for ids in batches(3, seed=1):
        step_once(emb, opt, ids.tolist())
    assert rows_and_state(emb).tobytes() != kept.tobytes()
    table.rollback()
    assert rows_and_state(emb).tobytes() == kept.tobytes()
    assert table.scalars == scalars
    step_once(emb, opt)
    after = rows_and_state(emb)
    table.commit("auto")
    table.rollback(table.generations()[-1].number)
    assert rows_and_state(emb).tobytes() == after.tobytes()
    assert table.scalars["step"] == 4
    assert first < table.generation


def test_rollback_to_an_earlier_generation_restores_the_step_count(tmp_path):
    """An automatic commit comes between the explicit one and the rollback."""
    emb = small_embedding(tmp_path, journal_bytes=4096)
    opt = optim.Adam(emb)
    step_once(emb, opt)
    first = emb.commit("first")
    kept = rows_and_state(emb)
    for ids in batches(6):
        step_once(emb, opt, ids.tolist())
    assert emb.stats()["journal"]["auto_commits"] > 0
    emb.table.rollback(first)
    assert rows_and_state(emb).tobytes() == kept.tobytes()
    assert emb.table.scalars["step"] == 1
