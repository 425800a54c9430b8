"""The contract of nn.Embedding, point by point: torch's class and ours side by side, exact unless a test says why not.

Cached and uncached: with 4 slots, with room for every row, and with a cache on a device above 4 slots. What max_norm
does is in test_max_norm.py, loops that train in test_idioms.py and test_handle.py.
"""

import inspect
import itertools
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from training import batches, coefficients, plain_twin, rows_and_state, small_table, weights

import bigembed
from bigembed import optim
from bigembed.errors import BigembedError, InvalidArgument, NoVocabulary, TableClosed
from bigembed.nn.frequency import factors
from bigembed.nn.transforms import NotAPureFunction

V, D = 20, 4
# Each place: (slots of the host's cache, slots of a device's), None is room for all or no such cache.
PLACES = {"4 rows": (4, None), "all rows": (None, None), "device": (4, 4)}


@pytest.fixture(params=PLACES)
def place(request):
    return request.param


def pair(folder, place, *, sparse=False, scale_grad_by_freq=False, **facts):
    """A module on a temporary table, and torch's with the same rows."""
    cache_rows, device_rows = PLACES[place]
    emb = bigembed.Embedding.open(small_table(folder, V, D, **facts), cache_rows=cache_rows, device_rows=device_rows)
    plain = plain_twin(emb, sparse=sparse)
    emb.sparse = sparse
    emb.scale_grad_by_freq = plain.scale_grad_by_freq = scale_grad_by_freq
    return emb, plain


def gradients(emb, plain, ids, factors=None):
    """Both dense gradients of one backward."""
    factors = coefficients(ids, D) if factors is None else factors
    for module in (emb, plain):
        module.zero_grad()
        (module(ids) * factors).sum().backward()
    theirs = plain.weight.grad
    return emb.pending_gradient().to_dense(), theirs.to_dense() if theirs.is_sparse else theirs


def errors(*calls):
    """What each call raises; torch's is the last, and ours are of our own kind and of torch's."""
    raised = []
    for call in calls:
        with pytest.raises(Exception) as caught:
            call()
        raised.append(caught.value)
    *ours, theirs = raised
    for error in ours:
        assert isinstance(error, BigembedError)
        assert isinstance(error, type(theirs)), f"{type(error).__mro__} where torch raises {type(theirs)}"
    return [*map(str, ours), str(theirs)]


# -- the constructor's face -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["__init__", "from_pretrained", "forward"])
def test_arguments_are_torchs_in_torchs_order(name):
    def positional(kind):
        given = inspect.signature(getattr(kind, name)).parameters.values()
        return [(p.name, p.default) for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(bigembed.Embedding) == positional(nn.Embedding)


def test_declared_names_are_torchs():
    assert bigembed.Embedding.__constants__ == nn.Embedding.__constants__
    ours, theirs = bigembed.Embedding.__annotations__, nn.Embedding.__annotations__
    made = bigembed.Embedding(V, D, 3)
    for name in theirs.keys() - {"freeze"}:  # which torch declares and never sets
        assert name in ours or hasattr(made, name), name
    shared = ours.keys() & theirs.keys()
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


CHOICES = {
    "padding_idx": [None, 0, -1, 7],
    "max_norm": [None, 1.0, 2, True],
    "norm_type": [2.0, 2, 1.0],
    "scale_grad_by_freq": [False, True],
    "sparse": [False, True],
}
EVERY_CHOICE = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]


def test_attributes_and_repr_are_torchs_for_every_choice():
    emb, plain = bigembed.Embedding(V, D), nn.Embedding(V, D)
    for choice in EVERY_CHOICE:
        made = nn.Embedding(V, D, **choice)
        for name in choice:
            setattr(emb, name, getattr(made, name))
            setattr(plain, name, getattr(made, name))
        assert repr(emb) == repr(plain) == repr(made)
    for choice in EVERY_CHOICE[:: len(EVERY_CHOICE) // 7]:
        emb, plain = bigembed.Embedding(V, D, **choice), nn.Embedding(V, D, **choice)
        assert repr(emb) == repr(plain)
        for name in nn.Embedding.__constants__:
            ours, theirs = getattr(emb, name), getattr(plain, name)
            assert ours == theirs, name
            assert type(ours) is type(theirs), name
        again = bigembed.Embedding.from_pretrained(torch.zeros(V, D), **choice)
        assert repr(again) == repr(nn.Embedding.from_pretrained(torch.zeros(V, D), **choice))


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"padding_idx": V}, "Padding_idx must be within num_embeddings"),
        ({"padding_idx": -V - 1}, "Padding_idx must be within num_embeddings"),
        ({"_weight": torch.zeros(V, D + 1)}, "weight"),
        ({"_weight": torch.zeros(V * D)}, "weight"),
    ],
)
def test_arguments_that_cannot_be(facts, text):
    ours, theirs = errors(lambda: bigembed.Embedding(V, D, **facts), lambda: nn.Embedding(V, D, **facts))
    assert text in theirs
    assert text in ours
    assert len(ours) > len(text) + 20, "and says what was given"


def test_pretrained_rows_that_cannot_be():
    for rows in (torch.zeros(D), torch.zeros(2, 3, 4)):
        ours, theirs = errors(
            lambda rows=rows: bigembed.Embedding.from_pretrained(rows),
            lambda rows=rows: nn.Embedding.from_pretrained(rows),
        )
        assert theirs in ours
    for padding_idx in (V, -V - 1):
        errors(
            lambda p=padding_idx: bigembed.Embedding.from_pretrained(torch.zeros(V, D), padding_idx=p),
            lambda p=padding_idx: nn.Embedding.from_pretrained(torch.zeros(V, D), padding_idx=p),
        )


# -- padding_idx ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [None, 0, 5, V - 1, -1, -V])
def test_the_padding_row_of_a_new_module(padding_idx):
    emb, plain = bigembed.Embedding(V, D, padding_idx), nn.Embedding(V, D, padding_idx)
    assert emb.padding_idx == plain.padding_idx
    ours, theirs = weights(emb), weights(plain)
    assert torch.equal((ours == 0).all(1), (theirs == 0).all(1)), "zeros in that row and in no other"


@pytest.mark.parametrize("padding_idx", [None, 0, 5, V - 1, -1, -V])
def test_the_padding_row_of_given_rows_is_as_given(padding_idx):
    rows = torch.randn(V, D)
    for make in (
        lambda kind: kind(V, D, padding_idx, _weight=rows.clone()),
        lambda kind: kind.from_pretrained(rows.clone(), padding_idx=padding_idx),
    ):
        emb, plain = make(bigembed.Embedding), make(nn.Embedding)
        assert emb.padding_idx == plain.padding_idx
        assert torch.equal(weights(emb), weights(plain))
        assert torch.equal(emb(torch.arange(V)), plain(torch.arange(V)))


@pytest.mark.parametrize("padding_idx", [0, 7, V - 1])
def test_the_padding_row_is_given_as_it_is_and_gets_no_gradient(tmp_path, place, padding_idx):
    emb, plain = pair(tmp_path, place, padding_idx=padding_idx)
    opt, plain_opt = optim.SGD(emb, lr=0.5), torch.optim.SGD(plain.parameters(), lr=0.5)
    emb.weight[padding_idx] = torch.ones(D)
    plain.weight.data[padding_idx] = 1.0
    for ids in batches(6, V):
        ids[0] = padding_idx
        assert torch.equal(emb(ids), plain(ids))
        ours, theirs = gradients(emb, plain, ids)
        assert torch.equal(ours, theirs)
        assert not ours[padding_idx].any()
        opt.step(), plain_opt.step()
        assert torch.equal(weights(emb), weights(plain))
    only = torch.full((3,), padding_idx)
    ours, theirs = gradients(emb, plain, only)
    assert torch.equal(ours, theirs), "a batch of nothing else"


@pytest.mark.parametrize("set_to", [-1, 3, -V, None])
def test_padding_idx_may_be_set_later(tmp_path, place, set_to):
    emb, plain = pair(tmp_path, place)
    optim.SGD(emb)
    emb.opt = optim.SGD(emb)
    emb.padding_idx = plain.padding_idx = set_to
    ids = torch.tensor([0, 3, V - 1, V - 1, 5])
    ours, theirs = gradients(emb, plain, ids)
    assert torch.equal(ours, theirs)
    emb.padding_idx = plain.padding_idx = V
    ours, theirs = errors(lambda: emb(ids), lambda: plain(ids))
    assert theirs in ours


def test_torchs_decay_and_momentum_move_the_padding_row_and_ours_do_not(tmp_path):
    """A row without a gradient is not touched, so what decays in torch's dense update stays here."""
    emb, plain = pair(tmp_path, "all rows", padding_idx=2)
    emb.weight[2] = torch.ones(D)
    plain.weight.data[2] = 1.0
    plain_opt = torch.optim.SGD(plain.parameters(), lr=0.5, weight_decay=0.5)
    decay = {"weight_decay": 0.5} if "weight_decay" in inspect.signature(optim.SGD).parameters else {}
    opt = optim.SGD(emb, lr=0.5, **decay)
    gradients(emb, plain, torch.tensor([1, 2, 2]))
    opt.step(), plain_opt.step()
    assert plain.weight[2].tolist() == [0.75] * D
    assert emb.weight[2].tolist() == [1.0] * D


# -- given rows, and freezing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [True, False, None])
def test_who_trains(freeze):
    given = {} if freeze is None else {"freeze": freeze}
    rows = torch.randn(V, D)
    emb = bigembed.Embedding.from_pretrained(rows, **given)
    plain = nn.Embedding.from_pretrained(rows.clone(), **given)
    assert emb.weight.requires_grad == plain.weight.requires_grad == (freeze is False)
    assert emb(torch.tensor([1])).requires_grad == plain(torch.tensor([1])).requires_grad
    if freeze is not None:
        emb, plain = bigembed.Embedding(V, D, _freeze=freeze), nn.Embedding(V, D, _freeze=freeze)
        assert emb.weight.requires_grad == plain.weight.requires_grad == (not freeze)
    for module in (emb, plain):
        module.requires_grad_(True)
        assert module(torch.tensor([1])).requires_grad
        module.requires_grad_(False)
        assert not module(torch.tensor([1])).requires_grad


def test_given_rows_are_not_initialised_and_take_nothing_from_the_generator():
    rows = torch.randn(V, D)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    nn.Embedding(V, D, _weight=rows)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(0)
    assert torch.equal(weights(bigembed.Embedding(V, D, _weight=rows, seed=1)), rows)
    assert torch.equal(torch.rand(1), expected)


def test_given_rows_are_a_copy_where_torch_shares_them():
    """The table is on disk: it cannot be the tensor. Values of another dtype become float32."""
    rows = torch.randn(V, D)
    emb, plain = bigembed.Embedding(V, D, _weight=rows), nn.Embedding(V, D, _weight=rows)
    before = rows.clone()
    rows += 1
    assert torch.equal(weights(plain), rows)
    assert torch.equal(weights(emb), before)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        given = bigembed.Embedding(V, D, _weight=before.to(dtype))
        assert given.weight.dtype == torch.float32
        assert torch.equal(weights(given), before.to(dtype).float())


def test_eval_and_train_change_nothing(tmp_path, place):
    emb, plain = pair(tmp_path, place)
    ids = torch.tensor([1, 2, 2])
    for module in (emb, plain):
        assert module.training
        assert module.eval() is module
        assert not module.training
        assert module(ids).requires_grad
        assert module.train().training
    assert torch.equal(emb(ids), plain(ids))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.complex64])
def test_other_dtypes_are_refused_with_what_there_is(dtype):
    with pytest.raises(InvalidArgument, match=rf"dtype {dtype} is not supported.*float32"):
        bigembed.Embedding(V, D, dtype=dtype)


# -- the meta device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", torch.device("meta"), "meta:0"])
def test_a_meta_module_is_refused_with_the_reason(device):
    with pytest.raises(InvalidArgument, match=r"takes none.*Leave device out"):
        bigembed.Embedding(V, D, device=device)


def test_a_model_made_under_the_meta_device_has_its_rows_already():
    """What deferred initialisation is for, memory, a table does not take; to_empty and a load then go as usual."""
    with torch.device("meta"):
        model = nn.Sequential(bigembed.Embedding(10**9, D, seed=1), nn.Linear(D, 2))
        plain = nn.Sequential(nn.Embedding(10**9, D), nn.Linear(D, 2))
    assert plain[0].weight.is_meta
    assert model[1].weight.is_meta
    rows = model[0](torch.tensor([10**9 - 1]))
    assert rows.device.type == "cpu"
    model.to_empty(device="cpu")
    assert torch.equal(model[0](torch.tensor([10**9 - 1])), rows)
    assert model(torch.tensor([1])).shape == (1, 2)


# -- lookups ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 4), (0, 5, 0)], ids=str)
def test_inputs_of_any_shape_forward_and_back(tmp_path, place, shape, dtype):
    emb, plain = pair(tmp_path, place, padding_idx=3)
    opt = optim.SGD(emb)
    ids = torch.randint(0, V, shape, dtype=dtype)
    ours, theirs = emb(ids), plain(ids)
    assert torch.equal(ours, theirs)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert ours.is_contiguous() == theirs.is_contiguous()
    ours, theirs = gradients(emb, plain, ids, torch.ones(*shape, D))
    assert torch.equal(ours, theirs)
    assert emb.handle.grad is not None, "an empty batch has a gradient too, of zeros"
    opt.step()


@pytest.mark.parametrize("ids", [torch.tensor([V]), torch.tensor([0, -1]), torch.tensor([2**62]), torch.tensor(-V)])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_ids_that_are_no_rows(tmp_path, place, ids, needs_grad):
    emb, plain = pair(tmp_path, place)
    before = rows_and_state(emb).tobytes()
    with torch.set_grad_enabled(needs_grad):
        ours, _ = errors(lambda: emb(ids), lambda: plain(ids))
    assert str(int(ids.reshape(-1)[-1])) in ours
    assert f"valid ids are 0 to {V - 1}" in ours
    assert rows_and_state(emb).tobytes() == before


@pytest.mark.parametrize("ids", [torch.tensor([1.0]), torch.tensor([True]), [1], 1, None, np.array([1])], ids=str)
def test_inputs_that_are_no_ids(tmp_path, place, ids):
    emb, plain = pair(tmp_path, place)
    errors(lambda: emb(ids), lambda: plain(ids))


def test_a_result_belongs_to_the_caller(tmp_path, place):
    """As torch's: changing it in place in a graph, or later, changes neither the table nor the gradient."""
    emb, plain = pair(tmp_path, place)
    emb.opt = optim.SGD(emb)
    ids = torch.tensor([1, 1, 4])
    before = weights(emb)
    for module in (emb, plain):
        rows = module(ids)
        rows.mul_(2.0).add_(1.0)
        rows.sum().backward()
    assert torch.equal(emb.pending_gradient().to_dense(), plain.weight.grad)
    assert torch.equal(weights(emb), before)


def test_ids_may_change_between_forward_and_backward(tmp_path, place):
    """torch refuses the backward then (it kept the ids themselves); ours has grouped them and goes on, right."""
    emb, plain = pair(tmp_path, place, scale_grad_by_freq=True)
    emb.opt = optim.SGD(emb)
    ids = torch.tensor([1, 1, 4, 5])
    expected = plain(ids)
    ours, theirs = emb(ids), plain(ids)
    expected.sum().backward()
    ids.fill_(0)
    ours.sum().backward()
    assert torch.equal(emb.pending_gradient().to_dense(), plain.weight.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        theirs.sum().backward()


# -- scale_grad_by_freq, sparse ---------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[1], [2, 4, 1], [8, 1, 16, 2]], ids=str)
def test_gradients_by_frequency(tmp_path, place, counts):
    """Exact where a count is a power of two."""
    emb, plain = pair(tmp_path, place, scale_grad_by_freq=True, padding_idx=2)
    opt, plain_opt = optim.SGD(emb, lr=0.5), torch.optim.SGD(plain.parameters(), lr=0.5)
    ids = torch.cat([torch.full((count,), row) for row, count in enumerate(counts)])
    ids = ids[torch.randperm(len(ids))].reshape(1, -1).to(torch.int32)
    for _ in range(2):
        ours, theirs = gradients(emb, plain, ids)
        assert torch.equal(ours, theirs)
        opt.step(), plain_opt.step()
        assert torch.equal(weights(emb), weights(plain))


def test_gradients_by_any_frequency(tmp_path, place):
    """Within rounding: torch adds grad / count by fused multiply-add where the processor has one, ours rounds it."""
    emb, plain = pair(tmp_path, place, scale_grad_by_freq=True)
    emb.opt = optim.SGD(emb)
    for ids in batches(5, V, (6, 7)):
        ours, theirs = gradients(emb, plain, ids, torch.randn(6, 7, D))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        # What is promised instead: each product rounded, then added in order of position.
    assert factors(np.array([0, 0, 1, 0]), 2).tolist() == [np.float32(1 / 3)] * 2 + [1.0, np.float32(1 / 3)]


def test_frequencies_are_of_one_lookup(tmp_path, place):
    """Not of the batches accumulated, nor of the lookups of one graph."""
    emb, plain = pair(tmp_path, place, scale_grad_by_freq=True)
    emb.opt = optim.SGD(emb)
    first, second = torch.tensor([1, 1, 2]), torch.tensor([1, 2, 2, 2, 2])
    for module in (emb, plain):
        (module(first).sum() + module(second).sum()).backward()
        module(first).sum().backward()
    assert torch.equal(emb.pending_gradient().to_dense(), plain.weight.grad)


def test_rows_with_frequencies_may_be_changed_in_place(tmp_path, place):
    emb, plain = pair(tmp_path, place, scale_grad_by_freq=True)
    opt = optim.SGD(emb, lr=1.0)
    ids, outputs = torch.tensor([1, 1, 2, 5]), []
    for module in (emb, plain):
        rows = module(ids)
        rows.mul_(2.0)
        rows[0] = 0.0
        rows.sum().backward()
        outputs.append(rows.detach())
    assert torch.equal(*outputs)
    assert torch.equal(emb.pending_gradient().to_dense(), plain.weight.grad)
    assert torch.equal(weights(emb), plain.weight), "the rows given are nobody else's"
    opt.step()


def test_sparse_is_taken_with_frequencies_where_torch_fails_in_backward(tmp_path):
    emb, plain = pair(tmp_path, "all rows", sparse=True, scale_grad_by_freq=True)
    emb.opt = optim.SGD(emb)
    ids = torch.tensor([1, 1, 2])
    with pytest.raises(RuntimeError, match="scale_grad_by_freq not supported with sparse"):
        plain(ids).sum().backward()
    emb(ids).sum().backward()
    assert emb.pending_gradient().to_dense()[:3].tolist() == [[0.0] * D, [1.0] * D, [1.0] * D]


# -- what is pending --------------------------------------------------------------------------------------------


def test_the_pending_gradient_is_torchs_sparse_one(tmp_path, place):
    emb, plain = pair(tmp_path, place, sparse=True, padding_idx=1)
    opt = optim.SGD(emb, lr=0.5)
    assert emb.pending_gradient() is None
    for ids in batches(3, V):
        factors = coefficients(ids, D)
        for module in (emb, plain):
            (module(ids) * factors).sum().backward()
        ours, theirs = emb.pending_gradient(), plain.weight.grad.coalesce()
        assert ours.is_sparse
        assert ours.is_coalesced()
        assert ours.shape == theirs.shape == (V, D)
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        assert not (ours.indices() == 1).any(), "no gradient for padding"
        torch.sparse_coo_tensor(ours.indices(), ours.values(), ours.shape, check_invariants=True)
    kept = emb.pending_gradient().to_dense()
    emb.pending_gradient().values().fill_(7.0)
    assert torch.equal(emb.pending_gradient().to_dense(), kept), "a copy"
    emb.handle.grad.mul_(0.5)
    plain.weight.grad.mul_(0.5)
    assert torch.equal(emb.pending_gradient().to_dense(), plain.weight.grad.to_dense())
    expected = weights(emb) - 0.5 * (0.5 * kept)
    opt.step()
    assert torch.equal(weights(emb), expected), "what was shown is what the step applied"
    opt.zero_grad()
    assert emb.pending_gradient() is None


def test_what_is_pending_takes_no_memory_of_the_table(tmp_path):
    emb = bigembed.Embedding(10**9, D)
    emb.opt = optim.SGD(emb)
    ids = torch.tensor([0, 10**9 - 1])
    emb(ids).sum().backward()
    pending = emb.pending_gradient()
    assert pending.shape == (10**9, D)
    assert pending.indices().tolist() == [ids.tolist()]


# -- reset_parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("written", [True, False])
def test_reset_parameters(tmp_path, place, written, padding_idx):
    emb, plain = pair(tmp_path, place, init="zeros")
    emb.padding_idx = plain.padding_idx = padding_idx
    if written:
        emb.weight[:] = torch.full((V, D), 5.0)
    for module in (emb, plain):
        torch.manual_seed(1)
        assert module.reset_parameters() is None
        rows = weights(module)
        assert torch.equal((rows == 0).all(1).nonzero().flatten(), torch.tensor([] if padding_idx is None else [3]))
        assert rows.abs().max() < 5
        assert 0.7 < rows.std() < 1.3
        assert module(torch.arange(V)).requires_grad


def test_a_reset_of_rows_that_only_the_cache_has_changed(tmp_path, place):
    emb, _ = pair(tmp_path, place, padding_idx=3)
    opt = optim.SGD(emb, lr=100.0)
    emb(torch.tensor([1, 2, 3])).sum().backward()
    opt.step()
    assert weights(emb)[1].max() < -50
    emb.reset_parameters()
    assert weights(emb).abs().max() < 10
    assert not emb(torch.tensor(3)).any()


def test_the_padding_row_is_filled_whoever_wrote_it(tmp_path, place):
    emb, plain = pair(tmp_path, place, padding_idx=3)
    for module, rows in ((emb, emb.weight), (plain, plain.weight.data)):
        rows[3] = torch.ones(D)
        module._fill_padding_idx_with_zero()
        assert not weights(module)[3].any()
    assert torch.equal(weights(emb), weights(plain))
    new = bigembed.Embedding(V, D, 3)
    new.reset_parameters()
    assert not new.table.has_rows, "a reset of a new table writes nothing"


def test_a_rows_reset_draws_from_torchs_generator(tmp_path):
    emb, _ = pair(tmp_path, "all rows")
    emb.weight[0] = torch.ones(D)
    torch.manual_seed(0)
    emb.reset_parameters()
    first = weights(emb)
    emb.reset_parameters()
    assert not torch.equal(weights(emb), first)
    torch.manual_seed(0)
    emb.reset_parameters()
    assert torch.equal(weights(emb), first)


def test_the_usual_init_functions_reach_the_rows(tmp_path, place):
    """`model.apply(init_weights)`, as models have it."""

    def init_weights(module):
        if isinstance(module, nn.Linear | nn.Embedding | bigembed.Embedding):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.Embedding | bigembed.Embedding) and module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].fill_(0) if isinstance(module, nn.Embedding) else (
                        module._fill_padding_idx_with_zero()
                    )

    emb, plain = pair(tmp_path, place, padding_idx=3)
    for module in (emb, plain):
        nn.Sequential(module, nn.Linear(D, D)).apply(init_weights)
        assert weights(module).std() < 0.05
        assert torch.equal((weights(module) == 0).all(1).nonzero().flatten(), torch.tensor([3]))


def small(base, calls):
    class Small(base):
        def reset_parameters(self):
            calls.append((self.num_embeddings, self.embedding_dim, self.padding_idx, self.max_norm, self.norm_type))
            nn.init.uniform_(self.weight, 3.0, 4.0)
            self._fill_padding_idx_with_zero()

    return Small


def test_a_subclass_that_initialises_itself():
    """nn.Embedding's constructor calls reset_parameters, unless rows are given."""
    called = []
    for base in (bigembed.Embedding, nn.Embedding):
        calls = []
        kind = small(base, calls)
        rows = weights(kind(V, D, 3, 9.0, 1.0))
        assert rows[3].tolist() == [0.0] * D
        assert 3.0 <= rows[rows != 0].min() <= rows.max() < 4.0
        assert weights(kind(V, D, _weight=torch.ones(V, D))).eq(1.0).all()
        kind.from_pretrained(torch.ones(V, D))
        called.append(calls)
    assert called[0] == called[1] == [(V, D, 3, 9.0, 1.0)]
    calls = []
    table = small(bigembed.Embedding, calls)(10**9, D).table
    assert len(calls) == 1
    assert not table.has_rows, "which costs nothing"
    assert weights(small(bigembed.Embedding, calls)(V, D, init="zeros")).eq(0.0).all(), "said more precisely"
    assert len(calls) == 1


def test_a_subclass_that_cannot_initialise_itself_leaves_no_table(tmp_path):
    class Broken(bigembed.Embedding):
        def reset_parameters(self):
            raise KeyError("not yet")

    with pytest.raises(KeyError, match="not yet"):
        Broken(V, D, path=tmp_path / "t")
    assert not (tmp_path / "t").exists()


# -- methods of a module ----------------------------------------------------------------------------------------


def test_names_that_code_may_use_are_there():
    ours, theirs = bigembed.Embedding(V, D), nn.Embedding(V, D)
    missing = {name for name in dir(theirs) if not name.startswith("__") and not hasattr(ours, name)}
    assert missing == set()
    public = {name for name in vars(nn.Embedding) if isinstance(vars(nn.Embedding)[name], types.FunctionType)}
    assert public <= set(dir(bigembed.Embedding))


def test_no_vocabulary_is_an_attribute_that_is_not_there():
    """For hasattr, getattr with a default, and tools that walk attributes; who asks for it reads why."""
    emb = bigembed.Embedding(V, D)
    assert not hasattr(emb, "vocab")
    assert getattr(emb, "vocab", 7) == 7
    assert dict(inspect.getmembers(emb)).keys() > {"table", "weight"}
    for kind in (AttributeError, NoVocabulary, BigembedError):
        with pytest.raises(kind, match=r"no vocabulary"):
            emb.vocab  # noqa: B018
    with pytest.raises(NoVocabulary):
        emb.embed(["word"])
    with pytest.raises(AttributeError, match="'Embedding' object has no attribute 'vocabulary'"):
        emb.vocabulary  # noqa: B018
    emb.close()
    with pytest.raises(TableClosed):
        emb.vocab  # noqa: B018


# -- defaults of torch that somebody has set --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bag", "embedding"])
@pytest.mark.parametrize("device_rows", [None, 4])
def test_torchs_defaults_do_not_matter(tmp_path, kind, device_rows):
    """`torch.set_default_dtype`, and lookups under `torch.device("meta")`, where torch makes tensors without bytes."""
    ids, results = torch.tensor([[1, 3, 1], [2, 5, 3]]), []
    factors = coefficients(torch.zeros(2 if kind == "bag" else (2, 3), dtype=torch.int64), D)
    ones = torch.ones(2, 3)
    for changed in (False, True):
        table = small_table(tmp_path, V, D, padding_idx=3)
        options = {"max_norm": 0.5, "scale_grad_by_freq": True, "cache_rows": 4, "device_rows": device_rows}
        if kind == "bag":
            module = bigembed.EmbeddingBag.open(table, bag_mode="sum", **options)
        else:
            module = bigembed.Embedding.open(table, **options)
        opt = optim.Adagrad(module, lr=0.5)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if changed else before)
        try:
            with torch.device("meta" if changed else "cpu"):
                out = module(ids, None, ones) if kind == "bag" else module(ids)
                out.backward(factors)
                pending = module.pending_gradient()
                opt.step()
        finally:
            torch.set_default_dtype(before)
        results.append([out.detach(), pending.to_dense(), weights(module)])
    for a, b in zip(*results, strict=True):
        assert (a.dtype, a.device.type) == (torch.float32, "cpu")
        assert torch.equal(a, b)


# -- what records or compiles a model ---------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("kind", [bigembed.Embedding, bigembed.EmbeddingBag])
def test_traces_would_keep_rows_and_say_so(kind, trains):
    """Torch's own tools; a trace that was made would give the rows of its example for any ids."""
    module = kind(V, D).requires_grad_(trains)
    model, ids = nn.Sequential(module, nn.Linear(D, 1)), torch.tensor([[1, 2]])
    for record in (
        lambda: torch.jit.trace(model, ids),
        lambda: make_fx(lambda given: module(given))(ids),
        lambda: make_fx(lambda given: module(given), tracing_mode="fake")(ids),
    ):
        with pytest.raises(NotAPureFunction, match=r"to_nn_embedding"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            record()
    for whole in (module, model):
        with pytest.raises(NotAPureFunction, match=r"Script what follows"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(whole)
    assert module(ids).shape[-1] == D, "it serves on"
