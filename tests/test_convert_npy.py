"""NumPy's files: what np.save and np.savez write is read exactly; what they would never write is refused."""

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reading import peak_mib_above_import, read_all

from bigembed.convert import npy
from bigembed.convert.regions import RegionSource
from bigembed.convert.source import ReadOptions, Source
from bigembed.errors import BadSource, InvalidArgument

DTYPES = ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "i1", "<i2", ">i2", "<i4", "<i8", ">i8", "u1", "<u2", "<u4", "<u8"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigembed.convert.ahead.BLOCK_BYTES", 4 * 3 * 7)


def opened(path: Path, **options: Any) -> Source:
    found = npy.recognise(path.read_bytes()[:4096], str(path))
    assert found is not None
    return npy.open_source(str(path), found, ReadOptions(**options))


def written(path: Path, header: str, content: bytes = b"", version: bytes = b"\x01\x00") -> Path:
    """A file with a header of one's own."""
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header) + 1)
    path.write_bytes(b"\x93NUMPY" + version + length + header.encode() + b"\n" + content)
    return path


def header_of(shape: str, descr: str = "'<f4'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_every_number_type_and_order(tmp_path: Path, dtype: str, order: str, kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 100, (50, 3)).astype(dtype, order=order)
    if dtype[-2] == "f":
        values /= 3
    path = tmp_path / f"a.{kind}"
    np.save(path, values) if kind == "npy" else np.savez(path, rows=values)
    source = opened(path)
    assert (source.num_rows, source.dim, source.dtype) == (50, 3, np.dtype(dtype).name)
    np.testing.assert_array_equal(read_all(source)[0], values.astype(np.float32))
    assert source.files == [str(path)]
    assert ("float64 values were rounded to float32." in source.notes) == (source.dtype == "float64")
    assert ("column after column" in " ".join(source.notes)) == (order == "F")


@pytest.mark.parametrize("shape", [(1, 3), (7, 3), (8, 3), (14, 3), (5, 1), (3, 200)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_that_do_not_fill_their_blocks(tmp_path: Path, shape: tuple[int, int], order: str) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype("f4", order=order)
    np.save(tmp_path / "a.npy", values)
    np.testing.assert_array_equal(read_all(opened(tmp_path / "a.npy"))[0], values)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header(tmp_path: Path, version: tuple[int, int]) -> None:
    values = np.arange(6, dtype="f4").reshape(2, 3)
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, values, version)
    np.testing.assert_array_equal(read_all(opened(tmp_path / "a.npy"))[0], values)


def test_a_header_that_python_2_wrote(tmp_path: Path) -> None:
    path = written(tmp_path / "a.npy", header_of("(2L, 3L)"), np.arange(6, dtype="<f4").tobytes())
    np.testing.assert_array_equal(read_all(opened(path))[0], np.arange(6).reshape(2, 3))


def test_nan_and_infinity_are_values(tmp_path: Path) -> None:
    values = np.array([[np.nan, np.inf], [-np.inf, -0.0]], np.float32)
    np.save(tmp_path / "a.npy", values)
    assert read_all(opened(tmp_path / "a.npy"))[0].tobytes() == values.tobytes()


@pytest.mark.parametrize("order", ["C", "F"])
def test_every_cut_is_found(tmp_path: Path, order: str) -> None:
    np.save(tmp_path / "whole.npy", np.ones((4, 3), order=order))
    content, path = (tmp_path / "whole.npy").read_bytes(), str(tmp_path / "cut.npy")
    for length in range(len(content)):
        Path(path).write_bytes(content[:length])
        with pytest.raises(BadSource, match=r"cut\.npy, byte"):
            npy.open_source(path, "npy", ReadOptions())


@pytest.mark.parametrize(
    "shape",
    ["(4611686018427387904, 4)", "(2, 4611686018427387904)", "(4294967296, 4294967296)", "(3, 4)", "(10**30, 2)"],
)
def test_shapes_larger_than_the_file(tmp_path: Path, shape: str) -> None:
    path = written(tmp_path / "a.npy", header_of(shape.replace("10**30", "1" + "0" * 30)), bytes(44))
    with pytest.raises(BadSource, match=r"but the file has only|a table has at least one"):
        opened(path)


@pytest.mark.parametrize("shape", ["(0, 3)", "(3, 0)", "(99999999999999, 0)"])
def test_shapes_without_values(tmp_path: Path, shape: str) -> None:
    with pytest.raises(BadSource, match="a table has at least one"):
        opened(written(tmp_path / "a.npy", header_of(shape)))


@pytest.mark.parametrize("shape", ["()", "(12,)", "(2, 3, 2)"])
def test_shapes_that_are_no_table(tmp_path: Path, shape: str) -> None:
    with pytest.raises(BadSource, match="a table has two dimensions, rows and columns"):
        opened(written(tmp_path / "a.npy", header_of(shape), bytes(48)))


@pytest.mark.parametrize("shape", ["(-2, -3)", "(True, 3)", "(2, -1)"])
def test_impossible_shapes(tmp_path: Path, shape: str) -> None:
    with pytest.raises(BadSource, match="byte 0: the header's shape"):
        opened(written(tmp_path / "a.npy", header_of(shape), bytes(48)))


@pytest.mark.parametrize(
    "header",
    [
        *("", "{", "[1]", "(" * 9000, "x" * 60000, "{'a': " * 1000, "__import__('os')", "{'descr': '<f4'}"),
        *(header_of("3"), header_of("(2.0, 3)"), header_of("(" + "9" * 5000 + ", 3)")),
        *(header_of("(2, 3)", "'nope'"), header_of("(2, 3)", order="1"), header_of("(2, 3)") * 2),
    ],
)
def test_headers_that_are_none(tmp_path: Path, header: str) -> None:
    with pytest.raises(BadSource, match="byte 0: the array's header cannot be read"):
        opened(written(tmp_path / "a.npy", header, bytes(48)))


def test_a_header_length_of_gigabytes_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 200_000)
    with pytest.raises(BadSource, match="the array's header cannot be read"):
        opened(path)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    class Mischief:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "loaded"),))

    values = np.array([[Mischief(), 1]], dtype=object)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "b.npz", rows=values)
    for name in ("a.npy", "b.npz"):
        with pytest.raises(BadSource, match="Python objects \\(a pickle, which is never loaded"):
            opened(tmp_path / name)
    assert not (tmp_path / "loaded").exists()


@pytest.mark.parametrize("dtype", ["?", "c8", "U3", "S4", "M8[s]", "f4,i4", "g"])
def test_what_is_no_number_is_refused(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3), dtype))
    with pytest.raises(BadSource, match=r"array cannot be a table: its values are .*, which are not numbers"):
        opened(tmp_path / "a.npy")


def test_bfloat16_says_what_happened_to_it(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    np.save(tmp_path / "a.npy", np.zeros((2, 3), ml_dtypes.bfloat16))
    with pytest.raises(BadSource, match="bfloat16 loses its name in NumPy's files"):
        opened(tmp_path / "a.npy")


def test_overflow_is_counted(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1e300, 1.0]] * 30))
    source = opened(tmp_path / "a.npy")
    assert np.isinf(read_all(source)[0][:, 0]).all()
    assert source.notes == ["30 finite float64 values are beyond float32's range and became infinite."]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((100, 3), "f4"))
    with pytest.raises(BadSource, match=r"a\.npy, byte \d+: the file ends here"), opened(tmp_path / "a.npy") as source:
        for _ in source.blocks():
            os.truncate(tmp_path / "a.npy", 600)


def test_an_asked_dim(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((100, 3), "f4"))
    with pytest.raises(BadSource, match="there are 3 columns, but dim=4 was asked for"):
        opened(tmp_path / "a.npy", dim=4)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_members_are_chosen_by_name(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "a.npz"
    left, right = np.ones((40, 3), "f8"), np.full((20, 5), 2, "f2")
    save(path, left=left, right=right, names=np.array(["a", "b"]))
    with pytest.raises(InvalidArgument) as error:
        opened(path)
    assert "left  (40, 3)  float64\n  right  (20, 5)  float16" in str(error.value)
    source = opened(path, tensor="right")
    np.testing.assert_array_equal(read_all(source)[0], right)
    assert source.facts == {"tensor": "right"}
    with pytest.raises(InvalidArgument, match="holds no 'middle'"):
        opened(path, tensor="middle")


def test_columns_first_in_an_archive(tmp_path: Path) -> None:
    values = np.asfortranarray(np.random.default_rng(0).standard_normal((40, 3)))
    np.savez(tmp_path / "a.npz", other=np.arange(9), rows=values)
    source = opened(tmp_path / "a.npz")
    assert isinstance(source, RegionSource)
    np.testing.assert_array_equal(read_all(source)[0], values.astype("f4"))
    np.savez_compressed(tmp_path / "b.npz", rows=values)
    with pytest.raises(BadSource, match=r"rows\.npy: a compressed array in Fortran's order .* np\.ascontiguousarray"):
        opened(tmp_path / "b.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_cut_of_an_archive_is_found(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "whole.npz", rows=np.random.default_rng(0).standard_normal((9, 3)))
    content, path = (tmp_path / "whole.npz").read_bytes(), str(tmp_path / "cut.npz")
    for length in range(len(content)):
        Path(path).write_bytes(content[:length])
        with pytest.raises(BadSource, match=r"cut\.npz"):
            read_all(npy.open_source(path, "npz", ReadOptions()))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_byte_of_the_values_is_found(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "a.npz"
    save(path, rows=np.random.default_rng(0).standard_normal((30, 3)))
    content = bytearray(path.read_bytes())
    for position in range(250, len(content) - 150, 17):
        content[position] ^= 0x10
        path.write_bytes(content)
        with pytest.raises(BadSource, match=r"a\.npz"):
            read_all(opened(path))
        content[position] ^= 0x10


def test_members_that_contradict_their_headers(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.ones((4, 3), "f4"))
    for name, content in (("short", buffer.getvalue()[:-1]), ("long", buffer.getvalue() + b"x")):
        path = tmp_path / f"{name}.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("rows.npy", content)
        with pytest.raises(BadSource, match=r"rows\.npy: its header tells of 48 bytes, but 4[79] follow"):
            opened(path)


def test_what_is_recognised(tmp_path: Path) -> None:
    assert npy.recognise(b"\x93NUMPY\x01\x00", "x") == "npy"
    assert npy.recognise(b"PK\x03\x04", "x.npz") == "npz"
    for head in (b"", b"PK\x03\x04", b"PK", b"NUMPY", bytes(4096)):
        assert npy.recognise(head, "x.pt") is None


@pytest.mark.parametrize("order", ["False", "True"])
def test_memory_is_bounded(tmp_path: Path, order: str) -> None:
    path = written(tmp_path / "a.npy", header_of("(300000, 256)", order=order))
    os.truncate(path, path.stat().st_size + 300_000 * 1024)
    assert peak_mib_above_import("npy", path) < 100
