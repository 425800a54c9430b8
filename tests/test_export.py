"""export: the rows of the last commit, bit for bit, in every format; whole or not at all; in bounded memory."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from bigembed.convert import export as module
from bigembed.convert.export import export
from bigembed.convert.writers.formats import WRITE_FORMATS
from bigembed.convert.writers.vocab_text import read_vocab_lines
from bigembed.errors import (
    InvalidArgument,
    TableExists,
    TableMissing,
    TableMoved,
    UnknownFormat,
)
from bigembed.spec import StateColumns
from bigembed.storage.table import Table
from bigembed.vocab.vocabulary import Vocabulary

V, D = 5000, 6
SUFFIXES = {
    "word2vec-text": ".vec",
    "glove": ".glove",
    "word2vec-binary": ".bin",
    "npy": ".npy",
    "safetensors": ".safetensors",
    "torch": ".pt",
}


def give_tokens(path, listed):
    """Row r gets the token listed[r]; None gives it none."""
    rows = [row for row, token in enumerate(listed) if token is not None]
    with Table.open(path) as table:
        Vocabulary.create(table, [listed[row] for row in rows], rows)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Two tables with rows in the base, in the journal and never written; the second one's tokens are all "x"."""
    folder = tmp_path_factory.mktemp("templates")
    rng = np.random.default_rng(0)
    with Table.create(folder / "plain", V, D, init="normal", seed=3, chunk_rows=4096) as table:
        table.write(np.arange(1000, 4500), rng.standard_normal((3500, D)).astype(np.float32))
        table.commit("base")
        table.merge()
        table.write(np.arange(500, 1500), rng.standard_normal((1000, D)).astype(np.float32))
        table.commit("journal")
    shutil.copytree(folder / "plain", folder / "named")
    give_tokens(folder / "named", [b"x"] * V)
    return folder


@pytest.fixture
def path(templates, tmp_path):
    return shutil.copytree(templates / "plain", str(tmp_path / "t.bigembed"))


@pytest.fixture
def named(templates, tmp_path):
    return shutil.copytree(templates / "named", str(tmp_path / "t.bigembed"))


def rows_of(path):
    with Table.open(path, mode="r") as table:
        return table.read(np.arange(table.shape[0]))


def read_back(target, format):
    """(values, tokens) as other tools read them."""
    if format == "npy":
        return np.load(target), None
    if format == "torch":
        return torch.load(target, weights_only=True)["weight"].numpy(), None
    if format == "safetensors":
        return pytest.importorskip("safetensors.numpy").load_file(target)["embedding.weight"], None
    models = pytest.importorskip("gensim.models")
    loaded = models.KeyedVectors.load_word2vec_format(
        target, binary=format == "word2vec-binary", no_header=format == "glove"
    )
    return loaded.vectors, [key.encode() for key in loaded.index_to_key]


@pytest.mark.parametrize("format", WRITE_FORMATS)
def test_every_format_holds_the_rows_bit_for_bit(path, tmp_path, monkeypatch, format):
    monkeypatch.setattr(module, "BLOCK_BYTES", 20_000)
    target = str(tmp_path / "rows") + SUFFIXES[format]
    report = export(path, target, format=None if format != "glove" else format)
    values, tokens = read_back(target, format)
    assert values.tobytes() == rows_of(path).tobytes()
    if tokens is not None:
        assert tokens == [b"%d" % row for row in range(V)]
    assert (report.format, report.rows, report.dim, report.dtype) == (format, V, D, "float32")
    assert (report.files, report.size_bytes) == ([target], os.path.getsize(target))
    assert report.generation == 2
    assert [("its number" in note) for note in report.notes] == ([True] if tokens else [])
    assert sorted(os.listdir(tmp_path)) == sorted([os.path.basename(target), "t.bigembed"])


@pytest.mark.parametrize("state_dim", [0, 1, 12])
def test_optimizer_state_stays_behind(tmp_path, state_dim):
    path = str(tmp_path / "t")
    with Table.create(path, 100, D, state_dim=state_dim) as table:
        table.write(np.arange(50), np.ones((50, D), np.float32))
        table.commit()
    export(path, tmp_path / "x.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), rows_of(path))


@pytest.mark.parametrize("format", WRITE_FORMATS)
def test_tokens_go_along(path, tmp_path, monkeypatch, format):
    monkeypatch.setattr(module, "MAX_BLOCK_ROWS", 700)
    tokens = [b"word%d" % row for row in range(V)]
    tokens[7], tokens[699], tokens[4999], tokens[100] = None, None, None, "ü\xff".encode()
    give_tokens(path, tokens)
    target = str(tmp_path / "rows") + SUFFIXES[format]
    report = export(path, target, format=format)
    expected = [b"row:%d" % row if token is None else token for row, token in enumerate(tokens)]
    values, found = read_back(target, format)
    assert values.tobytes() == rows_of(path).tobytes()
    if found is None:
        assert report.files == [target, target + ".vocab.txt"]
        found = [token for block in read_vocab_lines(target + ".vocab.txt") for token in block.to_list()]
    assert found == expected
    assert report.notes == []
    assert report.size_bytes == sum(os.path.getsize(file) for file in report.files)


def test_an_empty_token_is_not_a_missing_one(tmp_path):
    path = str(tmp_path / "t")
    Table.create(path, 3, D).close()
    give_tokens(path, [b"", None, b"x"])
    export(path, tmp_path / "x.npy")
    assert (tmp_path / "x.npy.vocab.txt").read_bytes() == b"\nrow:1\nx\n"


def test_a_token_that_the_format_cannot_hold(tmp_path):
    path = str(tmp_path / "t")
    Table.create(path, 3, D).close()
    give_tokens(path, [b"a", b"b c", b"d"])
    with pytest.raises(InvalidArgument) as caught:
        export(path, tmp_path / "x.vec")
    assert "row 1 has the token b'b c'" in str(caught.value)
    assert os.listdir(tmp_path) == ["t"]
    export(path, tmp_path / "x.txt", format="glove")


def test_tokens_that_were_added_and_tokens_that_come_twice(tmp_path):
    path = str(tmp_path / "t")
    with Table.create(path, 3, D) as table:
        vocab = Vocabulary.create(table, ["a", "b", "a"])
        table.commit()
        assert vocab.add(["c", "b"]).tolist() == [3, 1]
        table.commit()
        vocab.add(["not committed"])
        table.rollback()
    export(path, tmp_path / "x.npy")
    assert (tmp_path / "x.npy.vocab.txt").read_bytes() == b"a\nb\na\nc\n"


@pytest.mark.parametrize("limit", [1, 4999, 5000, 10_000])
def test_limit_takes_the_first_rows(path, tmp_path, limit):
    report = export(path, tmp_path / "x.npy", limit=limit)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), rows_of(path)[:limit])
    assert report.rows == min(limit, V)


def test_narrow_types_and_names_are_passed_on(path, tmp_path):
    with Table.open(path) as table:
        table.write([0], np.array([[1e5, -1e5, np.inf, 1, 1, 1]], np.float32))
        table.commit()
    report = export(path, tmp_path / "x.pt", dtype="float16", tensor="emb.weight")
    found = torch.load(tmp_path / "x.pt", weights_only=True)["emb.weight"]
    assert torch.equal(found, torch.from_numpy(rows_of(path)).half())
    assert report.notes == [
        "1 rows hold NaN or infinity; they are written as they are (text that holds them cannot be converted again).",
        "2 values are beyond the range of float16 and became infinite.",
    ]


def test_parts(named, tmp_path):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    report = export(named, tmp_path / "model", part_bytes=30_000)
    names = sorted(name for name in os.listdir(tmp_path / "model") if name.endswith(".safetensors"))
    assert len(names) > 3
    found = [load_file(tmp_path / "model" / name)[f"embedding.weight.{n}"] for n, name in enumerate(names)]
    assert np.concatenate(found).tobytes() == rows_of(named).tobytes()
    assert report.format == "safetensors"
    assert len(report.files) == len(names) + 2
    export(named, tmp_path / "model", part_bytes=1 << 20, overwrite=True)
    names = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert sorted(os.listdir(tmp_path / "model")) == names


def test_progress_counts_rows(path, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK_ROWS", 2000)
    seen = []
    export(path, tmp_path / "x.npy", progress=lambda *step: seen.append(step))
    assert seen == [(2000, V), (4000, V), (5000, V)]


@pytest.mark.parametrize("format", WRITE_FORMATS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [1, 3])
def test_an_error_anywhere_leaves_nothing(named, tmp_path, monkeypatch, format, error, at):
    monkeypatch.setattr(module, "MAX_BLOCK_ROWS", 2000)
    calls = []

    def fail(done, total):
        calls.append(done)
        if len(calls) == at:
            raise error

    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error):
        export(named, tmp_path / "x", format=format, progress=fail)
    assert os.listdir(tmp_path) == ["t.bigembed"]
    assert len(os.listdir("/proc/self/fd")) == open_files


INTERRUPTED = """
import os, signal, sys
from bigembed.convert import export as module
module.MAX_BLOCK_ROWS = 500
def show(done, total):
    if done >= 2000:
        os.kill(os.getpid(), signal.SIGINT)
module.export(sys.argv[1], sys.argv[2], progress=show)
"""


@pytest.mark.parametrize("name", ["x.npy", "x.vec"])
def test_ctrl_c_leaves_nothing(path, tmp_path, name):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, path, tmp_path / name], capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr
    assert os.listdir(tmp_path) == ["t.bigembed"]


# --- beside a writer


@pytest.mark.parametrize(
    "change",
    [
        lambda table: (table.write([1], np.ones((1, D), np.float32)), table.commit()),
        lambda table: (table.grow(V + 1), table.commit()),
        lambda table: table.rollback(table.generations()[0].number),
        lambda table: table.set_state("Adam", (StateColumns("m", D), StateColumns("v", D))),
        lambda table: table.publish(),
    ],
    ids=["commit", "grow", "rollback", "set_state", "publish"],
)
@pytest.mark.parametrize("at", [1, 3])
def test_a_commit_meanwhile_is_an_error(path, tmp_path, monkeypatch, change, at):
    """Rows of two commits must never stand in one file."""
    monkeypatch.setattr(module, "MAX_BLOCK_ROWS", 2000)
    with Table.open(path) as writer:
        writer.write([3], np.ones((1, D), np.float32))
        writer.commit("to go back to")
        writer.write([4], np.ones((1, D), np.float32))
        writer.merge()  # commits by itself, so that there are two generations
        left = [at]

        def go_on(done, total):
            left[0] -= 1
            if left[0] == 0:
                change(writer)

        with pytest.raises(TableMoved) as caught:
            export(path, tmp_path / "x.npy", progress=go_on)
        assert "export again while no writer commits" in str(caught.value)
        assert "generation" in str(caught.value)
        assert sorted(os.listdir(tmp_path)) == ["t.bigembed"]


def test_what_is_uncommitted_or_only_merged_does_not_matter(path, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK_ROWS", 2000)
    committed = rows_of(path)
    with Table.open(path) as writer:
        writer.merge()
        writer.write([1, 4999], np.ones((2, D), np.float32))
        export(path, tmp_path / "x.npy", progress=lambda *step: writer.write([2, 4000], np.ones((2, D), np.float32)))
        writer.rollback()
    assert np.load(tmp_path / "x.npy").tobytes() == committed.tobytes()


def test_a_merge_meanwhile_does_not_matter(path, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK_ROWS", 600)
    committed = rows_of(path)
    with Table.open(path) as writer:
        export(path, tmp_path / "x.npy", progress=lambda *step: writer.merge())
    assert np.load(tmp_path / "x.npy").tobytes() == committed.tobytes()


# --- mistakes


@pytest.mark.parametrize(
    ("target", "options", "error", "text"),
    [
        ("x.unknown", {}, UnknownFormat, "the suffix '.unknown'"),
        ("x", {"format": "csv"}, UnknownFormat, "no format 'csv'"),
        ("x.npy", {"limit": 0}, InvalidArgument, "limit must be at least 1"),
        ("x.npy", {"dtype": "bfloat16"}, InvalidArgument, "cannot be written as npy"),
        ("x.npy", {"format": "npy", "part_bytes": 1 << 20}, InvalidArgument, "only safetensors"),
        ("x.vec", {"dtype": "float16"}, InvalidArgument, "cannot be written as word2vec-text"),
        ("no/x.npy", {}, TableMissing, "is no folder"),
        ("t.bigembed", {"format": "npy"}, TableExists, "exists"),
        ("t.bigembed", {"format": "npy", "overwrite": True}, TableExists, "is a folder"),
        ("t.bigembed", {"part_bytes": 1 << 20, "overwrite": True}, TableExists, "holds"),
    ],
)
def test_mistakes(path, tmp_path, target, options, error, text):
    before = rows_of(path)
    with pytest.raises(error) as caught:
        export(path, tmp_path / target, **options)
    assert text in str(caught.value)
    assert os.listdir(tmp_path) == ["t.bigembed"]
    assert rows_of(path).tobytes() == before.tobytes()


def test_there_is_no_table(tmp_path):
    with pytest.raises(TableMissing):
        export(tmp_path / "no", tmp_path / "x.npy")
    assert os.listdir(tmp_path) == []


PEAK = """
import sys, resource
from bigembed.convert.export import export
def peak():
    return int([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1]) << 10
before = peak()
export(sys.argv[1], sys.argv[2], format=sys.argv[3], dtype=sys.argv[4], limit=int(sys.argv[5]))
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.parametrize(
    ("format", "dtype", "limit"),
    [("safetensors", "bfloat16", 1 << 20), ("torch", "float32", 1 << 20), ("word2vec-text", "float32", 1 << 17)],
)
def test_memory_is_bounded(tmp_path, format, dtype, limit):
    """A table of 256 MiB, whose rows were never written and so take no disk."""
    Table.create(str(tmp_path / "t"), 1 << 20, 64, init="uniform").close()
    command = [sys.executable, "-c", PEAK, str(tmp_path / "t"), str(tmp_path / "x"), format, dtype, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 8 << 20 < int(done.stdout) < 200 << 20
