"""A fuzz of arguments: 2,200 random cases, each run on nn.Embedding and on ours, compared after every operation.

A case draws its options, rows and ids; looks up, goes back, steps; and compares output, gradient, every row, errors.
Gradients are multiples of 1/8, so sums are exact in any order, and all bits must be torch's. Only where a gradient is
divided by a count that is no power of two is there a tolerance, see nn/frequency.py.
"""

import platform

import numpy as np
import pytest
import torch
from training import plain_twin, small_table, weights

import bigembed
from bigembed import optim
from bigembed.errors import BigembedError

BLOCKS, CASES = 22, 100
SHAPES = [(1, 1), (3, 5), (20, 4), (20, 8), (60, 11)]
# (slots of the host's cache, slots of a device's): next to nothing, room for all, and a device above.
PLACES = [(4, None), (None, None), (4, 4)]
IDS_SHAPES = [(), (0,), (1,), (7,), (3, 4), (2, 0, 3), (2, 2, 3), (40,)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A pair of modules for each shape and place; a case gives them new rows."""
    folder, pairs = tmp_path_factory.mktemp("pool"), []
    for rows, dim in SHAPES:
        for cache_rows, device_rows in PLACES:
            table = small_table(folder, rows, dim)
            emb = bigembed.Embedding.open(table, cache_rows=cache_rows, device_rows=device_rows)
            pairs.append((emb, plain_twin(emb), optim.SGD(emb, lr=1.0)))
    return pairs


def same(ours, theirs, exact=True):
    if exact and platform.machine() == "x86_64":  # elsewhere torch adds up a norm in another order
        return torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


class Case:
    """One draw of everything, and its run; `describe` is what a failure shows."""

    def __init__(self, seed, pool):
        self.rng = rng = np.random.default_rng([7, seed])
        self.emb, self.plain, self.opt = pool[rng.integers(len(pool))]
        self.num_rows, self.dim = self.plain.weight.shape
        self.exact = True
        sparse = rng.random() < 0.3
        self.options = {
            "padding_idx": self.pick([None, None, *self.some_rows(2), self.num_rows, -self.num_rows - 1]),
            "max_norm": self.pick([None, None, None, 1.0, 0.5, 2, True, 0.0, -1.0, float("inf"), float("nan")]),
            "norm_type": self.pick([2.0, 2.0, 2, 1.0, 0.0, float("inf"), float("-inf")]),
            "scale_grad_by_freq": not sparse and rng.random() < 0.3,  # torch refuses both
            "sparse": sparse,
        }
        self.frozen, self.training = rng.random() < 0.15, rng.random() < 0.7
        self.grad_mode = self.pick([torch.enable_grad] * 6 + [torch.no_grad])
        self.lr = float(self.pick([0.5, 0.25, 1.0]))
        self.done = []

    def pick(self, choices):
        return choices[self.rng.integers(len(choices))]

    def some_rows(self, count):
        return [int(row) for row in self.rng.integers(-self.num_rows, self.num_rows, count)]

    def describe(self):
        facts = (self.num_rows, self.dim), self.options, self.frozen, self.grad_mode.__name__
        return "\n".join(map(str, [*facts, *self.done]))

    def begin(self):
        """The same rows and options in both, nothing pending."""
        rows = self.rng.integers(-16, 17, (self.num_rows, self.dim)).astype(np.float32) / 8
        if self.rng.random() < 0.5:
            rows = self.rng.standard_normal(rows.shape).astype(np.float32)
        if self.rng.random() < 0.1:
            bad = self.pick([np.nan, np.inf, -0.0, 1e-30, 1e30])
            rows[self.rng.integers(self.num_rows), self.rng.integers(self.dim)] = bad
        self.emb.weight[:] = torch.from_numpy(rows)
        self.plain.weight.data.copy_(torch.from_numpy(rows))
        self.opt.param_groups[0]["lr"] = self.lr
        self.plain_opt = torch.optim.SGD(self.plain.parameters(), lr=self.lr)
        self.opt.zero_grad()
        for module in (self.emb, self.plain):
            module.zero_grad()
            module.train(self.training)
            module.requires_grad_(not self.frozen)
            for name, value in self.options.items():
                setattr(module, name, value)

    def draw_ids(self):
        shape = self.pick(
            IDS_SHAPES[1:] if self.options["sparse"] else IDS_SHAPES
        )  # torch's sparse backward fails on ()
        hot = self.rng.integers(0, min(3, self.num_rows), shape)
        ids = np.where(self.rng.random(shape) < 0.4, hot, self.rng.integers(0, self.num_rows, shape))
        ids = torch.from_numpy(np.asarray(ids, self.pick([np.int64, np.int64, np.int32])))
        if ids.numel() and self.rng.random() < 0.08:
            ids.view(-1)[int(self.rng.integers(ids.numel()))] = int(self.pick([-1, self.num_rows, -(2**31), 2**31 - 1]))
        if self.rng.random() < 0.03:
            ids = self.pick([ids.float(), ids.to(torch.int16), ids.bool(), ids.tolist()])
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and self.rng.random() < 0.5:
            ids = ids.T
        return ids

    def run(self):
        self.begin()
        for _ in range(self.rng.integers(1, 4)):
            ids = self.draw_ids()
            self.done.append(ids)
            outs, errors = [], []
            for module in (self.emb, self.plain):
                try:
                    with self.grad_mode():
                        outs.append(module(ids))
                except Exception as error:
                    errors.append(error)
            if errors:
                assert len(errors) == 2, f"only one of them raised: {errors}"
                self.compare_errors(*errors)
                return
            self.compare_outputs(*outs)
            if not self.exact:
                return
        self.compare_steps()

    def compare_errors(self, ours, theirs):
        assert isinstance(ours, BigembedError)
        expected = type(theirs)
        if expected is AttributeError and not isinstance(self.done[-1], torch.Tensor):
            expected = TypeError  # as without max_norm, with which torch stumbles over a list earlier
        assert isinstance(ours, expected), f"{ours!r} where torch raises {theirs!r}"

    def compare_outputs(self, ours, theirs):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.requires_grad == theirs.requires_grad
        assert same(ours.detach(), theirs.detach())
        assert same(weights(self.emb), self.plain.weight.detach())
        if not theirs.requires_grad:
            return
        factor = torch.from_numpy(self.rng.integers(-16, 17, tuple(theirs.shape)).astype(np.float32) / 8)
        for rows in (ours, theirs):
            (rows * factor).sum().backward()
        _, counts = torch.unique(self.done[-1], return_counts=True)
        if self.options["scale_grad_by_freq"]:
            self.exact = bool(((counts & (counts - 1)) == 0).all())
        found, grad = self.emb.pending_gradient(), self.plain.weight.grad
        grad = grad.to_dense() if grad.is_sparse else grad
        # Rows that are NaN have a gradient like others: it does not depend on them.
        assert same(found.to_dense(), grad, self.exact)

    def compare_steps(self):
        if self.plain.weight.grad is not None and self.plain.weight.grad.is_sparse:
            self.plain.weight.grad = (
                self.plain.weight.grad.coalesce()
            )  # torch would add row by row, and round each time
        for _ in range(self.rng.integers(1, 3)):
            self.opt.step()
            self.plain_opt.step()
            assert same(weights(self.emb), self.plain.weight.detach())


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_arguments(block, pool):
    for number in range(block * CASES, (block + 1) * CASES):
        case = Case(number, pool)
        try:
            case.run()
        except BaseException as error:
            error.add_note(f"case {number}:\n{case.describe()}")
            raise
    for emb, _, _ in pool:
        emb.trainable.caches._check()
