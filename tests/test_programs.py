"""Programs as people have them, run once with torch's classes and once with ours: the same losses and weights."""

import functools

import numpy as np
import pytest
import torch
from programs import dlrm, ngram_memory, skip_gram
from torch import nn

import bigembed
from bigembed.nn.options import temporary_path

# Of torch's own Adagrad, where it makes sparse tensors.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

PROGRAMS = {"ngram_memory": (ngram_memory, 40), "dlrm": (dlrm, 20), "skip_gram": (skip_gram, 60)}
CACHES = {"few_rows": {"cache_rows": 4}, "all_rows": {}, "on_a_device": {"cache_rows": 64, "device_rows": 16}}
PLAIN_RULES = {"SGD": torch.optim.SGD, "Adagrad": torch.optim.Adagrad, "Adam": torch.optim.SparseAdam}


class Ours:
    """Makes bigembed's modules, each with a seed of its own, and the optimizers for a model that holds them."""

    def __init__(self, caches):
        self.caches, self.made = caches, []

    def _table(self, rows, dim, padding_idx):
        seed = len(self.made)
        return bigembed.Table.create(temporary_path(), rows, dim, seed=seed, padding_idx=padding_idx, is_temporary=True)

    def embedding(self, rows, dim, padding_idx=None, sparse=False):
        self.made.append(bigembed.Embedding.open(self._table(rows, dim, padding_idx), **self.caches))
        return self.made[-1]

    def bag(self, rows, dim, mode="mean", sparse=False):
        self.made.append(bigembed.EmbeddingBag.open(self._table(rows, dim, None), bag_mode=mode, **self.caches))
        return self.made[-1]

    def optimizer(self, model, rule, table_lr, lr=None):
        tables = getattr(bigembed.optim, rule)(model, lr=table_lr)
        handles = {id(module.handle) for module in self.made}
        dense = [p for p in model.parameters() if id(p) not in handles]
        return bigembed.optim.Chained(tables, torch.optim.AdamW(dense, lr=lr)) if dense else tables

    def weights(self):
        return [torch.from_numpy(module.table.read(np.arange(module.num_embeddings))) for module in self.made]


class Torchs(Ours):
    """The same with torch's modules; they begin with the rows that bigembed's would have."""

    def embedding(self, rows, dim, padding_idx=None, sparse=False):
        weight = torch.from_numpy(self._table(rows, dim, padding_idx).read(np.arange(rows)))
        self.made.append(nn.Embedding(rows, dim, padding_idx, sparse=True, _weight=weight))
        return self.made[-1]

    def bag(self, rows, dim, mode="mean", sparse=False):
        weight = torch.from_numpy(self._table(rows, dim, None).read(np.arange(rows)))
        self.made.append(nn.EmbeddingBag(rows, dim, mode=mode, sparse=True, _weight=weight))
        return self.made[-1]

    def optimizer(self, model, rule, table_lr, lr=None):
        tables = [module.weight for module in self.made]
        parts = [PLAIN_RULES[rule](tables, lr=table_lr)]
        dense = [p for p in model.parameters() if all(p is not table for table in tables)]
        return bigembed.optim.Chained(*parts, torch.optim.AdamW(dense, lr=lr)) if dense else parts[0]

    def weights(self):
        return [module.weight.detach() for module in self.made]


def outcome(name, kit):
    program, steps = PROGRAMS[name]
    losses = program.run(kit.embedding, kit.bag, kit.optimizer, steps, seed=1)
    return torch.tensor(losses), kit.weights()


@functools.cache
def with_torchs(name):
    return outcome(name, Torchs({}))


@functools.cache
def with_ours(name, caches):
    return outcome(name, Ours(CACHES[caches]))


@pytest.mark.parametrize("caches", CACHES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_as_with_torchs_modules(name, caches):
    """To rounding: a row's gradients are added in another order, and 20 to 60 steps let that grow a little."""
    (losses, weights), (plain_losses, plain_weights) = with_ours(name, caches), with_torchs(name)
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()  # it does learn
    torch.testing.assert_close(losses, plain_losses, rtol=2e-5, atol=2e-6)
    for got, wanted in zip(weights, plain_weights, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_size_of_the_cache_changes_no_bit(name):
    (losses, weights), (other_losses, other_weights) = with_ours(name, "few_rows"), with_ours(name, "all_rows")
    assert torch.equal(losses, other_losses)
    assert all(torch.equal(got, wanted) for got, wanted in zip(weights, other_weights, strict=True))


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_tables_have_learned_something(name):
    """Rows that were looked up have changed, and padding has not: the losses are not the dense layers' doing alone."""
    fresh = Torchs({})
    program, _ = PROGRAMS[name]
    program.run(fresh.embedding, fresh.bag, fresh.optimizer, 0, seed=1)
    for before, after in zip(fresh.weights(), with_ours(name, "all_rows")[1], strict=True):
        assert (before != after).any(1).sum() > 1
    if name == "skip_gram":
        assert all(not weight[skip_gram.PAD].any() for weight in with_ours(name, "all_rows")[1])


@pytest.mark.parametrize(("name", "model"), [("ngram_memory", "Model"), ("skip_gram", "SkipGram")])
def test_a_compiled_program_is_the_eager_one_bit_for_bit(monkeypatch, name, model):
    program, _ = PROGRAMS[name]

    class Compiled(getattr(program, model)):
        def __init__(self, *args):
            super().__init__(*args)
            self.forward = torch.compile(super().forward, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(program, model, Compiled)
    torch._dynamo.reset()
    losses, weights = outcome(name, Ours({}))
    eager_losses, eager_weights = with_ours(name, "all_rows")
    assert torch.equal(losses, eager_losses)
    assert all(torch.equal(got, wanted) for got, wanted in zip(weights, eager_weights, strict=True))
