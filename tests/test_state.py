"""What leaves a module: state_dict and back, copies, other processes; beside torch's nn.Embedding where it can be."""

import copy
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from training import rows_and_state, small_embedding, weights

import bigembed
from bigembed import optim
from bigembed.errors import (
    BigembedError,
    DiskFull,
    ForkedTable,
    InvalidArgument,
    NoOptimizer,
    ReadOnlyTable,
    RowOutOfRange,
    TableClosed,
    TableMissing,
)
from bigembed.nn import weight as weight_module
from bigembed.nn.conversions import CannotConvert
from bigembed.nn.copies import CannotCopy, OtherTable
from bigembed.nn.weight import WeightUseError

V, D = 50, 4
PLACES = [{"cache_rows": None}, {"cache_rows": 3}, {"cache_rows": 3, "device_rows": 5}]


class Model(nn.Module):
    """A table below a dense layer."""

    def __init__(self, emb):
        super().__init__()
        self.emb = emb
        self.head = nn.Linear(D, 2)

    def forward(self, ids):
        return self.head(self.emb(ids)).sum()


def at_path(tmp_path, name="t", **options):
    return bigembed.Embedding(V, D, path=tmp_path / name, seed=1, **options)


def train(emb, ids=(1, 2, 3), lr=1.0):
    """One step of SGD: rows of ids move by -lr."""
    opt = optim.SGD(emb, lr=lr)
    emb(torch.tensor(ids)).sum().backward()
    opt.step()
    opt.zero_grad()


def discard(emb):
    """Close a table that has changes, without the warning."""
    emb.table.rollback()
    emb.close()


def saved(tmp_path, thing, name="a.pt"):
    torch.save(thing, tmp_path / name)
    return tmp_path / name


# -- out --------------------------------------------------------------------------------------------------------


def test_a_state_dict_holds_tensors_and_no_rows(tmp_path):
    emb = bigembed.Embedding(10**9, 64, path=tmp_path / "t")
    state = nn.Sequential(emb, nn.Linear(64, 1)).state_dict()
    assert list(state) == ["0.handle", "0.table", "1.weight", "1.bias"]
    assert all(type(value) is torch.Tensor for value in state.values())
    assert sum(value.nbytes for value in state.values()) < 1000
    loaded = torch.load(saved(tmp_path, state), weights_only=True)
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    emb.close()


def test_every_parameter_has_an_entry_of_its_shape(tmp_path):
    """Tools that walk parameters and state side by side rely on it."""
    model = Model(small_embedding(tmp_path))
    state = model.state_dict()
    for name, parameter in model.named_parameters():
        assert state[name].shape == parameter.shape, name


@pytest.mark.parametrize("place", PLACES)
def test_state_dict_commits_what_is_dirty_and_only_that(tmp_path, place):
    emb = small_embedding(tmp_path, **place)
    first = emb.table.generation
    unchanged = emb.state_dict()["table"]
    assert emb.table.generation == first, "nothing to commit"
    train(emb)
    changed = emb.state_dict()["table"]
    commit = emb.table.generations()[-1]
    assert (commit.number, commit.explicit, commit.note) == (first + 1, True, "state_dict")
    assert emb.table.stats()["pending"]["uncommitted_rows"] == emb.trainable.caches.dirty_rows == 0
    assert torch.equal(emb.state_dict()["table"], changed)
    assert not torch.equal(changed, unchanged)
    emb.commit("epoch 1", payload={"epoch": 1})
    emb.state_dict()
    assert emb.table.generations()[-1].payload == {"epoch": 1}, "a user's own commit is not covered by another"


def test_an_automatic_commit_is_followed_by_an_explicit_one(tmp_path):
    """Otherwise the state could not be restored after the next automatic commit."""
    emb = small_embedding(tmp_path)
    emb.weight[1] = 5.0
    emb.table.merge()
    assert not emb.table.generations()[-1].explicit
    state = emb.state_dict()
    emb.weight[1] = 6.0
    emb.table.merge()
    emb.load_state_dict(state)
    assert emb.weight[1].tolist() == [5.0] * D


def test_what_a_commit_raises_comes_out_of_state_dict(tmp_path, monkeypatch):
    emb = small_embedding(tmp_path)
    train(emb)

    def full(*args, **kwargs):
        raise DiskFull("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(type(emb.table._store), "commit", full)
        with pytest.raises(DiskFull):
            emb.state_dict()
    assert emb.state_dict()
    emb.close()
    with pytest.raises(TableClosed):
        emb.state_dict()


def test_saving_the_state_of_a_temporary_table_warns(tmp_path):
    model = Model(small_embedding(tmp_path))
    state = model.state_dict()
    kept = copy.deepcopy(state)
    with pytest.warns(UserWarning, match=r"temporary table is being saved.*path="):
        torch.save(kept, tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert type(loaded["emb.table"]) is torch.Tensor
    model.load_state_dict(loaded)  # in this process it is good


# -- back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_kept_state_dict_goes_back(tmp_path, place, automatic):
    """The loop of early stopping, beside torch's: keep the best, go on, load the best."""
    emb = small_embedding(tmp_path, **place)
    ours, theirs = Model(emb), Model(emb.to_nn_embedding())
    theirs.head.load_state_dict(ours.head.state_dict())
    train(emb, (1, 2, 2, 7))
    state_then = rows_and_state(emb)
    with torch.no_grad():
        theirs.emb.weight.copy_(weights(emb))
    best = [copy.deepcopy(model.state_dict()) for model in (ours, theirs)]
    for model in (ours, theirs):
        with torch.no_grad():
            model.head.weight.add_(1.0)
            model.emb.weight[3] = torch.full((D,), 7.0)
    train(emb, (2, 9))
    if automatic:
        emb.weight[4] = 9.0
        emb.table.merge()
        emb.weight[5] = 9.0
    for model, state in zip((ours, theirs), best, strict=True):
        found = model.load_state_dict(state)
        assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert torch.equal(weights(emb), weights(theirs.emb))
    assert torch.equal(ours.head.weight, theirs.head.weight)
    assert rows_and_state(emb).tobytes() == state_then.tobytes()
    handle = ours.emb.handle
    train(emb, (2, 9))
    ours.load_state_dict(best[0])
    assert torch.equal(weights(emb), weights(theirs.emb)), "again, from what the first load committed"
    assert ours.emb.handle is handle
    ours.load_state_dict(best[0], assign=True)
    assert ours.emb.handle is handle is emb.trainable.handle
    generation = emb.table.generation
    ours.load_state_dict(best[0])
    assert emb.table.generation == generation, "where it is already, nothing happens"


def test_a_run_that_is_killed_again_and_again_starts_from_one_checkpoint(tmp_path):
    emb = at_path(tmp_path)
    train(emb)
    expected = weights(emb)
    file = saved(tmp_path, emb.state_dict())
    emb.close()
    for _ in range(4):
        emb = bigembed.Embedding.open(tmp_path / "t")
        emb.load_state_dict(torch.load(file))
        assert torch.equal(weights(emb), expected)
        emb.weight[1] = 9.0
        emb.table.merge()
        emb.table.__exit__(KeyboardInterrupt, None, None)


def test_loading_goes_back_in_the_optimizers_step_count_too(tmp_path):
    emb = small_embedding(tmp_path)
    opt = optim.Adam(emb)
    states = []
    for _ in range(2):
        emb(torch.tensor([1])).sum().backward()
        opt.step()
        opt.zero_grad()
        states.append(emb.state_dict() if not states else None)
    emb.load_state_dict(states[0])
    assert emb.table.scalars["step"] == 1
    emb(torch.tensor([1])).sum().backward()
    opt.step()
    assert emb.table.scalars["step"] == 2


def test_a_state_that_is_no_longer_kept_says_which_are(tmp_path):
    emb = at_path(tmp_path)
    state = emb.state_dict()
    train(emb)
    number = emb.commit("later")
    before = weights(emb)
    with pytest.raises(
        RuntimeError, match=rf"Error.*for Model.*\n.*emb.table.*generation 0 of .*/t .*keeps \[{number}\]"
    ):
        Model(emb).load_state_dict({**Model(emb).state_dict(), "emb.table": state["table"]})
    assert torch.equal(weights(emb), before)
    emb.close()


def test_a_state_merged_into_a_new_one_comes_too_late_and_says_what_to_do(tmp_path):
    """`state = model.state_dict(); state.update(torch.load(best))`: the first call has made a commit."""
    model = Model(at_path(tmp_path))
    train(model.emb)
    file, expected = saved(tmp_path, model.state_dict()), weights(model.emb)
    merged = model.state_dict()
    merged.update(torch.load(file))
    model.load_state_dict(merged)  # nothing has changed
    train(model.emb)
    kept = torch.load(file)
    model.load_state_dict(kept, strict=False)
    assert torch.equal(weights(model.emb), expected)
    train(model.emb)
    merged = model.state_dict()
    merged.update(torch.load(file))
    with pytest.raises(RuntimeError, match=r"load a kept state as it is.*not merged into a new state_dict"):
        model.load_state_dict(merged)
    model.emb.close()


def test_a_state_of_another_table_says_so(tmp_path):
    one, other = at_path(tmp_path), at_path(tmp_path, "other")
    state = one.state_dict()
    one.close()
    before = weights(other)
    with pytest.raises(RuntimeError, match=r"another table of 50 x 4.*holds no rows.*weight.copy_"):
        other.load_state_dict(state)
    assert torch.equal(weights(other), before)
    other.close()


def test_a_folder_copied_and_trained_on_is_another_history(tmp_path):
    emb = at_path(tmp_path)
    emb.close()
    subprocess.run(["cp", "-r", tmp_path / "t", tmp_path / "copy"], check=True)
    one, two = (bigembed.Embedding.open(tmp_path / name) for name in ("t", "copy"))
    for each, value in ((one, 1.0), (two, 2.0)):
        each.weight[1] = value
    state = one.state_dict()
    assert one.commit() == one.table.generation
    two.commit()
    with pytest.raises(RuntimeError, match="cannot be restored"):
        two.load_state_dict(state)
    one.close()
    two.close()


def test_a_copied_folder_that_went_back_has_its_own_rows(tmp_path):
    """Both have a generation of the same number, and the copy has rolled back to its own."""
    emb = at_path(tmp_path)
    emb.close()
    subprocess.run(["cp", "-r", tmp_path / "t", tmp_path / "copy"], check=True)
    one, two = (bigembed.Embedding.open(tmp_path / name) for name in ("t", "copy"))
    one.weight[1] = 1.0
    state = one.state_dict()
    two.weight[1] = 2.0
    own = two.state_dict()
    assert torch.equal(own["table"][:3], state["table"][:3]), "of one number"
    for _ in range(2):
        two.weight[1] = 3.0
        two.table.merge()
        two.load_state_dict(own)
        assert two.table.generations()[-1].rollback_to is not None
        with pytest.raises(RuntimeError, match="cannot be restored"):
            two.load_state_dict(state)
        assert weights(two)[1].tolist() == [2.0] * D
    one.close()
    two.close()


@pytest.mark.parametrize("changed", [False, True])
def test_a_second_model_takes_the_first_ones_rows(tmp_path, changed):
    """`model2.load_state_dict(model.state_dict())`, as target networks do it."""
    models = [Model(small_embedding(tmp_path, seed=seed)) for seed in (1, 2)]
    train(models[0].emb)
    state = models[0].state_dict()
    if changed:
        models[0].emb.weight[5] = 1.0
        with pytest.raises(RuntimeError, match="another table"):
            models[1].load_state_dict(state)
        return
    models[1].load_state_dict(state)
    assert torch.equal(weights(models[1].emb), weights(models[0].emb))
    ids = torch.tensor([1, 2, 49])
    assert torch.equal(models[1](ids), models[0](ids))


def test_a_source_that_changes_while_its_rows_are_taken_is_noticed(tmp_path, monkeypatch):
    source, target = (small_embedding(tmp_path, seed=seed) for seed in (1, 2))

    def blocks(*_):
        yield 0, 25
        source.weight[30] = 1.0
        yield 25, V

    monkeypatch.setattr("bigembed.nn.state.row_blocks", blocks)
    with pytest.raises(RuntimeError, match="changed by another thread"):
        target.load_state_dict(source.state_dict())


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(6),
        torch.zeros(6, dtype=torch.float64),
        torch.zeros(5, dtype=torch.int64),
        torch.zeros((), dtype=torch.int64),
        3,
        None,
    ],
    ids=str,
)
def test_what_is_no_mark_is_refused(tmp_path, value):
    emb = small_embedding(tmp_path)
    with pytest.raises(RuntimeError, match=r'"table": expected 6 int64'):
        emb.load_state_dict({**emb.state_dict(), "table": value})
    with pytest.raises(RuntimeError, match=r"layout is 9.*upgrade"):
        emb.load_state_dict({"table": torch.full((6,), 9)})


def test_a_reader_follows_its_writers_state(tmp_path):
    writer = at_path(tmp_path)
    reader = bigembed.Embedding.open(tmp_path / "t", mode="r")
    old = reader.state_dict()
    assert torch.equal(old["table"], writer.state_dict()["table"])
    train(writer)
    state = writer.state_dict()
    assert not torch.equal(weights(reader), weights(writer))
    reader.load_state_dict(state)
    assert torch.equal(weights(reader), weights(writer))
    with pytest.raises(RuntimeError, match="cannot be restored"):
        reader.load_state_dict(old)
    writer.weight[5] = 5.0
    writer.table.merge()
    reader.table.refresh()
    with pytest.raises(RuntimeError, match=r"mode='r' and at generation 2; generation 1 can be restored"):
        reader.load_state_dict(state)
    reader.close()
    writer.close()


def test_growth_is_undone_with_the_rest(tmp_path):
    emb = small_embedding(tmp_path)
    state = emb.state_dict()
    emb.table.grow(V + 9)
    emb.weight[V + 3] = 1.0
    emb.load_state_dict(state)
    assert emb.num_embeddings == V


# -- plain checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "mmap", "float16", "float64", "transposed", "parameter"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_plain_checkpoint_streams_in(tmp_path, monkeypatch, kind, assign, place):
    monkeypatch.setattr(weight_module, "STREAM_BYTES", 7 * 4 * D)
    theirs = Model(nn.Embedding(V, D))
    ours = Model(small_embedding(tmp_path, **place))
    state = theirs.state_dict()
    given = {
        "float16": theirs.emb.weight.detach().half(),
        "float64": theirs.emb.weight.detach().double(),
        "transposed": theirs.emb.weight.detach().T.contiguous().T,
        "parameter": theirs.emb.weight,
    }
    state["emb.weight"] = given.get(kind, state["emb.weight"])
    if kind == "mmap":
        state = torch.load(saved(tmp_path, state), weights_only=True, mmap=True)
    ids = torch.tensor([0, 1, V - 1])
    ours.emb(ids)  # rows in the caches are replaced too
    handle = ours.emb.handle
    found = ours.load_state_dict(state, assign=assign)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert ours.emb.handle is handle
    theirs.load_state_dict(dict(state))  # torch notes assign=True in the state's own metadata
    assert torch.equal(weights(ours.emb), weights(theirs.emb))
    assert torch.equal(ours(ids), theirs(ids))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "state",
    [
        {"emb.weight": torch.ones(V + 1, D)},
        {"emb.weight": torch.ones(V, D, 1)},
        {"emb.weight": torch.ones(())},
        {"emb.weight": [1.0]},
        {"emb.weight": torch.ones(V, D, device="meta")},
        {"emb.wieght": torch.ones(V, D)},
        {"emb.extra": torch.ones(1), "emb.weight": torch.ones(V, D)},
        {},
    ],
    ids=lambda state: str([(name, getattr(value, "shape", value)) for name, value in state.items()]),
)
def test_wrong_checkpoints_are_refused_in_torchs_words(tmp_path, state, strict):
    ours, theirs = Model(small_embedding(tmp_path)), Model(nn.Embedding(V, D))
    before = weights(ours.emb)
    given = {**{f"head.{name}": value for name, value in ours.head.state_dict().items()}, **state}
    results = []
    for model in (theirs, ours):
        try:
            results.append(model.load_state_dict(given, strict=strict))
        except RuntimeError as error:
            results.append(str(error))
    assert results[0] == results[1]
    assert not strict or isinstance(results[0], str)
    if "emb.extra" not in state:
        assert torch.equal(weights(ours.emb), before)


def test_a_full_disk_is_no_wrong_checkpoint(tmp_path, monkeypatch):
    emb = small_embedding(tmp_path)

    def full(*args, **kwargs):
        raise DiskFull("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(type(emb.table._store), "append", full)
        with pytest.raises(DiskFull):
            emb.load_state_dict(nn.Embedding(V, D).state_dict())


def test_a_plain_checkpoint_into_a_reader_is_refused(tmp_path):
    at_path(tmp_path).close()
    reader = bigembed.Embedding.open(tmp_path / "t", mode="r")
    with pytest.raises(RuntimeError, match="mode='r'"):
        reader.load_state_dict(nn.Embedding(V, D).state_dict())
    reader.close()


def test_hooks_that_rename_keys_work(tmp_path):
    def rename(module, state_dict, prefix, *rest):
        state_dict[prefix + "weight"] = state_dict.pop(prefix + "old_name")

    ours, theirs = Model(small_embedding(tmp_path)), Model(nn.Embedding(V, D))
    state = theirs.state_dict()
    state["emb.old_name"] = state.pop("emb.weight") + 1
    for model in (ours, theirs):
        model.emb.register_load_state_dict_pre_hook(rename)
        model.load_state_dict(state)
    assert torch.equal(weights(ours.emb), weights(theirs.emb))


class WithScale(bigembed.Embedding):
    """A user's subclass with a parameter of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(D))
        self.register_buffer("seen", torch.zeros(1))
        self.remark = ["mine"]

    def forward(self, ids):
        return super().forward(ids) * self.scale


def test_a_subclass_keeps_what_it_has_beside_rows(tmp_path):
    one, two = WithScale(V, D), WithScale(V, D)
    with torch.no_grad():
        one.scale.fill_(3.0)
        one.seen.fill_(4.0)
    state = one.state_dict()
    assert set(state) == {"handle", "table", "scale", "seen"}
    two.load_state_dict(state)
    assert torch.equal(two.scale, one.scale)
    assert torch.equal(two.seen, one.seen)
    assert torch.equal(weights(two), weights(one))
    del state["scale"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"scale"'):
        two.load_state_dict(state)


def test_two_modules_on_one_table_save_and_load_as_one(tmp_path):
    emb = small_embedding(tmp_path)
    model = nn.ModuleList([emb, bigembed.Embedding.open(emb.table, padding_idx=1)])
    train(emb)
    expected, state = weights(emb), model.state_dict()
    assert torch.equal(state["0.table"], state["1.table"])
    train(emb, (4,))
    model.load_state_dict(state)
    assert torch.equal(weights(emb), expected)


def test_distributed_checkpoints_walk_it(tmp_path):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model = Model(small_embedding(tmp_path))
    train(model.emb)
    expected, state = weights(model.emb), get_model_state_dict(model)
    assert set(state) == set(model.state_dict())
    train(model.emb)
    set_model_state_dict(model, state)
    assert torch.equal(weights(model.emb), expected)


# -- to_nn_embedding --------------------------------------------------------------------------------------------

PARTS = {
    "all": None,
    "slice": slice(3, 40, 5),
    "backwards": slice(None, None, -1),
    "list": [4, 4, 0, -1],
    "tensor": torch.tensor([9, 2], dtype=torch.int32),
    "array": np.array([9, 2]),
    "mask": torch.arange(V) % 7 == 2,
    "none": [],
    "empty slice": slice(5, 5),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("place", PLACES)
def test_a_plain_embedding_of_a_part(tmp_path, monkeypatch, part, place):
    monkeypatch.setattr(weight_module, "STREAM_BYTES", 3 * 4 * D)
    emb, rows = small_embedding(tmp_path, **place), PARTS[part]
    emb.weight[4] = 9.0
    plain = emb.to_nn_embedding(rows)
    expected = weights(emb) if rows is None else emb.weight[rows]
    assert type(plain) is nn.Embedding
    assert type(plain.weight) is nn.Parameter
    assert torch.equal(plain.weight, expected)
    assert plain.weight.requires_grad
    plain.weight.data.zero_()
    assert emb.weight[4].tolist() == [9.0] * D


def test_a_plain_embedding_has_the_modules_options(tmp_path):
    emb = bigembed.Embedding(V, D, 4, sparse=True, _freeze=True).eval()
    plain = emb.to_nn_embedding()
    assert (plain.padding_idx, plain.sparse, plain.training, plain.weight.requires_grad) == (4, True, False, False)
    assert emb.to_nn_embedding([7, 4, 4]).padding_idx == 1
    assert emb.to_nn_embedding(slice(4)).padding_idx is None
    half = emb.to_nn_embedding(dtype=torch.float16, device="meta")
    assert (half.weight.dtype, half.weight.device.type) == (torch.float16, "meta")
    assert torch.equal(emb.to_nn_embedding(dtype=torch.bfloat16).weight, weights(emb).bfloat16())


def test_rows_that_are_none_are_refused(tmp_path):
    emb = small_embedding(tmp_path)
    for rows in ([V], [-V - 1], torch.tensor([1 << 60])):
        with pytest.raises(RowOutOfRange):
            emb.to_nn_embedding(rows)
    for rows in (3, torch.tensor(3), torch.ones(2, 2).long()):
        with pytest.raises(InvalidArgument, match="slice, a list or a 1-D tensor"):
            emb.to_nn_embedding(rows)
    with pytest.raises(InvalidArgument, match="mask"):
        emb.to_nn_embedding(torch.ones(V + 1).bool())


# -- deep copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_a_deep_copy_of_a_temporary_table_is_independent(tmp_path, place):
    emb = small_embedding(tmp_path, padding_idx=2, **place)
    train(emb)
    kept = emb.state_dict()
    emb.weight[8] = 8.0
    ours, theirs = Model(emb), Model(emb.to_nn_embedding())
    copies = [copy.deepcopy(model) for model in (ours, theirs)]
    assert rows_and_state(copies[0].emb).tobytes() == rows_and_state(emb).tobytes()
    assert copies[0].emb.table.path != emb.table.path
    assert copies[0].emb.padding_idx == 2
    assert copies[0].emb.trainable.has_device_tier == emb.trainable.has_device_tier
    for model in (copies[0], ours):
        before = weights((ours if model is copies[0] else copies[0]).emb)
        train(model.emb, (1, 9))
        assert torch.equal(weights((ours if model is copies[0] else copies[0]).emb), before)
    emb.load_state_dict(kept)  # copying made no explicit commit
    again = copy.deepcopy(copies[0])
    assert torch.equal(weights(again.emb), weights(copies[0].emb))
    again(torch.tensor([1]))
    assert len(again.emb._forward_pre_hooks) == 1, "copies of copies gather none"
    path = copies[0].emb.table.path
    del copies, again, model
    assert not os.path.exists(path)


def test_a_deep_copy_compiles_without_a_graph_break(tmp_path):
    copied = copy.deepcopy(Model(small_embedding(tmp_path)))
    compiled = torch.compile(copied, fullgraph=True, backend="eager")
    ids = torch.tensor([1, 2])
    assert torch.equal(compiled(ids), copied(ids))


def test_modules_on_one_table_are_copied_onto_one_table():
    emb = bigembed.Embedding(V, D)
    model = nn.ModuleList([emb, emb, bigembed.Embedding.open(emb.table, padding_idx=3)])
    copied = copy.deepcopy(model)
    assert copied[0] is copied[1]
    assert copied[0].trainable is copied[2].trainable is not emb.trainable
    assert (copied[0].padding_idx, copied[2].padding_idx) == (None, 3)
    assert len(list(copied.parameters())) == 1


def test_a_copy_keeps_flags_hooks_and_attributes():
    calls = []
    emb = WithScale(V, D, _freeze=True).eval()
    emb.register_forward_hook(lambda *_: calls.append(1))
    for copied in (copy.deepcopy(emb), copy.copy(emb)):
        calls.clear()
        assert torch.equal(copied(torch.tensor([1])), emb(torch.tensor([1])))
        assert len(calls) == 2
        assert isinstance(copied, WithScale)
        assert not copied.training
        assert not copied.handle.requires_grad
        assert copied.remark == ["mine"]
        assert set(dict(copied.named_parameters())) == {"handle", "scale"}
    assert copy.copy(emb).scale is emb.scale
    assert copy.deepcopy(emb).scale is not emb.scale


def test_a_shallow_copy_shares_the_rows(tmp_path):
    for emb in (small_embedding(tmp_path), nn.Embedding(V, D)):
        copied = copy.copy(emb)
        assert type(copied) is type(emb)
        assert next(copied.parameters()) is next(emb.parameters())
        with torch.no_grad():
            emb.weight[3] = torch.full((D,), 2.0)
        assert copied(torch.tensor([3])).tolist() == [[2.0] * D]
        copied.eval()
        assert emb.training


def test_a_deep_copy_of_a_table_with_a_path_is_refused(tmp_path):
    model = Model(at_path(tmp_path))
    for use in (copy.deepcopy, torch.optim.swa_utils.AveragedModel):
        with pytest.raises(TypeError, match=r"deep-copied.*copy_table\(path, new_path\).*AveragedModel") as caught:
            use(model)
        assert isinstance(caught.value, CannotCopy)
    model.emb.close()


def test_a_deep_copy_of_a_reader_reads_the_same_table(tmp_path):
    at_path(tmp_path).close()
    reader = bigembed.Embedding.open(tmp_path / "t", mode="r")
    copied = copy.deepcopy(Model(reader)).emb
    assert copied.table is reader.table
    assert copied is not reader
    assert torch.equal(copied(torch.arange(V)), weights(reader))
    reader.close()


def test_no_room_for_a_copy_leaves_nothing(tmp_path, monkeypatch):
    emb = bigembed.Embedding(V, D)

    def full(*args, **kwargs):
        raise DiskFull("no space left")

    monkeypatch.setattr("bigembed.nn.copies.copy_table", full)
    with pytest.raises(DiskFull):
        copy.deepcopy(emb)
    assert emb(torch.tensor([1])).shape == (1, D)


@pytest.mark.parametrize("how", ["swa", "ema", "by hand"])
def test_an_average_that_would_miss_the_rows_says_so(tmp_path, how):
    model = Model(small_embedding(tmp_path))
    ids = torch.tensor([1, 2])
    if how == "by hand":
        average = copy.deepcopy(model)
        average(ids)
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                mine.mul_(0.5).add_(theirs, alpha=0.5)
    else:
        fn = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5) if how == "ema" else None
        average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=fn)
        average(ids)
        average.update_parameters(model)
    for use in (lambda: average(ids), lambda: copy.deepcopy(average)):
        with pytest.raises(OtherTable, match="Average the other modules alone"):
            use()


def through_data(mine, theirs):
    mine.data.mul_(0.5).add_(theirs.data, alpha=0.5)


def by_lerp(mine, theirs):
    mine.data.lerp_(theirs.data, 0.25)


def by_new_data(mine, theirs):
    mine.data = 0.5 * mine.data + 0.5 * theirs.data


def by_copy(mine, theirs):
    mine.data.copy_(theirs.data)


@pytest.mark.parametrize("write", [through_data, by_lerp, by_new_data, by_copy])
def test_an_average_made_through_data_says_so(tmp_path, write):
    """`ema_p.data.mul_(d).add_(p.data, alpha=1 - d)`, which moves no version."""
    model = Model(small_embedding(tmp_path))
    average = copy.deepcopy(model)
    ids = torch.tensor([1, 2])
    average(ids)
    assert torch.equal(average.emb.handle, model.emb.handle)
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        write(mine, theirs)
    with pytest.raises(OtherTable, match="Average the other modules alone"):
        average(ids)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_copy_that_is_trained_by_a_dense_optimizer_too_is_no_average(tmp_path, decay):
    """torch.optim.AdamW(model.parameters()) writes to the handle, which nothing depends on."""
    model = Model(small_embedding(tmp_path))
    trained = copy.deepcopy(model)
    before = weights(trained.emb)
    dense = torch.optim.AdamW(trained.parameters(), lr=0.5, weight_decay=decay)
    rows = optim.SGD(trained.emb, lr=1.0)
    for _ in range(3):
        trained(torch.tensor([1, 2])).backward()
        dense.step()
        rows.step()
        dense.zero_grad()
    assert not torch.equal(weights(trained.emb), before)
    copy.deepcopy(trained)


def test_the_dense_part_can_be_averaged(tmp_path):
    model = Model(small_embedding(tmp_path))
    average = torch.optim.swa_utils.AveragedModel(model.head)
    average.update_parameters(model.head)
    ids = torch.tensor([1, 2])
    assert torch.equal(average(model.emb(ids)).sum(), model(ids))


# -- other processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_a_whole_model_is_saved_and_comes_back_as_a_reader(tmp_path, place):
    at_path(tmp_path, padding_idx=2).close()
    emb = bigembed.Embedding.open(tmp_path / "t", **place)
    model = Model(emb).eval()
    train(emb)
    emb.commit("kept")
    kept = emb.state_dict()
    emb.weight[8] = 8.0
    file = saved(tmp_path, model)
    assert not emb.table.generations()[-1].explicit
    loaded = torch.load(file, weights_only=False)
    ids = torch.tensor([1, 2, 8])
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.emb.table.mode == "r"
    assert not loaded.emb.handle.requires_grad
    assert not loaded.emb.training
    assert loaded.emb.padding_idx == 2
    assert "mode='r'" in repr(loaded)
    assert "mode='r'" not in repr(model)
    with pytest.raises(ReadOnlyTable, match="mode='r'"):
        optim.SGD(loaded)
    loaded.requires_grad_(True)
    with pytest.raises(NoOptimizer):
        loaded(ids).backward()
    loaded.emb.close()
    emb.load_state_dict(kept)
    with pytest.warns(UserWarning, match=r"pickled at generation \d+ of .*/t, which is at \d+ now"):
        torch.load(file, weights_only=False)
    emb.close()


def test_a_pickle_is_of_its_table_or_nothing(tmp_path):
    emb = at_path(tmp_path)
    data = pickle.dumps(emb)
    emb.close()
    again = pickle.loads(data)
    assert again.table.mode == "r"
    assert torch.equal(pickle.loads(pickle.dumps(again)).weight[:], again.weight[:]), "a reader too"
    again.close()
    os.rename(tmp_path / "t", tmp_path / "away")
    with pytest.raises(TableMissing):
        pickle.loads(data)
    at_path(tmp_path).close()
    with pytest.raises(OtherTable, match="another table"):
        pickle.loads(data)


def test_a_temporary_table_is_not_pickled():
    emb = bigembed.Embedding(V, D)
    for use in (pickle.dumps, lambda module: torch.save(module, os.devnull)):
        with pytest.raises(TypeError, match=r"temporary.*path="):
            use(emb)


class Rows(torch.utils.data.Dataset):
    """Looks rows up where it runs: in a worker process."""

    def __init__(self, emb):
        self.emb = emb

    def __len__(self):
        return 4

    def __getitem__(self, item):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return self.emb(torch.tensor([item, 9])), self.emb.table.mode, self.emb.training


@pytest.mark.parametrize("kind", ["path", "temporary"])
def test_spawned_workers_read_the_rows_of_now(tmp_path, kind):
    emb = at_path(tmp_path) if kind == "path" else small_embedding(tmp_path, cache_rows=3)
    emb.eval()
    train(emb, (0, 9))
    expected = weights(emb)
    loader = torch.utils.data.DataLoader(Rows(emb), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for item, (rows, mode, training) in enumerate(loader):
        assert torch.equal(rows, expected[[item, 9]])
        assert not rows.requires_grad
        assert (mode, training) == ("r", False)
    train(emb)
    discard(emb)


def test_a_forked_child_cannot_save_changes_of_its_parent(tmp_path):
    """It has them in memory, but may not commit them; without changes it can."""
    emb = small_embedding(tmp_path)

    def child(expect):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                try:
                    emb.state_dict()
                    pickled = emb.table.is_temporary
                    status = 0 if expect is None and pickled else 2
                except ForkedTable:
                    status = 0 if expect is ForkedTable else 3
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert child(None) == 0
    train(emb)
    assert child(ForkedTable) == 0


def test_share_memory_changes_nothing(tmp_path):
    emb = small_embedding(tmp_path)
    before = weights(emb)
    assert Model(emb).share_memory().emb.handle is emb.trainable.handle
    assert not emb.handle.is_shared()
    train(emb)
    assert torch.equal(weights(emb)[1], before[1] - 1)


# -- conversions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "convert",
    [
        nn.Module.half,
        nn.Module.double,
        nn.Module.bfloat16,
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.float64),
        lambda m: m.to(torch.ones(1, dtype=torch.float16)),
        lambda m: m.type(torch.float64),
        lambda m: m.to("meta"),
        lambda m: m.to_empty(device="meta"),
    ],
    ids=["half", "double", "bfloat16", "dtype", "device and dtype", "tensor", "type", "meta", "to_empty meta"],
)
def test_conversions_are_refused_with_a_reason(tmp_path, place, convert):
    emb = small_embedding(tmp_path, **place)
    before = weights(emb)
    with pytest.raises(TypeError, match=r"on disk.*(to_nn_embedding\(dtype=|Leave it)") as caught:
        convert(nn.Sequential(emb))
    assert isinstance(caught.value, CannotConvert)
    assert torch.equal(weights(emb), before)
    assert (emb.handle.dtype, emb.handle.device.type) == (torch.float32, "cpu")


def test_conversions_to_what_it_is_do_nothing(tmp_path):
    emb = small_embedding(tmp_path)
    handle = emb.handle
    for convert in (
        nn.Module.float,
        nn.Module.cpu,
        lambda m: m.to("cpu", torch.float32),
        lambda m: m.to_empty(device="cpu"),
    ):
        assert convert(emb) is emb
    assert emb.handle is handle
    for module in (emb, nn.Embedding(V, D)):
        with pytest.raises(TypeError, match="floating point or complex"):
            module.to(torch.int32)


# -- other uses of a Parameter ----------------------------------------------------------------------------------


def test_a_weight_is_assigned_by_copy_or_not_at_all(tmp_path):
    emb, given = small_embedding(tmp_path), torch.ones(V, D)
    for value in (nn.Parameter(given), given, None, nn.Linear(D, V).weight):
        with pytest.raises(TypeError, match=r"cannot be replaced.*weight.copy_\(tensor\).*Embedding.open\(emb.table\)"):
            emb.weight = value
    assert list(dict(emb.named_parameters())) == ["handle"]
    for module in (emb, nn.Embedding(V, D)):
        module.weight.data = given * 3
        assert torch.equal(weights(module), given * 3)
        module.weight.data.copy_(given)
        assert torch.equal(weights(module), given)
        module.weight.data.zero_()
        assert not weights(module).any()
    with pytest.raises(InvalidArgument, match="shape"):
        emb.weight.data = torch.ones(V)


def test_tying_a_head_is_refused(tmp_path):
    emb, head = small_embedding(tmp_path), nn.Linear(D, V)
    with pytest.raises(TypeError, match="WeightView"):
        head.weight = emb.weight
    assert head.weight.shape == (V, D)


@pytest.mark.parametrize("freeze", ["requires_grad", "requires_grad_", "parameters", "module"])
def test_a_weight_is_frozen_and_thawed(tmp_path, freeze):
    for module in (small_embedding(tmp_path), nn.Embedding(V, D)):
        for value in (False, True):
            if freeze == "requires_grad":
                module.weight.requires_grad = value
            elif freeze == "requires_grad_":
                assert module.weight.requires_grad_(value) is not None
            elif freeze == "module":
                module.requires_grad_(value)
            else:
                for parameter in module.parameters():
                    parameter.requires_grad = value
            assert module.weight.requires_grad is value
            assert module(torch.tensor([1])).requires_grad is value


def test_parametrizations_are_refused(tmp_path):
    from torch.nn.utils import parametrizations, prune
    from torch.nn.utils.parametrize import register_parametrization

    emb = small_embedding(tmp_path)
    before = weights(emb)
    with pytest.raises(ValueError, match="weight"):
        register_parametrization(emb, "weight", nn.Identity())
    with pytest.raises(ValueError, match="weight"):
        parametrizations.weight_norm(emb)
    with pytest.raises((ValueError, TypeError, BigembedError)):
        prune.l1_unstructured(emb, "weight", 0.5)
    assert torch.equal(weights(emb), before)
    assert list(dict(emb.named_parameters())) == ["handle"]


def test_functional_call(tmp_path):
    """With its own parameters it is a call; a weight cannot be put in."""
    from torch.func import functional_call

    ours = Model(small_embedding(tmp_path))
    theirs = Model(ours.emb.to_nn_embedding())
    theirs.head.load_state_dict(ours.head.state_dict())
    ids = torch.tensor([1, 2])
    for model in (ours, theirs):
        assert torch.equal(functional_call(model, dict(model.named_parameters()), (ids,)), ours(ids))
        dense = {name: value * 2 for name, value in model.named_parameters() if name.startswith("head")}
        assert torch.allclose(functional_call(model, dense, (ids,)), 2 * ours(ids))
    with pytest.raises(TypeError, match="WeightView"):
        functional_call(ours, {"emb.weight": torch.ones(V, D)}, (ids,))
    assert torch.equal(ours(ids), theirs(ids))


def test_functional_call_with_another_handle_is_refused(tmp_path):
    """Its gradient would go to the table, not to what was given."""
    model = Model(small_embedding(tmp_path))
    copied = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    opt = optim.SGD(model)
    with pytest.raises(RuntimeError):
        torch.func.functional_call(model, copied, (torch.tensor([1, 2]),)).backward()
    opt.zero_grad()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_is_saved_and_copied_as_an_embedding(tmp_path, mode):
    bag = bigembed.EmbeddingBag(V, D, mode=mode, include_last_offset=True, path=tmp_path / "t")
    bag.weight[3] = 3.0
    ids, offsets = torch.tensor([3, 3, 4, 5]), torch.tensor([0, 2, 4])
    expected = bag(ids, offsets).detach()
    state = bag.state_dict()
    again = pickle.loads(pickle.dumps(bag))
    assert torch.equal(again(ids, offsets), expected)
    again.close()
    bag.weight[3] = 4.0
    bag.load_state_dict(state)
    assert torch.equal(bag(ids, offsets), expected)
    bag.close()
    bag = bigembed.EmbeddingBag(V, D, mode=mode, include_last_offset=True)
    copied = copy.deepcopy(bag)
    assert type(copied) is bigembed.EmbeddingBag
    assert torch.equal(copied(ids, offsets), bag(ids, offsets))
    plain = nn.EmbeddingBag(V, D, mode=mode, include_last_offset=True)
    bag.load_state_dict(plain.state_dict())
    assert torch.equal(weights(bag), plain.weight)


def test_importing_and_saving_elsewhere(tmp_path):
    """A checkpoint written by one process is loaded by another: the table's folder stays where it is."""
    code = """
import sys, torch, bigembed
emb = bigembed.Embedding.open(sys.argv[1])
emb.load_state_dict(torch.load(sys.argv[2]))
assert emb.weight[3].tolist() == [3.0] * 4, emb.weight[3]
emb.weight[3] = 4.0
torch.save(emb.state_dict(), sys.argv[2])
"""
    emb = at_path(tmp_path)
    emb.weight[3] = 3.0
    file = saved(tmp_path, emb.state_dict())
    emb.weight[3] = 5.0
    emb.table.merge()
    emb.close()
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "t", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    emb = bigembed.Embedding.open(tmp_path / "t")
    emb.weight[3] = 6.0
    emb.load_state_dict(torch.load(file))
    assert emb.weight[3].tolist() == [4.0] * D
    emb.close()


def test_a_refused_tensor_operation_is_a_type_error():
    assert issubclass(WeightUseError, TypeError)


# -- hooks that rename ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False], ids=["weight", "mark"])
@pytest.mark.parametrize("where", ["parent", "module"])
def test_a_hook_that_renames_keys_is_heard(tmp_path, where, plain):
    """Checkpoints of wrapped models (`module.emb.weight`); a hook may also bring back what is not ours to find."""
    emb = small_embedding(tmp_path)
    train(emb)
    wanted = weights(emb)
    rows = nn.Embedding(V, D, _weight=wanted.clone()) if plain else emb
    inner = where == "module"
    old = {"old." + key: value for key, value in (rows if inner else nn.Sequential(rows)).state_dict().items()}

    def rename(_, state, *rest):
        for key in list(state):
            if key.startswith("old."):
                state[key.removeprefix("old.")] = state.pop(key)

    ours = emb if inner else nn.Sequential(emb)
    emb.weight[1] = 9.0
    ours.register_load_state_dict_pre_hook(rename)
    found = ours.load_state_dict(old)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert torch.equal(weights(emb), wanted)
