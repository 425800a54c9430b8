"""EmbeddingBag against torch.nn.EmbeddingBag: outputs, gradients, side effects and errors.

Outputs of sum, mean and max are equal bit by bit, in any order of magnitude: torch adds a bag's rows in order of
position and divides by their number. What is not:
- a weighted sum without padding_idx: torch (FBGEMM) uses fused multiply-adds there, this library nowhere;
- gradients of a row with several positions: torch adds them in the order of an unstable sort, and for mean by fused
  multiply-adds with 1 / count.
Numbers that are multiples of 1/8, or of powers of two, make all of these exact in any order; the others are compared
to float32's rounding. All gradients equal our own twins, and our own Embedding with the reduction on top, exactly.
"""

import copy
import itertools
import tracemalloc
import warnings

import naive_bags
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from training import RULES, rows_and_state, small_table

import bigembed
from bigembed import threads
from bigembed.cache.row_cache import RowCache
from bigembed.errors import InvalidArgument, NoOptimizer
from bigembed.kernels import bags as kernels
from bigembed.kernels.grouping import NONE_F
from bigembed.nn.bags import (
    BagsNotTensors,
    InvalidBags,
    InvalidNested,
    InvalidOffsets,
    InvalidWeights,
    RowOutOfBags,
    WeightsNeedSum,
)
from bigembed.nn.max_norm import MaxNormNeedsWriting
from bigembed.nn.transforms import NoSuchDerivative, NotAPureFunction

V, D = 12, 5
CACHES = [{"cache_rows": 4}, {"cache_rows": V}, {"device_rows": 4, "cache_rows": 4}, {"device_rows": V}]
MODES = ("sum", "mean", "max")


def eighths(rng, *shape):
    """Multiples of 1/8: products of three and sums of hundreds of them are exact in float32."""
    return torch.from_numpy(rng.integers(-16, 17, shape).astype(np.float32) / 8)


def any_floats(rng, *shape):
    """Magnitudes so different that another order of addition gives other bits."""
    return torch.from_numpy((rng.standard_normal(shape) * 2.0 ** rng.integers(-9, 9, shape)).astype(np.float32))


def small_bag(folder, num_rows=V, dim=D, *, cache_rows=None, device_rows=None, **how):
    table = small_table(folder, num_rows, dim)
    return bigembed.EmbeddingBag.open(table, cache_rows=cache_rows, device_rows=device_rows, **how)


def weights(module):
    weight = module.weight[:] if isinstance(module, bigembed.EmbeddingBag) else module.weight
    return weight.detach().clone().as_subclass(torch.Tensor)


def twins(folder, rows, cache, *, mode="mean", padding_idx=None, **facts):
    """(ours, torch's) on the same rows, with an SGD each whose lr loses nothing."""
    ours = small_bag(folder, *rows.shape, bag_mode=mode, padding_idx=padding_idx, **facts, **cache)
    ours.weight.copy_(rows)
    plain = nn.EmbeddingBag.from_pretrained(rows.clone(), False, mode=mode, padding_idx=padding_idx, **facts)
    opts = bigembed.optim.SGD(ours, lr=0.5), torch.optim.SGD(plain.parameters(), lr=0.5)
    return ours, plain, opts


@pytest.fixture(params=CACHES, ids=lambda cache: "-".join(f"{name[:-5]}{rows}" for name, rows in cache.items()))
def cache(request):
    return request.param


@pytest.fixture(params=[1, 2, 5])
def num_threads(request):
    before = threads.get_num_threads()
    threads.set_num_threads(request.param)
    yield request.param
    threads.set_num_threads(before)


# -- kernels ----------------------------------------------------------------------------------------------------


def kernel_cases():
    """(values_SE, past_PE, slots_U, inverse_N, starts_B1, dim), some rows past the cache, some bags empty."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        dim, slots, past = rng.integers(1, 20), rng.integers(1, 9), rng.integers(0, 4)
        width = dim + rng.integers(0, 3)
        values_SE, past_PE = any_floats(rng, slots, width).numpy(), any_floats(rng, past, width).numpy()
        if seed % 5 == 0:
            values_SE[rng.random(values_SE.shape) < 0.3] = rng.choice([np.nan, np.inf, -np.inf, -0.0, 0.0])
        slots_U = rng.permutation(slots + past)[: rng.integers(1, slots + past + 1)]
        count = int(rng.integers(0, 40))
        inverse_N = rng.integers(0, len(slots_U), count)
        cuts = np.sort(rng.integers(0, count + 1, rng.integers(0, 9)))
        yield values_SE, past_PE, slots_U, inverse_N, np.array([0, *cuts, count]), int(dim)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_kernels_equal_their_twins(num_threads):
    for number, (values_SE, past_PE, slots_U, inverse_N, starts_B1, dim) in enumerate(kernel_cases()):
        rng = np.random.default_rng(number)
        where, shape = (values_SE, past_PE, slots_U, inverse_N, starts_B1), (len(starts_B1) - 1, dim)
        for factor_N in (NONE_F, any_floats(rng, len(inverse_N)).numpy()):
            for divides in (False, True):
                out_BD = np.full(shape, 7, np.float32)
                threads.run(kernels.sum_bags, shape[0], *where, factor_N, divides, out_BD, grain=1)
                assert out_BD.tobytes() == naive_bags.sum_bags(*where, factor_N, divides, dim).tobytes()
        out_BD, places_BD = np.full(shape, 7, np.float32), np.full(shape, 7, np.int32)
        threads.run(kernels.max_bags, shape[0], *where, out_BD, places_BD, grain=1)
        expected_BD, expected_places_BD = naive_bags.max_bags(*where, dim)
        assert out_BD.tobytes() == expected_BD.tobytes()
        np.testing.assert_array_equal(places_BD, expected_places_BD)

        grad_BD, sums_UD = any_floats(rng, *shape).numpy(), np.zeros((len(slots_U), dim), np.float32)
        threads.run(kernels.sum_max_gradients, dim, grad_BD, places_BD, sums_UD, grain=1)
        assert sums_UD.tobytes() == naive_bags.sum_max_gradients(grad_BD, places_BD, len(slots_U)).tobytes()

        bag_N = np.repeat(np.arange(shape[0]), np.diff(starts_B1))
        rows_UD, out_N = any_floats(rng, len(slots_U), dim).numpy(), np.full(len(inverse_N), 7, np.float32)
        threads.run(kernels.factor_gradients, len(out_N), rows_UD, inverse_N, bag_N, grad_BD, out_N, grain=1)
        assert out_N.tobytes() == naive_bags.factor_gradients(rows_UD, inverse_N, bag_N, grad_BD).tobytes()


# -- forms of input ---------------------------------------------------------------------------------------------


def jagged(*lengths, dtype=torch.int64):
    rng = np.random.default_rng(len(lengths))
    parts = [torch.from_numpy(rng.integers(0, V, length)).to(dtype) for length in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def with_gaps():
    """A jagged tensor that is a window on a plain one: its values have gaps between the bags."""
    lines = torch.arange(12).reshape(3, 4)
    return torch.nested.narrow(lines, 1, torch.tensor([0, 1, 0]), torch.tensor([2, 3, 1]), layout=torch.jagged)


def long(*ids):
    return torch.tensor(ids, dtype=torch.int64)


FORMS = {
    "offsets": lambda: (long(1, 2, 4, 5, 4, 3, 2, 9), long(0, 4)),
    "one bag": lambda: (long(1, 2, 4), long(0)),
    "empty bags": lambda: (long(1, 2, 4, 5), long(0, 0, 1, 4, 4)),
    "all bags empty": lambda: (long(), long(0, 0)),
    "no bags": lambda: (long(), long()),
    "int32": lambda: (long(1, 2, 4).int(), long(0, 2).int()),
    "int32 and int64": lambda: (long(1, 2, 4).int(), long(0, 2)),
    "int64 and uint8": lambda: (long(1, 2, 4), long(0, 2).byte()),
    "uint8 and int64": lambda: (long(1, 2, 4).byte(), long(0, 2)),
    "2D": lambda: (long(1, 2, 2, 9, 0, 11).reshape(2, 3),),
    "2D int32": lambda: (long(1, 2, 2, 9).int().reshape(2, 2),),
    "2D transposed": lambda: (torch.arange(12).reshape(3, 4).T,),
    "2D without lines": lambda: (torch.zeros(0, 3, dtype=torch.int64),),
    "strided": lambda: (torch.arange(12)[::2], long(0, 9, 2, 9, 5)[::2]),
    "jagged": lambda: (jagged(2, 0, 3),),
    "jagged int32": lambda: (jagged(1, 2, dtype=torch.int32),),
    "jagged with offsets": lambda: (jagged(2, 1), long(0, 1)),
}


@pytest.mark.parametrize("padding_idx", [None, 2, -3])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_input(tmp_path, cache, form, padding_idx):
    rng = np.random.default_rng(1)
    rows = eighths(rng, V, D)
    ours, plain, opts = twins(tmp_path, rows, cache, padding_idx=padding_idx)
    for mode in MODES:
        ours.mode = plain.mode = mode
        given = FORMS[form]()
        out, expected = ours(*given), plain(*given)
        assert out.dtype == expected.dtype == torch.float32
        assert out.is_contiguous()
        assert torch.equal(out, expected)
        factors = eighths(rng, *expected.shape)
        for result, opt in zip((out, expected), opts, strict=True):
            opt.zero_grad()
            (result * factors).sum().backward()
            opt.step()
        if mode == "mean":
            torch.testing.assert_close(weights(ours), weights(plain), rtol=2e-6, atol=1e-7)
        else:
            assert torch.equal(weights(ours), weights(plain))
        ours.weight.copy_(rows)
        plain.weight.data.copy_(rows)


def test_include_last_offset(tmp_path, cache):
    for padding_idx in (None, 2):
        ours, plain, _ = twins(
            tmp_path, any_floats(np.random.default_rng(1), V, D), cache, mode="sum", padding_idx=padding_idx
        )
        ours.include_last_offset = plain.include_last_offset = True
        for offsets in (long(0, 2, 4), long(0), long(0, 0, 4)):
            ids = long(1, 2, 4, 5)[: int(offsets[-1])]
            assert torch.equal(ours(ids, offsets), plain(ids, offsets))


def test_ids_behind_the_last_offset_are_in_no_bag(tmp_path, cache):
    """As torch's documentation has it; its fast path does so too, its other one puts them into the last bag."""
    ours, plain, _ = twins(tmp_path, any_floats(np.random.default_rng(1), V, D), cache, mode="sum")
    ours.include_last_offset = plain.include_last_offset = True
    ids, offsets = long(1, 2, 4, 5), long(0, 2, 3)
    out = ours(ids, offsets)
    assert torch.equal(out, plain(ids, offsets))
    for mode in MODES:
        ours.mode = mode
        assert torch.equal(ours(ids, offsets), ours(ids[:3], offsets))
    out.sum().backward()
    assert ours.pending_gradient().indices().tolist() == [[1, 2, 4]]


def test_jagged_with_gaps(tmp_path, cache):
    """torch adds up what is between the bags too; here a bag is what the tensor holds."""
    ours, _, _ = twins(tmp_path, any_floats(np.random.default_rng(1), V, D), cache, mode="sum")
    assert torch.equal(ours(with_gaps()), ours(long(0, 1, 5, 6, 7, 8), long(0, 2, 5)))


def test_lines_without_ids_are_empty_bags(tmp_path, cache):
    """torch fails here by accident ("step must be nonzero")."""
    ours, plain, _ = twins(tmp_path, any_floats(np.random.default_rng(1), V, D), cache)
    for lines in (0, 3):
        ids = torch.zeros(lines, 0, dtype=torch.int64)
        assert torch.equal(ours(ids), torch.zeros(lines, D))
        with pytest.raises(RuntimeError):
            plain(ids)


def test_no_offsets_are_no_bags(tmp_path, cache):
    """With ids and no bag torch gives (0, D), or crashes."""
    for mode in MODES:
        ours, plain, _ = twins(tmp_path, any_floats(np.random.default_rng(1), V, D), cache, mode=mode)
        assert ours(long(1, 2), long()).shape == (0, D)
        if mode != "max":
            assert plain(long(1, 2), long()).shape == (0, D)


# -- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_special_values(tmp_path, cache, mode):
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[nan, -0.0, inf, 1.0], [1.0, -0.0, -inf, nan], [2.0, 0.0, 3.0, 3.4e38], [2.0, 1, inf, 3.4e38]])
    ours, plain, _ = twins(tmp_path, rows, cache, mode=mode)
    for bag in ([0], [1], [0, 1], [1, 0], [2, 3], [3, 2], [2, 0, 1], [1, 2, 3, 0]):
        out, expected = ours(long(bag)), plain(long(bag))
        np.testing.assert_array_equal(out.detach().numpy(), expected.detach().numpy())
        assert torch.equal(out.signbit() & (out == 0), expected.signbit() & (expected == 0))


def test_of_equal_maxima_the_first_has_the_gradient(tmp_path, cache):
    ours, plain, opts = twins(tmp_path, torch.ones(V, D), cache, mode="max")
    for module, opt in zip((ours, plain), opts, strict=True):
        module(long(4, 2, 4, 7), long(0, 3)).sum().backward()
        opt.step()
    assert torch.equal(weights(ours), weights(plain))
    assert weights(ours)[:, 0].tolist() == [1, 1, 1, 1, 0.5, 1, 1, 0.5, 1, 1, 1, 1]


def test_frequency_is_that_of_the_row(tmp_path, cache):
    """Equals torch's nn.Embedding with the sum on top; torch's own bags divide by counts of other rows."""
    rows, rng = eighths(np.random.default_rng(2), V, D), np.random.default_rng(3)
    ids, offsets = long(5, 5, 5, 5, 3, 3, 9, 5, 5, 5, 5), long(0, 6)
    for padding_idx in (None, 3):
        ours, plain, opts = twins(tmp_path, rows, cache, mode="sum", padding_idx=padding_idx, scale_grad_by_freq=True)
        by_rows = nn.Embedding.from_pretrained(rows.clone(), False, padding_idx, scale_grad_by_freq=True)
        factors = eighths(rng, 2, D)
        for out in (ours(ids, offsets), plain(ids, offsets)):
            (out * factors).sum().backward()
        kept = by_rows(ids) * (ids != (-1 if padding_idx is None else padding_idx)).unsqueeze(1)
        (torch.stack([kept[:6].sum(0), kept[6:].sum(0)]) * factors).sum().backward()
        found = ours.pending_gradient().to_dense()
        assert torch.equal(found, by_rows.weight.grad)
        assert not torch.equal(found, plain.weight.grad)
        ours.zero_grad()
        opts[0].zero_grad()

    ours, plain, _ = twins(tmp_path, rows, cache, mode="sum", scale_grad_by_freq=True)
    for out in (ours(long(1, 1, 3, 3), long(0, 3)), plain(long(1, 1, 3, 3), long(0, 3))):  # equal counts
        out.sum().backward()
    assert torch.equal(ours.pending_gradient().to_dense(), plain.weight.grad)


# -- weights of samples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("kind", ["1D", "2D", "jagged"])
def test_weights_of_samples_and_their_gradient(tmp_path, cache, kind, padding_idx):
    rng = np.random.default_rng(4)
    ours, plain, opts = twins(tmp_path, eighths(rng, V, D), cache, mode="sum", padding_idx=padding_idx)
    ids = {"1D": long(1, 2, 2, 4, 1, 9), "2D": long(1, 2, 2, 4, 1, 9).reshape(2, 3), "jagged": jagged(2, 0, 4)}[kind]
    given = (ids, long(0, 3, 3)) if kind == "1D" else (ids,)
    values = eighths(rng, 6)
    grads = []
    for module, opt in zip((ours, plain), opts, strict=True):
        leaf = values.clone().requires_grad_()
        if kind == "jagged":
            shaped = torch.nested.nested_tensor_from_jagged(leaf, ids.offsets())
        else:
            shaped = leaf.reshape(ids.shape)
        out = module(*given, per_sample_weights=shaped)
        factors = eighths(np.random.default_rng(5), *out.shape)
        (out * factors).sum().backward()
        opt.step()
        grads.append((out.detach(), leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])
    assert torch.equal(weights(ours), weights(plain))


def test_weights_of_samples_train_where_the_table_is_frozen(tmp_path, cache):
    ours, plain, _ = twins(tmp_path, eighths(np.random.default_rng(4), V, D), cache, mode="sum")
    grads = []
    for module in (ours, plain):
        module.requires_grad_(False)
        leaf = torch.tensor([1.0, 2.0, 0.5], requires_grad=True)
        out = module(long(1, 1, 3), long(0, 1), leaf)
        out.pow(2).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert ours.handle.grad is None
    assert not ours(long(1), long(0)).requires_grad


def test_weights_of_samples_changed_before_backward_are_an_error(tmp_path, cache):
    ours, plain, _ = twins(tmp_path, eighths(np.random.default_rng(4), V, D), cache, mode="sum")
    for module in (ours, plain):
        given = torch.ones(3)
        out = module(long(1, 1, 3), long(0, 1), given)
        given.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_the_gradient_of_weights_is_of_the_rows_looked_up(tmp_path, cache):
    """A step between forward and backward does not change it (torch raises where its weight was changed)."""
    ours, _, opts = twins(tmp_path, eighths(np.random.default_rng(4), V, D), cache, mode="sum")
    leaf = torch.ones(2, requires_grad=True)
    out = ours(long(1, 3), long(0), leaf)
    before = weights(ours)
    ours(long(1, 3), long(0)).sum().backward()
    opts[0].step()
    assert not torch.equal(before, weights(ours))
    out.sum().backward()
    assert torch.equal(leaf.grad, before[[1, 3]].sum(1))


# -- errors -----------------------------------------------------------------------------------------------------


def ones_like_jagged(ids):
    return torch.nested.nested_tensor_from_jagged(torch.ones(ids.values().shape[0]), ids.offsets())


# name: (mode, arguments, our class, torch's builtin, words)
ERRORS = {
    "id too large": ("any", lambda: (long(1, 99), long(0)), RowOutOfBags, RuntimeError, r"99 \(at position 1\)"),
    "id negative": ("any", lambda: (long(1, -1), long(0)), RowOutOfBags, RuntimeError, r"-1 \(at position 1\)"),
    "id in 2D": ("any", lambda: (long(1, 2, 3, V).reshape(2, 2),), RowOutOfBags, RuntimeError, r"at position 3"),
    "first offset": ("any", lambda: (long(1, 2, 3), long(1, 2)), InvalidOffsets, RuntimeError, r"not 1"),
    "last offset": ("any", lambda: (long(1, 2, 3), long(0, 4)), InvalidOffsets, RuntimeError, r"is 4, .* 3 ids"),
    "no offsets": ("any", lambda: (long(1, 2),), InvalidBags, ValueError, "not None"),
    "offsets 2D": ("any", lambda: (long(1, 2), long(0).reshape(1, 1)), InvalidBags, ValueError, "2 dimensions"),
    "2D and offsets": ("any", lambda: (long(1).reshape(1, 1), long(0)), InvalidBags, ValueError, "has to be None"),
    "0-D": ("any", lambda: (torch.tensor(1), long(0)), InvalidBags, ValueError, "0 dimensions"),
    "3-D": ("any", lambda: (long(1).reshape(1, 1, 1), long(0)), InvalidBags, ValueError, "3 dimensions"),
    "floats": ("any", lambda: (torch.ones(2), long(0)), bigembed.errors.InvalidIds, RuntimeError, "torch.float32"),
    "int16": ("any", lambda: (long(1).short(), long(0).short()), bigembed.errors.InvalidIds, RuntimeError, "int16"),
    "float offsets": ("any", lambda: (long(1), torch.zeros(1)), bigembed.errors.InvalidIds, RuntimeError, "float32"),
    "list": ("any", lambda: ([1, 2], long(0)), BagsNotTensors, AttributeError, "input must be a tensor, not list"),
    "offsets list": ("any", lambda: (long(1, 2), [0]), BagsNotTensors, AttributeError, "offsets must be a tensor"),
    "weights list": ("any", lambda: (long(1), long(0), [1.0]), BagsNotTensors, AttributeError, "per_sample_weights"),
    "weights' mode": ("mean", lambda: (long(1), long(0), torch.ones(1)), WeightsNeedSum, NotImplementedError, "'mean'"),
    "weights' mode max": ("max", lambda: (long(1), long(0), torch.ones(1)), WeightsNeedSum, NotImplementedError, "sum"),
    "weights' shape": ("any", lambda: (long(1, 2), long(0), torch.ones(3)), InvalidBags, ValueError, r"\(3,\).*\(2,\)"),
    "weights' dtype": ("sum", lambda: (long(1), long(0), torch.ones(1).double()), InvalidWeights, RuntimeError, "64"),
    "weights' int": ("sum", lambda: (long(1), long(0), long(1)), InvalidWeights, RuntimeError, "torch.int64"),
    "jagged, plain weights": ("sum", lambda: (jagged(2, 1), None, torch.ones(3)), InvalidBags, ValueError, "offsets"),
    "2D, jagged weights": (
        "sum",
        lambda: (long(1, 2).reshape(1, 2), None, ones_like_jagged(jagged(2))),
        InvalidBags,
        ValueError,
        "shape",
    ),
}


@pytest.mark.parametrize("cache", [CACHES[0], CACHES[2]], ids=["host", "device"])
@pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n, case in ERRORS.items() for m in MODES if case[0] in ("any", m)]
)
def test_errors_are_torchs_with_better_words(tmp_path, cache, name, mode):
    _, make, kind, builtin, words = ERRORS[name]
    for padding_idx in (None, 2):
        rows = torch.zeros(V, D)
        ours, plain, _ = twins(tmp_path, rows, cache, mode=mode, padding_idx=padding_idx)
        with pytest.raises(builtin):
            plain(*make())
        with pytest.raises(kind, match=words) as caught:
            ours(*make())
        assert isinstance(caught.value, builtin)
        assert ours.trainable.pending.current() is None
        assert torch.equal(ours(long(1), long(0)), torch.zeros(1, D))  # and goes on


def test_errors_where_torch_crashes_or_is_silent(tmp_path, cache):
    ours, _, _ = twins(tmp_path, torch.zeros(V, D), cache)
    with pytest.raises(InvalidOffsets, match=r"offsets\[2\] is 1, below the 3 before it"):
        ours(long(1, 2, 3, 4), long(0, 3, 1))
    with pytest.raises(InvalidOffsets, match=r"offsets\[1\] is -1"):
        ours(long(1, 2, 3, 4), long(0, -1))
    with pytest.raises(InvalidOffsets, match=r"offsets\[2\] is -9223372036854775808"):
        ours(long(1, 2), long(0, 2**63 - 1, -(2**63)))


def test_errors_of_include_last_offset(tmp_path, cache):
    ours, plain, _ = twins(tmp_path, torch.zeros(V, D), cache)
    ours.include_last_offset = plain.include_last_offset = True
    for offsets, words in ((long(), "at least 1 offset"), (long(0, 5), "is 5"), (long(2), "not 2")):
        with pytest.raises(RuntimeError):
            plain(long(1, 2), offsets)
        with pytest.raises(InvalidOffsets, match=words):
            ours(long(1, 2), offsets)


def test_the_old_layout_of_nested_tensors_is_an_error(tmp_path):
    ours, plain, _ = twins(tmp_path, torch.zeros(V, D), CACHES[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([long(1, 2), long(3)], layout=torch.strided)
    with pytest.raises(AttributeError):
        plain(nested)
    with pytest.raises(InvalidNested, match=r"layout=torch\.jagged"):
        ours(nested)


def test_the_position_of_a_bad_id_counts_padding(tmp_path, cache):
    ours, _, _ = twins(tmp_path, torch.zeros(V, D), cache, padding_idx=2)
    with pytest.raises(RowOutOfBags, match=r"99 \(at position 3\)"):
        ours(long(2, 2, 1, 99), long(0))


@pytest.mark.parametrize(
    ("facts", "kind", "words"),
    [
        ({"mode": "avg"}, ValueError, "'avg'"),
        ({"mode": "max", "scale_grad_by_freq": True}, ValueError, "frequency"),
        ({"mode": "max", "sparse": True}, ValueError, "sparse"),
    ],
)
def test_modes_are_checked_by_the_constructor_and_by_forward(facts, kind, words):
    plain, ours = nn.EmbeddingBag(V, D), bigembed.EmbeddingBag(V, D)
    for make in (
        bigembed.EmbeddingBag,
        lambda *_, **facts: bigembed.EmbeddingBag.from_pretrained(torch.ones(2, 2), **facts),
    ):
        with pytest.raises(InvalidBags, match=words):
            make(V, D, **facts)
    for name, value in facts.items():
        setattr(plain, name, value)
        setattr(ours, name, value)
    with pytest.raises(kind, match=words if words != "'avg'" else "one of sum, mean or max"):
        plain(long(1), long(0))
    with pytest.raises(kind, match=words):
        ours(long(1), long(0))


@pytest.mark.parametrize("padding_idx", [V, -V - 1, V + 5])
def test_padding_that_is_no_row(padding_idx):
    for make in (nn.EmbeddingBag, bigembed.EmbeddingBag):
        with pytest.raises(AssertionError, match=r"(?i)padding_idx must be within num_embeddings"):
            make(V, D, padding_idx=padding_idx)


def test_wrong_shapes_of_given_rows():
    for make in (nn.EmbeddingBag, bigembed.EmbeddingBag):
        with pytest.raises(AssertionError):
            make(V, D, _weight=torch.ones(V, D + 1))
        with pytest.raises(AssertionError, match="expected to be 2-dimensional"):
            make.from_pretrained(torch.ones(3))


# -- fuzz -------------------------------------------------------------------------------------------------------


def random_case(rng):
    """(how the module reduces, its input, whether 1/counts are exact)."""
    mode, padding_idx = str(rng.choice(MODES)), None if rng.random() < 0.5 else int(rng.integers(-V, V))
    how = {"mode": mode, "padding_idx": None if padding_idx is None else padding_idx % V}
    how["include_last_offset"] = bool(rng.random() < 0.3)
    count = int(rng.integers(0, 30))
    ids = torch.from_numpy(np.where(rng.random(count) < 0.5, rng.integers(0, 3, count), rng.integers(0, V, count)))
    ids, form = ids.to(rng.choice([torch.int32, torch.int64])), rng.integers(0, 3)
    starts = np.sort(rng.integers(0, count + 1, rng.integers(0, 6)))
    starts = np.array([0, *starts])
    if form == 0 and count:
        length = int(rng.choice([d for d in range(1, count + 1) if count % d == 0]))
        ids = ids.reshape(-1, length)
        given, bounds = (ids, None), np.arange(0, count + 1, length)
    elif form == 1:
        bounds = np.array([*starts, count])
        given = (torch.nested.nested_tensor_from_jagged(ids, torch.from_numpy(bounds)), None)
    else:
        bounds = np.array([*starts, count])
        offsets = torch.from_numpy(bounds if how["include_last_offset"] else starts)
        given = (ids, offsets.to(rng.choice([torch.int32, torch.int64])))
    return how, given, bounds


def weights_of_samples(rng, draw, ids):
    """(a leaf, the same in the form of the ids)."""
    count = ids.values().shape[0] if ids.is_nested else ids.numel()
    leaf = draw(rng, count).requires_grad_(bool(rng.random() < 0.7))
    if ids.is_nested:
        return leaf, torch.nested.nested_tensor_from_jagged(leaf, ids.offsets())
    return leaf, leaf.reshape(ids.shape)


def spoiled(rng, given):
    """The same input with something wrong in it."""
    ids, offsets = given
    kind = rng.integers(0, 4)
    if kind == 0 and not ids.is_nested and ids.numel():
        ids = ids.clone()
        ids.view(-1)[int(rng.integers(0, ids.numel()))] = int(rng.choice([-1, V, V + 100]))
        return ids, offsets
    if kind == 1 and offsets is not None:
        return ids, offsets + 1
    if kind == 2:
        return ids, None if offsets is not None else long(0, 1) if not ids.is_nested else [1]
    return (ids.values() if ids.is_nested else ids).float(), offsets


@pytest.mark.parametrize("cache", CACHES, ids=["host-4", "host-all", "device-4", "device-all"])
def test_random_combinations(tmp_path, cache):
    """200 cases for each cache: outputs, gradients of rows and of weights, the rows after SGD, and errors."""
    ours, plain, opts = twins(tmp_path, torch.zeros(V, D), cache)
    errors = exact = 0
    for seed in range(200):
        rng = np.random.default_rng([7, seed])
        draw = eighths if rng.random() < 0.6 else any_floats
        rows = draw(rng, V, D)
        ours.weight.copy_(rows)
        plain.weight.data.copy_(rows)
        how, given, bounds = random_case(rng)
        for name, value in how.items():
            setattr(ours, name, value)
            setattr(plain, name, value)
        if rng.random() < 0.15:
            given = spoiled(rng, given)
        try:
            expected = plain(*given)
        except Exception as error:
            builtin = type(error)
            with pytest.raises(builtin):
                ours(*given)
            errors += 1
            continue
        psw = rng.random() < 0.4 and how["mode"] == "sum"
        leaves, outs = [], []
        for module in (ours, plain):
            leaf, shaped = weights_of_samples(np.random.default_rng([8, seed]), draw, given[0]) if psw else (None, None)
            outs.append(module(*given, shaped))
            leaves.append(leaf)
        if draw is eighths or not psw:
            assert torch.equal(*outs), f"case {seed}"
        else:
            torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-4)
        factors = draw(rng, *expected.shape)
        for out, opt in zip(outs, opts, strict=True):
            opt.zero_grad()
            (out * factors).sum().backward()
            opt.step()
        flat = (given[0].values() if given[0].is_nested else given[0]).reshape(-1).numpy()
        kept = [(flat[a:b] != how["padding_idx"]).sum() if b > a else 0 for a, b in itertools.pairwise(bounds)]
        is_exact = draw is eighths and (how["mode"] != "mean" or all(n & (n - 1) == 0 for n in map(int, kept)))
        compare = torch.equal if is_exact else lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        assert compare(weights(ours), weights(plain)) is not False, f"case {seed}"
        if psw and leaves[0].requires_grad:
            assert compare(leaves[0].grad, leaves[1].grad) is not False, f"case {seed}"
        exact += is_exact
        ours.trainable.caches._check()
    assert errors > 10
    assert exact > 60


# -- training ---------------------------------------------------------------------------------------------------


def bags_of_step(step, num_rows=50):
    rng = np.random.default_rng([9, step])
    ids = torch.from_numpy(np.where(rng.random(60) < 0.5, rng.integers(0, 5, 60), rng.integers(0, num_rows, 60)))
    return ids, torch.from_numpy(np.array([0, *np.sort(rng.integers(0, 61, 9))])), any_floats(rng, 10, 4)


def rows_after_training(folder, rule, mode, padding_idx, by_freq, *, in_one, **caches):
    """The bytes of rows and state; without `in_one`, of an Embedding with torch's reduction of its rows on top."""
    table = small_table(folder, 50, 4)
    make, facts = RULES[rule]
    if in_one:
        how = {"bag_mode": mode, "padding_idx": padding_idx, "scale_grad_by_freq": by_freq}
        module = bigembed.EmbeddingBag.open(table, **how, **caches)
    else:
        module = bigembed.Embedding.open(table, padding_idx=padding_idx, **caches)
        module.scale_grad_by_freq = by_freq
    opt = make(module, **facts)
    for step in range(6):
        ids, offsets, factors = bags_of_step(step)
        if in_one:
            out = module(ids, offsets)
        else:
            kept = (ids != (-1 if padding_idx is None else padding_idx)).nonzero().squeeze(1)
            starts = torch.searchsorted(kept, torch.cat([offsets, torch.tensor([60])]))
            out = functional.embedding_bag(
                torch.arange(len(kept)), module(ids[kept]), starts, mode=mode, include_last_offset=True
            )
        (out * factors).sum().backward()
        if step % 2:
            opt.step()
            opt.zero_grad()
    return rows_and_state(module).tobytes()


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize(("mode", "by_freq"), [("sum", False), ("sum", True), ("mean", False), ("max", False)])
@pytest.mark.parametrize("rule", RULES)
def test_trains_as_embedding_with_the_reduction_on_top(tmp_path, rule, mode, by_freq, padding_idx):
    """Bit by bit, whatever the cache; with a device too, as no row has more than 32 positions that matter."""
    how = (rule, mode, padding_idx, by_freq)
    expected = rows_after_training(tmp_path, *how, in_one=False)
    for caches in ({"cache_rows": 4}, {"cache_rows": 50}):
        assert rows_after_training(tmp_path, *how, in_one=True, **caches) == expected
    assert rows_after_training(tmp_path, *how, in_one=True, device_rows=4, cache_rows=4) == expected


@pytest.mark.parametrize("mode", MODES)
def test_threads_do_not_change_a_bit(mode):
    before, found = threads.get_num_threads(), set()
    for num_threads in (1, 2, 5):
        threads.set_num_threads(num_threads)
        torch.manual_seed(0)
        bag = bigembed.EmbeddingBag(3000, 64, mode=mode, seed=1)
        opt = bigembed.optim.Adagrad(bag, lr=0.1)
        ids = torch.randint(0, 3000, (8000,))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(0, 8001, (500,)).sort().values])
        leaf = torch.rand(8000, requires_grad=True) if mode == "sum" else None
        out = bag(ids, offsets, leaf)
        (out * torch.randn(501, 64)).sum().backward()
        opt.step()
        of_leaf = b"" if leaf is None else leaf.grad.numpy().tobytes()
        found.add((out.detach().numpy().tobytes(), rows_and_state(bag).tobytes(), of_leaf))
    threads.set_num_threads(before)
    assert len(found) == 1


def test_no_array_of_all_positions_is_made(monkeypatch):
    bag = bigembed.EmbeddingBag(200, 128, mode="sum")
    opt = bigembed.optim.SGD(bag, lr=0.5)
    ids, offsets = torch.arange(20_000) % 150, torch.arange(0, 20_000, 400)
    bag(ids[:10], offsets[:1]).sum().backward()  # compiled and cached now
    bag.zero_grad()
    monkeypatch.setattr(RowCache, "gather", None)
    for mode in MODES:
        bag.mode = mode
        tracemalloc.start()
        bag(ids, offsets).sum().backward()
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 20_000 * 128 * 4 / 4
        opt.zero_grad()


def test_shares_its_table_with_an_embedding(tmp_path, cache):
    ours, plain, opts = twins(tmp_path, eighths(np.random.default_rng(1), V, D), cache, mode="sum")
    emb = bigembed.Embedding.open(ours.table)
    (emb(long(1, 2)).sum() + ours(long(2, 3), long(0)).sum()).backward()
    (plain.weight[[1, 2]].sum() + plain(long(2, 3), long(0)).sum()).backward()
    for opt in opts:
        opt.step()
    assert torch.equal(weights(ours), weights(plain))


def test_max_norm(tmp_path, cache):
    """Rows of the input, padding too, are shortened in the table, also in eval; the output is of what they are then."""
    rows = any_floats(np.random.default_rng(1), V, D)
    for mode in MODES:
        ours, plain, _ = twins(tmp_path, rows, cache, mode=mode, padding_idx=2, max_norm=1.5)
        for module in (ours, plain):
            module.eval()
            module.requires_grad_(False)
        ids, offsets = long(1, 2, 4, 5, 4, 3, 2, 9), long(0, 4)
        assert torch.equal(ours(ids, offsets), plain(ids, offsets))
        assert torch.equal(weights(ours), weights(plain))
        assert not torch.equal(weights(ours), rows)


# -- a module ---------------------------------------------------------------------------------------------------


def test_declared_names_are_torchs():
    assert bigembed.EmbeddingBag.__constants__ == nn.EmbeddingBag.__constants__
    ours, theirs = bigembed.EmbeddingBag.__annotations__, nn.EmbeddingBag.__annotations__
    assert all(ours.get(name, kind) == kind for name, kind in theirs.items())


def test_a_subclass_that_initialises_itself(tmp_path):
    """nn.EmbeddingBag's constructor calls reset_parameters, with all settings in place."""

    def kind(base):
        class Small(base):
            def reset_parameters(self):
                assert (self.max_norm, self.padding_idx) == (9.0, 2)
                nn.init.constant_(self.weight, 0.25)

        return Small

    for base in (bigembed.EmbeddingBag, nn.EmbeddingBag):
        bag = kind(base)(V, D, 9.0, mode="sum", padding_idx=2)
        assert bag(long(0, 1), long(0)).tolist() == [[0.5] * D], base


@pytest.mark.parametrize("kind", [bigembed.Embedding, bigembed.EmbeddingBag])
def test_both_classes_open_with_the_same_options(tmp_path, kind):
    with bigembed.Table.create(tmp_path / "t", V, D, seed=1) as table:
        table.commit()
    with pytest.raises(MaxNormNeedsWriting, match="max_norm=None"):
        kind.open(tmp_path / "t", mode="r", max_norm=1.0)
    with pytest.raises(TypeError, match="number"):
        kind.open(tmp_path / "t", max_norm="1")
    module = kind.open(tmp_path / "t", rank_local=True, max_norm=1, norm_type=1.0, scale_grad_by_freq=True)
    assert module.trainable.rank_local
    assert (module.max_norm, module.norm_type, module.scale_grad_by_freq) == (1, 1.0, True)
    module.close()
    assert not kind.open(tmp_path / "t", mode="r").weight.requires_grad
    frozen = kind.from_pretrained(tmp_path / "t", max_norm=1.0)
    assert (frozen.table.mode, frozen.weight.requires_grad) == ("r+", False)
    frozen.close()


def test_constructor_and_attributes_as_torchs():
    given = (V, D, 2.0, 1.0, True, "sum", False, None, True, -1)
    ours, plain = bigembed.EmbeddingBag(*given), nn.EmbeddingBag(*given)
    for name in nn.EmbeddingBag.__constants__:
        assert getattr(ours, name) == getattr(plain, name), name
    assert weights(ours)[V - 1].tolist() == [0.0] * D
    assert repr(ours) == repr(plain)
    for facts in ({}, {"mode": "max"}, {"padding_idx": 0}, {"norm_type": 1.0}, {"sparse": True}):
        assert repr(bigembed.EmbeddingBag(V, D, **facts)) == repr(nn.EmbeddingBag(V, D, **facts))
        assert bigembed.EmbeddingBag(V, D, **facts).mode == nn.EmbeddingBag(V, D, **facts).mode


def test_from_pretrained(tmp_path):
    rows = torch.arange(12.0).reshape(4, 3)
    for freeze in (True, False):
        ours = bigembed.EmbeddingBag.from_pretrained(rows, freeze, mode="max", padding_idx=1)
        plain = nn.EmbeddingBag.from_pretrained(rows, freeze, mode="max", padding_idx=1)
        assert torch.equal(weights(ours), rows)
        assert ours.weight.requires_grad == plain.weight.requires_grad
        assert torch.equal(ours(long(0, 1, 2), long(0)), plain(long(0, 1, 2), long(0)))
    path = tmp_path / "t"
    with bigembed.Table.create(path, 4, 3, seed=1) as table:
        table.write(np.arange(4), rows.numpy())
        table.commit()
    ours = bigembed.EmbeddingBag.from_pretrained(path, mode="sum", include_last_offset=True)
    assert ours(long(1, 2), long(0, 2)).tolist() == [[9.0, 11.0, 13.0]]
    assert ours.table.mode == "r"
    with pytest.raises(InvalidArgument, match="leave path="):
        bigembed.EmbeddingBag.from_pretrained(path, path=tmp_path / "u")


def test_open_says_how_to_reduce(tmp_path):
    with bigembed.EmbeddingBag(V, D, mode="max", path=tmp_path / "t", seed=3).table as table:
        table.commit()
    ours = bigembed.EmbeddingBag.open(tmp_path / "t", bag_mode="sum", mode="r", padding_idx=2)
    assert (ours.mode, ours.table.mode, ours.padding_idx) == ("sum", "r", 2)
    assert repr(ours) == f"EmbeddingBag({V}, {D}, mode='sum', padding_idx=2, path='{tmp_path}/t', read-only)"
    with pytest.raises(InvalidArgument, match="Use bag_mode='sum'"):
        bigembed.EmbeddingBag.open(tmp_path / "t", mode="sum")
    with pytest.raises(InvalidBags, match="'avg'"):
        bigembed.EmbeddingBag.open(tmp_path / "t", bag_mode="avg")
    with pytest.raises(bigembed.errors.TableExists, match=r"EmbeddingBag\.open"):
        bigembed.EmbeddingBag(V, D, path=tmp_path / "t")
    ours.close()


def test_to_plain_modules():
    ours = bigembed.EmbeddingBag(V, D, mode="sum", padding_idx=2, include_last_offset=True, scale_grad_by_freq=True)
    plain = ours.to_nn_embedding_bag()
    for name in nn.EmbeddingBag.__constants__:
        assert getattr(ours, name) == getattr(plain, name), name
    assert torch.equal(weights(ours), weights(plain))
    assert plain.weight.requires_grad
    ours.requires_grad_(False)
    assert not ours.to_nn_embedding_bag().weight.requires_grad
    assert torch.equal(ours.to_nn_embedding().weight, plain.weight)


def test_copies_keep_how_they_reduce():
    ours = bigembed.EmbeddingBag(V, D, mode="max", padding_idx=2)
    copied = copy.deepcopy(ours)
    assert repr(copied) == repr(ours)
    ids = long(1, 2, 3, 4).reshape(2, 2)
    assert torch.equal(copied(ids), ours(ids))


def test_committed_rows_are_found_again(tmp_path):
    ours = bigembed.EmbeddingBag(V, D, mode="sum", path=tmp_path / "t")
    opt = bigembed.optim.Adagrad(ours, lr=0.5)
    ours(long(1, 2), long(0)).sum().backward()
    opt.step()
    ours.commit("one")
    expected = weights(ours)
    ours.close()
    again = bigembed.EmbeddingBag.open(tmp_path / "t", bag_mode="sum")
    assert torch.equal(weights(again), expected)
    again.close()


def test_prefetch(tmp_path):
    ours = small_bag(tmp_path, cache_rows=4, bag_mode="sum")
    for ids in (long(1, 2, 2), long(3, 4).reshape(1, 2), jagged(2, 1)):
        ours.prefetch(ids)
    assert ours.stats()["prefetch"]["requested"] > 0
    loader = bigembed.lookahead([jagged(2, 3), jagged(4)], {ours: lambda ids: ids}, depth=1)
    assert [ours(ids).shape for ids in loader] == [(2, D), (1, D)]


def test_without_grad(tmp_path, cache):
    ours, plain, _ = twins(tmp_path, any_floats(np.random.default_rng(1), V, D), cache, mode="sum")
    leaf = torch.ones(2, requires_grad=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out, expected = ours(long(1, 2), long(0), leaf), plain(long(1, 2), long(0), leaf)
        assert not out.requires_grad
        assert out.is_inference() == expected.is_inference()
        torch.testing.assert_close(out, expected)
    ours.eval()
    assert ours(long(1), long(0)).requires_grad


def test_backward_without_an_optimizer_is_an_error(tmp_path, cache):
    ours = small_bag(tmp_path, **cache)
    with pytest.raises(NoOptimizer):
        ours(long(1), long(0)).sum().backward()
    ours.requires_grad_(False)
    assert not ours(long(1), long(0)).requires_grad


def test_backward_twice(tmp_path, cache):
    ours, plain, _ = twins(tmp_path, eighths(np.random.default_rng(1), V, D), cache, mode="max")
    for module in (ours, plain):
        out = module(long(1, 2, 3), long(0, 1))
        out.sum().backward(retain_graph=True)
        out.sum().backward()
    assert torch.equal(ours.pending_gradient().to_dense(), plain.weight.grad)


@pytest.mark.parametrize("cache", CACHES[:2], ids=["host-4", "host-all"])
def test_the_gradient_of_the_table_is_not_given_as_a_tensor(tmp_path, cache):
    ours, _, _ = twins(tmp_path, eighths(np.random.default_rng(1), V, D), cache)
    with pytest.raises(NoSuchDerivative, match=r"autograd\.grad was asked"):
        torch.autograd.grad(ours(long(1, 2), long(0)).sum(), ours.handle)


def test_a_gradient_is_not_differentiated(tmp_path, cache):
    for module in twins(tmp_path, eighths(np.random.default_rng(1), V, D), cache, mode="sum")[:2]:
        module.requires_grad_(False)
        leaf = torch.ones(2, requires_grad=True)
        out = module(long(1, 2), long(0), leaf)
        (grad,) = torch.autograd.grad(out.pow(2).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()


def test_transforms_of_torch_func(tmp_path, cache):
    ours, _, _ = twins(tmp_path, eighths(np.random.default_rng(1), V, D), cache, mode="sum")
    scale, ids, offsets = torch.ones(()), long(1, 2), long(0)
    with pytest.raises(NotAPureFunction):
        torch.func.grad(lambda scale: (ours(ids, offsets) * scale).sum())(scale)
    ours.requires_grad_(False)
    found = torch.func.grad(lambda scale: (ours(ids, offsets) * scale).sum())(scale)
    assert torch.equal(found, ours(ids, offsets).sum())
    with pytest.raises(NotAPureFunction):
        torch.func.grad(lambda scale: ours(ids, offsets, scale.expand(2)).sum())(scale)


# -- under torch.compile ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch's own, about itself
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("cache", [CACHES[0], CACHES[2]], ids=["host", "device"])
def test_a_compiled_graph_equals_eager(tmp_path, cache, padding_idx):
    """Without a break, bit by bit."""
    rng = np.random.default_rng(1)
    rows, ids, offsets = any_floats(rng, V, D), long(1, 2, 4, 2, 9, 2, 2, 11), long(0, 3, 3, 7)
    cases = [
        ("sum", False, (ids, offsets, any_floats(rng, 8))),
        ("mean", True, (ids, offsets)),
        ("max", False, (ids.reshape(2, 4),)),
    ]
    for mode, include_last_offset, given in cases:
        torch._dynamo.reset()  # each is a graph of its own
        found = []
        for compiled in (False, True):
            ours, _, opts = twins(tmp_path, rows, cache, mode=mode, padding_idx=padding_idx)
            ours.include_last_offset = include_last_offset
            run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
            out = run(*given)
            (out * eighths(np.random.default_rng(2), *out.shape)).sum().backward()
            opts[0].step()
            found.append((out.detach(), weights(ours)))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


def test_gradients_of_any_layout(tmp_path, cache):
    """expanded (of a sum), transposed, and of a bag that takes part twice"""
    ours, plain, _ = twins(tmp_path, eighths(np.random.default_rng(1), V, D), cache, mode="sum")
    for module in (ours, plain):
        out = module(long(1, 2, 3), long(0, 1))
        (out.sum() + (out.T * 2).sum() + out[0].sum()).backward()
    assert torch.equal(ours.pending_gradient().to_dense(), plain.weight.grad)


def test_nothing_is_pending_after_a_failed_lookup(tmp_path, monkeypatch):
    ours, _, _ = twins(tmp_path, torch.zeros(V, D), CACHES[0])

    def fails(*_):
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "sum_bags", fails)
        with pytest.raises(OSError, match="no"):
            ours(long(1, 2), long(0))
    ours(long(1, 2), long(0)).sum().backward()
    assert ours.pending_gradient().indices().tolist() == [[1, 2]]
    ours.trainable.caches._check()


def test_a_forward_without_backward_leaves_nothing(tmp_path, cache):
    ours, _, _ = twins(tmp_path, torch.zeros(V, D), cache)
    out = ours(long(1, 2), long(0))
    assert len(ours.trainable._tickets) == 1
    del out
    assert len(ours.trainable._tickets) == 0
