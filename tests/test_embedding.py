"""Embedding: lookups of any shape, tables opened, shared and gone, pretrained rows, sizes beyond memory."""

import gc
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from training import plain_twin, rows_and_state, small_embedding, small_table, weights

import bigembed
from bigembed import optim
from bigembed.errors import NoOptimizer, ReadOnlyTable, TableClosed, TableExists, TableLocked

D = 4


def run_python(code, *args, **environment):
    """A new interpreter; returns its finished process."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


# -- lookup -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_rows", [3, None])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4), (2, 0, 3), (1, 1)])
def test_ids_of_any_shape(tmp_path, shape, dtype, cache_rows):
    emb = small_embedding(tmp_path, cache_rows=cache_rows)
    ids = torch.randint(0, 50, shape, dtype=dtype)
    rows, expected = emb(ids), plain_twin(emb)(ids)
    assert rows.shape == expected.shape
    assert rows.dtype == torch.float32
    assert torch.equal(rows, expected)
    assert rows.requires_grad


def test_ids_that_are_not_contiguous(tmp_path):
    emb = small_embedding(tmp_path)
    ids = torch.arange(24).reshape(4, 6)
    for view in (ids.T, ids[:, ::2], ids[1].expand(3, 6)):
        assert torch.equal(emb(view), weights(emb)[view])


def test_the_rows_given_are_nobody_elses(tmp_path):
    emb = small_embedding(tmp_path)
    before = weights(emb)
    with torch.no_grad():
        emb(torch.tensor([1, 2])).zero_()
    assert torch.equal(weights(emb), before)


@pytest.mark.parametrize("padding_idx", [0, 7, -1, -50])
def test_padding_starts_as_zeros_and_stays(tmp_path, padding_idx):
    emb = bigembed.Embedding(50, D, padding_idx, seed=1)
    plain = nn.Embedding(50, D, padding_idx)
    row = padding_idx % 50
    assert emb.padding_idx == plain.padding_idx == row
    assert not emb.weight[row].any()
    assert emb.weight[(row + 1) % 50].all()
    opt = optim.Adagrad(emb)
    emb(torch.tensor([row, row, 3])).sum().backward()
    opt.step()
    assert not rows_and_state(emb)[row].any()
    emb.weight[row] = 1.0  # may be written, and is given then
    opt.zero_grad()
    emb(torch.tensor([row, 3])).sum().backward()
    opt.step()
    assert emb(torch.tensor(row)).tolist() == [1.0] * D


def test_attributes_and_repr_as_torchs():
    emb, plain = bigembed.Embedding(50, D, -1, sparse=True), nn.Embedding(50, D, -1, sparse=True)
    for name in (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    ):
        assert getattr(emb, name) == getattr(plain, name), name
    assert repr(emb) == repr(plain)


def test_repr_names_a_path_that_stays(tmp_path):
    emb = bigembed.Embedding(50, D, path=tmp_path / "t")
    assert repr(emb) == f"Embedding(50, 4, path={str(tmp_path / 't')!r})"


def test_conversions_leave_the_rows_alone(tmp_path):
    model = nn.Sequential(small_embedding(tmp_path), nn.Linear(D, 2))
    before = weights(model[0])
    for convert in (lambda m: m.cpu(), lambda m: m.float()):
        convert(model)
        assert model[0].handle.dtype == torch.float32
    assert model.eval().train()[1].weight.dtype == torch.float32
    assert torch.equal(weights(model[0]), before)


# -- seeds ------------------------------------------------------------------------------------------------------


def test_manual_seed_governs_the_seed():
    def rows():
        return bigembed.Embedding(50, D).weight[:]

    torch.manual_seed(3)
    first, second = rows(), rows()
    torch.manual_seed(3)
    assert torch.equal(rows(), first)
    assert not torch.equal(first, second)
    assert torch.equal(bigembed.Embedding(50, D, seed=9).weight[:], bigembed.Embedding(90, D, seed=9).weight[:50])


@pytest.mark.parametrize(
    ("init", "low", "high"),
    [("zeros", 0, 0), ("uniform", 0, 1), (bigembed.init.uniform(2, 3), 2, 3), (bigembed.init.constant(5), 5, 5)],
)
def test_initial_values(init, low, high):
    rows = bigembed.Embedding(1000, D, init=init).weight[:]
    assert rows.min() >= low
    assert rows.max() <= high
    assert rows.std() == pytest.approx((high - low) / 12**0.5, rel=0.05)


# -- opening and sharing ----------------------------------------------------------------------------------------


def test_open_finds_what_was_committed(tmp_path):
    path = tmp_path / "t"
    emb = bigembed.Embedding(50, D, padding_idx=2, path=path, seed=1)
    opt = optim.Adagrad(emb, initial_accumulator_value=0.5)
    emb(torch.tensor([1, 2, 3])).sum().backward()
    opt.step()
    assert emb.commit("one", payload={"epoch": 1}) == emb.table.generation
    expected = rows_and_state(emb)
    emb.close()
    again = bigembed.Embedding.open(path)
    assert again.padding_idx == 2
    assert rows_and_state(again).tobytes() == expected.tobytes()
    assert [commit.note for commit in again.table.generations()][-1] == "one"
    assert again.table.generations()[-1].payload == {"epoch": 1}
    with pytest.raises(TableExists, match="exists"):
        bigembed.Embedding(50, D, path=path)


def test_opening_a_path_twice_gives_one_table(tmp_path):
    first = bigembed.Embedding(50, D, path=tmp_path / "t")
    os.symlink(tmp_path / "t", tmp_path / "link")
    for where in (
        tmp_path / "t",
        str(tmp_path / "t"),
        str(tmp_path / "sub" / ".." / "t"),
        tmp_path / "link",
        first.table,
    ):
        second = bigembed.Embedding.open(where, padding_idx=-1)
        assert second.trainable is first.trainable
        assert (second.padding_idx, first.padding_idx) == (49, None)
    with pytest.raises(TableLocked):
        bigembed.Table.open(tmp_path / "t")
    first.close()
    with pytest.raises(TableClosed):
        second(torch.tensor([1]))


def test_the_first_cache_counts(tmp_path):
    table = small_table(tmp_path)
    first = bigembed.Embedding.open(table, cache_rows=3)
    assert bigembed.Embedding.open(table, cache_rows=40).stats()["cache"]["capacity_rows"] == 3
    del first
    gc.collect()
    assert bigembed.Embedding.open(table, cache_rows=40).stats()["cache"]["capacity_rows"] > 3


def test_changes_stay_when_the_last_module_goes(tmp_path):
    table = small_table(tmp_path)
    emb = bigembed.Embedding.open(table)
    opt = optim.SGD(emb, lr=1.0)
    emb(torch.tensor([1, 2])).sum().backward()
    opt.step()
    expected = rows_and_state(emb)
    del emb, opt
    gc.collect()
    assert table.read(np.arange(50), with_state=True).tobytes() == expected.tobytes()
    again = bigembed.Embedding.open(table, cache_rows=3)
    assert rows_and_state(again).tobytes() == expected.tobytes()
    assert torch.equal(again(torch.arange(50)), torch.from_numpy(expected[:, :D]))


def test_cache_bytes_bound_cache_and_index():
    for cache_bytes in (1, 100, 10_000, 1_000_000):
        emb = bigembed.Embedding(1_000_000, D, cache_bytes=cache_bytes)
        opt = optim.Adagrad(emb)
        for seed in range(4):
            emb(torch.from_numpy(np.random.default_rng(seed).integers(0, 1_000_000, 300))).sum().backward()
            opt.step()
            opt.zero_grad()
        stats = emb.stats()
        assert stats["index"]["limit_bytes"] <= max(1, cache_bytes // 4)
        assert stats["cache"]["capacity_bytes"] <= max(cache_bytes, 4 * 8 + 17)
    assert stats["pending"]["gradient_bytes"] == 0


def test_stats_show_what_is_pending(tmp_path):
    emb = small_embedding(tmp_path)
    opt = optim.SGD(emb)
    emb(torch.tensor([1, 2, 2])).sum().backward()
    assert emb.stats()["pending"]["gradient_bytes"] == 2 * (8 + 4 * D)
    opt.zero_grad()
    assert emb.stats()["pending"]["gradient_bytes"] == 0


# -- pretrained rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "parameter", "bfloat16", "array", "float64 array", "transposed"])
def test_from_pretrained_copies_rows(kind):
    rows = torch.arange(20, dtype=torch.float32).reshape(5, 4)
    given = {
        "tensor": rows,
        "parameter": nn.Parameter(rows),
        "bfloat16": rows.bfloat16(),
        "array": rows.numpy(),
        "float64 array": rows.double().numpy(),
        "transposed": rows.T.contiguous().T,
    }[kind]
    emb = bigembed.Embedding.from_pretrained(given, padding_idx=0)
    assert torch.equal(emb.weight[:], rows), "also the padding row is taken as it is"
    rows.zero_()
    assert emb.weight[4].all()
    assert not emb(torch.tensor([1])).requires_grad
    assert bigembed.Embedding.from_pretrained(given, freeze=False)(torch.tensor([1])).requires_grad


def test_weight_given_to_the_constructor(tmp_path):
    rows = torch.randn(5, D)
    emb = bigembed.Embedding(5, D, 2, _weight=rows, _freeze=True, path=tmp_path / "t")
    assert torch.equal(emb.weight[:], rows)
    assert not emb.weight.requires_grad
    emb.commit()
    emb.close()
    again = bigembed.Embedding.open(tmp_path / "t")
    assert again.padding_idx == 2
    assert torch.equal(again.weight[:], rows)


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_from_pretrained_of_a_path_reads_beside_the_writer(tmp_path, kind):
    writer = bigembed.Embedding(50, D, path=tmp_path / "t", seed=1)
    writer.weight[3] = 1.0
    writer.commit()
    frozen = bigembed.Embedding.from_pretrained(kind(tmp_path / "t"))
    assert frozen.table is not writer.table
    assert frozen.table.mode == "r"
    assert not frozen(torch.tensor([3])).requires_grad
    assert writer(torch.tensor([3])).requires_grad
    opt = optim.SGD(writer, lr=1.0)
    writer(torch.tensor([3])).sum().backward()
    opt.step()
    assert frozen(torch.tensor([3])).tolist() == [[1.0] * D], "what was committed when it was opened"
    writer.commit()
    frozen.table.refresh()
    assert frozen(torch.tensor([3])).tolist() == [[0.0] * D]
    with pytest.raises(ReadOnlyTable, match="mode='r'"):
        optim.SGD(frozen)
    frozen.requires_grad_(True)
    with pytest.raises(NoOptimizer):
        frozen(torch.tensor([3])).sum().backward()


def test_from_pretrained_of_a_path_to_train(tmp_path):
    bigembed.Embedding(50, D, path=tmp_path / "t", seed=1).close()
    emb = bigembed.Embedding.from_pretrained(tmp_path / "t", freeze=False, padding_idx=1)
    assert emb.table.mode == "r+"
    assert emb.padding_idx == 1
    assert emb.weight.requires_grad


# -- the end ----------------------------------------------------------------------------------------------------


def test_a_temporary_table_goes_with_its_module():
    emb = bigembed.Embedding(50, D)
    path = emb.table.path
    opt = optim.Adam(emb)
    loss = emb(torch.tensor([1, 2])).sum()
    loss.backward()
    opt.step()
    emb.commit()
    assert os.path.isdir(path)
    del emb, opt, loss
    gc.collect()
    assert not os.path.exists(path)
    assert not os.path.exists(path + ".lock")


def test_a_temporary_table_goes_at_once_when_nothing_holds_it():
    """Without the help of a collection: the module is in no cycle."""
    gc.disable()
    try:
        emb = bigembed.Embedding(50, D)
        path = emb.table.path
        del emb
        assert not os.path.exists(path)
    finally:
        gc.enable()


def test_a_temporary_table_goes_with_the_interpreter(tmp_path):
    code = """
import torch, bigembed
emb = bigembed.Embedding(50, 4)
opt = bigembed.optim.Adagrad(emb)
emb(torch.tensor([1, 2])).sum().backward()
opt.step()
print(emb.table.path)
"""
    done = run_python(code, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_closing_without_a_commit_warns_and_counts(tmp_path):
    emb = bigembed.Embedding(50, D, path=tmp_path / "t")
    opt = optim.SGD(emb)
    emb.commit()
    emb(torch.tensor([1, 2, 2, 9])).sum().backward()
    opt.step()
    with pytest.warns(UserWarning, match=r"closed without a commit: changes to 3 rows are discarded.*commit\(\)"):
        emb.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emb.close()


def test_closing_after_a_commit_does_not_warn(tmp_path):
    emb = bigembed.Embedding(50, D, path=tmp_path / "t")
    emb.weight[1] = 1.0
    emb.commit()
    emb(torch.tensor([1, 2]))
    emb.close()


def test_an_exit_without_a_commit_warns(tmp_path):
    code = """
import sys, torch, bigembed
emb = bigembed.Embedding(50, 4, path=sys.argv[1])
opt = bigembed.optim.Adagrad(emb)
emb(torch.tensor([1, 2])).sum().backward()
opt.step()
"""
    done = run_python(code, tmp_path / "t")
    assert done.returncode == 0, done.stderr
    assert "closed without a commit: changes to 2 rows are discarded" in done.stderr
    with bigembed.Table.open(tmp_path / "t", "r") as table:
        assert not table.has_rows


def test_rows_in_the_cache_are_not_served_after_close(tmp_path):
    emb = small_embedding(tmp_path)
    ids = torch.tensor([1, 2])
    opt = optim.SGD(emb)
    emb(ids).sum().backward()
    emb.close()
    for use in (lambda: emb(ids), opt.step, emb.commit, lambda: emb.weight[ids], emb.stats, lambda: optim.SGD(emb)):
        with pytest.raises(TableClosed, match="was closed"):
            use()
    with torch.no_grad(), pytest.raises(TableClosed):
        emb(ids)


# -- sizes ------------------------------------------------------------------------------------------------------

BILLION = """
import resource, sys, numpy as np, torch, bigembed

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

V = 10**int(sys.argv[2])
warm = bigembed.Embedding(1000, 64)  # whatever is compiled or loaded at the first use
opt = bigembed.optim.RowwiseAdagrad(warm, lr=0.5)
warm(torch.arange(1000)).sum().backward()
opt.step()
del warm, opt
before = peak_mib()
emb = bigembed.Embedding(V, 64, path=sys.argv[1], cache_bytes=8 << 20)
opt = bigembed.optim.RowwiseAdagrad(emb, lr=0.5)
ends = torch.tensor([0, 1, V - 2, V - 1])
first = emb(ends).detach().clone()
emb(ends).sum().backward()
opt.step()
opt.zero_grad()
for seed in range(5):
    ids = torch.from_numpy(np.random.default_rng(seed).integers(2, V - 2, 5000))
    emb(ids).pow(2).mean().backward()
    opt.step()
    opt.zero_grad()
emb.commit("both ends")
assert torch.equal(emb(ends), first - 0.5), emb(ends) - first
emb.close()
again = bigembed.Embedding.open(sys.argv[1], mode="r")
assert torch.equal(again(ends), first - 0.5)
print(peak_mib() - before)
"""


def test_a_billion_rows_train_in_the_memory_of_a_million(tmp_path):
    grown_mib = {}
    for digits in (6, 9):
        done = run_python(BILLION, tmp_path / f"t{digits}", digits)
        assert done.returncode == 0, done.stderr
        grown_mib[digits] = float(done.stdout)
    assert grown_mib[9] < 100
    assert grown_mib[9] < grown_mib[6] + 30


# -- workers ----------------------------------------------------------------------------------------------------


class RowsOfATable(torch.utils.data.Dataset):
    """Looks rows up where it runs: in a worker process."""

    def __init__(self, emb):
        self.emb = emb

    def __len__(self):
        return 24

    def __getitem__(self, item):
        with torch.no_grad():
            return self.emb(torch.tensor([item, 49 - item]))


@pytest.mark.parametrize("cache_rows", [3, None])
def test_dataloader_workers_read_while_the_parent_trains(tmp_path, cache_rows):
    emb = small_embedding(tmp_path, cache_rows=cache_rows)
    opt = optim.SGD(emb, lr=1.0)
    emb(torch.arange(10)).sum().backward()
    opt.step()
    expected = plain_twin(emb).weight.detach()
    loader = torch.utils.data.DataLoader(RowsOfATable(emb), batch_size=4, num_workers=2, multiprocessing_context="fork")
    for number, batch in enumerate(loader):
        first = torch.arange(4 * number, 4 * number + 4)
        assert torch.equal(batch, torch.stack([expected[first], expected[49 - first]], 1))
    emb(torch.arange(10)).sum().backward()
    opt.step()
    emb.commit("the parent goes on")
