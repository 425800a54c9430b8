"""Idioms of real training loops that test_handle.py has not: each run on torch's class and on ours, and compared."""

import gc
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.utils.checkpoint import checkpoint
from training import batches, coefficients, plain_twin, rows_and_state, small_embedding, small_table, weights

import bigembed
from bigembed import optim
from bigembed.errors import BigembedError, NoOptimizer

V, D = 50, 4
LR = 0.25
CACHES = {
    "4 rows": {"cache_rows": 4},
    "all rows": {},
    "device": {"device_rows": 4, "cache_rows": 4},
}


class Model(nn.Module):
    """An embedding under a linear layer, both trained by SGD; weights are multiples of 1/8, so that sums are exact."""

    def __init__(self, emb, **facts):
        super().__init__()
        self.emb = emb
        self.head = nn.Linear(D, 3)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 8 - 1)
        is_ours = isinstance(emb, bigembed.Embedding)
        self.opt = optim.SGD(emb, lr=LR) if is_ours else torch.optim.SGD(emb.parameters(), lr=LR)
        self.dense = torch.optim.SGD(self.head.parameters(), lr=LR)

    def forward(self, ids):
        return self.head(self.emb(ids))

    def step(self):
        self.opt.step()
        self.dense.step()


@pytest.fixture(params=CACHES)
def pair(request, tmp_path):
    """A model, and its twin on a dense nn.Embedding."""
    emb = small_embedding(tmp_path, V, D, **CACHES[request.param])
    return Model(emb), Model(plain_twin(emb))


def in_both(pair, action):
    """Do it to both models; returns both results."""
    return [action(model) for model in pair]


def assert_same(pair, **tolerance):
    ours, plain = pair
    compare = {"rtol": 1e-6, "atol": 1e-6, **tolerance}
    torch.testing.assert_close(weights(ours.emb), weights(plain.emb), **compare)
    torch.testing.assert_close(ours.head.weight, plain.head.weight, **compare)


# -- order of forward, backward and step ------------------------------------------------------------------------


def test_two_forwards_before_a_backward_with_a_step_between(pair):
    """The rows of the first lookup are old when its gradient comes; so they are in torch."""
    first, second = torch.tensor([1, 2, 2]), torch.tensor([2, 3, 40])

    def train(model):
        a, b = model.emb(first), model.emb(second)
        (b * coefficients(second, D)).sum().backward()
        model.step()
        model.zero_grad()
        (a * coefficients(first, D)).sum().backward()
        model.step()

    in_both(pair, train)
    assert_same(pair, rtol=0, atol=0)


def test_one_module_many_times_in_one_graph(pair):
    """As a recurrent model looks up at each step what it has just chosen."""

    def train(model):
        ids, total = torch.tensor([3, 7]), 0.0
        for _ in range(5):
            rows = model.emb(ids)
            total = total + (rows * coefficients(ids, D)).sum()
            ids = (ids * 3 + 1) % V
        total.backward()
        model.step()

    in_both(pair, train)
    assert_same(pair, rtol=0, atol=0)


def test_a_loss_of_some_of_the_lookups(pair):
    """A lookup that the loss does not reach, and one that is detached, bring nothing."""

    def train(model):
        model.emb(torch.tensor([9]))
        kept, cut = model.emb(torch.tensor([1, 2])), model.emb(torch.tensor([2, 3])).detach()
        (kept * cut).sum().backward()
        model.step()

    in_both(pair, train)
    assert_same(pair)


def test_truncated_backpropagation(pair):
    def train(model):
        carried = torch.zeros(4, D)
        for ids in batches(4, V, (4,)):
            carried = (carried.detach() + model.emb(ids)).tanh()
            carried.sum().backward()
            model.step()
            model.zero_grad()

    in_both(pair, train)
    assert_same(pair)


def test_an_exception_between_backward_and_step(pair):
    """As in a loop that skips bad batches: the gradient goes with zero_grad, the next step is as if it never was."""

    def train(model):
        for number, ids in enumerate(batches(4)):
            try:
                model(ids).sum().backward()
                if number == 1:
                    raise ValueError("a bad batch")
                model.step()
            except ValueError:
                pass
            finally:
                model.zero_grad()

    in_both(pair, train)
    assert_same(pair)


def test_an_exception_without_a_zero_grad(pair):
    """Then the gradient is still there and adds up, as torch's does."""

    def train(model):
        for number, ids in enumerate(batches(4)):
            try:
                model(ids).sum().backward()
                if number == 1:
                    raise ValueError("a bad batch")
                model.step()
                model.zero_grad()
            except ValueError:
                pass

    in_both(pair, train)
    assert_same(pair)


def test_an_exception_in_forward_keeps_nothing(tmp_path):
    emb = small_embedding(tmp_path, V, D, cache_rows=4)
    opt = optim.SGD(emb, lr=LR)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            emb(torch.tensor([1, 2])) @ torch.ones(9, 9)
    gc.collect()
    assert len(emb.trainable._tickets) == 0
    assert emb.stats()["pending"]["gradient_bytes"] == 0
    before = rows_and_state(emb).tobytes()
    opt.step()
    assert rows_and_state(emb).tobytes() == before


def test_forwards_that_never_see_a_backward_leak_nothing(tmp_path):
    emb = small_embedding(tmp_path, V, D, cache_rows=4)
    emb.opt = optim.SGD(emb, lr=LR)
    for ids in batches(50):
        emb(ids).sum()
    assert len(emb.trainable._tickets) == 0
    assert emb.trainable._protect_step() is None
    assert emb.stats()["pending"]["gradient_bytes"] == 0


# -- gradients ---------------------------------------------------------------------------------------------------


def test_gradients_divided_by_the_number_of_batches(pair):
    """`p.grad /= n` and `p.grad.mul_(1 / n)` over all parameters after accumulating."""

    def train(model):
        for ids in batches(4):
            model(ids).sum().backward()
        for parameter in model.parameters():
            parameter.grad /= 2
            parameter.grad.mul_(0.5)
        model.step()

    in_both(pair, train)
    assert_same(pair)


def test_gradients_set_aside_and_given_back(pair):
    """Clone, zero, restore: what gradient surgery does with a dense gradient."""

    def train(model):
        model(torch.tensor([1, 2, 2])).sum().backward()
        kept = [parameter.grad.clone() for parameter in model.parameters()]
        for parameter, before in zip(model.parameters(), kept, strict=True):
            parameter.grad.zero_()
            parameter.grad.copy_(before)
        model.step()

    in_both(pair, train)
    assert_same(pair)


def test_whether_gradients_are_finite(pair):
    """`all(p.grad.isfinite().all() for p in model.parameters())`, and the step left out where they are not."""

    def train(model):
        stepped = 0
        for factor in (1.0, float("inf"), float("nan"), 1.0):
            (model.emb(torch.tensor([1, 2])) * factor).sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if all(bool(g.isfinite().all()) for g in gradients):
                model.step()
                stepped += 1
            model.zero_grad()
        return stepped

    assert in_both(pair, train) == [2, 2]
    assert_same(pair)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of torch's class too: ids have no gradient
def test_hooks_on_the_module_see_the_rows_and_their_gradient(pair):
    def train(model):
        seen = []
        handles = [
            model.emb.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone())),
            model.emb.register_full_backward_hook(lambda module, into, out: seen.append(out[0].clone())),
        ]
        rows = model.emb(torch.tensor([4, 4, 5]))
        rows.register_hook(lambda grad: grad * 2)
        model.head(rows).sum().backward()
        model.step()
        for handle in handles:
            handle.remove()
        return seen

    ours, theirs = in_both(pair, train)
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert_same(pair)


def test_anomaly_mode_and_deterministic_algorithms(pair):
    def train(model):
        for ids in batches(2):
            with torch.autograd.set_detect_anomaly(True, check_nan=True):
                model(ids).sum().backward()
            model.step()
            model.zero_grad()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection")
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            in_both(pair, train)
        finally:
            torch.use_deterministic_algorithms(before)
    assert_same(pair)


def test_saved_tensors_elsewhere(pair):
    def train(model):
        with torch.autograd.graph.save_on_cpu():
            loss = model(torch.tensor([1, 2, 2])).pow(2).sum()
        loss.backward()
        model.step()

    in_both(pair, train)
    assert_same(pair)


def test_backward_into_some_parameters(pair):
    """`backward(inputs=...)` of the head alone leaves the table's gradient as it was."""

    def train(model):
        model(torch.tensor([1, 2])).sum().backward()
        model(torch.tensor([3, 4])).sum().backward(inputs=list(model.head.parameters()))
        model.step()

    in_both(pair, train)
    assert_same(pair)


# -- mixed precision, checkpoints --------------------------------------------------------------------------------


def test_autocast_on_the_cpu(pair):
    """The lookup stays float32, as torch's; what is above it is bfloat16, and so is the gradient that comes back."""

    def train(model):
        dtypes = []
        for ids in batches(3):
            with torch.autocast("cpu", torch.bfloat16):
                rows = model.emb(ids)
                out = model.head(rows)
                loss = out.float().sum()
            loss.backward()
            dtypes += [rows.dtype, out.dtype]
            model.step()
            model.zero_grad()
        return dtypes

    ours, theirs = in_both(pair, train)
    assert ours == theirs == [torch.float32, torch.bfloat16] * 3
    assert_same(pair)


def test_a_checkpoint_under_autocast(pair):
    def train(model):
        for reentrant in (False, True):
            anchor = torch.ones((), requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16):
                out = checkpoint(lambda x: model(torch.tensor([1, 2, 2])) * x, anchor, use_reentrant=reentrant)
            out.float().sum().backward()
            model.step()
            model.zero_grad()

    in_both(pair, train)
    assert_same(pair)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_shortens_and_counts_as_without_one(pair, use_reentrant):
    """max_norm and scale_grad_by_freq in a lookup that is computed again for the backward."""

    def train(model):
        model.emb.max_norm, model.emb.scale_grad_by_freq = 0.5, True
        anchor = torch.ones((), requires_grad=True)
        for ids in batches(3, V, (8,)):
            checkpoint(lambda x, ids=ids: model.emb(ids) * x, anchor, use_reentrant=use_reentrant).sum().backward()
            model.opt.step()
            model.zero_grad()

    in_both(pair, train)
    assert_same(pair)


# -- what a parent does ------------------------------------------------------------------------------------------


def test_freezing_between_steps_as_a_schedule_does(pair):
    def train(model):
        for number, ids in enumerate(batches(6)):
            model.emb.requires_grad_(number % 2 == 0)
            model(ids).sum().backward()
            model.step()
            model.zero_grad()

    in_both(pair, train)
    assert_same(pair)


def test_an_optimizer_made_anew_each_epoch(pair):
    def train(model):
        for epoch, ids in enumerate(batches(3)):
            lr = LR / (epoch + 1)
            is_ours = isinstance(model.emb, bigembed.Embedding)
            model.opt = optim.SGD(model, lr=lr) if is_ours else torch.optim.SGD(model.emb.parameters(), lr=lr)
            model(ids).sum().backward()
            model.step()
            model.zero_grad()

    in_both(pair, train)
    assert_same(pair)


def test_counting_and_naming_parameters(tmp_path):
    """One parameter a table; code that counts them gets the handle's one element, not V x D."""
    model = nn.Sequential(small_embedding(tmp_path, V, D), nn.Linear(D, 2))
    assert [name for name, _ in model.named_parameters()] == ["0.handle", "1.weight", "1.bias"]
    assert sum(p.numel() for p in model.parameters()) == 1 + 2 * D + 2
    assert model[0].weight.numel() == V * D


def test_two_modules_share_a_table_with_different_padding(tmp_path):
    table = small_table(tmp_path, V, D)
    first, second = bigembed.Embedding.open(table), bigembed.Embedding.open(table, padding_idx=1)
    second.scale_grad_by_freq = True
    plain = plain_twin(first)
    opt = optim.SGD(first, lr=LR)
    ids = torch.tensor([1, 1, 2, 2])
    (first(ids).sum() + second(ids).sum()).backward()
    plain_second = nn.functional.embedding(ids, plain.weight, 1, scale_grad_by_freq=True)
    (plain(ids).sum() + plain_second.sum()).backward()
    assert torch.equal(first.pending_gradient().to_dense(), plain.weight.grad)
    opt.step()


# -- refused, with the reason ------------------------------------------------------------------------------------


def refused(call, *texts):
    with pytest.raises(RuntimeError) as caught:
        call()
    assert isinstance(caught.value, BigembedError), caught.value
    for text in texts:
        assert text in str(caught.value)


def test_lbfgs_of_the_model_says_that_no_row_would_move(tmp_path):
    """Its closure meets a table without a bigembed optimizer."""
    model = nn.Sequential(small_embedding(tmp_path, V, D), nn.Linear(D, 1))
    before = rows_and_state(model[0]).tobytes()
    opt = torch.optim.LBFGS(model.parameters())

    def closure():
        opt.zero_grad()
        loss = model(torch.tensor([1, 2])).pow(2).sum()
        loss.backward()
        return loss

    with pytest.raises(NoOptimizer, match="torch's own optimizers cannot update rows on disk"):
        opt.step(closure)
    assert rows_and_state(model[0]).tobytes() == before


TRANSFORMS = {
    "grad of the head": lambda emb, ids: grad(lambda w: (emb(ids) * w).sum())(torch.ones(D)),
    "vjp": lambda emb, ids: vjp(lambda w: emb(ids) * w, torch.ones(D)),
    "jacrev": lambda emb, ids: jacrev(lambda w: emb(ids) * w)(torch.ones(D)),
    "vmap over weights": lambda emb, ids: vmap(lambda w: emb(ids) * w)(torch.ones(3, D)),
}


@pytest.mark.parametrize("caches", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_over_a_table_that_trains_is_refused(tmp_path, name, caches):
    emb = small_embedding(tmp_path, V, D, **caches)
    emb.opt = optim.SGD(emb)
    ids, before = torch.tensor([1, 2]), rows_and_state(emb).tobytes()
    refused(lambda: TRANSFORMS[name](emb, ids), "torch.func", "rows = emb(ids)", "loss.backward()")
    emb.requires_grad_(False)  # constants are fine
    result = TRANSFORMS[name](emb, ids)
    plain = nn.Embedding.from_pretrained(weights(emb))
    expected = TRANSFORMS[name](plain, ids)
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (result, expected)), strict=True):
        assert callable(a) or torch.equal(a, b)
    assert rows_and_state(emb).tobytes() == before


@pytest.mark.parametrize("caches", CACHES.values(), ids=CACHES)
def test_vmap_over_ids_is_refused_and_says_how(tmp_path, caches):
    emb = small_embedding(tmp_path, V, D, **caches).requires_grad_(False)
    ids = torch.tensor([[1, 2], [3, 4]])
    refused(lambda: vmap(emb)(ids), "torch.func", "rows = emb(ids)")
    refused(lambda: vmap(lambda more: grad(lambda w: (emb(more) * w).sum())(torch.ones(D)))(ids), "torch.func")
    assert torch.equal(vmap(lambda rows: rows * 2)(emb(ids)), emb(ids) * 2)


def test_a_frozen_table_under_nested_transforms(tmp_path):
    """Ids may be made inside, and an error of the lookup leaves the transforms as they were."""
    emb = small_embedding(tmp_path, V, D, cache_rows=4).requires_grad_(False)

    def loss(w):
        ids = (w[:2] * 0).long() + 3
        return (emb(ids) * w).pow(2).sum()

    expected = 4 * weights(emb)[3].pow(2)
    assert torch.allclose(grad(loss)(torch.ones(D)), expected)
    assert torch.allclose(
        vmap(grad(lambda w: (emb(torch.tensor([3, 3])) * w).pow(2).sum()))(torch.ones(2, D)), expected
    )
    with pytest.raises(IndexError, match="ids contain 50"):
        grad(lambda w: (emb(torch.tensor([V])) * w).sum())(torch.ones(D))
    assert torch.allclose(grad(loss)(torch.ones(D)), expected)


def test_functional_call_runs_with_the_heads_parameters(tmp_path):
    model = Model(small_embedding(tmp_path, V, D))
    ids = torch.tensor([1, 2])
    halved = {name: p.detach() / 2 for name, p in model.head.named_parameters(prefix="head")}
    expected = nn.functional.linear(model.emb(ids), model.head.weight / 2, model.head.bias / 2)
    assert torch.equal(functional_call(model, halved, (ids,)), expected)


@pytest.mark.parametrize("caches", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("create_graph", [False, True])
def test_autograd_grad_of_a_table_is_refused(tmp_path, create_graph, caches):
    """It would return 0, and nothing would be pending."""
    emb = small_embedding(tmp_path, V, D, **caches)
    opt = optim.SGD(emb, lr=LR)
    head, before = nn.Linear(D, 1), rows_and_state(emb).tobytes()
    ids = torch.tensor([1, 2])

    def loss():
        return head(emb(ids)).pow(2).sum()

    for inputs in ([emb.handle], [head.weight, emb.handle], list(nn.ModuleList([emb, head]).parameters())):
        refused(
            lambda inputs=inputs: torch.autograd.grad(loss(), inputs, create_graph=create_graph),
            *("torch.autograd.grad", "loss.backward()", "rows = emb(ids)"),
        )
        assert emb.pending_gradient() is None
    opt.step()
    assert rows_and_state(emb).tobytes() == before
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss(), head.parameters(), create_graph=create_graph))
    rows = emb(ids)
    assert torch.autograd.grad(head(rows).sum(), rows)[0].shape == (2, D)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # torch's advice against create_graph in backward
@pytest.mark.parametrize("caches", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("by_freq", [False, True])
def test_a_second_derivative_is_refused_where_it_would_reach_the_table(tmp_path, by_freq, caches):
    emb = small_embedding(tmp_path, V, D, **caches)
    emb.scale_grad_by_freq = by_freq
    plain, opt = plain_twin(emb), optim.SGD(emb, lr=LR)
    plain.scale_grad_by_freq = by_freq
    for module in (emb, plain):
        module(torch.tensor([1, 1, 2])).pow(3).sum().backward(create_graph=True)
    assert torch.equal(emb.pending_gradient().to_dense(), plain.weight.grad.detach()), "the first one is as ever"
    refused(lambda: emb.handle.grad.sum().backward(), "cannot be differentiated", "rows = emb(ids)")
    emb.handle.grad = plain.weight.grad = None
    opt.zero_grad()
    before = rows_and_state(emb).tobytes()
    opt.step()
    assert rows_and_state(emb).tobytes() == before


# -- several processes -------------------------------------------------------------------------------------------

TWO_RANKS = """
import sys, torch, bigembed
from torch.testing._internal.distributed.fake_pg import FakeStore
import torch.distributed as dist

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=int(sys.argv[1]))
emb = bigembed.Embedding(50, 4, rank_local=sys.argv[2] == "local")
opt = bigembed.optim.SGD(emb, lr=1.0)
before = emb.weight[1].clone()
emb(torch.tensor([1])).sum().backward()
try:
    opt.step()
    print("stepped", bool((emb.weight[1] == before - 1).all()))
except RuntimeError as error:
    print(type(error).__mro__[1].__name__, bool((emb.weight[1] == before).all()), "rank_local=True" in str(error))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize(
    ("ranks", "declared", "says"),
    [(2, "", "BigembedError True True"), (2, "local", "stepped True"), (1, "", "stepped True")],
)
def test_a_step_in_several_processes_needs_a_declaration(ranks, declared, says):
    """Every replica would go its own way, silently."""
    command = [sys.executable, "-W", "ignore", "-c", TWO_RANKS, str(ranks), declared]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=120)
    assert done.stdout.strip() == says, done.stderr
