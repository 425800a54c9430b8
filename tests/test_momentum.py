"""SGD with momentum, weight decay in every rule, AdamW: kernels against their twins, training against the equation.

And what torch's schedulers, state dicts and tensors for lr make of the optimizers of tables.
"""

import copy
import inspect
import itertools
import math

import naive
import naive_optim
import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler
from training import (
    CACHE_ROWS,
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
from bigembed.kernels import decay, momentum
from bigembed.optim import device_rules

D = 4
KERNEL_DIM = 5
ADAM = (0.03, 0.1, 0.001, 1e-8)
KERNELS = {  # name: (kernel's name, module, state columns, arguments after scale, name of the torch rule)
    "sgd decayed": ("sgd_decayed", momentum, 0, (0.3, 0.1), "sgd"),
    "momentum": ("sgd_momentum", momentum, KERNEL_DIM, (0.3, 0.0, 0.9, 1.0, False, False), "sgd"),
    "momentum decayed": ("sgd_momentum", momentum, KERNEL_DIM, (0.3, 0.1, 0.9, 1.0, False, False), "sgd"),
    "nesterov": ("sgd_momentum", momentum, KERNEL_DIM, (0.3, 0.1, 0.7, 1.0, True, False), "sgd"),
    "dampened": ("sgd_momentum", momentum, KERNEL_DIM + 1, (0.3, 0.1, 0.9, 0.6, False, True), "sgd"),
    "adagrad": ("adagrad_decayed", decay, KERNEL_DIM, (0.3, 1e-10, 0.1), "adagrad"),
    "rowwise": ("rowwise_adagrad_decayed", decay, 1, (0.3, 1e-10, 0.1), "rowwise_adagrad"),
    "adam": ("adam_decayed", decay, 2 * KERNEL_DIM, (*ADAM, 0.1), "adam"),
    "adamw": ("adamw", decay, 2 * KERNEL_DIM, (*ADAM, 0.997), "adamw"),
}


def as_given(facts):
    return [fact if isinstance(fact, bool) else np.float32(fact) for fact in facts]


def some_rows(rng, count, width):
    values = rng.standard_normal((count, width)).astype(np.float32)
    values[:, KERNEL_DIM:] = np.abs(values[:, KERNEL_DIM:])
    values[::2, 2 * KERNEL_DIM :] = 0.0  # rows whose momentum was never set
    return values


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_kernel_equals_its_oracle_in_slots_and_past_them(name, num_threads):
    kernel, module, state_dim, facts, _ = KERNELS[name]
    rng = np.random.default_rng(1)
    slots, past = 40, 9
    values_SE = some_rows(rng, slots + past, KERNEL_DIM + state_dim)
    slots_U = rng.permutation(slots + past)[:30]
    sums_UD = rng.standard_normal((30, KERNEL_DIM)).astype(np.float32)
    sums_UD[3] = 0.0
    expected, given = values_SE.copy(), sums_UD.copy()
    getattr(naive_optim, kernel)(expected, slots_U, sums_UD, -0.7, *facts)
    assert expected.tobytes() != values_SE.tobytes()
    in_slots, past_them = values_SE[:slots].copy(), values_SE[slots:].copy()
    edges = [30 * n // num_threads for n in range(num_threads + 1)]
    args = (in_slots, past_them, slots_U, sums_UD, np.float32(-0.7), *as_given(facts))
    for start, stop in itertools.pairwise(edges):
        getattr(module, kernel)(start, stop, *args)
    assert np.concatenate([in_slots, past_them]).tobytes() == expected.tobytes()
    assert sums_UD.tobytes() == given.tobytes(), "the gradient is pending still"


@pytest.mark.parametrize("name", KERNELS)
def test_the_rule_in_torch_ops_equals_its_kernel(name):
    kernel, module, state_dim, facts, device_rule = KERNELS[name]
    rng, num_rows = np.random.default_rng(2), 200
    host = some_rows(rng, num_rows, KERNEL_DIM + state_dim)
    rows_UE = torch.from_numpy(host.copy())
    for scale in map(np.float32, (1.0, 0.37, -1.0)):
        sums_UD = rng.standard_normal((num_rows, KERNEL_DIM)).astype(np.float32)
        nothing = np.empty((0, host.shape[1]), np.float32)
        getattr(module, kernel)(0, num_rows, host, nothing, np.arange(num_rows), sums_UD, scale, *as_given(facts))
        given = torch.from_numpy(sums_UD.copy())
        assert getattr(device_rules, device_rule)(rows_UE, given, scale, *as_given(facts)) is rows_UE
        assert given.numpy().tobytes() == sums_UD.tobytes()
        assert rows_UE.numpy().tobytes() == host.tobytes()


# -- training, against the equation on a plain array ------------------------------------------------------------

TRAINING = {
    "decay": (optim.SGD, {"lr": 0.5, "weight_decay": 0.25}),
    "momentum": (optim.SGD, {"lr": 0.5, "momentum": 0.75}),
    "all of it": (optim.SGD, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "maximize": True}),
    "dampened": (optim.SGD, {"lr": 0.3, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    "Adagrad": (optim.Adagrad, {"lr": 0.3, "lr_decay": 0.1, "weight_decay": 0.1}),
    "RowwiseAdagrad": (optim.RowwiseAdagrad, {"lr": 0.3, "weight_decay": 0.1, "initial_accumulator_value": 0.5}),
    "Adam": (optim.Adam, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    "AdamW": (optim.AdamW, {"lr": 0.1, "weight_decay": 0.1, "betas": (0.75, 0.875)}),
}
CACHES = [*({"cache_rows": rows} for rows in CACHE_ROWS), {"device_rows": 3, "cache_rows": 5}]
CACHE_NAMES = ["3 rows cached", "all cached", "3 rows on the device"]


def oracle_step(make, facts, values_VE, rows_U, sums_UD, step):
    """One step of a rule on the whole table in memory."""
    args = values_VE, rows_U, sums_UD, -1.0 if facts.get("maximize") else 1.0
    lr, wd = facts["lr"], facts.get("weight_decay", 0.0)
    beta1, beta2 = facts.get("betas", (0.9, 0.999))
    root, rest = math.sqrt(1 - beta2**step), 1 - beta1**step
    if make is optim.SGD and "momentum" in facts:
        dampening = facts.get("dampening", 0.0)
        more = facts["momentum"], 1 - dampening, facts.get("nesterov", False), dampening != 0
        naive_optim.sgd_momentum(*args, lr, wd, *more)
    elif make is optim.SGD:
        naive_optim.sgd_decayed(*args, lr, wd)
    elif make is optim.Adagrad:
        naive_optim.adagrad_decayed(*args, lr / (1 + (step - 1) * facts["lr_decay"]), 1e-10, wd)
    elif make is optim.RowwiseAdagrad:
        naive_optim.rowwise_adagrad_decayed(*args, lr, 1e-10, wd)
    elif make is optim.Adam:
        naive_optim.adam_decayed(*args, lr * root / rest, 1 - beta1, 1 - beta2, 1e-8, wd)
    else:
        naive_optim.adamw(*args, lr * root / rest, 1 - beta1, 1 - beta2, 1e-8 * root, 1 - lr * wd)


@pytest.mark.parametrize("caches", CACHES, ids=CACHE_NAMES)
@pytest.mark.parametrize("name", TRAINING)
def test_training_equals_the_oracle_bit_for_bit(tmp_path, name, caches):
    """And rows without a gradient stay as they are, which the oracle leaves alone."""
    make, facts = TRAINING[name]
    emb = small_embedding(tmp_path, **caches)
    opt = make(emb, **facts)
    expected_VE = rows_and_state(emb)
    rng = np.random.default_rng(2)
    for step, ids in enumerate(batches(6), start=1):
        grad = torch.from_numpy(rng.standard_normal((*ids.shape, D)).astype(np.float32))
        emb(ids).backward(grad)
        opt.step()
        opt.zero_grad()
        rows_U, inverse_N = naive.group_by_row(ids.reshape(-1).numpy())
        sums_UD = naive.sum_by_row(grad.reshape(-1, D).numpy(), inverse_N, len(rows_U))
        oracle_step(make, facts, expected_VE, rows_U, sums_UD, step)
        assert rows_and_state(emb).tobytes() == expected_VE.tobytes()


TWINS = {
    "momentum": (optim.SGD, torch.optim.SGD, {"lr": 0.25, "momentum": 0.5}),
    "nesterov": (optim.SGD, torch.optim.SGD, {"lr": 0.25, "momentum": 0.5, "nesterov": True, "maximize": True}),
    "dampened": (optim.SGD, torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    "decay": (optim.SGD, torch.optim.SGD, {"lr": 0.3, "weight_decay": 0.1, "maximize": True}),
    "Adagrad": (optim.Adagrad, torch.optim.Adagrad, {"lr": 0.3, "lr_decay": 0.1, "weight_decay": 0.1}),
    "AdamW": (optim.AdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "AdamW otherwise": (optim.AdamW, torch.optim.AdamW, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 0.1, "maximize": True}),
}


def train_twins(emb, plain, ours, theirs, ids):
    for module, opt in ((emb, ours), (plain, theirs)):
        (module(ids) * coefficients(ids, D)).sum().backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("name", TWINS)
def test_a_table_whose_every_row_has_a_gradient_goes_where_dense_torch_does(tmp_path, name):
    make, make_torch, facts = TWINS[name]
    emb = small_embedding(tmp_path)
    plain = plain_twin(emb)
    ours, theirs = make(emb, **facts), make_torch(plain.parameters(), **facts)
    for ids in batches(8):
        train_twins(emb, plain, ours, theirs, torch.cat([ids.reshape(-1), torch.arange(50)]))
    torch.testing.assert_close(weights(emb), weights(plain), rtol=1e-5, atol=1e-6)
    if name in ("momentum", "nesterov"):  # powers of two: no rounding to differ in
        assert torch.equal(weights(emb), weights(plain))


def test_a_row_whose_first_gradient_comes_late_starts_as_torchs_first_step(tmp_path):
    """With dampening its momentum is that gradient, undampened."""
    facts = {"lr": 0.5, "momentum": 0.5, "dampening": 0.5}
    emb = small_embedding(tmp_path)
    opt = optim.SGD(emb, **facts)
    for ids in ([1], [1], [2, 1], [2]):
        emb(torch.tensor(ids)).sum().backward()
        opt.step()
        opt.zero_grad()
    state = rows_and_state(emb)[:, D:]
    assert (state[1, :D] == 1.0).all()
    assert (state[2, :D] == 1.0).all()
    assert state[1, D] == state[2, D] == 1.0
    assert not state[3].any()


# -- what SGD refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "facts", "text"),
    [
        (optim.SGD, {"momentum": -0.1}, "momentum must be at least 0, not -0.1"),
        (optim.SGD, {"momentum": math.nan}, "momentum must be at least 0, not nan"),
        (optim.SGD, {"weight_decay": -1}, "weight_decay must be at least 0, not -1"),
        (optim.SGD, {"nesterov": True}, "nesterov needs a momentum above 0"),
        (optim.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "and no dampening"),
        (optim.Adagrad, {"weight_decay": -1}, "weight_decay must"),
        (optim.RowwiseAdagrad, {"weight_decay": -1}, "weight_decay must"),
        (optim.Adam, {"weight_decay": -1}, "weight_decay must"),
        (optim.AdamW, {"weight_decay": -1}, "weight_decay must"),
        (optim.AdamW, {"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1"),
        (optim.AdamW, {"betas": (0.9,)}, "betas must be"),
        (optim.AdamW, {"eps": 0.0}, "eps must be above 0"),
    ],
)
def test_hyperparameters_that_cannot_be(tmp_path, make, facts, text):
    emb = small_embedding(tmp_path)
    with pytest.raises(InvalidArgument, match=text):
        make(emb, **facts)
    assert emb.table.spec.owner is None


@pytest.mark.parametrize(
    ("made_with", "later", "name"),
    [({}, {"momentum": 0.5}, "momentum"), ({"momentum": 0.5}, {"dampening": 0.5}, "dampening")],
)
def test_what_has_no_column_cannot_start_later(tmp_path, made_with, later, name):
    emb = small_embedding(tmp_path)
    opt = optim.SGD(emb, **made_with)
    emb(torch.tensor([1])).sum().backward()
    opt.param_groups[0].update(later)
    before = rows_and_state(emb).tobytes()
    with pytest.raises(StateMismatch, match=f"{name} is 0.5 now, but it was 0 when this SGD was made"):
        opt.step()
    assert rows_and_state(emb).tobytes() == before
    assert emb.table.scalars == {}
    opt.param_groups[0][name] = 0.0
    opt.step()  # the gradient is still there
    assert rows_and_state(emb).tobytes() != before


@pytest.mark.parametrize(
    ("before", "now", "text"), [(0.0, 0.5, "no dampening, and with some"), (0.5, 0.0, "dampening, and with none")]
)
def test_dampening_that_comes_or_goes_needs_leave_to_give_the_momentum_up(tmp_path, before, now, text):
    fits, does_not = small_embedding(tmp_path), small_embedding(tmp_path)
    old, other = optim.SGD(does_not, momentum=0.5, dampening=before), optim.SGD(fits)
    for emb, opt in ((does_not, old), (fits, other)):
        emb(torch.tensor([1])).sum().backward()
        opt.step()
        opt.zero_grad()
    kept = rows_and_state(does_not)
    with pytest.raises(StateMismatch, match=f"trained by SGD with momentum and {text}.*reset_state=True"):
        optim.SGD([fits, does_not], momentum=0.5, dampening=now)
    assert rows_and_state(does_not).tobytes() == kept.tobytes()
    assert fits.table.spec.owner is None
    optim.SGD(does_not, momentum=0.25, dampening=before)  # as it was
    assert rows_and_state(does_not).tobytes() == kept.tobytes()
    optim.SGD(does_not, momentum=0.5, dampening=now, reset_state=True)
    assert not rows_and_state(does_not)[:, D:].any()


def test_momentum_set_to_0_leaves_the_buffer_as_it_is(tmp_path):
    emb = small_embedding(tmp_path)
    opt = optim.SGD(emb, lr=0.5, momentum=0.5)
    for factor in (0.5, 0.0):
        opt.param_groups[0]["momentum"] = factor
        emb(torch.tensor([1])).sum().backward()
        opt.step()
        opt.zero_grad()
    assert (rows_and_state(emb)[1, D:] == 1.0).all()


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_travels_with_the_table(tmp_path, dampening):
    facts = {"lr": 0.5, "momentum": 0.5, "dampening": dampening}
    tables = []
    for reopens in (False, True):
        table = small_table(tmp_path, is_temporary=False)
        emb = bigembed.Embedding.open(table)
        opt = optim.SGD(emb, **facts)
        for n, ids in enumerate(batches(4)):
            if reopens and n == 2:
                emb.commit("half-way")
                emb.close()
                emb = bigembed.Embedding.open(table.path)
                opt = optim.SGD(emb, **facts)
            emb(ids).sum().backward()
            opt.step()
            opt.zero_grad()
        tables.append(rows_and_state(emb).tobytes())
        emb.commit("end")
        emb.close()
    assert tables[0] == tables[1]


# -- schedulers, state dicts, tensors ---------------------------------------------------------------------------

SCHEDULERS = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3]),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda n: 1 / (n + 1)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda n: 0.9),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.25, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.5),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.125, 0.5, 2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.5, total_steps=8),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.5)], milestones=[2]
    ),
}
SCHEDULED = {
    "SGD": (optim.SGD, torch.optim.SGD, {"lr": 0.25, "momentum": 0.5}),
    "AdamW": (optim.AdamW, torch.optim.AdamW, {"lr": 0.25}),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("rule", SCHEDULED)
@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step")  # SequentialLR's own
def test_schedulers_move_lr_and_momentum_as_in_torch(tmp_path, rule, scheduler):
    make, make_torch, facts = SCHEDULED[rule]
    emb = small_embedding(tmp_path)
    plain = plain_twin(emb)
    opts = make(emb, **facts), make_torch(plain.parameters(), **facts)
    ours, theirs = (SCHEDULERS[scheduler](opt) for opt in opts)
    rates = set()
    for ids in batches(6):
        train_twins(emb, plain, *opts, torch.cat([ids.reshape(-1), torch.arange(50)]))
        rates.add(opts[0].param_groups[0]["lr"])
        ours.step()
        theirs.step()
        for name in ("lr", "momentum", "betas"):
            assert opts[0].param_groups[0].get(name) == opts[1].param_groups[0].get(name)
    assert len(rates) > 1
    torch.testing.assert_close(weights(emb), weights(plain), rtol=1e-5, atol=1e-6)


def test_reduce_on_plateau(tmp_path):
    opt = optim.SGD(small_embedding(tmp_path), lr=0.5)
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0)
    for loss in (1.0, 2.0, 3.0):
        scheduler.step(loss)
    assert opt.param_groups[0]["lr"] == 0.125


def test_one_cycle_on_sgd_without_momentum_says_so_at_the_first_step(tmp_path):
    emb = small_embedding(tmp_path)
    opt = optim.SGD(emb)
    lr_scheduler.OneCycleLR(opt, 0.5, total_steps=8)
    emb(torch.tensor([1])).sum().backward()
    with pytest.raises(StateMismatch, match=r"momentum is 0\.95 now.*cycle_momentum=False"):
        opt.step()


ALL_RULES = {"SGD": {"momentum": 0.5}, "Adagrad": {}, "RowwiseAdagrad": {}, "Adam": {}, "AdamW": {}}


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_lr_as_a_tensor_gives_the_same_bits(tmp_path, rule, shape):
    tables = []
    for lr in (0.125, torch.full(shape, 0.125)):
        emb = small_embedding(tmp_path)
        opt = getattr(optim, rule)(emb, lr=lr, **ALL_RULES[rule])
        scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
        for ids in batches(3):
            emb(ids).sum().backward()
            opt.step()
            opt.zero_grad()
            scheduler.step()
        assert emb.table.scalars["lr"] == 0.125 / 4
        tables.append(rows_and_state(emb).tobytes())
    assert tables[0] == tables[1]


@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_state_dict_is_small_and_sets_every_hyperparameter(tmp_path, rule):
    make, facts = getattr(optim, rule), ALL_RULES[rule]
    emb = small_embedding(tmp_path)
    opt = make([{"params": emb, "lr": 0.75}], weight_decay=0.5, **facts)
    emb(torch.tensor([1])).sum().backward()
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    assert saved["state"] == {}
    assert saved["param_groups"][0]["params"] == [0]
    new = make(emb, **facts)
    new.load_state_dict(saved)
    for name in inspect.signature(make).parameters:
        if name not in ("modules", "reset_state"):
            assert new.param_groups[0][name] == opt.param_groups[0][name], name
    assert new.param_groups[0]["lr"] == 0.75
    new.step()
    assert emb.table.scalars["step"] == 2


def test_several_tables_of_several_widths_in_one_optimizer(tmp_path):
    embs = [small_embedding(tmp_path, 50, dim, seed=dim) for dim in (1, 3, 8)]
    plains = [plain_twin(emb) for emb in embs]
    ours = optim.SGD([{"params": embs[:2]}, {"params": embs[2], "momentum": 0.25}], lr=0.5, momentum=0.5)
    theirs = torch.optim.SGD(
        [{"params": [plain.weight for plain in plains[:2]]}, {"params": plains[2].weight, "momentum": 0.25}],
        lr=0.5,
        momentum=0.5,
    )
    everything = torch.arange(50)
    for _ in range(3):
        for modules, opt in ((embs, ours), (plains, theirs)):
            sum(
                (module(everything) * coefficients(everything, module.embedding_dim)).sum() for module in modules
            ).backward()
            opt.step()
            opt.zero_grad()
    for emb, plain in zip(embs, plains, strict=True):
        assert torch.equal(weights(emb), weights(plain))
