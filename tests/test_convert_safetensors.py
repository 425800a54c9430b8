"""Safetensors: what the safetensors library writes is read exactly; headers that lie are refused."""

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reading import peak_mib_above_import, read_all

from bigembed.convert import safetensors_file
from bigembed.convert.source import ReadOptions, Source
from bigembed.errors import BadSource, InvalidArgument

safetensors_torch = pytest.importorskip("safetensors.torch")

DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
DTYPES += ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigembed.convert.ahead.BLOCK_BYTES", 4 * 3 * 7)


def opened(path: Path, **options: Any) -> Source:
    found = safetensors_file.recognise(path.read_bytes()[:4096], str(path))
    assert found is not None
    return safetensors_file.open_source(str(path), found, ReadOptions(**options))


def saved(path: Path, **tensors: Any) -> Path:
    safetensors_torch.save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return path


def written(path: Path, header: Any, content: bytes = b"") -> Path:
    """A file with a header of one's own: an object, or text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def rows(count: int = 50, dim: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dim))) * 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_type(tmp_path: Path, dtype: str) -> None:
    values = rows().abs().to(getattr(torch, dtype))
    source = opened(saved(tmp_path / "a.safetensors", x=values))
    assert (source.num_rows, source.dim, source.dtype) == (50, 3, dtype)
    np.testing.assert_array_equal(read_all(source)[0], values.float().numpy())
    assert source.notes == (["float64 values were rounded to float32."] if dtype == "float64" else [])


def test_the_input_embedding_among_others(tmp_path: Path) -> None:
    values = rows().float()
    path = saved(
        tmp_path / "a.safetensors",
        lm_head__weight=rows(seed=1),
        model__embed_tokens__weight=values,
        model__norm__weight=torch.ones(3),
    )
    source = opened(path)
    np.testing.assert_array_equal(read_all(source)[0], values.numpy())
    assert source.facts == {"tensor": "model.embed_tokens.weight"}
    assert source.notes == ["model.embed_tokens.weight was taken, one of 2 tables in it; --tensor NAME takes another."]
    np.testing.assert_array_equal(read_all(opened(path, tensor="lm_head.weight"))[0], rows(seed=1).float().numpy())


def test_several_tables_are_listed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", a=rows(), b=rows(4, 2).bfloat16(), c=torch.ones(3))
    with pytest.raises(InvalidArgument) as error:
        opened(path)
    assert str(error.value).endswith("a  (50, 3)  float64\n  b  (4, 2)  bfloat16")
    with pytest.raises(BadSource, match=r"c cannot be a table: its shape is \(3,\)"):
        opened(path, tensor="c")


def test_a_table_split_over_many_tensors(tmp_path: Path) -> None:
    parts = {f"ple__ngram_embedding__shard_{n}__weight": rows(10 + n, seed=n).float() for n in range(12)}
    path = saved(tmp_path / "a.safetensors", **parts, norm=torch.ones(3))
    source = opened(path)
    np.testing.assert_array_equal(read_all(source)[0], torch.cat(list(parts.values())).numpy())
    assert source.facts == {"tensor": "ple.ngram_embedding.shard_*.weight"}
    assert source.notes == ["12 tensors ple.ngram_embedding.shard_*.weight were joined, in the order of their numbers."]
    part = opened(path, tensor="ple.ngram_embedding.shard_11.weight")
    np.testing.assert_array_equal(read_all(part)[0], parts["ple__ngram_embedding__shard_11__weight"].numpy())


def test_a_missing_part_is_no_table(tmp_path: Path) -> None:
    parts = {f"shard_{n}": rows(10) for n in (0, 1, 3)}
    with pytest.raises(InvalidArgument, match="holds 3 possible tables"):
        opened(saved(tmp_path / "a.safetensors", **parts))
    with pytest.raises(InvalidArgument, match="without a gap"):
        opened(tmp_path / "a.safetensors", tensor="shard_*")


@pytest.mark.parametrize("shape", [(50,), (50, 1)])
@pytest.mark.parametrize("name", ["embedding__weight_scale", "embedding_scale", "embedding__weight_scale_inv"])
def test_a_scale_for_each_row(tmp_path: Path, shape: tuple[int, ...], name: str) -> None:
    values, scale = rows().to(torch.float8_e4m3fn), torch.rand(shape).bfloat16()
    source = opened(saved(tmp_path / "a.safetensors", embedding__weight=values, **{name: scale}))
    np.testing.assert_array_equal(read_all(source)[0], (values.float() * scale.float().reshape(-1, 1)).numpy())
    assert "Each row of embedding.weight was multiplied by its scale" in source.notes[0]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_all_parts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    parts = {f"ngram__shard_{n}__weight": rows(10, seed=n).to(torch.float8_e5m2) for n in range(3)}
    path = saved(tmp_path / "a.safetensors", **parts, ngram__weight_scale=torch.full(shape, 0.375).bfloat16())
    expected = torch.cat([part.float() for part in parts.values()]) * 0.375
    source = opened(path)
    np.testing.assert_array_equal(read_all(source)[0], expected.numpy())
    assert source.notes[0] == "ngram.shard_*.weight was multiplied by its scale ngram.weight_scale."
    np.testing.assert_array_equal(read_all(opened(path, tensor="ngram.shard_1.weight"))[0], expected[10:20].numpy())


def test_scales_of_parts(tmp_path: Path) -> None:
    parts = {f"ngram__shard_{n}__weight": rows(10, seed=n).to(torch.int8) for n in range(2)}
    scales = {f"ngram__shard_{n}__weight_scale": torch.rand(10, 1) for n in range(2)}
    expected = torch.cat([p.float() * s for p, s in zip(parts.values(), scales.values(), strict=True)])
    path = saved(tmp_path / "a.safetensors", **parts, **scales)
    np.testing.assert_array_equal(read_all(opened(path))[0], expected.numpy())


def test_other_scales_are_told_and_not_applied(tmp_path: Path) -> None:
    values = rows().to(torch.float8_e4m3fn)
    path = saved(tmp_path / "a.safetensors", e__weight=values, e__weight_scale=torch.rand(50, 2))
    source = opened(path)
    np.testing.assert_array_equal(read_all(source)[0], values.float().numpy())
    assert source.notes == [
        "Values of e.weight are not scaled: e.weight_scale (50, 2) is neither one factor nor one for each row."
    ]


def test_parts_listed_by_an_index(tmp_path: Path) -> None:
    parts = {f"t.shard_{n}": rows(10, seed=n).float() for n in range(4)}
    weight_map = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(parts)}
    for part in set(weight_map.values()):
        safetensors_torch.save_file({n: t for n, t in parts.items() if weight_map[n] == part}, tmp_path / part)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    source = opened(path)
    np.testing.assert_array_equal(read_all(source)[0], torch.cat(list(parts.values())).numpy())
    assert source.format == "safetensors-index"
    assert [os.path.basename(each) for each in source.files] == [
        "model.safetensors.index.json",
        "model-0.safetensors",
        "model-1.safetensors",
    ]
    os.unlink(tmp_path / "model-1.safetensors")
    with pytest.raises(BadSource, match=r"it names the file 'model-1\.safetensors', which is missing"):
        opened(path)


def test_an_index_says_which_of_two_namesakes_is_meant(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "c")):
        saved(tmp_path / f"{name}.safetensors", x=rows(seed=number).float(), **{name: torch.ones(2)})
    path = tmp_path / "model.safetensors.index.json"
    weight_map = {"a": "a.safetensors", "x": "b.safetensors", "c": "c.safetensors"}
    path.write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(read_all(opened(path))[0], rows(seed=1).float().numpy())


@pytest.mark.parametrize("part", ["../a.safetensors", "/etc/passwd", "", "..", "x/a.safetensors", 3, None])
def test_an_index_names_files_beside_it_alone(tmp_path: Path, part: Any) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"x": part}}))
    with pytest.raises(BadSource, match=r"model\.safetensors\.index\.json: "):
        opened(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(BadSource, match=r"model\.safetensors\.index\.json"):
        opened(path)


def test_an_index_with_tensors_that_are_nowhere(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", x=rows())
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}))
    with pytest.raises(BadSource, match="1 tensors are in none of its files, the first is 'y'"):
        opened(path)


def test_every_cut_is_found(tmp_path: Path) -> None:
    content = saved(tmp_path / "whole.safetensors", x=rows(4).float(), y=torch.ones(2)).read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(BadSource, match=r"cut\.safetensors"):
            safetensors_file.open_source(str(path), "safetensors", ReadOptions())


@pytest.mark.parametrize(
    "bad",
    [
        entry([2, 3], 0, 23),
        entry([2, 3], 0, 28),
        entry([2, 3], -4, 20),
        entry([2, 3], 24, 0),
        entry([2, 3], 24, 48),
        entry([-2, -3], 0, 24),
        entry([2, 3.0], 0, 24),
        entry([True, 6], 0, 24),
        entry([2, None], 0, 24),
        entry([1 << 62, 1 << 62], 0, 24),
        entry([1 << 64, 0], 0, 0),
        entry([1] * 65, 0, 4),
        entry([4294967296, 4294967296], 0, 0),
        entry([2, 3], 0.0, 24),
        entry([2, 3], 0, 24, dtype=3),
        entry([2, 3], 0, 12, dtype="float32"),
        {"dtype": "F32", "shape": [2, 3]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24, 48]},
        {"dtype": "F32", "shape": "23", "data_offsets": [0, 24]},
        [],
        "x",
        None,
    ],
)
def test_entries_that_are_not_possible(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(BadSource, match="the header's entry of 'x' is not possible in 24 bytes"):
        opened(written(tmp_path / "a.safetensors", {"x": bad}, bytes(24)))


def test_values_that_overlap(tmp_path: Path) -> None:
    header = {"x": entry([2, 3], 0, 24), "y": entry([2, 2], 20, 36)}
    with pytest.raises(BadSource, match="the values of 'y' and 'x' overlap"):
        opened(written(tmp_path / "a.safetensors", header, bytes(36)))
    header = {"x": entry([4, 3], 0, 48), "empty": entry([0, 3], 24, 24), "y": entry([2, 2], 48, 64)}
    assert opened(written(tmp_path / "b.safetensors", header, bytes(64)), tensor="y").num_rows == 2


@pytest.mark.parametrize(
    "header",
    [
        b"{}x",
        b"{  ",
        b'{"x": NaN',
        b"\xff\xfe{}",
        b'{"a":' * 50_000,
        b'{"x": 1, "x": 1}',
        b'{"x": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
    ],
)
def test_headers_that_are_none(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(BadSource, match=r"its JSON cannot be read"):
        safetensors_file.open_source(
            str(written(tmp_path / "a.safetensors", header, bytes(24))), "safetensors", ReadOptions()
        )


@pytest.mark.parametrize("length", [0, 1, 100, 100_000_001, (1 << 64) - 1])
def test_header_lengths_that_are_not_possible(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(20))
    with pytest.raises(BadSource, match=f"the header should have {length} bytes; the file has 30"):
        safetensors_file.open_source(str(path), "safetensors", ReadOptions())


def test_types_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    header = {"x": entry([2, 3], 0, 3, "F4"), "y": entry([2, 3], 4, 28), "s": entry([2, 3], 28, 34, "F8_E8M0")}
    path = written(tmp_path / "a.safetensors", header, bytes(34))
    assert opened(path).facts == {"tensor": "y"}
    with pytest.raises(BadSource, match="x cannot be a table: its values are F4"):
        opened(path, tensor="x")


@pytest.mark.parametrize("shape", [[0, 3], [3, 0]])
def test_tables_without_values(tmp_path: Path, shape: list[int]) -> None:
    with pytest.raises(BadSource, match="a table has at least one"):
        opened(written(tmp_path / "a.safetensors", {"x": entry(shape, 0, 0)}))


def test_what_is_recognised() -> None:
    def of(head: bytes, path: str = "x") -> str | None:
        return safetensors_file.recognise(head, path)

    assert of(struct.pack("<Q", 2) + b"{}") == "safetensors"
    assert of(b'{"weight_map": {"a": "b.safetensors"}}') == "safetensors-index"
    assert of(b"", "model.safetensors.index.json") == "safetensors-index"
    for head in (b"", b"{}", bytes(9), b"12345678{", b'{"weight_map": {"a": "b.bin"}}', b"\x93NUMPY\x01\x00{{{{"):
        assert of(head) is None


def test_many_tensors_open_quickly_enough(tmp_path: Path) -> None:
    header = {f"layers.{n}.experts.{n % 7}.w{n % 3}": entry([2, 3], 24 * n, 24 * n + 24) for n in range(30_000)}
    header["wte.weight"] = entry([2, 3], 24 * 30_000, 24 * 30_001)
    path = written(tmp_path / "a.safetensors", header, bytes(24 * 30_001))
    assert opened(path).facts == {"tensor": "wte.weight"}


def test_memory_is_bounded(tmp_path: Path) -> None:
    rows, dim = 300_000, 256
    size = rows * dim
    header = {"x": entry([rows, dim], 0, size, "F8_E4M3"), "x_scale": entry([rows, 1], size, size + 4 * rows)}
    path = written(tmp_path / "a.safetensors", header)
    os.truncate(path, path.stat().st_size + size + 4 * rows)
    assert math.prod((rows, dim)) == size
    assert peak_mib_above_import("safetensors_file", path) < 100
