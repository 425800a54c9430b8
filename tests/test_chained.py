"""Chained and clip_grad_norm_: a model with tables against its dense twin, in loops that know one optimizer."""

import copy
import math
import pickle

import naive_optim
import numpy as np
import pytest
import torch
from torch import nn
from training import batches, coefficients, plain_twin, rows_and_state, small_embedding, weights

import bigembed
from bigembed import optim
from bigembed.errors import InvalidArgument
from bigembed.kernels.gradient_norms import row_largest, row_power_sums
from bigembed.optim.clip import pending_norm
from bigembed.optim.reserve import RULES

D = 4
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
DEVICE = {"device_rows": 3, "cache_rows": 5}
CACHES = pytest.mark.parametrize("caches", [{"cache_rows": 3}, {}, DEVICE], ids=["3 rows", "all rows", "device"])


class Model(nn.Module):
    """Two embeddings under a linear layer."""

    def __init__(self, *embs):
        super().__init__()
        self.embs = nn.ModuleList(embs)
        self.head = nn.Linear(D, 3)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 8 - 1)

    def loss(self, ids):
        return self.head(sum(emb(ids) for emb in self.embs)).pow(2).mean()


@pytest.fixture
def pair(tmp_path):
    return twins(tmp_path, {})


def twins(tmp_path, caches):
    embs = [small_embedding(tmp_path, seed=seed, **caches) for seed in (1, 2)]
    return Model(*embs), Model(*(plain_twin(emb) for emb in embs))


def dense_parameters(model):
    return [parameter for name, parameter in model.named_parameters() if not name.endswith("handle")]


def chained(model, lr=0.25, **facts):
    """SGD for all, as one optimizer: of the twin one of torch's, with as many groups."""
    if isinstance(model.embs[0], nn.Embedding):
        groups = [{"params": [emb.weight for emb in model.embs]}, {"params": list(model.head.parameters())}]
        return torch.optim.SGD(groups, lr=lr, **facts)
    return optim.Chained(optim.SGD(model, lr=lr, **facts), torch.optim.SGD(dense_parameters(model), lr=lr, **facts))


def assert_same(ours, plain):
    for mine, theirs in zip(ours.embs, plain.embs, strict=True):
        torch.testing.assert_close(weights(mine), weights(theirs), **CLOSE)
    torch.testing.assert_close(ours.head.weight, plain.head.weight, **CLOSE)


# -- clip_grad_norm_ --------------------------------------------------------------------------------------------


@CACHES
@pytest.mark.parametrize("norm_type", [0, 0.5, 1, 1.5, 2, 3.0, math.inf, "inf"])
@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_equals_torchs_on_the_dense_twin(tmp_path, norm_type, max_norm, caches):
    def train(model):
        opt, norms = chained(model), []
        clip = nn.utils.clip_grad_norm_ if isinstance(model.embs[0], nn.Embedding) else optim.clip_grad_norm_
        for n, ids in enumerate(batches(4)):
            model.loss(ids).backward()
            norm = clip(model.parameters(), max_norm, norm_type, foreach=[None, True, False][n % 3])
            norms += [norm.item(), clip(model.parameters(), max_norm / 2, norm_type).item()]
            opt.step()
            opt.zero_grad()
        return norms

    ours, plain = twins(tmp_path, caches)
    assert train(ours) == pytest.approx(train(plain), rel=2e-5)
    assert_same(ours, plain)


def test_clipping_takes_modules_parameters_and_both_and_counts_each_once(pair):
    model = pair[0]
    opt = chained(model)
    expected = None
    ways = [
        model,
        [model],
        [model.embs, model.head, model.head.weight],
        (parameter for parameter in model.parameters()),
        [model, *model.parameters()],
    ]
    for way in ways:
        opt.zero_grad()
        model.loss(torch.tensor([1, 2, 2])).backward()
        norm = optim.clip_grad_norm_(way, 0.5, 1.0).item()
        assert norm > 0.5
        assert expected is None or norm == expected
        expected = norm
        assert optim.clip_grad_norm_(way if isinstance(way, list) else model, 0.5, 1.0).item() == pytest.approx(0.5)
    only = optim.clip_grad_norm_(model.head.weight, 1e9, 1.0).item()
    assert only == pytest.approx(model.head.weight.grad.abs().sum().item(), rel=1e-6)


@pytest.mark.parametrize("norm_type", [1.0, math.inf])
def test_a_gradient_that_is_not_clipped_keeps_its_bits(tmp_path, norm_type):
    tables = []
    for clips in (False, True):
        model = twins(tmp_path, {})[0]
        opt = chained(model)
        for ids in batches(4):
            model.loss(ids).backward()
            if clips:
                optim.clip_grad_norm_(model, 1e6, norm_type)
            opt.step()
            opt.zero_grad()
        tables.append([rows_and_state(emb).tobytes() for emb in model.embs])
    assert tables[0] == tables[1]


def test_scaled_and_accumulated_gradients_are_clipped_as_they_stand(pair):
    def norms(model):
        clip = nn.utils.clip_grad_norm_ if isinstance(model.embs[0], nn.Embedding) else optim.clip_grad_norm_
        optimizer = chained(model)  # it shall live
        found = []
        for factor in (0.5, -3.0, 0.0):
            model.loss(torch.tensor([[1, 2], [2, 7]])).backward()
            for parameter in model.parameters():
                parameter.grad.mul_(factor)
            found.append(clip(model.parameters(), 1e9, 1.0).item())
        del optimizer
        return found

    assert norms(pair[0]) == pytest.approx(norms(pair[1]), rel=1e-5)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_norm_that_is_no_number(pair, norm_type, factor):
    model = pair[0]
    optimizer = chained(model)
    (model.loss(torch.tensor([1, 2])) * factor).backward()
    with pytest.raises(RuntimeError, match=r"total norm of order .* is non-finite"):
        optim.clip_grad_norm_(model, 1.0, norm_type, error_if_nonfinite=True)
    assert not math.isfinite(optim.clip_grad_norm_(model, 1.0, norm_type).item())
    del optimizer


def test_clipping_nothing_and_what_cannot_be_clipped(pair):
    model = pair[0]
    assert optim.clip_grad_norm_(model, 1.0).item() == 0.0
    assert optim.clip_grad_norm_([], 1.0).item() == 0.0
    with pytest.raises(InvalidArgument, match="a int is neither a module nor a parameter"):
        optim.clip_grad_norm_([model, 3], 1.0)
    for norm_type in (-1.0, math.nan):
        with pytest.raises(InvalidArgument, match="norm_type must be at least 0"):
            optim.clip_grad_norm_(model, 1.0, norm_type)


def test_norm_kernels_equal_their_oracles():
    rng = np.random.default_rng(0)
    sums_UD = (rng.standard_normal((40, 7)) * 2.0 ** rng.integers(-20, 20, (40, 7))).astype(np.float32)
    sums_UD[3], sums_UD[4, 2], sums_UD[5, 1], sums_UD[6, 0] = 0.0, np.inf, np.nan, np.nan
    out_U = np.empty(40)
    for power in (0.0, 0.5, 1.0, 3.0):
        row_power_sums(0, 40, sums_UD, power, out_U)
        np.testing.assert_allclose(out_U, naive_optim.row_power_sums(sums_UD, power), rtol=1e-14)  # libm's pow
        if power in (0.0, 1.0):
            assert out_U.tobytes() == naive_optim.row_power_sums(sums_UD, power).tobytes()
    row_largest(0, 40, sums_UD, out_U)
    np.testing.assert_array_equal(out_U, naive_optim.row_largest(sums_UD))
    for norm_type in (0.0, 1.0, 3.0, math.inf):
        assert pending_norm(np.empty((0, 7), np.float32), norm_type) == 0.0
        finite_UD = sums_UD[7:]
        on_device = pending_norm(torch.from_numpy(finite_UD), norm_type).item()
        assert pending_norm(finite_UD, norm_type) == pytest.approx(on_device, rel=1e-12)
        assert math.isnan(pending_norm(sums_UD, norm_type)) == (norm_type != 0.0)


# -- Chained ----------------------------------------------------------------------------------------------------


@CACHES
def test_chained_trains_as_one_optimizer_of_torchs(tmp_path, caches):
    def train(model):
        opt = chained(model, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, [0.5, 0.25], total_steps=8)
        for ids in batches(6):
            ids = torch.cat([ids.reshape(-1), torch.arange(50)])  # every row: momentum moves only those
            model.loss(ids).backward()
            opt.step()
            scheduler.step()
            opt.zero_grad()
        return [(group["lr"], group["momentum"]) for group in opt.param_groups]

    ours, plain = twins(tmp_path, caches)
    assert train(ours) == train(plain)
    assert_same(ours, plain)


def test_a_scheduler_reaches_the_parts_also_after_a_load(pair):
    model = pair[0]
    opt = chained(model)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    opt.step()
    scheduler.step()
    assert [part.param_groups[0]["lr"] for part in opt.optimizers] == [0.125, 0.125]
    opt.param_groups[1]["lr"] = 7.0
    assert opt.optimizers[1].param_groups[0]["lr"] == 7.0


def test_momentum_is_cycled_only_where_all_parts_have_it(pair):
    model = pair[0]
    opt = optim.Chained(optim.SGD(model, momentum=0.9), torch.optim.AdamW(dense_parameters(model)))
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        torch.optim.lr_scheduler.OneCycleLR(opt, 0.5, total_steps=8)
    torch.optim.lr_scheduler.OneCycleLR(opt, 0.5, total_steps=8, cycle_momentum=False)
    both = optim.Chained(optim.AdamW(model), torch.optim.AdamW(dense_parameters(model)))
    torch.optim.lr_scheduler.OneCycleLR(both, 0.5, total_steps=8)
    assert [group["betas"][0] for group in both.param_groups] == [0.95, 0.95]


def test_the_closure_is_called_once_with_grad(pair):
    model = pair[0]
    opt, calls = chained(model), []

    def closure():
        opt.zero_grad()
        loss = model.loss(torch.tensor([1, 2]))
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    with torch.no_grad():
        first = opt.step(closure)
    assert first.item() > opt.step(closure).item()
    assert calls == [True, True]


def test_a_closure_that_raises_steps_nothing(pair):
    model = pair[0]
    opt = chained(model)
    model.loss(torch.tensor([1, 2])).backward()
    before = rows_and_state(model.embs[0]).tobytes(), model.head.weight.clone()

    def closure():
        raise KeyError("of the user")

    with pytest.raises(KeyError):
        opt.step(closure)
    assert rows_and_state(model.embs[0]).tobytes() == before[0]
    assert torch.equal(model.head.weight, before[1])


def test_hooks_run_once_for_it_and_for_each_part(pair):
    opt, seen = chained(pair[0]), []
    for name, one in (("chained", opt), ("table", opt.optimizers[0]), ("dense", opt.optimizers[1])):
        one.register_step_pre_hook(lambda *_, name=name: seen.append(name))
    opt.step()
    assert seen == ["chained", "table", "dense"]


@CACHES
def test_grad_scaler_unscales_once_and_skips_all_parts(tmp_path, caches):
    def train(model):
        opt = chained(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        scales = []
        for n, ids in enumerate(batches(6)):
            loss = model.loss(ids) * (math.inf if n == 2 else 1.0)
            scaler.scale(loss).backward()
            if n % 2:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = [weights(emb).clone() for emb in model.embs], model.head.weight.clone()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            scales.append(scaler.get_scale())
            if n == 2:
                assert all(torch.equal(weights(emb), old) for emb, old in zip(model.embs, before[0], strict=True))
                assert torch.equal(model.head.weight, before[1])
        return scales

    ours, plain = twins(tmp_path, caches)
    assert train(ours) == train(plain)
    assert_same(ours, plain)


def test_an_inf_in_one_part_skips_the_others(pair):
    model = pair[0]
    opt = chained(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model.loss(torch.tensor([1, 2]))).backward()
    model.head.bias.grad[0] = math.inf
    before = rows_and_state(model.embs[0]).tobytes()
    scaler.step(opt)
    scaler.update()
    assert rows_and_state(model.embs[0]).tobytes() == before


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_reaches_every_part(pair, set_to_none):
    model = pair[0]
    opt = chained(model)
    before = rows_and_state(model.embs[0]).tobytes(), model.head.weight.clone()
    model.loss(torch.tensor([1, 2])).backward()
    opt.zero_grad(set_to_none)
    opt.step()
    assert rows_and_state(model.embs[0]).tobytes() == before[0]
    assert torch.equal(model.head.weight, before[1])


def test_state_dict_goes_there_and_back_and_looks_like_torchs(pair):
    model = pair[0]

    def make(lr):
        return optim.Chained(
            optim.RowwiseAdagrad(model.embs[0], lr=lr),
            torch.optim.AdamW(dense_parameters(model), lr=lr),
            optim.Adam(model.embs[1], lr=lr),
        )

    opt = make(0.25)
    model.loss(torch.tensor([1, 2])).backward()
    opt.step()
    saved = pickle.loads(pickle.dumps(opt.state_dict()))
    assert set(saved) == {"state", "param_groups"}
    assert [group["params"] for group in saved["param_groups"]] == [[0], [1, 2], [3]]
    assert set(saved["state"]) == {1, 2}
    assert opt.state[model.head.weight] is opt.optimizers[1].state[model.head.weight]
    new = make(0.5)
    new.load_state_dict(saved)
    assert [group["lr"] for group in new.param_groups] == [0.25] * 3
    again = new.state_dict()
    assert str(again) == str(saved)
    assert torch.equal(again["state"][1]["exp_avg"], saved["state"][1]["exp_avg"])


class Keeps(torch.optim.SGD):
    """An optimizer whose state_dict holds something of its own."""

    kept = 0

    def state_dict(self):
        return {**super().state_dict(), "kept": self.kept}

    def load_state_dict(self, state_dict):
        self.kept = state_dict.pop("kept")
        super().load_state_dict(state_dict)


def test_what_a_part_keeps_of_its_own_comes_back_to_it(pair):
    model = pair[0]
    opt = optim.Chained(optim.SGD(model), Keeps(dense_parameters(model)))
    opt.optimizers[1].kept = 7
    saved = opt.state_dict()
    opt.optimizers[1].kept = 0
    opt.load_state_dict(saved)
    assert opt.optimizers[1].kept == 7


def test_a_state_dict_of_other_optimizers_is_refused_before_anything_is_loaded(pair):
    model = pair[0]
    opt = chained(model)
    saved = optim.Chained(*reversed(opt.optimizers)).state_dict()
    saved["param_groups"].append({**saved["param_groups"][0], "lr": 9.0})
    with pytest.raises(InvalidArgument, match=r"groups of \[2, 2, 2\] parameters.*groups of \[2, 2\]"):
        opt.load_state_dict(saved)
    assert [group["lr"] for group in opt.param_groups] == [0.25, 0.25]


def test_what_cannot_be_chained(pair):
    model = pair[0]
    table_opt, dense = optim.SGD(model), dense_parameters(model)
    with pytest.raises(InvalidArgument, match="at least one"):
        optim.Chained()
    with pytest.raises(InvalidArgument, match="a list is no optimizer"):
        optim.Chained([table_opt])
    with pytest.raises(InvalidArgument, match=r"SGD and AdamW share a parameter of shape \(1,\).*endswith\('handle'\)"):
        optim.Chained(table_opt, torch.optim.AdamW(model.parameters()))
    with pytest.raises(InvalidArgument, match="SGD and SGD share"):
        optim.Chained(table_opt, torch.optim.SGD(model.parameters()))
    with pytest.raises(InvalidArgument, match="LBFGS"):
        optim.Chained(table_opt, torch.optim.LBFGS(dense))
    opt = optim.Chained(table_opt, torch.optim.SGD(dense))
    with pytest.raises(InvalidArgument, match="add_param_group of that part"):
        opt.add_param_group({"params": dense})
    assert repr(opt) == "Chained(SGD, SGD)"


def test_a_group_added_to_a_part_is_stepped(pair):
    model, extra = pair[0], nn.Parameter(torch.ones(2))
    opt = chained(model)
    opt.optimizers[1].add_param_group({"params": [extra]})
    assert len(opt.param_groups) == 3
    extra.sum().backward()
    opt.step()
    assert (extra == 0.75).all()


def test_chained_in_chained(pair):
    model, plain = pair
    for one in pair:
        opt = chained(one)
        if one is model:
            opt = optim.Chained(optim.Chained(opt.optimizers[0]), opt.optimizers[1])
            opt.load_state_dict(opt.state_dict())
        for ids in batches(3):
            one.loss(ids).backward()
            opt.step()
            opt.zero_grad()
    assert_same(model, plain)


def test_only_rules_for_tables_are_offered_as_such():
    assert set(RULES) == {"SGD", "Adagrad", "RowwiseAdagrad", "Adam", "AdamW"}


def test_a_frozen_table_does_not_count(pair):
    model = pair[0]
    opt = chained(model)
    model.embs[0].requires_grad_(False)
    rows = model.embs[1](torch.tensor([1, 2]))
    (rows * coefficients(torch.tensor([1, 2]), D)).sum().backward()
    expected = coefficients(torch.tensor([1, 2]), D).abs().sum().item()
    assert optim.clip_grad_norm_(model, 1e9, 1.0).item() == expected
    opt.step()
    assert isinstance(model.embs[0], bigembed.Embedding)
