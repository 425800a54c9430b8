"""The handle: what torch's own tools do to a gradient through a parameter of one element, against a dense twin."""

import copy
import gc
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import batches, coefficients, plain_twin, rows_and_state, small_embedding, small_table, weights

import bigembed
from bigembed import optim
from bigembed.errors import BigembedError, InvalidArgument, NoOptimizer
from bigembed.nn.transforms import HookOnHandle

D = 4
LR = 0.25
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


class Model(nn.Module):
    """An embedding under a linear layer, trained by SGD: the table by bigembed's, the rest by torch's."""

    def __init__(self, emb):
        super().__init__()
        self.emb = emb
        self.head = nn.Linear(D, 3)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 8 - 1)
        self.dense = torch.optim.SGD(self.head.parameters(), lr=LR)
        self.rows = (optim.SGD if isinstance(emb, bigembed.Embedding) else torch.optim.SGD)(
            emb if isinstance(emb, bigembed.Embedding) else emb.parameters(), lr=LR
        )

    def forward(self, ids):
        return self.head(self.emb(ids))

    def loss(self, ids):
        return self(ids).pow(2).mean()

    def step(self):
        self.rows.step()
        self.dense.step()


CACHES = {
    "3 rows cached": {"cache_rows": 3},
    "all rows cached": {},
    "3 rows on the device": {"device_rows": 3, "cache_rows": 5},
    "all rows on the device": {"device_rows": 50, "cache_rows": 5},
}


SOME_CACHES = pytest.mark.parametrize("caches", [{}, CACHES["3 rows on the device"]], ids=["host", "device"])


@pytest.fixture(params=CACHES)
def pair(request, tmp_path):
    """A model, and its twin on a dense nn.Embedding."""
    emb = small_embedding(tmp_path, **CACHES[request.param])
    return Model(emb), Model(plain_twin(emb))


def assert_same(pair):
    ours, plain = pair
    torch.testing.assert_close(weights(ours.emb), weights(plain.emb), **CLOSE)
    torch.testing.assert_close(ours.head.weight, plain.head.weight, **CLOSE)


def in_both(pair, action):
    """Do it to both models; returns both results."""
    return [action(model) for model in pair]


# -- the norm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("max_norm", [0.01, 1.0])
def test_clip_grad_norm(pair, max_norm, times):
    def train(model):
        norms = []
        for ids in batches(4):
            model.loss(ids).backward()
            norms += [nn.utils.clip_grad_norm_(model.parameters(), max_norm / n).item() for n in range(1, times + 1)]
            model.step()
            model.zero_grad()
        return norms

    ours, theirs = in_both(pair, train)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert_same(pair)


def test_a_gradient_that_is_not_clipped_keeps_its_bits(tmp_path):
    tables = []
    for clips in (False, True):
        model = Model(small_embedding(tmp_path))
        for ids in batches(4):
            model.loss(ids).backward()
            if clips:
                nn.utils.clip_grad_norm_(model.parameters(), 1e6)
            model.step()
            model.zero_grad()
        tables.append(rows_and_state(model.emb).tobytes())
    assert tables[0] == tables[1]


def test_the_handle_shows_the_norm_of_the_summed_rows(pair):
    ours, plain = pair
    in_both(pair, lambda model: model.loss(torch.tensor([1, 2, 2, 9])).backward())
    assert ours.emb.handle.grad.item() == pytest.approx(plain.emb.weight.grad.norm().item(), rel=1e-6)
    assert ours.emb.handle.shape == (1,)
    assert [name for name, _ in ours.named_parameters()] == ["emb.handle", "head.weight", "head.bias"]


def test_scaling_the_grad_scales_the_gradient(pair):
    def train(model):
        for ids in batches(3):
            model.loss(ids).backward()
            for parameter in model.parameters():
                parameter.grad.mul_(0.5)
            model.loss(ids).backward()  # added to the half
            for parameter in model.parameters():
                parameter.grad.mul_(-2.0)
            model.step()
            model.zero_grad()

    in_both(pair, train)
    assert_same(pair)


# -- GradScaler -------------------------------------------------------------------------------------------------


def test_grad_scaler_unscales_clips_and_skips(pair):
    def train(model):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        scales = []
        for n, ids in enumerate(batches(6)):
            loss = model.loss(ids) * (math.inf if n == 2 else 1.0)
            scaler.scale(loss).backward()
            for optimizer in (model.rows, model.dense):
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in (model.rows, model.dense):
                scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
            scales.append(scaler.get_scale())
        return scales

    ours, theirs = in_both(pair, train)
    assert ours == theirs
    assert_same(pair)


@pytest.mark.parametrize("caches", [CACHES["3 rows cached"], CACHES["3 rows on the device"]], ids=["host", "device"])
@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_an_infinite_gradient_leaves_the_table_alone(tmp_path, factor, caches):
    emb = small_embedding(tmp_path, **caches)
    opt = optim.Adam(emb)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(emb(torch.tensor([1, 2])).sum()).backward()
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()
    before, scalars = rows_and_state(emb).tobytes(), emb.table.scalars
    scaler.scale(emb(torch.tensor([1, 2, 3, 4])).sum() * factor).backward()
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()
    assert rows_and_state(emb).tobytes() == before
    assert emb.table.scalars == scalars


# -- when gradients add up, and when they go --------------------------------------------------------------------


def test_accumulation_over_three_backwards(pair):
    def train(model):
        for n, ids in enumerate(batches(6), start=1):
            (model.loss(ids) / 3).backward()
            if n % 3 == 0:
                model.step()
                model.zero_grad()

    in_both(pair, train)
    assert_same(pair)


def test_two_lookups_in_one_graph(pair):
    def train(model):
        for ids in batches(4):
            (model(ids).pow(2).mean() + (model(ids.flip(1)) * model(ids[:2].repeat(3, 1))).sum() / 64).backward()
            model.step()
            model.zero_grad()

    in_both(pair, train)
    assert_same(pair)


def test_retain_graph_adds_the_gradient_again(pair):
    def train(model):
        loss = model.loss(torch.tensor([1, 2, 2]))
        loss.backward(retain_graph=True)
        loss.backward()
        model.step()

    in_both(pair, train)
    assert_same(pair)


CLEARINGS = {
    "model.zero_grad()": lambda model: model.zero_grad(),
    "model.zero_grad(set_to_none=False)": lambda model: model.zero_grad(set_to_none=False),
    "opt.zero_grad()": lambda model: (model.rows.zero_grad(), model.dense.zero_grad()),
    "opt.zero_grad(False)": lambda model: (model.rows.zero_grad(False), model.dense.zero_grad(False)),
    "grad = None": lambda model: [setattr(parameter, "grad", None) for parameter in model.parameters()],
}


@pytest.mark.parametrize("clearing", CLEARINGS)
def test_clearing_drops_what_was_pending(pair, clearing):
    def train(model):
        model.loss(torch.tensor([7, 8])).backward()
        CLEARINGS[clearing](model)
        model.step()  # nothing to do
        for ids in batches(3):
            model.loss(ids).backward()
            model.step()
            CLEARINGS[clearing](model)

    in_both(pair, train)
    assert_same(pair)


@SOME_CACHES
def test_cleared_gradients_leave_no_trace_in_the_state(tmp_path, caches):
    emb = small_embedding(tmp_path, **caches)
    opt = optim.Adagrad(emb)
    before = rows_and_state(emb).tobytes()
    for set_to_none in (True, False):
        emb(torch.tensor([1, 2])).sum().backward()
        opt.zero_grad(set_to_none)
        opt.step()
    assert rows_and_state(emb).tobytes() == before
    assert emb.table._cache.dirty_rows == 0
    assert emb.table.scalars == {}


def test_two_steps_apply_one_gradient_twice(pair):
    def train(model):
        model.loss(torch.tensor([1, 2, 2])).backward()
        model.step()
        model.step()

    in_both(pair, train)
    assert_same(pair)


def test_a_step_with_a_closure(tmp_path):
    emb = small_embedding(tmp_path)
    plain = plain_twin(emb)
    for module, opt in ((emb, optim.SGD(emb, lr=LR)), (plain, torch.optim.SGD(plain.parameters(), lr=LR))):

        def closure(module=module, opt=opt):
            opt.zero_grad()
            loss = module(torch.tensor([1, 2, 1])).pow(2).sum()
            loss.backward()
            return loss

        assert opt.step(closure).item() > opt.step(closure).item()
    torch.testing.assert_close(weights(emb), weights(plain), **CLOSE)


# -- freezing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["model", "embedding", "parent"])
def test_freezing_and_back(pair, part):
    def train(model):
        parent = nn.Sequential(model)
        target = {"model": model, "embedding": model.emb, "parent": parent}[part]
        for n, ids in enumerate(batches(6)):
            target.requires_grad_(n % 2 == 0)
            loss = model.loss(ids)
            if loss.requires_grad:
                loss.backward()
            model.step()
            model.zero_grad()

    in_both(pair, train)
    assert_same(pair)
    assert pair[0].emb.weight.requires_grad == pair[1].emb.weight.requires_grad


def test_a_frozen_table_needs_no_optimizer(tmp_path):
    emb = small_embedding(tmp_path).requires_grad_(False)
    assert not emb(torch.tensor([1])).requires_grad


# -- optimizers -------------------------------------------------------------------------------------------------


@SOME_CACHES
def test_a_new_optimizer_takes_over_and_the_old_one_raises(tmp_path, caches):
    emb = small_embedding(tmp_path, **caches)
    old = optim.Adam(emb)
    emb(torch.tensor([1, 2])).sum().backward()
    new = optim.Adam(emb)
    before = rows_and_state(emb).tobytes()
    with pytest.raises(NoOptimizer, match=r"this Adam no longer trains .* took it over"):
        old.step()
    assert rows_and_state(emb).tobytes() == before
    new.step()
    assert rows_and_state(emb).tobytes() != before


def test_an_optimizer_that_is_gone_is_not_attached(tmp_path):
    emb = small_embedding(tmp_path)
    optim.SGD(emb)
    gc.collect()
    with pytest.raises(NoOptimizer):
        emb(torch.tensor([1])).sum().backward()


def test_torchs_optimizer_of_the_whole_model_changes_no_row(tmp_path):
    """`AdamW(model.parameters())` for the dense part holds the handle too; that may not matter."""
    tables = []
    for whole in (False, True):
        model = Model(small_embedding(tmp_path))
        dense = torch.optim.AdamW(model.parameters() if whole else model.head.parameters(), lr=0.1)
        for ids in batches(4):
            model.loss(ids).backward()
            model.rows.step()
            dense.step()
            model.zero_grad()
        tables.append(rows_and_state(model.emb).tobytes())
    assert tables[0] == tables[1]


SCHEDULERS = {
    "StepLR": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.5),
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 1 / (n + 1)),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.5, total_steps=8, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_lr_schedulers(pair, name):
    def train(model):
        scheduler = SCHEDULERS[name](model.rows)
        for ids in batches(6):
            model.loss(ids).backward()
            model.step()
            scheduler.step()
            model.zero_grad()
        return scheduler.get_last_lr()

    ours, theirs = in_both(pair, train)
    assert ours == theirs != [LR]
    assert_same(pair)


def test_state_dict_of_the_optimizer(tmp_path):
    """It holds hyperparameters; the rows' state is in the table, the step count in its commits."""
    emb = small_embedding(tmp_path)
    opt = optim.Adam(emb, lr=0.25, betas=(0.5, 0.75))
    emb(torch.tensor([1])).sum().backward()
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    new = optim.Adam(emb)
    new.load_state_dict(state)
    assert new.param_groups[0]["lr"] == 0.25
    assert tuple(new.param_groups[0]["betas"]) == (0.5, 0.75)
    new.step()
    assert emb.table.scalars["step"] == 2
    assert emb.table.scalars["betas"] == [0.5, 0.75]


def test_state_dict_of_the_model_goes_there_and_back(tmp_path):
    model = Model(small_embedding(tmp_path))
    before = weights(model.emb)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(weights(model.emb), before)
    model.loss(torch.tensor([1])).backward()
    model.step()
    assert not torch.equal(weights(model.emb), before)


def test_several_tables_groups_and_a_group_added_later(tmp_path):
    embs = [small_embedding(tmp_path, seed=seed) for seed in range(4)]
    plains = [plain_twin(emb) for emb in embs]
    ours = optim.SGD([{"params": embs[0]}, {"params": [embs[1], nn.Sequential(embs[2])], "lr": 0.5}], lr=LR)
    ours.add_param_group({"params": embs[3], "lr": 0.125})
    theirs = torch.optim.SGD(
        [
            {"params": plains[0].parameters()},
            {"params": [plains[1].weight, plains[2].weight], "lr": 0.5},
            {"params": plains[3].parameters(), "lr": 0.125},
        ],
        lr=LR,
    )
    for modules, opt in ((embs, ours), (plains, theirs)):
        for ids in batches(3):
            sum((module(ids) * coefficients(ids, D)).sum() for module in modules).backward()
            opt.step()
            opt.zero_grad()
    for emb, plain in zip(embs, plains, strict=True):
        assert torch.equal(weights(emb), weights(plain))
    with pytest.raises(ValueError, match="more than one parameter group"):
        ours.add_param_group({"params": embs[0]})
    with pytest.raises(InvalidArgument, match="lr must be"):
        ours.add_param_group({"params": small_embedding(tmp_path), "lr": -1.0})
    assert len(ours.param_groups) == 3


def test_a_module_that_holds_a_table_twice_trains_it_once(tmp_path):
    emb = small_embedding(tmp_path)
    opt = optim.SGD(nn.ModuleList([emb, emb, bigembed.Embedding.open(emb.table)]))
    assert [len(group["params"]) for group in opt.param_groups] == [1]


# -- graphs -----------------------------------------------------------------------------------------------------


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        return rows.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("in the middle of a backward")


def test_a_backward_that_fails_leaves_no_half_gradient(pair):
    def train(model):
        ids = torch.tensor([1, 2, 3])
        # autograd takes the newest first: a whole lookup arrives, then the other one fails
        loss = Fails.apply(model(ids)).sum() + model(ids + 10).sum()
        with pytest.raises(ArithmeticError):
            loss.backward()
        assert model.emb.weight.grad is None if isinstance(model.emb, nn.Embedding) else model.emb.handle.grad is None
        model.rows.step()
        model.zero_grad()
        model.loss(ids).backward()
        model.step()

    in_both(pair, train)
    assert_same(pair)


@SOME_CACHES
def test_a_backward_that_fails_keeps_what_was_pending(tmp_path, caches):
    emb = small_embedding(tmp_path, **caches)
    plain = plain_twin(emb)
    opt, theirs = optim.SGD(emb, lr=LR), torch.optim.SGD(plain.parameters(), lr=LR)
    for module in (emb, plain):
        module(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(ArithmeticError):
            (Fails.apply(module(torch.tensor([2, 3]))).sum() + module(torch.tensor([4])).sum()).backward()
        module(torch.tensor([5])).sum().backward()
    opt.step()
    theirs.step()
    assert torch.equal(weights(emb), weights(plain))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_computes_the_lookup_again(pair, use_reentrant):
    """Also with the same table looked up outside, before and after, so that one backward runs inside another."""

    def train(model):
        anchor = torch.ones((), requires_grad=True)
        for ids in batches(3):

            def middle(x, ids=ids):
                return (model(ids) * x).tanh()

            before = model(ids.flip(0))
            inside = checkpoint(middle, anchor, use_reentrant=use_reentrant)
            (before.pow(2).mean() + (inside * model(ids.flip(1)).cos()).mean()).backward()
            model.step()
            model.zero_grad()

    in_both(pair, train)
    assert_same(pair)


@SOME_CACHES
@pytest.mark.parametrize("had_grad", [False, True])
def test_passes_within_passes_lose_nothing(tmp_path, had_grad, caches):
    """A reentrant backward that starts while gradients of the outer one are on their way."""

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, module):
            ctx.module = module
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                ctx.module(torch.tensor([5, 6])).sum().backward()
            return grad, None

    emb = small_embedding(tmp_path, **caches)
    plain = plain_twin(emb)
    for module, opt in ((emb, optim.SGD(emb, lr=LR)), (plain, torch.optim.SGD(plain.parameters(), lr=LR))):
        if had_grad:
            module(torch.tensor([9])).sum().backward()
        early = module(torch.tensor([1, 2]))
        late = Inner.apply(early.sum(), module)
        (late + module(torch.tensor([2, 3])).sum()).backward()
        opt.step()
    assert torch.equal(weights(emb), weights(plain))


def test_no_grad_and_inference_mode(tmp_path):
    emb = small_embedding(tmp_path, cache_rows=3)
    ids = torch.tensor([[1, 2], [3, 1]])
    expected = weights(emb)[ids]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            rows = emb(ids)
        assert torch.equal(rows, expected)
        assert not rows.requires_grad
    assert len(emb.trainable._tickets) == 0
    opt = optim.SGD(emb, lr=LR)  # needed from here on
    emb(ids).sum().backward()
    opt.step()
    assert torch.equal(weights(emb)[1], expected[0, 0] - 2 * LR)


def test_a_forward_whose_backward_never_comes_protects_nothing(tmp_path):
    emb = small_embedding(tmp_path, cache_rows=3)
    opt = optim.SGD(emb, lr=LR)
    kept = [emb(torch.tensor([n])) for n in range(2)]
    assert emb.trainable._protect_step() == 1
    for n in range(10, 30):
        emb(torch.tensor([n]))  # dropped at once
    assert len(emb.trainable._tickets) == 2
    del kept[0]
    assert emb.trainable._protect_step() == 2
    kept.clear()
    assert emb.trainable._protect_step() is None
    emb(torch.tensor([4])).sum().backward()
    assert emb.trainable._protect_step() is not None  # the pending gradient's rows are wanted again
    opt.step()
    opt.zero_grad()
    assert emb.trainable._protect_step() is None


@pytest.mark.parametrize("holds", [False, True])
def test_rows_of_a_forward_stay_cached_for_its_step(tmp_path, holds):
    """The lookups in between are served past the cache, unless nobody can come back for the rows."""
    emb = small_embedding(tmp_path, cache_rows=3)
    opt = optim.SGD(emb, lr=LR)
    rows = emb(torch.tensor([1, 2, 3]))
    if not holds:
        rows = rows.detach()
    with torch.no_grad():
        emb(torch.arange(10, 20))
        before = emb.stats()["cache"]
        emb(torch.tensor([1, 2, 3]))
    assert emb.stats()["cache"]["hits"] - before["hits"] == (3 if holds else 0)
    if holds:
        rows.sum().backward()
        opt.step()
        assert emb.stats()["cache"]["misses"] == before["misses"]


def test_a_gradient_penalty_on_the_rows_themselves_works(pair):
    """The second derivative of what stands above the lookup, which is one more first derivative of it."""

    def train(model):
        rows = model.emb(torch.tensor([1, 2, 2]))
        (grad,) = torch.autograd.grad(model.head(rows).pow(3).sum(), rows, create_graph=True)
        (grad.pow(2).sum() / 1e4).backward()
        model.step()

    in_both(pair, train)
    assert_same(pair)


# -- one cache per table ----------------------------------------------------------------------------------------


def test_modules_on_one_table_share_everything(tmp_path):
    table = small_table(tmp_path)
    modules = [
        bigembed.Embedding.open(table, cache_rows=3),
        bigembed.Embedding.open(table),
        bigembed.Embedding.open(table.path),
    ]
    first = modules[0]
    for other in modules[1:]:
        assert other.table is table
        assert other.trainable is first.trainable
        assert other.trainable.cache is first.trainable.cache
        assert other.handle is first.handle
    assert len(list(nn.ModuleList(modules).parameters())) == 1
    opt = optim.SGD(modules[1], lr=LR)
    expected = weights(first)
    for module in modules:
        module(torch.tensor([1, 2])).sum().backward()
    opt.step()
    expected[1:3] -= 3 * LR
    assert torch.equal(weights(modules[2]), expected)
    modules[0].requires_grad_(False)
    assert not modules[2](torch.tensor([1])).requires_grad


@pytest.mark.parametrize("kind", ["embedding", "bag", "weights of samples", "compiled", "compiled bag"])
def test_a_hook_on_the_handle_would_see_nothing_and_says_so(tmp_path, kind):
    """`for p in model.parameters(): p.register_hook(clamp)` changes dense gradients; a table's it cannot reach."""
    table = small_table(tmp_path)
    if "bag" in kind or "weights" in kind:
        module = bigembed.EmbeddingBag.open(table, bag_mode="sum")
    else:
        module = bigembed.Embedding.open(table)
    opt = optim.SGD(module, lr=1.0)
    ids = torch.tensor([[1, 2]])
    given = (ids, None, torch.ones(1, 2, requires_grad=True)) if "weights" in kind else (ids,)
    torch._dynamo.reset()
    run = torch.compile(module, backend="aot_eager") if "compiled" in kind else module
    seen = []
    hook = module.handle.register_hook(lambda grad: seen.append(grad) or grad.clamp(-0.5, 0.5))
    with pytest.raises(HookOnHandle, match=r"rows\.register_hook.*register_post_accumulate_grad_hook"):
        run(*given).sum().backward()
    assert module.pending_gradient() is None
    module.zero_grad()
    hook.remove()
    norms = []
    module.handle.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.clone()))
    run(*given).sum().backward()
    assert torch.equal(norms[0], module.handle.grad)
    assert norms[0] > 0
    assert seen == []
    opt.step()
    torch._dynamo.reset()


def test_a_backward_without_an_optimizer_names_the_ways_out(tmp_path):
    emb = small_embedding(tmp_path)
    before = rows_and_state(emb).tobytes()
    with pytest.raises(NoOptimizer, match=r"no bigembed optimizer is attached.*requires_grad_\(False\)") as caught:
        emb(torch.tensor([1])).sum().backward()
    assert isinstance(caught.value, BigembedError)
    assert isinstance(caught.value, RuntimeError)
    assert emb.handle.grad is None
    assert rows_and_state(emb).tobytes() == before
