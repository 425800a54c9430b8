"""HDF5: what h5py writes is read exactly, contiguous, chunked and compressed; rows in other files are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reading import peak_mib_above_import, read_all

from bigembed.convert import hdf5
from bigembed.convert.regions import RegionSource
from bigembed.convert.source import ReadOptions, Source
from bigembed.errors import BadSource, InvalidArgument, MissingLibrary

h5py = pytest.importorskip("h5py")

DTYPES = ["<f2", ">f2", "<f4", ">f4", "<f8", "i1", "<i2", ">i4", "<i8", "u1", "<u2", "<u4", ">u8"]
CHUNKED: dict[str, Any] = {
    "rows": {"chunks": (5, 3)},
    "columns": {"chunks": (50, 1)},
    "small": {"chunks": (2, 2), "compression": "gzip"},
    "large": {"chunks": (40, 3), "compression": "lzf", "shuffle": True},
    "checked": {"chunks": (9, 3), "fletcher32": True},
}
ROWS = np.random.default_rng(0).standard_normal((50, 3)).astype("f4")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigembed.convert.ahead.BLOCK_BYTES", 4 * 3 * 7)


def opened(path: Path, **options: Any) -> Source:
    assert hdf5.recognise(path.read_bytes()[:4096], str(path)) == "hdf5"
    return hdf5.open_source(str(path), "hdf5", ReadOptions(**options))


def saved(path: Path, userblock_size: int = 0, **datasets: Any) -> Path:
    with h5py.File(path, "w", userblock_size=userblock_size) as file:
        for name, values in datasets.items():
            file[name.replace("__", "/")] = values
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_type(tmp_path: Path, dtype: str) -> None:
    values = (np.abs(ROWS) * 30).astype(dtype)
    path = saved(tmp_path / "a.h5", x=values)
    with h5py.File(path, "a") as file:
        file.create_dataset("chunked", data=values, chunks=(4, 2))
    for name in ("x", "chunked"):
        source = opened(path, tensor=name)
        assert (source.num_rows, source.dim, source.dtype) == (50, 3, values.dtype.name)
        np.testing.assert_array_equal(read_all(source)[0], values.astype("f4"))
        assert isinstance(source, RegionSource) == (name == "x")
        assert source.notes == []


def test_float64_that_does_not_fit(tmp_path: Path) -> None:
    values = ROWS.astype("f8") + 1e-9
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=values, chunks=(4, 2))
    source = opened(tmp_path / "a.h5")
    np.testing.assert_array_equal(read_all(source)[0], values.astype("f4"))
    assert source.notes == ["float64 values were rounded to float32."]


@pytest.mark.parametrize("how", CHUNKED)
def test_chunks_of_any_shape(tmp_path: Path, how: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=ROWS, **CHUNKED[how])
    np.testing.assert_array_equal(read_all(opened(tmp_path / "a.h5"))[0], ROWS)


def test_rows_that_were_never_written_have_the_fill_value(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (50, 3), "f4", fillvalue=2.5)
    np.testing.assert_array_equal(read_all(opened(tmp_path / "a.h5"))[0], np.full((50, 3), 2.5))


@pytest.mark.parametrize("size", [512, 2048])
def test_a_block_of_the_users_before_the_file(tmp_path: Path, size: int) -> None:
    path = saved(tmp_path / "a.h5", userblock_size=size, x=ROWS)
    np.testing.assert_array_equal(read_all(opened(path))[0], ROWS)


def test_floats_that_numpy_lacks(tmp_path: Path) -> None:
    """16 bits of sign, exponent and mantissa as bfloat16 has them: h5py unpacks them into a wider type."""
    bfloat16 = h5py.h5t.IEEE_F32LE.copy()
    bfloat16.set_fields(15, 7, 8, 0, 7)
    bfloat16.set_size(2)
    bfloat16.set_ebias(127)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        space = h5py.h5s.create_simple((50, 3))
        dataset = h5py.Dataset(h5py.h5d.create(file.id, b"x", bfloat16, space))
        dataset[...] = ROWS
    source = opened(tmp_path / "a.h5")
    found = read_all(source)[0]
    assert not isinstance(source, RegionSource)
    np.testing.assert_allclose(found, ROWS, rtol=2**-7)
    assert (found.view(np.uint32) & 0xFFFF == 0).all()


def test_names_are_paths(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.h5", model__embedding__embeddings=ROWS, model__head__kernel=ROWS + 1, bias=np.ones(3))
    source = opened(path)
    np.testing.assert_array_equal(read_all(source)[0], ROWS)
    assert source.facts == {"tensor": "model/embedding/embeddings"}
    for name in ("model/head/kernel", "/model/head/kernel"):
        np.testing.assert_array_equal(read_all(opened(path, tensor=name))[0], ROWS + 1)
    with pytest.raises(InvalidArgument, match="holds no 'head'"):
        opened(path, tensor="head")


def test_several_datasets_are_listed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.h5", left=ROWS, right=np.ones((4, 2)), words=np.array([b"a", b"b"]))
    with pytest.raises(InvalidArgument) as error:
        opened(path)
    assert str(error.value).endswith("left  (50, 3)  float32\n  right  (4, 2)  float64")
    with pytest.raises(BadSource, match="words cannot be a table"):
        opened(path, tensor="words")


@pytest.mark.parametrize(
    "values", [np.ones(3), np.ones((2, 3, 4)), np.float32(1), np.ones((2, 2), bool), h5py.Empty("f4")]
)
def test_what_cannot_be_a_table(tmp_path: Path, values: Any) -> None:
    with pytest.raises(BadSource, match="nothing in it is a table"):
        opened(saved(tmp_path / "a.h5", x=values))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_tables_without_values(tmp_path: Path, shape: tuple[int, int]) -> None:
    with pytest.raises(BadSource, match="a table has at least one"):
        opened(saved(tmp_path / "a.h5", x=np.ones(shape)))


def test_rows_in_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(600))
    other = saved(tmp_path / "other.h5", x=ROWS)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (50, 3), "f4", external=[(str(tmp_path / "raw"), 0, 600)])
        layout = h5py.VirtualLayout((50, 3), "f4")
        layout[...] = h5py.VirtualSource(other, "x", (50, 3))
        file.create_virtual_dataset("v", layout)
        file["link"] = h5py.ExternalLink(other, "x")
    for name in ("x", "v"):
        with pytest.raises(BadSource, match=f"the rows of /{name} lie in other files"):
            opened(tmp_path / "a.h5", tensor=name)
    with pytest.raises(InvalidArgument, match="holds no 'link'"):
        opened(tmp_path / "a.h5", tensor="link")


def test_a_changed_byte_is_found_where_there_is_a_checksum(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=ROWS, chunks=(9, 3), fletcher32=True)
    content = bytearray((tmp_path / "a.h5").read_bytes())
    content[content.find(ROWS[20].tobytes())] ^= 1
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(BadSource, match="rows 14 to 20: h5py cannot read them"):
        read_all(opened(tmp_path / "a.h5"))


@pytest.mark.parametrize("how", [{}, {"chunks": (9, 3)}])
def test_cuts_are_found(tmp_path: Path, how: dict[str, Any]) -> None:
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file.create_dataset("x", data=ROWS, **how)
    content, path = (tmp_path / "whole.h5").read_bytes(), tmp_path / "cut.h5"
    for length in {*range(0, len(content), 61), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(BadSource, match=r"cut\.h5"):
            read_all(hdf5.open_source(str(path), "hdf5", ReadOptions()))


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.h5", x=ROWS)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(MissingLibrary, match=r"HDF5 files are read with the library 'h5py'"):
        opened(path)


def test_memory_is_bounded_for_one_piece(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # a hole in the file: nothing is written
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((300_000, 256)), plan)
    assert isinstance(opened(tmp_path / "a.h5"), RegionSource)
    assert peak_mib_above_import("hdf5", tmp_path / "a.h5", "import h5py") < 100


def test_memory_is_bounded_for_chunks(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("x", (300_000, 256), "f4", chunks=(10_000, 256), compression="lzf")
        for start in range(0, 300_000, 10_000):
            dataset[start : start + 10_000] = 1
    assert peak_mib_above_import("hdf5", tmp_path / "a.h5", "import h5py") < 100
