"""Bags under torch.compile: one graph, and the eager result bit for bit in every mode."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from training import rows_and_state, small_table

import bigembed
from bigembed.errors import InvalidIds, NoOptimizer, RowOutOfRange, StaleGraph
from bigembed.nn import compiled_bags
from bigembed.nn.bags import InvalidBags, InvalidOffsets

V, D = 40, 4
LINES = torch.tensor([[1, 2, 2], [7, 3, 3], [3, 3, 3], [39, 1, 2]])
LINE = torch.tensor([1, 2, 2, 7, 3, 39, 3, 1, 5, 5])
OFFSETS = torch.tensor([0, 3, 3, 5, 6, 10])  # the second and the last bag are empty
ENDS = torch.tensor([0, 3, 3, 5, 6, 8])  # with include_last_offset: two ids are past the end


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()
    with functorch_config.patch(enable_autograd_cache=False), inductor_config.patch(fx_graph_cache=False):
        yield  # nor those of earlier runs, which are on disk
    torch._dynamo.reset()


def one_graph(function, backend="aot_eager"):
    return torch.compile(function, backend=backend, fullgraph=True)


class FusedBag(bigembed.EmbeddingBag):
    """The graph holds the fused operator where it can."""

    def forward(self, input, offsets=None, per_sample_weights=None):
        if torch.compiler.is_compiling() and compiled_bags.takes(self, input, offsets, per_sample_weights):
            return compiled_bags.look_up_bags(self, input, offsets, per_sample_weights)
        return super().forward(input, offsets, per_sample_weights)


def bag_module(folder, cache_rows=None, device_rows=None, **options):
    table = small_table(folder, V, D, padding_idx=3)
    bag = FusedBag.open(table, cache_rows=cache_rows, device_rows=device_rows, **options)
    bag.scale_grad_by_freq = options.get("scale_grad_by_freq", False)
    return bag


def train(folder, wrap, given, weights=None, frozen=False, **options):
    """(outputs, norms, weights' gradients, the whole table) of three steps."""
    bag = bag_module(folder, **options)
    opt = bigembed.optim.Adagrad(bag, lr=0.5)
    bag.requires_grad_(not frozen)
    weights = None if weights is None else weights.clone().requires_grad_()
    run, outputs = wrap(bag), []
    for step in range(3):
        out = run(*given) if weights is None else run(*given, per_sample_weights=weights)
        outputs.append(out.detach().clone())
        (out.tanh() * (torch.arange(out.numel()).view(out.shape) % 5 - 2 + step)).sum().backward()
        if not frozen:
            outputs.append(bag.handle.grad.clone())
            opt.step()
            opt.zero_grad()
    gradients = [] if weights is None else [weights.grad]
    return [*outputs, *gradients, torch.from_numpy(rows_and_state(bag))]


def assert_as_eager(folder, given, backend="aot_eager", **options):
    eager = train(folder, lambda bag: bag, given, **options)
    graph = train(folder, lambda bag: one_graph(bag, backend), given, **options)
    assert len(eager) == len(graph)
    assert all(torch.equal(got, wanted) for got, wanted in zip(graph, eager, strict=True))


GIVEN = {"lines": ((LINES,), False), "offsets": ((LINE, OFFSETS), False), "ends": ((LINE, ENDS), True)}


@pytest.mark.parametrize("cache_rows", [3, None])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("form", GIVEN)
def test_training_equals_eager_bit_for_bit(tmp_path, form, mode, cache_rows):
    given, ends = GIVEN[form]
    assert_as_eager(tmp_path, given, cache_rows=cache_rows, bag_mode=mode, include_last_offset=ends)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("form", GIVEN)
def test_per_sample_weights_and_their_gradient(tmp_path, form, frozen):
    given, ends = GIVEN[form]
    weights = (torch.arange(given[0].numel()).view(given[0].shape) - 3) / 7
    assert_as_eager(tmp_path, given, weights=weights, frozen=frozen, bag_mode="sum", include_last_offset=ends)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_scale_grad_by_freq(tmp_path, mode):
    assert_as_eager(tmp_path, (LINE, OFFSETS), bag_mode=mode, scale_grad_by_freq=True)


@pytest.mark.parametrize("form", GIVEN)
def test_max_norm(tmp_path, form):
    given, ends = GIVEN[form]
    assert_as_eager(tmp_path, given, bag_mode="mean", include_last_offset=ends, max_norm=0.75)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_torchs_default_dtype_does_not_matter(tmp_path, mode, dtype):
    weights = torch.rand(LINES.shape) if mode == "sum" else None
    options = {"bag_mode": mode, "weights": weights}
    eager = train(tmp_path, lambda bag: bag, (LINES,), **options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        graph = train(tmp_path, one_graph, (LINES,), **options)
        bag = bag_module(tmp_path, bag_mode=mode)
        assert one_graph(lambda ids: bag(ids).dtype)(LINES) == torch.float32, "the graph expects it"
    finally:
        torch.set_default_dtype(before)
    for got, wanted in zip(graph, eager, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_two_equal_reductions_both_count(tmp_path):
    class Twice(nn.Module):
        def __init__(self, bag):
            super().__init__()
            self.bag = bag

        def forward(self, *given):
            return self.bag(*given) + self.bag(*given)

    wraps = (Twice, lambda bag: one_graph(Twice(bag)))
    results = [train(tmp_path, wrap, (LINES,), bag_mode="sum") for wrap in wraps]
    assert all(torch.equal(got, wanted) for got, wanted in zip(*results, strict=True))


def test_one_graph_serves_a_model_of_many_bags_and_batches_of_any_size(tmp_path):
    bags = nn.ModuleList(bag_module(tmp_path, bag_mode="sum") for _ in range(8))
    opt = bigembed.optim.SGD(bags, lr=1.0)
    counter = CompileCounterWithBackend("aot_eager")
    graph = one_graph(lambda ids, offsets: sum(bag(ids, offsets) for bag in bags), counter)
    for size in range(3, 9):
        ids, offsets = torch.arange(2 * size + 1), torch.arange(size)
        out = graph(ids, offsets)
        assert torch.equal(out, sum(bag(ids, offsets) for bag in bags))
        out.sum().backward()
        opt.step()
        opt.zero_grad()
    assert counter.frame_count == 2


def test_without_grad(tmp_path):
    bag = bag_module(tmp_path, bag_mode="max")
    graph = one_graph(bag)
    with torch.no_grad():
        assert torch.equal(graph(LINES), bag(LINES))
    bag.requires_grad_(False)
    assert torch.equal(graph(LINES), bag(LINES))


def test_the_operators_pass_torchs_own_checks(tmp_path):
    bag = bag_module(tmp_path, bag_mode="sum")
    opt = bigembed.optim.SGD(bag, lr=1.0)
    key, weights = bag.graph_key.key, torch.rand(LINE.shape, requires_grad=True)
    for mode, given in (("sum", weights), ("mean", None), ("max", None)):
        how = mode, False, 3, False, True, given is not None
        args = key, bag.handle, LINE, OFFSETS, given, D, *how
        torch.library.opcheck(torch.ops.bigembed.look_up_bags.default, args)
    torch.library.opcheck(torch.ops.bigembed.renorm_bags.default, (key, LINE, OFFSETS, False, 1.0, 2.0))
    opt.zero_grad()


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ((torch.tensor([[1, V]]),), RowOutOfRange),
        ((LINES.float(),), InvalidIds),
        ((LINE, torch.tensor([1, 2])), InvalidOffsets),
        ((LINE, OFFSETS, torch.ones(3)), InvalidBags),
    ],
)
def test_what_is_wrong_is_the_eager_error(tmp_path, given, error):
    bag = bag_module(tmp_path, bag_mode="sum")
    with pytest.raises(error) as by_graph:
        one_graph(bag)(*given)
    with pytest.raises(error) as by_eager:
        bag(*given)
    assert str(by_graph.value) == str(by_eager.value)
    assert type(by_graph.value) is type(by_eager.value)


def test_errors_in_backward_are_the_eager_ones(tmp_path):
    bag = bag_module(tmp_path)
    graph = one_graph(bag)
    with pytest.raises(NoOptimizer):
        graph(LINES).sum().backward()
    opt = bigembed.optim.SGD(bag, lr=1.0)
    bag.commit()
    generation = bag.commit()
    loss = graph(LINES).sum()
    bag.table.rollback(generation)
    with pytest.raises(StaleGraph):
        loss.backward()
    opt.zero_grad()


@pytest.mark.parametrize("what", ["device", "nested"])
def test_what_the_fused_operator_leaves_to_the_lookups(tmp_path, what):
    bag = bag_module(tmp_path, bag_mode="sum", device_rows=10 if what == "device" else None)
    given = LINES if what == "device" else torch.nested.nested_tensor_from_jagged(LINE, torch.tensor([0, 3, 10]))
    assert not compiled_bags.takes(bag, given, None, None)
    assert torch.equal(torch.compile(bag, backend="aot_eager")(given), bag(given))
