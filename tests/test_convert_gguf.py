"""GGUF: what the gguf package writes is read as the package itself dequantises it; headers that lie are refused."""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reading import peak_mib_above_import, read_all

from bigembed.convert import gguf_file, gguf_header
from bigembed.convert.source import ReadOptions, Source
from bigembed.errors import BadSource, InvalidArgument, MissingLibrary

gguf = pytest.importorskip("gguf")

QUANTISED = [
    each.name
    for each in gguf.GGMLQuantizationType
    if each in gguf.quants._type_traits and each.name not in gguf_file.PLAIN
]
VALUES = np.random.default_rng(0).standard_normal((23, 512)).astype("f4")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigembed.convert.ahead.BLOCK_BYTES", 4 * 512 * 7)
    monkeypatch.setattr("bigembed.convert.gguf_file.GRAIN_ROWS", 2)


def opened(path: Path, **options: Any) -> Source:
    assert gguf_file.recognise(path.read_bytes()[:4096], str(path)) == "gguf"
    return gguf_file.open_source(str(path), "gguf", ReadOptions(**options))


def saved(path: Path, tensors: dict[str, Any], tokens: list[Any] | None = None, **values: Any) -> Path:
    """Tensors are arrays, or (bytes as an array, type's name)."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("scores", [0.5, 1.5])
    for key, value in values.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(key.replace("__", "."), value)
    if tokens is not None:
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))
    for name, tensor in tensors.items():
        array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, array, raw_dtype=None if kind is None else gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_rows(kind: str, rows: int = 23, dim: int = 512) -> np.ndarray:
    """Any bytes are quantised rows."""
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return np.random.default_rng(1).integers(0, 256, (rows, dim // block_values * block_bytes), dtype=np.uint8)


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "i1", "i2", "i4", "i8"])
def test_plain_numbers(tmp_path: Path, dtype: str) -> None:
    values = (VALUES * 20).astype(dtype)
    source = opened(saved(tmp_path / "a.gguf", {"token_embd.weight": values, "other": values}))
    assert (source.num_rows, source.dim, source.dtype) == (23, 512, values.dtype.name)
    np.testing.assert_array_equal(read_all(source)[0], values.astype("f4"))


def test_bfloat16(tmp_path: Path) -> None:
    stored = gguf.quants.quantize(VALUES, gguf.GGMLQuantizationType.BF16)
    source = opened(saved(tmp_path / "a.gguf", {"token_embd.weight": (stored, "BF16")}))
    assert source.dtype == "bfloat16"
    np.testing.assert_array_equal(read_all(source)[0], gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.BF16))


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_types(tmp_path: Path, kind: str) -> None:
    stored = random_rows(kind)
    source = opened(saved(tmp_path / "a.gguf", {"token_embd.weight": (stored, kind)}))
    assert (source.num_rows, source.dim, source.dtype) == (23, 512, kind)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(read_all(source)[0], expected)


def test_there_are_quantised_types() -> None:
    assert {"Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4"} <= set(QUANTISED)


def test_a_type_that_the_package_cannot_dequantise(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.gguf", {"token_embd.weight": (random_rows("Q8_K"), "Q8_K")})
    with pytest.raises(BadSource, match="Q8_K: the gguf package cannot dequantise this type"):
        opened(path)


def test_tokens_are_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigembed.convert.gguf_header.BATCH_TOKENS", 5)
    tokens = [f"▁w{row}".encode() for row in range(20)] + [b"", b"\xff\x00"]
    source = opened(saved(tmp_path / "a.gguf", {"token_embd.weight": VALUES}, tokens))
    whole, found = read_all(source)
    np.testing.assert_array_equal(whole, VALUES)
    assert found == [*tokens, None]
    assert source.notes[-1].startswith("The vocabulary has the 22 tokens of tokenizer.ggml.tokens")


@pytest.mark.parametrize("count", [24, 11])
def test_tokens_of_another_table_are_left_out(tmp_path: Path, count: int) -> None:
    source = opened(saved(tmp_path / "a.gguf", {"token_embd.weight": VALUES}, ["t"] * count))
    assert read_all(source)[1] == [None] * 23
    assert source.notes == [f"The model's {count} tokens were left out: the table has 23 rows."]


def test_the_input_embedding_among_others(tmp_path: Path) -> None:
    tensors = {"output.weight": VALUES + 1, "token_embd.weight": VALUES, "per_layer_token_embd.weight": VALUES + 2}
    path = saved(tmp_path / "a.gguf", {**tensors, "norm.weight": np.ones(4, "f4"), "cube": np.ones((2, 3, 4), "f4")})
    source = opened(path)
    np.testing.assert_array_equal(read_all(source)[0], VALUES)
    assert source.facts == {"tensor": "token_embd.weight"}
    for name, expected in tensors.items():
        np.testing.assert_array_equal(read_all(opened(path, tensor=name))[0], expected)
    with pytest.raises(BadSource, match=r"cube cannot be a table: its shape is \(2, 3, 4\)"):
        opened(path, tensor="cube")
    with pytest.raises(InvalidArgument, match=r"holds no 'x'; it holds:\n  token_embd.weight  \(23, 512\)  float32"):
        opened(path, tensor="x")


def test_a_part_of_a_split_model(tmp_path: Path) -> None:
    split = {"split__count": 3, "split__no": 1}
    path = saved(tmp_path / "a-00002-of-00003.gguf", {"blk.1.up": VALUES, "blk.1.down": VALUES}, **split)
    with pytest.raises(
        InvalidArgument, match="this is part 2 of 3: name the part that holds the table, mostly the first"
    ):
        opened(path)
    first = saved(tmp_path / "a-00001-of-00003.gguf", {"token_embd.weight": VALUES, "b": VALUES}, **split)
    np.testing.assert_array_equal(read_all(opened(first))[0], VALUES)


def test_an_alignment_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("small", np.ones((3, 5), "f4"))
    writer.add_tensor("token_embd.weight", VALUES)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(read_all(opened(path))[0], VALUES)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_every_cut_is_found(tmp_path: Path, kind: str) -> None:
    stored = VALUES[:2, :32] if kind == "F32" else random_rows(kind, 2, 32)
    whole = saved(tmp_path / "whole.gguf", {"token_embd.weight": (stored, kind)}, ["a", "bc"], some__text="yes")
    content, path = whole.read_bytes(), tmp_path / "cut.gguf"
    (tensor,) = gguf_header.read_header(str(whole)).tensors
    for length in range(tensor.offset + stored.nbytes):  # what follows is padding
        path.write_bytes(content[:length])
        with pytest.raises(BadSource, match=r"cut\.gguf, byte"):
            gguf_file.open_source(str(path), "gguf", ReadOptions())


def header(*values: bytes, tensors: bytes = b"", version: int = 3, counts: tuple[int, int] | None = None) -> bytes:
    num_tensors, num_values = counts or (int(bool(tensors)), len(values))
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_values) + b"".join(values) + tensors


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def tensor_entry(dims: list[int], kind: int = 0, offset: int = 0, num_dims: int | None = None) -> bytes:
    packed = struct.pack(f"<I{len(dims)}QIQ", len(dims) if num_dims is None else num_dims, *dims, kind, offset)
    return text(b"token_embd.weight") + packed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(40), "a GGUF file begins with"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(version=1), "version 1 of the format cannot be read"),
        (header(counts=(1 << 60, 0)), "at most 1048576 are possible"),
        (header(counts=(0, 1 << 60)), "at most 1048576 are possible"),
        (header(counts=(0, 1)), "bytes should follow"),
        (header(struct.pack("<Q", 1 << 63)), "a name of 9223372036854775808 bytes"),
        (header(text(b"k") + struct.pack("<I", 77)), "metadata of type 77"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "a list of type 9, which cannot be read"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60)), "a list of 1152921504606846976 strings"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 62)), "bytes should follow, 0 do"),
        (header(text(b"k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 63)), "bytes should follow, 0 do"),
        (header(text(b"k") + struct.pack("<IQ", 8, 1 << 63)), "bytes should follow, 0 do"),
        (header(text(b"general.alignment") + struct.pack("<II", 4, 0)), "general.alignment is 0"),
        (header(tensors=tensor_entry([1], num_dims=1 << 31)), "has 2147483648 dimensions"),
        (header(tensors=tensor_entry([4, 1 << 62])), "a table has at least one"),
        (header(tensors=tensor_entry([1 << 62, 4])), "a table has at least one"),
        (header(tensors=tensor_entry([4, 1 << 40])), "but the file has only"),
        (header(tensors=tensor_entry([4, 4], offset=1 << 63)), "but the file has only"),
        (header(tensors=tensor_entry([4, 4], kind=8)), "4 columns are no multiple of Q8_0's 32 values"),
        (header(tensors=tensor_entry([32, 1 << 40], kind=8)), "but the file has only"),
        (header(tensors=tensor_entry([32, 4], kind=999)), "nothing in it is a table"),
        (header(tensors=tensor_entry([0, 4])), "a table has at least one"),
        (header(tensors=tensor_entry([4, 0], kind=8)), "a table has at least one"),
        (header(), "it holds:\n  nothing"),
    ],
)
def test_headers_that_lie(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(BadSource, match=message):
        gguf_file.open_source(str(path), "gguf", ReadOptions())


def test_values_of_every_scalar_type(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kinds = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64", "bool"]
    for kind in kinds:
        getattr(writer, f"add_{kind}")(kind, 1)
    writer.add_string("text", "é")
    writer.add_string("long", "x" * 70_000)
    writer.add_array("words", ["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values = gguf_header.read_header(str(path)).values
    assert {kind: values[kind] for kind in kinds} == dict.fromkeys(kinds, 1)
    assert (values["text"], values["long"], values["words"].count) == ("é", None, 2)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.gguf", {"token_embd.weight": VALUES})
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(
        MissingLibrary, match=r"GGUF files are read with the library 'gguf'.*pip install 'bigembed\[convert\]'"
    ):
        opened(path)


def test_memory_is_bounded(tmp_path: Path) -> None:
    tokens = text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 300_000) + text(b"token") * 300_000
    entry = tensor_entry([256, 300_000], kind=8)
    path = tmp_path / "a.gguf"
    path.write_bytes(header(tokens, tensors=entry))
    os.truncate(path, path.stat().st_size + 32 + 300_000 * 8 * 34)
    assert peak_mib_above_import("gguf_file", path, "import gguf") < 100
