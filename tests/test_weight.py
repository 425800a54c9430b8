"""`module.weight`: indexing and filling as a dense weight does it, and refusals where that would deceive."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from training import small_embedding, weights

import bigembed
from bigembed.errors import BigembedError, InvalidArgument, InvalidIds, ReadOnlyTable, RowOutOfRange
from bigembed.nn.weight import RowsCopy, WeightAttributeError, WeightUseError

V, D = 50, 4
MASK = [n % 7 == 2 for n in range(V)]
KEYS = {
    "row": 3,
    "negative row": -2,
    "first row from the end": -V,
    "numpy scalar": np.int8(-1),
    "0-d tensor": torch.tensor(7),
    "list": [1, -1, 1],
    "empty list": [],
    "tensor": torch.tensor([[1, 2, 3], [-4, 5, 6]]),
    "int32": torch.tensor([4, 4], dtype=torch.int32),
    "array": np.array([9, 8]),
    "slice": slice(3, 9),
    "slice from the end": slice(-5, None),
    "slice with a step": slice(None, None, 7),
    "empty slice": slice(9, 3),
    "all": slice(None),
    "mask": torch.tensor(MASK),
}
COLUMNS = {"column": 1, "some columns": slice(1, 3), "a column from the end": -1, "all columns": slice(None)}


@pytest.fixture(params=[3, None], ids=["3 rows cached", "all rows cached"])
def emb(request, tmp_path):
    emb = small_embedding(tmp_path, cache_rows=request.param)
    opt = bigembed.optim.SGD(emb, lr=0.5)
    emb(torch.tensor([1, 2, 3, 49])).sum().backward()  # some rows changed in the cache, some past it
    opt.step()
    opt.zero_grad()
    return emb


# -- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEYS)
def test_reading_equals_a_tensors(emb, name):
    expected = weights(emb)[KEYS[name]]
    assert emb.weight[KEYS[name]].shape == expected.shape
    assert torch.equal(emb.weight[KEYS[name]], expected)


def test_keys_that_a_tensor_does_not_take(emb):
    assert torch.equal(emb.weight[np.array([-50, 49], np.int8)], weights(emb)[[-50, 49]])
    assert torch.equal(emb.weight[::-1], weights(emb).flip(0))
    assert torch.equal(emb.weight[MASK], weights(emb)[MASK])


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", ["row", "tensor", "slice", "mask"])
def test_reading_columns_equals_a_tensors(emb, name, columns):
    rows = weights(emb)[KEYS[name]]
    assert torch.equal(emb.weight[KEYS[name], COLUMNS[columns]], rows[..., COLUMNS[columns]])


def test_facts(emb):
    weight, dense = emb.weight, weights(emb)
    assert weight.shape == dense.shape
    assert isinstance(weight.shape, torch.Size)
    assert weight.size() == dense.size()
    assert [weight.size(0), weight.size(1), weight.size(-1)] == [V, D, D]
    assert weight.dim() == weight.ndim == 2
    assert weight.numel() == V * D
    assert len(weight) == V
    assert weight.dtype == torch.float32
    assert weight.device == torch.device("cpu")
    assert weight.requires_grad
    assert not emb.requires_grad_(False).weight.requires_grad
    assert torch.equal(weight.data[5], dense[5])
    assert torch.equal(weight.detach()[5], dense[5])
    assert "weight[ids] reads rows" in repr(weight)


# -- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEYS)
def test_writing_equals_a_tensors(emb, name):
    expected = weights(emb)
    values = torch.arange(expected[KEYS[name]].numel(), dtype=torch.float32).reshape(expected[KEYS[name]].shape)
    if name == "list":
        values[0] = values[2]  # a row named twice: a tensor's result would not be defined
    expected[KEYS[name]] = values
    emb.weight[KEYS[name]] = values
    assert torch.equal(weights(emb), expected)
    assert torch.equal(emb(torch.arange(V)), expected)


@pytest.mark.parametrize(
    "values",
    [
        1.5,
        2,
        torch.ones(D),
        np.ones((1, D)),
        [1.0, 2.0, 3.0, 4.0],
        torch.ones(2, D, dtype=torch.float64),
        torch.ones(2, D, dtype=torch.bfloat16),
        nn.Parameter(torch.ones(2, D)),
    ],
)
def test_written_values_are_spread_and_converted(emb, values):
    expected = weights(emb)
    with torch.no_grad():
        expected[[3, 5]] = values if isinstance(values, float | int) else torch.as_tensor(values).float()
    emb.weight[[3, 5]] = values
    assert torch.equal(weights(emb), expected)


def test_what_was_written_is_trained_on(emb):
    emb.weight[[1, 40]] = 2.0
    opt = bigembed.optim.SGD(emb, lr=0.5)
    emb(torch.tensor([1, 40, 40])).sum().backward()
    opt.step()
    assert weights(emb)[[1, 40]].tolist() == [[1.5] * D, [1.0] * D]


@pytest.mark.parametrize(
    ("key", "values", "error", "text"),
    [
        ([1, 2], torch.ones(3, D), InvalidArgument, r"values have shape \(3, 4\); \(2, 4\) was expected"),
        (1, torch.ones(D + 1), InvalidArgument, r"values have shape \(5,\); \(4,\) was expected"),
        ((1, 2), 1.0, InvalidArgument, "write whole rows"),
        (V, 1.0, RowOutOfRange, r"contain 50 \(at position 0\).*0 to 49"),
        ([1, -V - 1], 1.0, RowOutOfRange, r"contain -51 \(at position 1\)"),
        ([0.5], 1.0, InvalidIds, "float64"),
        ([True, False], 1.0, InvalidArgument, "a mask of shape"),
    ],
)
def test_writes_that_are_refused_change_nothing(emb, key, values, error, text):
    before = weights(emb)
    with pytest.raises(error, match=text):
        emb.weight[key] = values
    assert torch.equal(weights(emb), before)


@pytest.mark.parametrize(
    ("key", "error"),
    [
        (V, RowOutOfRange),
        (-V - 1, RowOutOfRange),
        (1.5, InvalidIds),
        (..., InvalidIds),
        (None, InvalidIds),
        ((1, 2, 3), InvalidArgument),
        (torch.ones(V - 1, dtype=torch.bool), InvalidArgument),
    ],
)
def test_reads_that_are_refused(emb, key, error):
    with pytest.raises(error):
        emb.weight[key]


# -- rows are copies --------------------------------------------------------------------------------------------

IN_PLACE = {
    "zero_": lambda rows: rows.zero_(),
    "add_": lambda rows: rows.add_(1.0),
    "copy_": lambda rows: rows.copy_(torch.ones(2, D)),
    "index_fill_": lambda rows: rows.index_fill_(0, torch.tensor([0]), 1.0),
    "__setitem__": lambda rows: rows.__setitem__(0, 1.0),
    "__iadd__": lambda rows: rows.__iadd__(1.0),
    "__imul__": lambda rows: rows.__imul__(2.0),
    "__itruediv__": lambda rows: rows.__itruediv__(2.0),
    "a row of them": lambda rows: rows[0].fill_(1.0),
    "a view of them": lambda rows: rows.view(-1)[2:].zero_(),
    "transposed": lambda rows: rows.T.zero_(),
    "data": lambda rows: rows.data.zero_(),
    "detached": lambda rows: rows.detach().zero_(),
    "unbound": lambda rows: rows.unbind()[1].zero_(),
    "in a loop": lambda rows: [row.zero_() for row in rows],
    "nn.init": lambda rows: nn.init.normal_(rows),
    "F.relu": lambda rows: F.relu(rows, inplace=True),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_changing_a_copy_in_place_is_refused(emb, name):
    rows = emb.weight[[1, 2]]
    before = rows.clone()
    with pytest.raises(InvalidArgument, match=r"would change a copy of the rows.*weight\[ids\] = values"):
        IN_PLACE[name](rows)
    assert torch.equal(rows, before)


def test_adding_to_rows_by_item_is_refused_and_says_how(emb):
    before = weights(emb)
    with pytest.raises(InvalidArgument, match=r"Use weight\[ids\] = values"):
        emb.weight[[1, 2]] += 1.0
    emb.weight[[1, 2]] = emb.weight[[1, 2]] + 1.0
    before[[1, 2]] += 1.0
    assert torch.equal(weights(emb), before)


def test_zeroing_rows_as_models_do_says_how(emb):
    """`module.weight.data[module.padding_idx].zero_()`."""
    with pytest.raises(InvalidArgument, match=r"weight\[ids\] = 0\.0 for zeros.*padding_idx is zeros already"):
        emb.weight.data[7].zero_()
    emb.weight[7] = 0.0
    assert not weights(emb)[7].any()


def test_what_is_saved_or_copied_is_plain(emb, tmp_path):
    """A file must not need this library, nor a copy protect what it is not."""
    rows, dense = emb.weight[[1, 2]], weights(emb)[[1, 2]]
    file = io.BytesIO()
    torch.save({"rows": rows, "part": rows[0]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for result in (
        loaded["rows"],
        copy.deepcopy(rows),
        copy.copy(rows),
        pickle.loads(pickle.dumps(rows)),
        rows.clone(),
    ):
        assert type(result) is torch.Tensor
        assert torch.equal(result, dense)
    assert torch.equal(loaded["part"], dense[0])
    copied = copy.deepcopy(rows).zero_()
    assert torch.equal(rows, dense)
    assert not copied.any()
    both = copy.deepcopy([rows, rows])
    assert both[0] is both[1]


def test_rows_may_become_a_parameter(emb, tmp_path):
    """A small nn.Embedding made of a few rows trains, is copied and saved as any other."""
    before, dense = weights(emb), weights(emb)[:5]
    plain, twin = (nn.Embedding.from_pretrained(rows, freeze=False) for rows in (emb.weight[:5], dense.clone()))
    for layer in (plain, twin):
        opt = torch.optim.Adam(layer.parameters(), lr=0.5)
        layer(torch.tensor([1, 1, 3])).pow(2).sum().backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
        opt.step()
        with torch.no_grad():
            layer.weight[2] += 1.0
            layer.weight.data[4].zero_()
    assert isinstance(plain.weight, nn.Parameter)
    assert torch.equal(plain.weight.detach().clone(), twin.weight)
    copied = copy.deepcopy(plain)
    torch.save(plain.state_dict(), tmp_path / "a.pt")
    copied.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    assert type(copied.weight) is nn.Parameter
    assert copied.weight.requires_grad
    assert torch.equal(copied.weight, twin.weight)
    assert torch.equal(weights(emb), before)


def test_a_copy_is_otherwise_a_tensor(emb):
    rows, dense = emb.weight[[1, 2]], weights(emb)[[1, 2]]
    assert isinstance(rows, RowsCopy)
    for result in (
        rows + 1,
        1 + rows,
        rows.clone(),
        rows @ torch.ones(D),
        torch.cat([rows, rows]),
        rows.sum(),
        ~rows.isnan(),
    ):
        assert type(result) is torch.Tensor
    assert torch.equal(torch.stack([rows, rows])[1], dense)
    assert torch.equal(rows.max(dim=1).values, dense.max(dim=1).values)
    assert [row.tolist() for row in rows] == dense.tolist()
    assert F.cosine_similarity(rows[0], rows[1], dim=0) == F.cosine_similarity(dense[0], dense[1], dim=0)
    assert rows.numpy().tolist() == dense.tolist()
    assert float(rows[0, 0]) == dense[0, 0]
    plain = rows.clone()
    plain.zero_()
    rows.requires_grad_()
    rows.pow(2).sum().backward()
    assert torch.equal(rows.grad, 2 * dense)
    assert repr(rows).count("\n") == 1


# -- filling ----------------------------------------------------------------------------------------------------

FILLS = {
    "weight.normal_": (lambda w: w.normal_(3.0, 0.5), 3.0, 0.5),
    "weight.uniform_": (lambda w: w.uniform_(-1.0, 3.0), 1.0, 4 / 12**0.5),
    "weight.fill_": (lambda w: w.fill_(2.5), 2.5, 0.0),
    "weight.zero_": (lambda w: w.zero_(), 0.0, 0.0),
    "weight.data.normal_": (lambda w: w.data.normal_(mean=0.0, std=0.02), 0.0, 0.02),
    "nn.init.normal_": (lambda w: nn.init.normal_(w, 3.0, 0.5), 3.0, 0.5),
    "nn.init.uniform_": (lambda w: nn.init.uniform_(w, -1.0, 3.0), 1.0, 4 / 12**0.5),
    "nn.init.constant_": (lambda w: nn.init.constant_(w, 2.5), 2.5, 0.0),
    "nn.init.zeros_": (lambda w: nn.init.zeros_(w), 0.0, 0.0),
    "nn.init.ones_": (lambda w: nn.init.ones_(w), 1.0, 0.0),
    "nn.init.xavier_normal_": (lambda w: nn.init.xavier_normal_(w), 0.0, (2 / (3000 + D)) ** 0.5),
    "nn.init.kaiming_uniform_": (lambda w: nn.init.kaiming_uniform_(w), 0.0, (2 / D) ** 0.5),
}


@pytest.mark.parametrize("written", [False, True], ids=["free", "streamed"])
@pytest.mark.parametrize("name", FILLS)
def test_filling(tmp_path, name, written):
    fill, mean, std = FILLS[name]
    torch.manual_seed(1)
    emb = small_embedding(tmp_path, 3000, padding_idx=7)
    if written:
        emb.weight[0] = 9.0
    assert emb(torch.tensor([0, 7])).shape == (2, D)  # in the cache before
    fill(emb.weight)
    got = weights(emb)
    assert torch.equal(emb(torch.arange(3000)), got)
    assert emb.table.has_rows == written
    assert not got[7].any(), "the padding row stays zeros"
    rest = got[torch.arange(3000) != 7].double()
    assert rest.mean().item() == pytest.approx(mean, abs=0.05 * std + 1e-12)
    assert rest.std().item() == pytest.approx(std, rel=0.05, abs=1e-12)
    emb.commit()
    assert torch.equal(weights(emb), got)


def test_filling_a_billion_rows_is_free(tmp_path):
    emb = small_embedding(tmp_path, 1_000_000_000)
    nn.init.uniform_(emb.weight, 1.0, 2.0)
    assert (emb.weight[[0, 999_999_999]] >= 1.0).all()


def test_filling_a_table_with_padding_keeps_it_after_reopening(tmp_path):
    emb = bigembed.Embedding(10, D, padding_idx=-1, path=tmp_path / "t", seed=0)
    emb.weight.normal_()
    emb.commit()
    emb.close()
    assert bigembed.Embedding.open(tmp_path / "t", mode="r").padding_idx == 9


def test_copy_writes_every_row(emb, monkeypatch):
    monkeypatch.setattr("bigembed.nn.weight.STREAM_BYTES", 7 * 4 * D)  # several blocks
    given = torch.arange(V * D, dtype=torch.float32).reshape(V, D)
    assert emb.weight.copy_(given).shape == (V, D)
    assert torch.equal(weights(emb), given)
    emb.weight.copy_(given.numpy() + 1)
    assert torch.equal(weights(emb), given + 1)
    with pytest.raises(InvalidArgument, match=r"shape \(4, 50\); \(50, 4\) was expected"):
        emb.weight.copy_(given.T)


def test_fill_streams_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("bigembed.nn.weight.STREAM_BYTES", 7 * 4 * D)
    emb = small_embedding(tmp_path, padding_idx=8)
    emb.weight[0] = 1.0
    emb.weight.fill_(2.0)
    assert weights(emb).sum() == 2.0 * (V - 1) * D


def test_a_read_only_weight_is_read_and_not_written(tmp_path):
    bigembed.Table.create(tmp_path / "t", V, D).close()
    emb = bigembed.Embedding.open(tmp_path / "t", mode="r")
    before = weights(emb)
    for change in (emb.weight.zero_, emb.weight.normal_, lambda: emb.weight.__setitem__(1, 0.0)):
        with pytest.raises(ReadOnlyTable, match="mode='r'"):
            change()
    assert torch.equal(weights(emb), before)


# -- not a matrix -----------------------------------------------------------------------------------------------

NEEDS_ALL = {
    "F.linear": lambda w: F.linear(torch.ones(2, D), w),
    "F.embedding": lambda w: F.embedding(torch.tensor([1]), w),
    "matmul": lambda w: torch.matmul(torch.ones(D), w),
    "@": lambda w: torch.ones(D, D) @ w,
    "+": lambda w: torch.ones(D) + w,
    "cat": lambda w: torch.cat([torch.ones(1, D), w]),
    "norm": lambda w: torch.linalg.norm(w),
    "T": lambda w: w.T,
    "mean": lambda w: w.mean(),
    "grad": lambda w: w.grad,
}


@pytest.mark.parametrize("name", NEEDS_ALL)
def test_what_would_need_the_whole_weight_is_refused(emb, name):
    with pytest.raises(WeightUseError, match=r"this one is on disk.*emb.weight\[ids\].*to_nn_embedding") as caught:
        NEEDS_ALL[name](emb.weight)
    assert isinstance(caught.value, BigembedError)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("std", [0.02, 100.0], ids=["by rejection", "by search"])
def test_a_truncated_normal_is_refused_before_anything_changes(emb, std):
    """nn.init.trunc_normal_ has no way for a weight that is no tensor: it would stop with half of it done."""
    before = weights(emb)
    with pytest.raises(WeightAttributeError, match=r"weight\.normal_\(mean, std\).*by blocks: weight\[a:b\] ="):
        nn.init.trunc_normal_(emb.weight, std=std)
    assert torch.equal(weights(emb), before)
    emb.weight[0:9] = nn.init.trunc_normal_(torch.empty(9, D), std=std)
    assert not torch.equal(weights(emb)[:9], before[:9])


def test_tying_a_weight_is_refused(emb):
    with pytest.raises(TypeError, match="WeightView"):
        nn.Linear(D, V).weight = emb.weight


@pytest.mark.parametrize("trains", [True, False])
def test_to_nn_embedding(emb, trains, monkeypatch):
    monkeypatch.setattr("bigembed.nn.weight.STREAM_BYTES", 7 * 4 * D)
    emb.padding_idx = 5
    plain = emb.requires_grad_(trains).to_nn_embedding()
    assert type(plain) is nn.Embedding
    assert type(plain.weight.data) is torch.Tensor
    assert plain.padding_idx == 5
    assert plain.weight.requires_grad == trains
    assert torch.equal(plain.weight, weights(emb))
    before = weights(emb)
    with torch.no_grad():
        plain.weight.zero_()
    assert torch.equal(weights(emb), before)
