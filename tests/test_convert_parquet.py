"""Parquet and Arrow: lists, columns of numbers and tokens that pyarrow wrote are read exactly; nulls are refused."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reading import peak_mib_above_import, read_all

from bigembed.convert import parquet
from bigembed.convert.source import ReadOptions, Source
from bigembed.errors import BadSource, InvalidArgument, MissingLibrary

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
KINDS = ["parquet", "file", "stream"]
ROWS = np.random.default_rng(0).standard_normal((50, 3)).astype("f4")
WORDS = ["", "a b", "é", *(f"w{row}" for row in range(47))]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigembed.convert.parquet.BLOCK_BYTES", 8 * 3 * 7)
    monkeypatch.setattr("bigembed.convert.arrow_batches.MAPPED_BYTES", 4 * 3 * 10)


def opened(path: Path, **options: Any) -> Source:
    found = parquet.recognise(path.read_bytes()[:4096], str(path))
    assert found is not None
    return parquet.open_source(str(path), found, ReadOptions(**options))


def saved(path: Path, table: Any, kind: str, **options: Any) -> Path:
    """A table in one of KINDS; `rows` in a batch or row group."""
    rows = options.pop("rows", 20)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=rows, **options)
        return path
    create = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with create(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def fixed(values: np.ndarray) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])


def lists(values: np.ndarray, of: Any = None) -> Any:
    of = of or pa.ListArray
    offset_dtype = "i8" if of is pa.LargeListArray else "i4"
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=offset_dtype)
    return of.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values).ravel()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_type(tmp_path: Path, dtype: str, kind: str) -> None:
    values = (np.abs(ROWS) * 30).astype(dtype)
    source = opened(saved(tmp_path / "a", pa.table({"v": fixed(values)}), kind))
    assert (source.dim, source.dtype, source.format) == (
        3,
        values.dtype.name,
        "parquet" if kind == KINDS[0] else "arrow",
    )
    assert source.num_rows == (50 if kind == "parquet" else None)
    np.testing.assert_array_equal(read_all(source)[0], values.astype("f4"))
    assert source.notes == []


def test_float64_that_does_not_fit(tmp_path: Path) -> None:
    source = opened(saved(tmp_path / "a", pa.table({"v": lists(ROWS.astype("f8") + 1e-9)}), "parquet"))
    np.testing.assert_array_equal(read_all(source)[0], (ROWS.astype("f8") + 1e-9).astype("f4"))
    assert source.notes == ["float64 values were rounded to float32."]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 20, 50])
def test_lists_of_every_kind(tmp_path: Path, kind: str, rows: int) -> None:
    tensor = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [3]), fixed(ROWS))
    for number, column in enumerate([fixed(ROWS), lists(ROWS), lists(ROWS, pa.LargeListArray), tensor]):
        path = saved(tmp_path / f"a{number}", pa.table({"v": column}), kind, rows=rows)
        np.testing.assert_array_equal(read_all(opened(path))[0], ROWS)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_slices_keep_their_offsets(tmp_path: Path, kind: str) -> None:
    whole = pa.table({"word": WORDS, "f": fixed(ROWS), "l": lists(ROWS)})
    path = saved(tmp_path / "a", whole.slice(7, 30), kind, rows=100)
    for name in ("f", "l"):
        found, tokens = read_all(opened(path, tensor=name))
        np.testing.assert_array_equal(found, ROWS[7:37])
        assert tokens == [word.encode() for word in WORDS[7:37]]


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("kind", ["file", "stream"])
def test_compressed_batches(tmp_path: Path, kind: str, codec: str) -> None:
    path = saved(tmp_path / "a", pa.table({"token": WORDS, "v": fixed(ROWS)}), kind, compression=codec)
    found, tokens = read_all(opened(path))
    np.testing.assert_array_equal(found, ROWS)
    assert tokens == [word.encode() for word in WORDS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type", ["string", "large_string", "binary", "large_binary", "dictionary"])
@pytest.mark.parametrize("name", ["token", "Word", "KEY", "text"])
def test_tokens_are_a_column_of_text(tmp_path: Path, kind: str, type: str, name: str) -> None:
    words = pa.array(WORDS).dictionary_encode() if type == "dictionary" else pa.array(WORDS).cast(getattr(pa, type)())
    source = opened(saved(tmp_path / "a", pa.table({"other": WORDS[::-1], "v": fixed(ROWS), name: words}), kind))
    found, tokens = read_all(source)
    np.testing.assert_array_equal(found, ROWS)
    assert tokens == [word.encode() for word in WORDS]
    assert source.notes == [f"The tokens are from the column {name!r}."]


def test_tokens_may_be_any_bytes(tmp_path: Path) -> None:
    words = [b"\xff\x00", b"\n", *[b"x"] * 48]
    path = saved(tmp_path / "a", pa.table({"token": pa.array(words, pa.binary()), "v": fixed(ROWS)}), "parquet")
    assert read_all(opened(path))[1] == words


def test_a_dictionary_that_is_replaced_within_a_stream(tmp_path: Path) -> None:
    schema = pa.schema([("token", pa.dictionary(pa.int8(), pa.string())), ("v", pa.list_(pa.float32(), 3))])
    with pa.ipc.new_stream(tmp_path / "a", schema) as writer:
        later = pa.array(WORDS[20:]).dictionary_encode().cast(schema.field("token").type)
        first = pa.array(WORDS[:20]).dictionary_encode().cast(schema.field("token").type)
        for start, words in ((0, first), (20, later[:15]), (35, later[15:])):
            values = fixed(ROWS[start : start + len(words)])
            writer.write_batch(pa.record_batch([words, values], schema=schema))
    found, tokens = read_all(opened(tmp_path / "a"))
    np.testing.assert_array_equal(found, ROWS)
    assert tokens == [word.encode() for word in WORDS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0, 1])
def test_columns_of_numbers(tmp_path: Path, kind: str, first: int) -> None:
    values = np.random.default_rng(1).standard_normal((50, 12)).astype("f4")
    columns = {f"dim_{first + d}": values[:, d] for d in reversed(range(12))}
    source = opened(saved(tmp_path / "a", pa.table({"word": WORDS, "id": np.arange(50), **columns}), kind))
    found, tokens = read_all(source)
    np.testing.assert_array_equal(found, values)
    assert tokens == [word.encode() for word in WORDS]
    assert source.facts == {"tensor": "dim_*"}


def test_columns_that_do_not_belong_together(tmp_path: Path) -> None:
    for names in (["dim_0", "dim_2"], ["dim_0"], ["dim_2", "dim_3"], ["a", "b"]):
        path = saved(tmp_path / "a", pa.table(dict.fromkeys(names, ROWS[:, 0])), "parquet")
        with pytest.raises(BadSource, match="nothing in it is a table"):
            opened(path)


def test_several_columns_are_listed(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "a", pa.table({"left": fixed(ROWS), "right": lists(ROWS.astype("f8")), "n": WORDS}), "parquet"
    )
    with pytest.raises(InvalidArgument) as error:
        opened(path)
    assert str(error.value).endswith("left  (50, 3)  float32\n  right  (50, ?)  float64")
    assert opened(path, tensor="right").dim == 3
    with pytest.raises(BadSource, match="n cannot be a table"):
        opened(path, tensor="n")
    with pytest.raises(InvalidArgument, match="holds no 'x'"):
        opened(path, tensor="x")


@pytest.mark.parametrize("kind", KINDS)
def test_nulls_are_named_by_their_row(tmp_path: Path, kind: str) -> None:
    listed: list[Any] = ROWS.tolist()
    missing = [*listed[:33], None, *listed[34:]]
    number = [*listed[:41], [1.0, None, 2.0], *listed[42:]]
    short = [*listed[:29], [1.0, 2.0], *listed[30:]]
    for type in (pa.list_(pa.float32(), 3), pa.list_(pa.float32()), pa.large_list(pa.float32())):
        for rows, message in (
            (missing, r"row 33: there is nothing in it \(null\)"),
            (number, r"row 41: a number is missing in it \(null\)"),
            (short, "row 29: it has 2 numbers, 3 were expected as in the first row"),
        ):
            if rows is short and pa.types.is_fixed_size_list(type):
                continue
            path = saved(tmp_path / "a", pa.table({"v": pa.array(rows, type)}), kind)
            with pytest.raises(BadSource, match=message):
                read_all(opened(path))
    words = [*WORDS[:44], None, *WORDS[45:]]
    with pytest.raises(BadSource, match=r"row 44: its token is missing \(null\)"):
        read_all(opened(saved(tmp_path / "a", pa.table({"word": words, "v": fixed(ROWS)}), kind)))
    columns = {"x0": ROWS[:, 0], "x1": pa.array([*ROWS[:22, 1].tolist(), None, *ROWS[23:, 1].tolist()], pa.float32())}
    with pytest.raises(BadSource, match=r"row 22: there is nothing in it \(null\)"):
        read_all(opened(saved(tmp_path / "a", pa.table(columns), kind)))


def test_a_first_list_that_is_missing(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", pa.table({"v": pa.array([None, [1.0]], pa.list_(pa.float32()))}), "parquet")
    with pytest.raises(BadSource, match=r"row 0: there is no list in it \(null\)"):
        opened(path)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_without_values(tmp_path: Path, kind: str) -> None:
    for column in (fixed(ROWS[:0]), lists(ROWS[:0])):
        path = saved(tmp_path / "a", pa.table({"v": column}), kind)
        with pytest.raises(BadSource, match=r"there are no rows|a table has at least one|the rows end here"):
            list(opened(path).blocks())
    empty = pa.array([[], []], pa.list_(pa.float32()))
    with pytest.raises(BadSource, match="there are 0 columns"):
        opened(saved(tmp_path / "a", pa.table({"v": empty}), kind))


def test_an_asked_dim(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", pa.table({"v": lists(ROWS)}), "parquet")
    with pytest.raises(BadSource, match="there are 3 columns, but dim=4 was asked for"):
        opened(path, dim=4)


@pytest.mark.parametrize(
    "type", [pa.list_(pa.string()), pa.list_(pa.bool_()), pa.list_(pa.list_(pa.float32())), pa.date32()]
)
def test_what_cannot_be_a_table(tmp_path: Path, type: Any) -> None:
    with pytest.raises(BadSource, match="nothing in it is a table"):
        opened(saved(tmp_path / "a", pa.table({"v": pa.nulls(3, type)}), "parquet"))


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_are_found(tmp_path: Path, kind: str) -> None:
    content = saved(tmp_path / "whole", pa.table({"word": WORDS, "v": fixed(ROWS)}), kind).read_bytes()
    path = tmp_path / "cut"
    format = "parquet" if kind == "parquet" else "arrow"
    ends = {len(content) - 8, len(content) - 4} if kind == "stream" else set()  # its end mark may be missing
    for length in {*range(0, len(content), 13), len(content) - 1} - ends:
        path.write_bytes(content[:length])
        with pytest.raises(BadSource, match="cut"):
            found = read_all(parquet.open_source(str(path), format, ReadOptions()))[0]
            assert len(found) == 50, f"{length} of {len(content)} bytes gave {len(found)} rows"


def test_a_stream_that_is_cut_between_two_batches_is_told_of(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", pa.table({"v": fixed(ROWS)}), "stream")
    whole = path.read_bytes()
    path.write_bytes(whole.removesuffix(b"\xff\xff\xff\xff\0\0\0\0"))
    assert path.stat().st_size == len(whole) - 8
    source = opened(path)
    np.testing.assert_array_equal(read_all(source)[0], ROWS)
    assert source.notes == ["The stream has no end mark: if it was cut off between two batches, rows are missing."]


def test_what_is_recognised() -> None:
    assert parquet.recognise(b"PAR1", "x") == "parquet"
    assert parquet.recognise(b"ARROW1\0\0", "x") == "arrow"
    assert parquet.recognise(b"\xff\xff\xff\xff" + struct.pack("<I", 80), "x") == "arrow"
    for head in (b"", b"PAR", bytes(8), b"\xff" * 8, b"\xff\xff\xff\xff" + bytes(4)):
        assert parquet.recognise(head, "x.parquet") is None


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a", pa.table({"v": fixed(ROWS)}), "parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingLibrary, match="Parquet and Arrow files are read with the library 'pyarrow'"):
        opened(path)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((10_000, 256)).astype("f4")
    table = pa.concat_tables([pa.table({"word": [f"w{row}" for row in range(10_000)], "v": fixed(values)})] * 30)
    options = {"compression": "none", "use_dictionary": ["word"]} if kind == "parquet" else {}
    rows = 10_000 if kind == "stream" else 300_000
    if kind == "file":
        table = table.combine_chunks()  # one batch with all rows
    path = saved(tmp_path / "a", table, kind, rows=rows, **options)
    assert peak_mib_above_import("parquet", path, "import pyarrow.parquet") < 200
