"""torch.compile: a model that holds the modules is one graph, and trains to the eager result bit for bit."""

import gc
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint
from training import RULES, batches, coefficients, rows_and_state, small_embedding, weights

import bigembed
from bigembed.errors import InvalidIds, NoOptimizer, RowOutOfRange, StaleGraph, TableClosed
from bigembed.nn import graph_key
from bigembed.nn.graph_key import BackwardInGraph
from bigembed.nn.options import InvalidEmbedding

V, D = 50, 4
ROOT = Path(__file__).parent.parent
COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)
BACKENDS = ["aot_eager", pytest.param("inductor", marks=COMPILER)]
CACHES = [{"cache_rows": 3}, {"cache_rows": None}, {"cache_rows": 20, "device_rows": 10}]
IDS = torch.tensor([[1, 2, 2], [7, 1, 3]])


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()
    with functorch_config.patch(enable_autograd_cache=False), inductor_config.patch(fx_graph_cache=False):
        yield  # nor those of earlier runs, which are on disk
    torch._dynamo.reset()


def one_graph(function, backend="aot_eager", **how):
    return torch.compile(function, backend=backend, fullgraph=True, **how)


def as_it_is(function):
    return function


def spread(rows, ids):
    """A loss whose gradient has few bits, so that sums of it are exact in any order."""
    return (rows * coefficients(ids, rows.shape[-1])).sum()


def train(folder, loss_of, wrap, rule="Adagrad", count=4, **facts):
    """(losses, norms of the gradients, the whole table with its state) of a seeded run."""
    make, hyper = RULES[rule]
    emb = small_embedding(folder, V, D, seed=7, padding_idx=3, **facts)
    opt, loss_of = make(emb, **hyper), wrap(loss_of)
    losses, norms = [], []
    for ids in batches(count, V):
        loss = loss_of(emb, ids, coefficients(ids, D))
        loss.backward()
        losses.append(loss.detach().clone())
        norms.append(emb.handle.grad.clone())
        opt.step()
        opt.zero_grad()
        emb.trainable.caches._check()
    return torch.stack(losses), torch.stack(norms), torch.from_numpy(rows_and_state(emb))


def assert_as_eager(folder, loss_of, backend="aot_eager", **facts):
    """Inductor adds up a loss in an order of its own; what reaches the table must be the same bits all the same."""
    losses, *eager = train(folder, loss_of, as_it_is, **facts)
    graph_losses, *graph = train(folder, loss_of, lambda function: one_graph(function, backend), **facts)
    if backend == "inductor":
        torch.testing.assert_close(graph_losses, losses)
    else:
        assert torch.equal(graph_losses, losses)
    for got, wanted in zip(graph, eager, strict=True):
        assert torch.equal(got, wanted)


# -- the eager result -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caches", CACHES)
@pytest.mark.parametrize("rule", ["Adagrad", "Adam"])
def test_training_equals_eager_bit_for_bit(tmp_path, rule, caches):
    assert_as_eager(tmp_path, lambda emb, ids, factors: (emb(ids).tanh() * factors).sum(), rule=rule, **caches)


@COMPILER
def test_training_equals_eager_with_generated_code(tmp_path):
    def loss_of(emb, ids, factors):
        return (emb(ids) * factors).sum()

    losses, *eager = train(tmp_path, loss_of, as_it_is)
    graph_losses, *graph = train(tmp_path, loss_of, lambda f: torch.compile(f, fullgraph=True, mode="reduce-overhead"))
    torch.testing.assert_close(graph_losses, losses)
    for got, wanted in zip(graph, eager, strict=True):
        assert torch.equal(got, wanted)


def test_a_model_with_dense_layers_trains_as_in_eager(tmp_path):
    results = []
    for wrap in (as_it_is, one_graph):
        torch.manual_seed(0)
        emb = small_embedding(tmp_path, V, D, seed=7)
        model = nn.Sequential(emb, nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3))
        table_opt = bigembed.optim.Adagrad(model, lr=0.25)
        dense_opt = torch.optim.SGD([p for p in model.parameters() if p is not emb.handle], lr=0.25)
        run, losses = wrap(model), []
        for ids in batches(5, V):
            loss = run(ids).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for opt in (table_opt, dense_opt):
                opt.step()
                opt.zero_grad()
            losses.append(loss.detach())
        results.append([torch.stack(losses), model[1].weight.detach(), weights(emb)])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("ids", [torch.tensor(2), torch.empty(0, dtype=torch.int64), IDS.int(), IDS.T, IDS[:, ::2]])
def test_ids_of_any_shape(tmp_path, ids):
    emb = small_embedding(tmp_path, V, D)
    opt = bigembed.optim.SGD(emb, lr=1.0)
    before = weights(emb)
    rows = one_graph(emb)(ids)
    assert torch.equal(rows, emb(ids))
    assert rows.shape == (*ids.shape, D)
    rows.sum().backward()
    opt.step()
    expected = nn.Embedding(V, D, _weight=before)
    expected(ids).sum().backward()
    assert torch.equal(weights(emb), before - expected.weight.grad)


def test_gradients_add_up_over_batches_and_with_eager_ones(tmp_path):
    emb = small_embedding(tmp_path, V, D)
    opt = bigembed.optim.SGD(emb, lr=1.0)
    before, graph = weights(emb), one_graph(emb)
    for run, ids in ((graph, IDS), (emb, IDS.flip(0)), (graph, IDS[:1])):
        spread(run(ids), ids).backward()
    opt.step()
    plain = nn.Embedding(V, D, _weight=before.clone())
    for ids in (IDS, IDS.flip(0), IDS[:1]):
        spread(plain(ids), ids).backward()
    assert torch.equal(weights(emb), before - plain.weight.grad)


# -- what a compiler may not do ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_equal_lookups_with_equal_gradients_both_count(tmp_path, backend):
    """As pure operators they would be merged, and half of the gradient would be lost."""
    assert_as_eager(
        tmp_path, lambda emb, ids, factors: (emb(ids) * factors).sum() + (emb(ids) * factors).sum(), backend, count=2
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lookup_whose_rows_cancel_still_trains_by_its_own_gradient(tmp_path, backend):
    """Algebra on the rows must not reach the gradients: x - x has gradients 1 and -1, which add up at the row."""
    assert_as_eager(
        tmp_path,
        lambda emb, ids, factors: ((emb(ids) - emb(ids.flip(0))) * factors).sum(),
        backend,
        count=2,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_inside_the_graph(tmp_path, backend):
    def loss_of(emb, ids, factors):
        return checkpoint(lambda ids: (emb(ids) * factors).relu(), ids, use_reentrant=False).sum()

    assert_as_eager(tmp_path, loss_of, backend, count=3)


def test_a_graph_inside_a_checkpoint(tmp_path):
    results = []
    for wrap in (as_it_is, one_graph):
        emb = small_embedding(tmp_path, V, D, seed=7)
        opt = bigembed.optim.Adagrad(emb, lr=0.5)
        run = wrap(lambda ids, emb=emb: emb(ids).tanh())
        for ids in batches(3, V):
            spread(checkpoint(run, ids, use_reentrant=False), ids).backward()
            opt.step()
            opt.zero_grad()
        results.append(rows_and_state(emb).tobytes())
    assert results[0] == results[1]


def test_the_operators_pass_torchs_own_checks(tmp_path):
    for caches in CACHES:
        emb = small_embedding(tmp_path, V, D, padding_idx=3, **caches)
        opt = bigembed.optim.SGD(emb, lr=1.0)
        key = emb.graph_key.key
        for ids in (IDS, torch.tensor(3), torch.empty((2, 0), dtype=torch.int64)):
            for requires_grad in (True, False):
                emb.requires_grad_(requires_grad)
                args = (key, emb.handle, ids, D, requires_grad, 3, True)
                torch.library.opcheck(torch.ops.bigembed.look_up.default, args)
            torch.library.opcheck(torch.ops.bigembed.renorm.default, (key, ids, 1.0, 2.0))
        opt.zero_grad()


def test_the_gradients_operator_passes_torchs_own_checks(tmp_path):
    emb = small_embedding(tmp_path, V, D)
    opt = bigembed.optim.SGD(emb, lr=1.0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    key, passed = emb.graph_key.key, []
    rows, stamp = torch.ops.bigembed.look_up(key, emb.handle, IDS, D, True, None, False)

    def check(grad):  # the operator asks to be in a backward pass
        args = (key, torch.ones(*IDS.shape, D), IDS, stamp, None, False)
        result = torch.library.opcheck(torch.ops.bigembed.keep_gradient.default, args, test_utils=checks)
        passed.extend(result.values())

    rows.register_hook(check)
    rows.sum().backward()
    assert passed == ["SUCCESS"] * 3
    opt.zero_grad()


def test_a_backward_inside_the_graph_is_refused(tmp_path):
    emb = small_embedding(tmp_path, V, D)
    opt = bigembed.optim.SGD(emb, lr=1.0)

    @one_graph
    def forward_and_backward(ids):
        emb(ids).sum().backward()

    with (
        torch._dynamo.config.patch(trace_autograd_ops=True),
        pytest.raises(BackwardInGraph, match="outside of what"),
    ):
        forward_and_backward(IDS)
    opt.zero_grad()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of the compiler itself, between two graphs
@pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning")
def test_a_whole_training_step_as_one_function(tmp_path):
    results = []
    for wrap in (as_it_is, lambda function: torch.compile(function, backend="aot_eager")):
        emb = small_embedding(tmp_path, V, D, seed=7)
        opt = bigembed.optim.Adagrad(emb, lr=0.5)

        def step(ids, factors, emb=emb, opt=opt):
            loss = (emb(ids) * factors).sum()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss.detach()

        run = wrap(step)
        losses = [float(run(ids, coefficients(ids, D))) for ids in batches(3, V)]
        results.append((losses, rows_and_state(emb).tobytes()))
    assert results[0] == results[1]


# -- how often it compiles --------------------------------------------------------------------------------------


def test_batches_of_many_sizes_take_two_graphs(tmp_path):
    emb = small_embedding(tmp_path, V, D)
    opt = bigembed.optim.SGD(emb, lr=1.0)
    counter = CompileCounterWithBackend("aot_eager")
    graph = one_graph(emb, counter)
    for size in range(2, 22):
        ids = torch.arange(size)
        rows = graph(ids)
        assert torch.equal(rows, emb(ids))
        rows.sum().backward()
        opt.step()
        opt.zero_grad()
    assert counter.frame_count == 2  # the first size, and then any


def test_one_graph_serves_every_module_of_the_same_kind(tmp_path):
    """A number in the graph would be compiled into it: one graph a module, and no more after eight."""
    counter = CompileCounterWithBackend("aot_eager")
    embs = [small_embedding(tmp_path, V, D, seed=seed) for seed in range(12)]
    graphs = [one_graph(emb, counter) for emb in embs]
    for emb, graph in zip(embs, graphs, strict=True):
        assert torch.equal(graph(IDS), weights(emb)[IDS])
    assert counter.frame_count == 1


def test_growth_a_commit_and_a_new_optimizer_need_no_new_graph(tmp_path):
    counter = CompileCounterWithBackend("aot_eager")
    emb = small_embedding(tmp_path, V, D)
    graph = one_graph(emb, counter)
    graph(IDS)
    bigembed.optim.SGD(emb, lr=1.0)
    graph(IDS)
    opt = bigembed.optim.Adam(emb, lr=1.0, reset_state=True)
    graph(IDS).sum().backward()
    opt.step()
    emb.commit()
    emb.table.grow(2 * V)
    assert torch.equal(graph(IDS + V), emb(IDS + V))
    assert counter.frame_count == 1


def test_frozen_and_without_grad(tmp_path):
    emb = small_embedding(tmp_path, V, D)
    opt = bigembed.optim.SGD(emb, lr=1.0)
    graph, wanted = one_graph(emb), weights(emb)[IDS]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            rows = graph(IDS)
        assert torch.equal(rows, wanted)
        assert not rows.requires_grad
    emb.requires_grad_(False)
    assert not graph(IDS).requires_grad
    emb.requires_grad_(True)
    emb.eval()
    graph(IDS).sum().backward()
    opt.step()
    assert not torch.equal(weights(emb)[IDS], wanted)


def test_forwards_without_a_backward_leave_nothing(tmp_path):
    emb = small_embedding(tmp_path, V, D, cache_rows=3)
    opt = bigembed.optim.SGD(emb, lr=1.0)
    graph = one_graph(emb)
    for ids in batches(20, V):
        graph(ids)
    gc.collect()
    assert emb.trainable._protect_step() is None
    assert emb.stats()["pending"]["gradient_bytes"] == 0
    first = emb.trainable.cache.step
    spread(graph(IDS), IDS).backward()
    assert emb.trainable.pending.oldest_step <= first  # of a forward that had no backward; forgotten with this one
    opt.step()
    opt.zero_grad()
    last = emb.trainable.cache.step
    spread(graph(IDS) + graph(IDS.flip(0)), IDS).backward()
    assert emb.trainable.pending.oldest_step == last + 1
    opt.zero_grad()


# -- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caches", CACHES)
def test_scale_grad_by_freq(tmp_path, caches):
    def loss_of(emb, ids, factors):
        emb.scale_grad_by_freq = True
        return (emb(ids).tanh() * factors).sum()

    assert_as_eager(tmp_path, loss_of, count=3, **caches)


@pytest.mark.parametrize("caches", CACHES)
def test_max_norm_shortens_rows_before_they_are_looked_up(tmp_path, caches):
    emb, twin = (small_embedding(tmp_path, V, D, seed=7, **caches) for _ in range(2))
    for module in (emb, twin):
        module.max_norm, module.norm_type = 0.75, 2.0
    graph = one_graph(lambda ids: (emb(ids), emb(ids.flip(0)[:1]), emb(ids)))
    for ids in batches(3, V):
        rows = graph(ids)
        wanted = twin(ids), twin(ids.flip(0)[:1]), twin(ids)
        assert all(torch.equal(got, want) for got, want in zip(rows, wanted, strict=True))
        assert rows[0].norm(dim=-1).max() < 0.7501
    assert torch.equal(weights(emb), weights(twin))


def test_max_norm_writes_even_where_nobody_uses_the_rows(tmp_path):
    emb = small_embedding(tmp_path, V, D, seed=7)
    emb.max_norm = 0.5

    @one_graph
    def forgotten(ids):
        emb(ids)
        return ids + 1

    forgotten(IDS)
    assert weights(emb)[IDS].norm(dim=-1).max() < 0.5001


# -- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (torch.tensor([1, V]), RowOutOfRange),
        (torch.tensor([1, -1]), RowOutOfRange),
        (torch.tensor([1.0, 2.0]), InvalidIds),
        (torch.tensor([2**63 - 1, 0]), RowOutOfRange),
    ],
)
@pytest.mark.parametrize("caches", CACHES)
def test_wrong_ids_are_the_eager_error_and_nothing_has_happened(tmp_path, caches, ids, error):
    emb = small_embedding(tmp_path, V, D, **caches)
    opt = bigembed.optim.SGD(emb, lr=1.0)
    graph = one_graph(emb)
    with pytest.raises(error) as by_graph:
        graph(ids)
    with pytest.raises(error) as by_eager:
        emb(ids)
    assert str(by_graph.value) == str(by_eager.value)
    before = weights(emb)
    graph(IDS).sum().backward()
    opt.step()
    assert not torch.equal(weights(emb), before)


def test_a_backward_without_an_optimizer_is_the_eager_error(tmp_path):
    emb = small_embedding(tmp_path, V, D)
    loss = one_graph(emb)(IDS).sum()
    with pytest.raises(NoOptimizer, match="Make one first"):
        loss.backward()


def test_a_pass_that_asks_for_other_gradients_of_the_graph_leaves_nothing(tmp_path):
    """The graph gives all its gradients, though only that of `dense` was asked for."""
    emb = small_embedding(tmp_path, V, D)
    opt = bigembed.optim.SGD(emb, lr=1.0)
    before, dense = weights(emb), torch.ones(D, requires_grad=True)
    graph = one_graph(lambda ids: (emb(ids) * dense).sum())
    for _ in range(3):
        assert torch.equal(torch.autograd.grad(graph(IDS), dense)[0], before[IDS].sum((0, 1)))
        assert emb.stats()["pending"]["gradient_bytes"] == 0
    opt.step()
    assert torch.equal(weights(emb), before)
    graph(IDS).backward()
    opt.step()
    assert not torch.equal(weights(emb), before)


@pytest.mark.parametrize("padding_idx", [V, -V - 1])
def test_a_padding_row_that_is_none_is_the_eager_error(tmp_path, padding_idx):
    emb = small_embedding(tmp_path, V, D)
    graph, emb.padding_idx = one_graph(emb), padding_idx
    for run in (graph, emb):
        with pytest.raises(InvalidEmbedding, match="Padding_idx must be within num_embeddings"):
            run(IDS)


@pytest.mark.parametrize("between", ["rollback", "move"])
def test_a_graph_run_before_a_rollback_or_a_move_is_stale(tmp_path, between):
    emb = small_embedding(tmp_path, V, D)
    opt = bigembed.optim.SGD(emb, lr=1.0)
    emb.commit()
    generation = emb.commit()
    graph = one_graph(emb)
    loss = graph(IDS).sum()
    if between == "rollback":
        emb.table.rollback(generation)
    else:
        emb.trainable.move(device_rows=10)
    with pytest.raises(StaleGraph, match="Run the forward again"):
        loss.backward()
    before = weights(emb)
    graph(IDS).sum().backward()
    opt.step()
    assert not torch.equal(weights(emb), before)


def test_a_closed_table_and_one_that_is_gone(tmp_path):
    emb = small_embedding(tmp_path, V, D)
    graph = one_graph(emb)
    graph(IDS)
    emb.close()
    with pytest.raises(TableClosed, match="was closed"):
        graph(IDS)
    key, handle = emb.graph_key.key, emb.handle
    del emb, graph
    torch._dynamo.reset()
    gc.collect()
    others = [small_embedding(tmp_path, V, D) for _ in range(3)]  # in the memory of the old one, maybe
    assert all(int(other.graph_key.key) != int(key) for other in others)
    with pytest.raises(TableClosed, match="which this process does not have"):
        torch.ops.bigembed.look_up(key, handle, IDS, D, False, None, False)


def test_an_error_in_the_backward_leaves_nothing_pending(tmp_path):
    emb = small_embedding(tmp_path, V, D)
    opt = bigembed.optim.SGD(emb, lr=1.0)
    before = weights(emb)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("in the middle")

    graph = one_graph(emb)
    first = Fails.apply(graph(IDS))
    with pytest.raises(ValueError, match="in the middle"):
        (first + graph(IDS)).sum().backward()  # the later lookup has given its gradient when it happens
    opt.step()
    assert torch.equal(weights(emb), before)


# -- threads and processes --------------------------------------------------------------------------------------


def test_threads_share_a_graph(tmp_path):
    emb = small_embedding(tmp_path, V, D, cache_rows=5)
    graph, wanted, wrong = one_graph(emb), weights(emb), []
    with torch.no_grad():  # as the threads: torch compiles once more for each that comes while there is no graph yet
        graph(IDS)

    def look(seed):
        with torch.no_grad():
            for ids in batches(30, V, size=IDS.shape, seed=seed):
                if not torch.equal(graph(ids), wanted[ids]):
                    wrong.append(ids)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_uses_the_parents_graph(tmp_path):
    emb = small_embedding(tmp_path, V, D)
    graph, wanted = one_graph(emb), weights(emb)
    with torch.no_grad():
        graph(IDS)
    child = os.fork()
    if child == 0:
        try:
            with torch.no_grad():
                right = torch.equal(graph(IDS), wanted[IDS]) and torch.equal(graph(IDS + 40), wanted[IDS + 40])
            os._exit(0 if right else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


PROCESS = """
import sys, torch, bigembed
from torch._dynamo.utils import counters
emb = bigembed.Embedding.open(sys.argv[1], cache_bytes=1 << 20)
opt = bigembed.optim.SGD(emb, lr=1.0)
torch.compile(emb, fullgraph=True)(torch.tensor([1, 2, 2])).sum().backward()
opt.step()
emb.commit()
print(counters["inductor"]["fxgraph_cache_hit"])
"""


@COMPILER
def test_a_graph_kept_on_disk_serves_the_next_process(tmp_path):
    path = tmp_path / "t"
    with bigembed.Table.create(path, V, D, seed=1) as table:
        table.commit()
        before = torch.from_numpy(table.read([1, 2]))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "graphs"), "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    hits = []
    for _ in range(2):
        command = [sys.executable, "-c", PROCESS, str(path)]
        done = subprocess.run(
            command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        hits.append(int(done.stdout))
    with bigembed.Table.open(path) as table:
        assert torch.equal(torch.from_numpy(table.read([1, 2])), before - torch.tensor([[1.0], [2.0]]) * 2)
    assert hits[0] == 0
    assert hits[1] > 0


def test_keys_are_never_used_twice(tmp_path):
    emb = small_embedding(tmp_path, V, D)
    again = bigembed.Embedding.open(emb.table)
    numbers = {int(graph_key.GraphKey(emb.trainable).key) for _ in range(100)}
    assert len(numbers | {int(emb.graph_key.key), int(again.graph_key.key)}) == 102
