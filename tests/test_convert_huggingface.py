"""Model folders: where the weights lie, which tensor is taken, and when the tokenizer's tokens belong to it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reading import peak_mib_above_import, read_all

from bigembed.convert import huggingface
from bigembed.convert.source import ReadOptions, Source
from bigembed.convert.tokenizer import TokenRows, read_tokens
from bigembed.errors import BadSource, InvalidArgument

safetensors_torch = pytest.importorskip("safetensors.torch")

ROWS = torch.from_numpy(np.random.default_rng(0).standard_normal((12, 3))).float()
MODEL = {"model.embed_tokens.weight": ROWS, "lm_head.weight": ROWS + 1, "model.norm.weight": torch.ones(3)}


def opened(path: Path, **options: Any) -> Source:
    assert huggingface.recognise(b"", str(path)) == "huggingface"
    return huggingface.open_source(str(path), "huggingface", ReadOptions(**options))


def folder(path: Path, weights: str = "model.safetensors", tensors: Any = None, **files: Any) -> Path:
    """A model's folder; `files` are written as JSON, but for bytes."""
    path.mkdir()
    tensors = MODEL if tensors is None else tensors
    if weights.endswith(".safetensors"):
        safetensors_torch.save_file(tensors, path / weights)
    elif weights:
        torch.save(tensors, path / weights)
    for name, content in {"config__json": {}, **files}.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (path / name.replace("__", ".")).write_bytes(raw)
    return path


def tokens_of(count: int = 12) -> dict[str, int]:
    return {f"Ġw{row}": row for row in range(count)}


@pytest.mark.parametrize("weights", ["model.safetensors", "custom.safetensors", "pytorch_model.bin"])
def test_the_input_embedding_of_a_folder(tmp_path: Path, weights: str) -> None:
    source = opened(folder(tmp_path / "m", weights))
    np.testing.assert_array_equal(read_all(source)[0], ROWS.numpy())
    assert source.facts == {"tensor": "model.embed_tokens.weight"}
    assert source.format == "huggingface"
    assert source.files == [str(tmp_path / "m" / weights)]


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_parts(tmp_path: Path, kind: str) -> None:
    path = folder(tmp_path / "m", "")
    names = [kind.replace(".", f"-0000{n}-of-00003.") for n in (1, 2, 3)]
    for name, (tensor, values) in zip(names, MODEL.items(), strict=True):
        save = safetensors_torch.save_file if kind.endswith("s") else torch.save
        save({tensor: values}, path / name)
    weight_map = dict(zip(MODEL, names, strict=True))
    (path / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = opened(path)
    np.testing.assert_array_equal(read_all(source)[0], ROWS.numpy())
    assert source.files == [str(path / f"{kind}.index.json"), str(path / names[0])]
    np.testing.assert_array_equal(read_all(opened(path, tensor="lm_head.weight"))[0], ROWS.numpy() + 1)
    (path / names[2]).unlink()
    with pytest.raises(BadSource, match="which is missing; download all parts"):
        opened(path)


def test_none_or_several_are_listed(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as error:
        opened(folder(tmp_path / "m", tensors={"a": ROWS, "b": ROWS + 1}))
    assert "none has the name of an input embedding. Say which one with --tensor NAME" in str(error.value)
    assert str(error.value).endswith("  a  (12, 3)  float32\n  b  (12, 3)  float32")
    two = {"encoder.embed_tokens.weight": ROWS, "decoder.embed_tokens.weight": ROWS + 1}
    with pytest.raises(InvalidArgument, match="several have the name of an input embedding"):
        opened(folder(tmp_path / "n", tensors=two))
    assert opened(tmp_path / "m", tensor="b").num_rows == 12


def test_what_is_recognised(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")
    assert huggingface.recognise(b"{}", str(file)) is None
    assert huggingface.recognise(b"", str(tmp_path)) is None
    with pytest.raises(BadSource, match="it holds no weights"):
        huggingface.open_source(str(tmp_path), "huggingface", ReadOptions())
    assert huggingface.recognise(b"", str(tmp_path / "nothing")) is None


BPE = {"model": {"type": "BPE", "vocab": tokens_of(10)}, "added_tokens": [{"id": 10, "content": "<s>"}]}
UNIGRAM = {"model": {"type": "Unigram", "vocab": [["<pad>", 0.0], ["▁a", -1.5], ["b", -2]] * 3}}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer__json": BPE}, [*tokens_of(10), "<s>"]),
        ({"tokenizer__json": UNIGRAM}, ["<pad>", "▁a", "b"] * 3),
        ({"vocab__json": tokens_of(9), "added_tokens__json": {"<x>": 9}}, [*tokens_of(9), "<x>"]),
        ({"vocab__txt": b"[PAD]\r\n##a\nb c\n\n\xff\nd\n"}, ["[PAD]", "##a", "b c", "", b"\xff", "d"]),
        ({"vocab__txt": b"a\nb\nc\nd\ne\nf"}, list("abcdef")),
        ({"tokenizer__json": BPE, "vocab__txt": b"a\nb\n"}, [*tokens_of(10), "<s>"]),
    ],
)
def test_tokens_become_the_vocabulary(tmp_path: Path, files: dict[str, Any], expected: list[Any]) -> None:
    source = opened(folder(tmp_path / "m", **files))
    tokens = read_all(source)[1]
    listed = [each if isinstance(each, bytes) else each.encode() for each in expected]
    assert tokens[: len(listed)] == listed
    assert tokens[len(listed) :] == [None] * (12 - len(listed))
    name = next(iter(files)).replace("__", ".")
    assert f"The vocabulary has the {len(listed)} tokens of {name}" in source.notes[-1]
    assert source.files[-1].endswith(name)


def test_tokens_in_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigembed.convert.tokenizer.BATCH_TOKENS", 5)
    backwards = dict(reversed(tokens_of(12).items()))
    tokens = read_all(opened(folder(tmp_path / "m", vocab__json=backwards)))[1]
    assert tokens == [token.encode() for token in tokens_of(12)]
    found = read_tokens(str(tmp_path / "m"))
    assert isinstance(found, TokenRows)
    assert found.row_M.tolist() == list(range(12))


def test_rows_may_have_gaps_and_two_tokens(tmp_path: Path) -> None:
    vocab = {"a": 0, "b": 3, "c": 3, "d": 5, "e": 7, "f": 9}
    found = read_tokens(str(folder(tmp_path / "m", vocab__json=vocab)))
    assert isinstance(found, TokenRows)
    assert (found.tokens, found.row_M.tolist()) == ([b"a", b"b", b"c", b"d", b"e", b"f"], [0, 3, 3, 5, 7, 9])


def test_lone_surrogates_are_kept(tmp_path: Path) -> None:
    content = b'{"\\ud800": 0, "a": 1}'
    found = read_tokens(str(folder(tmp_path / "m", vocab__json=content)))
    assert isinstance(found, TokenRows)
    assert found.tokens == [b"\xed\xa0\x80", b"a"]


@pytest.mark.parametrize("count", [13, 5])
def test_tokens_of_another_table_are_left_out(tmp_path: Path, count: int) -> None:
    source = opened(folder(tmp_path / "m", vocab__json=tokens_of(count)))
    assert read_all(source)[1] == [None] * 12
    assert source.notes[-1] == (f"The {count} tokens of vocab.json were left out: they go up to row {count - 1} of 12.")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"3", b"\xff", b"[" * 99999),
        *(b'{"a": "0"}', b'{"a": -1}', b'{"a": true}', b'{"a": 1e5}', b'{"a": 1e400}', b'{"a": 99999999999999999999}'),
        b'{"a": ' + b"9" * 5000 + b"}",
        *(b'{"model": {}}', b'{"model": {"vocab": 3}}', b'{"model": {"vocab": [3]}}', b'{"model": {"vocab": [[]]}}'),
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{}]}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": 3}',
    ],
)
@pytest.mark.parametrize("name", ["tokenizer__json", "vocab__json"])
def test_a_broken_tokenizer_costs_the_vocabulary_alone(tmp_path: Path, name: str, content: bytes) -> None:
    source = opened(folder(tmp_path / "m", **{name: content}))
    whole, tokens = read_all(source)
    np.testing.assert_array_equal(whole, ROWS.numpy())
    assert tokens == [None] * 12
    assert source.notes[-1].startswith("The tokenizer's file gives no vocabulary: ")


def test_an_empty_vocabulary(tmp_path: Path) -> None:
    source = opened(folder(tmp_path / "m", vocab__txt=b""))
    assert not source.has_tokens
    assert read_all(source)[1] == [None] * 12


def test_memory_is_bounded(tmp_path: Path) -> None:
    vocab = {f"Ġtoken{row}": row for row in range(200_000)}
    path = folder(tmp_path / "m", "", tokenizer__json={"model": {"vocab": vocab, "merges": list(vocab)}})
    size = 300_000 * 256 * 4
    header = json.dumps({"wte.weight": {"dtype": "F32", "shape": [300_000, 256], "data_offsets": [0, size]}}).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert peak_mib_above_import("huggingface", path) < 200
