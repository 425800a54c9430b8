"""Every mistake at the module's border: the type torch would raise too, a text that helps, a table left as it was."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn
from training import rows_and_state, small_embedding, small_table

import bigembed
from bigembed import optim
from bigembed.errors import (
    BigembedError,
    InvalidArgument,
    InvalidIds,
    NoOptimizer,
    ReadOnlyTable,
    RowOutOfRange,
    StateMismatch,
    TableExists,
    TableMissing,
)

V, D = 50, 4


@contextlib.contextmanager
def refused(error, *texts, also=None):
    """The block raises `error`, which is one of ours and the builtin `also`, with all the texts in its message."""
    with pytest.raises(error) as caught:
        yield
    assert isinstance(caught.value, BigembedError)
    assert also is None or isinstance(caught.value, also)
    for text in texts:
        assert text in str(caught.value)


def torchs_error(call):
    """The type that torch raises for the same call."""
    try:
        call()
    except Exception as error:
        return type(error)
    raise AssertionError("torch takes this")


@pytest.fixture(params=[3, None], ids=["3 rows cached", "all rows cached"])
def emb(request, tmp_path):
    """A module whose table is compared afterwards: no mistake may change it."""
    emb = small_embedding(tmp_path, cache_rows=request.param)
    opt = optim.RowwiseAdagrad(emb)
    emb(torch.tensor([1, 2, 3, 49])).sum().backward()
    opt.step()
    opt.zero_grad()
    emb.opt = opt
    before, scalars = rows_and_state(emb).tobytes(), dict(emb.table.scalars)
    yield emb
    assert rows_and_state(emb).tobytes() == before
    assert emb.table.scalars == scalars
    emb.trainable.cache._check()
    opt.step()
    assert rows_and_state(emb).tobytes() == before


# -- ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.int16, torch.bool, torch.complex64])
def test_ids_of_another_dtype(emb, dtype):
    ids = torch.ones(3, dtype=dtype)
    also = torchs_error(lambda: nn.Embedding(V, D)(ids))
    with refused(InvalidIds, f"ids have dtype {dtype}", "int64 or int32", "ids.long()", also=also):
        emb(ids)


@pytest.mark.parametrize("ids", [[1, 2], 3, np.array([1, 2]), None], ids=["list", "int", "array", "None"])
def test_ids_that_are_no_tensor(emb, ids):
    also = torchs_error(lambda: nn.Embedding(V, D)(ids))
    with refused(InvalidIds, f"not {type(ids).__name__}", "torch.tensor(ids)", also=also):
        emb(ids)


@pytest.mark.parametrize(
    ("ids", "value", "position"),
    [
        ([V], V, 0),
        ([3, 1, V + 7, V], V + 7, 2),
        ([[1, 2], [3, -1]], -1, 3),
        ([0, 2**40, -(2**40)], 2**40, 1),
        ([-(2**63)], -(2**63), 0),
    ],
)
def test_ids_out_of_range(emb, ids, value, position):
    also = torchs_error(lambda: nn.Embedding(V, D)(torch.tensor(ids)))
    texts = f"ids contain {value} (at position {position})", "has 50 rows", "valid ids are 0 to 49", "grow the table"
    with refused(RowOutOfRange, *texts, also=also):
        emb(torch.tensor(ids))
    with torch.no_grad(), refused(RowOutOfRange, *texts, also=IndexError):
        emb(torch.tensor(ids))
    if abs(value) < 2**31:
        with refused(RowOutOfRange, *texts):
            emb(torch.tensor(ids, dtype=torch.int32))


def test_ids_elsewhere(emb):
    with refused(InvalidIds, "ids are on meta", "ids.cpu()"):
        emb(torch.ones(3, dtype=torch.int64, device="meta"))


# -- making a module --------------------------------------------------------------------------------------------

TORCH_ASSERTS = {
    "padding_idx too large": ({"padding_idx": V}, ("Padding_idx must be within num_embeddings", "50", "-50 to 49")),
    "padding_idx too small": ({"padding_idx": -V - 1}, ("Padding_idx must be within num_embeddings", "-51")),
    "_weight": ({"_weight": torch.zeros(V, D + 1)}, ("_weight has shape (50, 5)", "(50, 4) was expected")),
    "_weight of 1-D": ({"_weight": torch.zeros(V)}, ("_weight has shape (50,)", "(50, 4) was expected")),
}


@pytest.mark.parametrize("name", TORCH_ASSERTS)
def test_what_torch_asserts(tmp_path, name):
    facts, texts = TORCH_ASSERTS[name]
    also = torchs_error(lambda: nn.Embedding(V, D, **facts))
    assert also is AssertionError
    with refused(InvalidArgument, *texts, also=also):
        bigembed.Embedding(V, D, **facts, path=tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("rows", [torch.zeros(3), torch.zeros(2, 3, 4)])
def test_pretrained_rows_that_are_no_matrix(rows):
    also = torchs_error(lambda: nn.Embedding.from_pretrained(rows))
    with refused(InvalidArgument, "expected to be 2-dimensional", f"not {rows.dim()}", also=also):
        bigembed.Embedding.from_pretrained(rows)


REFUSED_FACTS = {
    "device cuda:99": ({"device": "cuda:99"}, ("device 'cuda:99'", "torch finds")),
    "no device": ({"device": "gpu"}, ("device='gpu' is no device", "'cuda'")),
    "host_cache_bytes": ({"host_cache_bytes": 1 << 20}, ("host_cache_bytes=1048576", "use cache_bytes")),
    "device meta": ({"device": torch.device("meta")}, ("takes none", "Leave device out")),
    "float16": ({"dtype": torch.float16}, ("dtype torch.float16 is not supported", "torch.float32")),
    "int64": ({"dtype": torch.int64}, ("dtype torch.int64 is not supported", "torch.float32")),
    "cache_bytes": ({"cache_bytes": 0}, ("cache_bytes must be positive, not 0",)),
    "journal_bytes": ({"journal_bytes": 0}, ("journal_bytes", "0")),
    "init": ({"init": "xavier"}, ("init='xavier' is unknown", "'normal'")),
    "seed": ({"seed": -1}, ("seed must be at least 0", "-1")),
    "seed of another type": ({"seed": 1.5}, ("seed must be an integer, not 1.5",)),
    "padding_idx of another type": ({"padding_idx": 1.5}, ("padding_idx must be an integer, not 1.5",)),
}


@pytest.mark.parametrize("name", REFUSED_FACTS)
def test_facts_that_are_not_supported(tmp_path, name):
    facts, texts = REFUSED_FACTS[name]
    with refused(InvalidArgument, *texts, also=ValueError):
        bigembed.Embedding(V, D, **facts, path=tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "dim", "text"),
    [
        (0, D, "num_rows must be between 1 and 2**48, not 0"),
        (-5, D, "-5"),
        (2**48 + 1, D, "2**48"),
        (1e6, D, "num_embeddings must be an integer, not 1000000.0"),
        ("50", D, "num_embeddings must be an integer, not '50'"),
        (V, 0, "dim 0"),
        (V, -1, "dim -1"),
        (V, 2.5, "embedding_dim must be an integer, not 2.5"),
    ],
)
def test_sizes_that_cannot_be(tmp_path, rows, dim, text):
    with refused(InvalidArgument, text, also=ValueError):
        bigembed.Embedding(rows, dim, path=tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_integers_of_numpy_are_integers():
    emb = bigembed.Embedding(np.int64(V), np.int32(D), np.int8(-1))
    assert (emb.num_embeddings, emb.embedding_dim, emb.padding_idx) == (V, D, 49)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_moving_to_a_device_that_is_not_there(emb):
    with pytest.raises(torchs_error(lambda: nn.Embedding(V, D).to("cuda"))):
        emb.to("cuda")
    assert emb.handle.device.type == "cpu"


def test_paths(tmp_path):
    (tmp_path / "file").write_text("text")
    with refused(TableMissing, "does not exist", "Table.create", also=FileNotFoundError):
        bigembed.Embedding.open(tmp_path / "none")
    with refused(TableMissing, "does not exist", also=FileNotFoundError):
        bigembed.Embedding.from_pretrained(tmp_path / "none")
    with refused(TableExists, "exists", "choose another path", also=FileExistsError):
        bigembed.Embedding(V, D, path=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "text"
    with refused(InvalidArgument, "Padding_idx", also=AssertionError):
        bigembed.Embedding.open(small_table(tmp_path), padding_idx=V)
    with refused(InvalidArgument, "cache_bytes must be positive, not -1"):
        bigembed.Embedding.open(small_table(tmp_path), cache_bytes=-1)
    with refused(InvalidArgument, "capacity_rows must be at least 1, not 0"):
        bigembed.Embedding.open(small_table(tmp_path), cache_rows=0)
    with refused(InvalidArgument, "mode='w' is unknown", "'r+'"):
        bigembed.Embedding.open(tmp_path / "none", mode="w")


# -- training ---------------------------------------------------------------------------------------------------


def test_a_backward_without_an_optimizer(tmp_path):
    emb = small_embedding(tmp_path)
    before = rows_and_state(emb).tobytes()
    for _ in range(2):
        with refused(NoOptimizer, emb.table.path, "bigembed.optim", "requires_grad_(False)", also=RuntimeError):
            emb(torch.tensor([1])).sum().backward()
    opt = optim.SGD(emb, lr=1.0)
    opt.step()
    assert rows_and_state(emb).tobytes() == before, "nothing of the refused gradients is left"


def test_torchs_optimizer_alone_is_not_enough(tmp_path):
    emb = small_embedding(tmp_path)
    torch.optim.SGD(emb.parameters(), lr=1.0)
    with refused(NoOptimizer, "torch's own optimizers cannot update rows on disk"):
        emb(torch.tensor([1])).sum().backward()


@pytest.mark.parametrize(
    ("modules", "texts"),
    [
        (lambda emb: emb.parameters(), ("a Parameter is no module", "take modules")),
        (lambda emb: list(emb.parameters()), ("a Parameter is no module", "take modules")),
        (lambda emb: emb.handle, ("no module",)),
        (lambda emb: [emb, nn.Parameter(torch.zeros(1))], ("a Parameter is no module",)),
        (lambda emb: [{"params": emb.parameters()}], ("a Parameter is no module",)),
        (lambda emb: nn.Linear(2, 2), ("Linear holds no bigembed module", "Pass the Embedding")),
        (lambda emb: nn.Embedding(2, 2), ("Embedding holds no bigembed module",)),
        (lambda emb: [], ("list holds no bigembed module",)),
        (lambda emb: 5, ("int is no module", "pass the Embedding")),
        (lambda emb: emb.table, ("a Table is no module", "pass the Embedding")),
    ],
)
def test_optimizers_take_modules(emb, modules, texts):
    with refused(InvalidArgument, *texts, also=ValueError):
        optim.SGD(modules(emb), lr=0.5)
    assert emb.trainable.attached is emb.opt


def test_another_rule_than_the_tables(emb):
    texts = "hold the state of rowwise_adagrad, not of adam", "reset_state=True", emb.table.path
    with refused(StateMismatch, *texts, also=ValueError):
        optim.Adam(emb)
    assert emb.trainable.attached is emb.opt


@pytest.mark.parametrize("make", [optim.SGD, optim.RowwiseAdagrad, optim.Adam])
def test_an_optimizer_of_a_read_only_table(tmp_path, make):
    bigembed.Table.create(tmp_path / "t", V, D).close()
    emb = bigembed.Embedding.open(tmp_path / "t", mode="r")
    with refused(ReadOnlyTable, "mode='r'", "mode='r+'", also=RuntimeError):
        make(emb)
    with refused(ReadOnlyTable, "mode='r'"):
        make(emb, reset_state=True)
    with refused(ReadOnlyTable, "mode='r'"):
        emb.commit()
    assert emb.trainable.attached is None
    assert not emb(torch.tensor([1])).requires_grad


def test_a_payload_that_json_cannot_hold(emb):
    generation = emb.table.generation
    with refused(InvalidArgument, "payload", "JSON"):
        emb.commit("x", payload={1, 2})
    assert emb.table.generation == generation


def test_every_error_is_a_builtin_too():
    """What a user of torch would catch."""
    found = {cls for cls in vars(bigembed.errors).values() if isinstance(cls, type)}
    for error in found - {BigembedError}:
        assert issubclass(error, BigembedError)
        builtins = OSError | ValueError | RuntimeError | LookupError | TypeError | ImportError
        assert issubclass(error, builtins), error
