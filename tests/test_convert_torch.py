"""Torch's files: what torch.save writes is read exactly, by name; nothing but tensors is ever unpickled."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reading import peak_mib_above_import, read_all

from bigembed.convert import torch_file
from bigembed.convert.source import ReadOptions, Source
from bigembed.errors import BadSource, InvalidArgument

DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
DTYPES += ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigembed.convert.ahead.BLOCK_BYTES", 4 * 3 * 7)
    monkeypatch.setattr("bigembed.convert.torch_file.MAPPED_BYTES", 4 * 3 * 20)


def opened(path: Path, **options: Any) -> Source:
    found = torch_file.recognise(path.read_bytes()[:4096], str(path))
    assert found == "torch"
    return torch_file.open_source(str(path), found, ReadOptions(**options))


def saved(path: Path, value: Any, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def rows(count: int = 50, dim: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dim))) * 20


LEGACY_LACKS = {"float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"}  # torch cannot load what it saved


@pytest.mark.parametrize(
    ("dtype", "legacy"), [(each, old) for each in DTYPES for old in (False, True) if not (old and each in LEGACY_LACKS)]
)
def test_every_number_type(tmp_path: Path, dtype: str, legacy: bool) -> None:
    values = rows().abs().to(getattr(torch, dtype))
    source = opened(saved(tmp_path / "a.pt", values, legacy))
    assert (source.num_rows, source.dim, source.dtype) == (50, 3, dtype)
    np.testing.assert_array_equal(read_all(source)[0], values.float().numpy())
    assert ("read into memory whole" in " ".join(source.notes)) == legacy
    assert ("float64 values were rounded to float32." in source.notes) == (dtype == "float64")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_of_an_embedding(tmp_path: Path, legacy: bool) -> None:
    emb = torch.nn.Embedding(20, 4)
    source = opened(saved(tmp_path / "a.pt", emb.state_dict(), legacy))
    np.testing.assert_array_equal(read_all(source)[0], emb.weight.detach().numpy())
    assert source.facts == {"tensor": "weight"}


def test_nested_dictionaries_have_dotted_names(tmp_path: Path) -> None:
    wanted = torch.nn.Parameter(rows().float())
    checkpoint = {
        "epoch": 3,
        "model": OrderedDict({"encoder.wte.weight": wanted, "head.weight": rows(50, 3, 1), "bias": torch.ones(3)}),
        "optimizer": {"state": {0: {"exp_avg": rows(50, 3, 2)}}, "groups": [{"lr": 0.1, "rows": rows(4, 4)}]},
    }
    path = saved(tmp_path / "a.ckpt", checkpoint)
    source = opened(path)
    np.testing.assert_array_equal(read_all(source)[0], wanted.detach().numpy())
    assert source.facts == {"tensor": "model.encoder.wte.weight"}
    assert "one of 4 tables" in source.notes[0]
    for name, expected in (("optimizer.state.0.exp_avg", rows(50, 3, 2)), ("optimizer.groups.0.rows", rows(4, 4))):
        np.testing.assert_array_equal(read_all(opened(path, tensor=name))[0], expected.float().numpy())


def test_several_tables_are_listed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"user": rows().half(), "item": rows(4, 2), "ids": torch.ones(3, 3).long()})
    with pytest.raises(InvalidArgument) as error:
        opened(path)
    assert str(error.value).endswith("user  (50, 3)  float16\n  item  (4, 2)  float64")
    assert opened(path, tensor="item").num_rows == 4


@pytest.mark.parametrize("legacy", [False, True])
def test_views_with_strides_of_their_own(tmp_path: Path, legacy: bool) -> None:
    base = rows(60, 40)
    views = {"t": base[:3].float().T, "cut": base.float()[5:40, 2:9], "step": base[::2].bfloat16()[:, ::3]}
    path = saved(tmp_path / "a.pt", views, legacy)
    for name, expected in views.items():
        np.testing.assert_array_equal(read_all(opened(path, tensor=name))[0], expected.float().numpy())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_repeated_row_is_no_bomb(tmp_path: Path, legacy: bool) -> None:
    path = saved(tmp_path / "a.pt", torch.ones(1, 3).expand(1 << 40, 3), legacy)
    with pytest.raises(BadSource, match=r"its shape \(1099511627776, 3\) repeats stored values or is wrong"):
        opened(path)


def test_what_cannot_be_a_table(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "a.pt",
        {"sparse": torch.eye(3).to_sparse(), "bool": torch.eye(3).bool(), "meta": torch.ones(3, 3, device="meta")},
    )
    for name in ("sparse", "bool", "meta"):
        with pytest.raises(BadSource, match=f"{name} cannot be a table: its values are"):
            opened(path, tensor=name)
    with pytest.raises(BadSource, match="nothing in it is a table"):
        opened(path)
    with pytest.raises(BadSource, match="it holds:\n  nothing"):
        opened(saved(tmp_path / "b.pt", {"epoch": 3}))


@pytest.mark.parametrize("legacy", [False, True])
def test_other_objects_are_never_unpickled(tmp_path: Path, legacy: bool) -> None:
    class Mischief:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "loaded"),))

    path = saved(tmp_path / "a.pt", {"weight": rows(), "x": Mischief()}, legacy)
    with pytest.raises(BadSource, match="holds other objects than tensors and dictionaries"):
        opened(path)
    assert not (tmp_path / "loaded").exists()


def test_a_dictionary_that_holds_itself(tmp_path: Path) -> None:
    value: dict[str, Any] = {"weight": rows().float()}
    value["self"] = value
    layers: Any = {"w": rows(2, 2)}
    for _ in range(60):
        layers = {"a": layers, "b": layers}
    value["layers"] = layers
    source = opened(saved(tmp_path / "a.pt", value), tensor="weight")
    np.testing.assert_array_equal(read_all(source)[0], rows().float().numpy())


@pytest.mark.parametrize("legacy", [False, True])
def test_cuts_are_found(tmp_path: Path, legacy: bool) -> None:
    content = saved(tmp_path / "whole.pt", {"weight": rows().float()}, legacy).read_bytes()
    path = tmp_path / "cut.pt"
    for length in {*range(40), *range(0, len(content), 97), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(BadSource, match=r"cut\.pt: torch cannot load it as weights"):
            torch_file.open_source(str(path), "torch", ReadOptions())


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    class Looked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(4, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.emb(ids)

    torch.jit.trace(Looked(), torch.tensor([1])).save(str(tmp_path / "a.pt"))
    with pytest.raises(BadSource, match="torch cannot load it as weights"):
        opened(tmp_path / "a.pt")


def test_a_plain_pickle_is_no_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"weight": [1, 2]}))
    assert torch_file.recognise(path.read_bytes(), str(path)) is None
    with pytest.raises(BadSource, match="torch cannot load it as weights"):
        torch_file.open_source(str(path), "torch", ReadOptions())


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"weight": rows(200).float()})
    with pytest.raises(BadSource, match="the file was changed while it was read"), opened(path) as source:
        for _ in source.blocks():
            os.replace(saved(tmp_path / "b.pt", {"weight": rows(100).float()}), path)


def test_a_legacy_file_larger_than_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigembed.convert.torch_file.memory_limit_bytes", lambda: 1000)
    with pytest.raises(BadSource, match=r"has to be read into memory whole; it has .* half of the memory is 500"):
        opened(saved(tmp_path / "a.pt", rows(), legacy=True))
    assert opened(saved(tmp_path / "b.pt", rows())).num_rows == 50


def test_what_is_recognised(tmp_path: Path) -> None:
    odd = saved(tmp_path / "model.weights", {"weight": rows()})
    assert torch_file.recognise(odd.read_bytes()[:4096], str(odd)) == "torch"
    for head in (b"", b"PK", b"PK\x03\x04", b"\x80\x02}q\x00."):
        assert torch_file.recognise(head, "a.zip") is None


def test_memory_is_bounded(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"weight": torch.zeros(300_000, 256)})
    assert peak_mib_above_import("torch_file", path, "import torch") < 200
