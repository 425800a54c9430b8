"""Magnitude files, made by sqlite3 as pymagnitude's converter makes them; whole, cut off, and lying."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from bigembed.convert import ahead, magnitude
from bigembed.convert.source import ReadOptions
from bigembed.errors import BadSource

KEYS = ["der", "Der", "tübingen", "a b", "", "123"]


def vectors(count, dim=4, seed=0):
    rng = np.random.default_rng(seed)
    values_VD = rng.standard_normal((count, dim))
    norm_V = np.linalg.norm(values_VD, axis=1)
    return np.round(values_VD / norm_V[:, None] * 10**7).astype(np.int64), norm_V


def save(folder, integer_VD, norm_V=None, keys=KEYS, precision=7, settings=(), column="INTEGER"):
    """As converter.py does: its tables, its index, its settings."""
    path = str(folder / "rows.magnitude")
    if os.path.exists(path):
        os.unlink(path)
    dim = integer_VD.shape[1]
    names = [f"dim_{d}" for d in range(dim)] + ([] if norm_V is None else ["magnitude"])
    types = [column] * dim + ([] if norm_V is None else ["REAL"])
    with closing(sqlite3.connect(path)) as database:
        columns = ", ".join(f"{name} {type}" for name, type in zip(names, types, strict=True))
        database.execute(f"CREATE TABLE `magnitude` (key TEXT COLLATE NOCASE, {columns});")
        database.execute("CREATE TABLE `magnitude_format` (key TEXT COLLATE NOCASE, value INTEGER);")
        marks = ", ".join("?" * (len(names) + 1))
        for v, integers in enumerate(integer_VD.tolist()):
            values = integers + ([] if norm_V is None else [float(norm_V[v])])
            database.execute(f"INSERT INTO magnitude VALUES ({marks})", (keys[v], *values))
        chosen = {"version": 2, "size": len(integer_VD), "dim": dim, "precision": precision, "entropy": 1} | dict(
            settings
        )
        database.executemany("INSERT INTO magnitude_format VALUES (?, ?)", chosen.items())
        database.execute("CREATE INDEX `magnitude_key_idx` ON `magnitude` (key);")
        database.commit()
    return path


def expected(integer_VD, norm_V=None, precision=7):
    values_VD = integer_VD.astype(np.float64) / 10.0**precision
    return (values_VD if norm_V is None else values_VD * norm_V[:, None]).astype(np.float32)


def read(path, **options):
    """(values, tokens, source)"""
    with magnitude.open_source(path, "magnitude", ReadOptions(**options)) as source:
        values, tokens = [], []
        for block in source.blocks():
            values.append(block.values_MD.copy())
            tokens += block.tokens.to_list()
            assert len(block.tokens) == len(block.values_MD)
    return np.concatenate(values), tokens, source


def test_rows_and_keys_with_norms(tmp_path):
    integer_VD, norm_V = vectors(6)
    path = save(tmp_path, integer_VD, norm_V)
    with open(path, "rb") as file:
        assert magnitude.recognise(file.read(4096), path) == "magnitude"
    found_VD, tokens, source = read(path)
    np.testing.assert_array_equal(found_VD, expected(integer_VD, norm_V))
    assert tokens == [key.encode() for key in KEYS]
    assert (source.num_rows, source.dim, source.done_bytes) == (6, 4, os.path.getsize(path))
    assert source.has_tokens
    assert os.listdir(tmp_path) == ["rows.magnitude"], "a file was left beside the source"


def test_older_files_hold_no_norms_and_other_precisions(tmp_path):
    integer_VD, _ = vectors(6)
    found_VD, _, source = read(save(tmp_path, integer_VD, precision=3))
    np.testing.assert_array_equal(found_VD, expected(integer_VD, precision=3))
    assert source.facts["precision"] == 3
    assert any("norms" in note for note in source.notes)


def test_rows_come_in_order_of_their_number_over_many_blocks(tmp_path, monkeypatch):
    integer_VD, norm_V = vectors(300)
    keys = [f"wort{n * 7919 % 300}" for n in range(300)]
    path = save(tmp_path, integer_VD, norm_V, keys)
    for block_bytes, fetched in ((16, 4), (16 * 7, 1 << 16), (16 * 100, 12), (1 << 24, 1)):
        monkeypatch.setattr(ahead, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(magnitude, "FETCHED_VALUES", fetched)
        found_VD, tokens, source = read(path)
        np.testing.assert_array_equal(found_VD, expected(integer_VD, norm_V))
        assert tokens == [key.encode() for key in keys]
        assert len(source.notes) == 1


def test_a_folder_that_cannot_be_written_and_a_name_with_odd_characters(tmp_path):
    folder = tmp_path / "what? #1 ü%20"
    folder.mkdir()
    integer_VD, norm_V = vectors(6)
    path = save(folder, integer_VD, norm_V)
    folder.chmod(0o555)
    try:
        np.testing.assert_array_equal(read(path)[0], expected(integer_VD, norm_V))
    finally:
        folder.chmod(0o755)


def test_what_a_log_beside_the_file_holds_is_read_too(tmp_path):
    integer_VD, norm_V = vectors(6)
    path = save(tmp_path, integer_VD, norm_V)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("UPDATE magnitude SET dim_0 = 5 WHERE key = 'tübingen'")
        database.commit()
        integer_VD[2, 0] = 5
        np.testing.assert_array_equal(read(path)[0], expected(integer_VD, norm_V))


@pytest.mark.parametrize(("size", "said"), [(5, "Rows past the 5"), (9, "6 rows were found; the file announces 9")])
def test_a_size_that_is_wrong_is_told_of(tmp_path, size, said):
    integer_VD, norm_V = vectors(6)
    found_VD, tokens, source = read(save(tmp_path, integer_VD, norm_V, settings={"size": size}.items()))
    np.testing.assert_array_equal(found_VD, expected(integer_VD, norm_V)[:size])
    assert len(tokens) == min(size, 6)
    assert any(said in note for note in source.notes)


def test_norms_beyond_float32_become_infinite(tmp_path):
    integer_VD, norm_V = vectors(6)
    norm_V[1] = 1e300
    found_VD, _, _ = read(save(tmp_path, integer_VD, norm_V))
    assert np.isinf(found_VD[1]).all()
    assert np.isfinite(found_VD[[0, 2, 3, 4, 5]]).all()


# --- what is wrong with a file


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dim": 5}, "no column 'dim_4'|'dim'"),
        ({"dim": 0}, "'dim' is 0"),
        ({"dim": 10**12}, "'dim' is 1000000000000"),
        ({"dim": "four"}, "'dim' is b'four'"),
        ({"size": 10**15}, "'size' is 1000000000000000"),
        ({"size": 0}, "'size' is 0"),
        ({"size": -3}, "'size' is -3"),
        ({"precision": 400}, "'precision' is 400"),
        ({"precision": None}, "'precision' is None"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, said):
    integer_VD, norm_V = vectors(6)
    with pytest.raises(BadSource, match=said):
        read(save(tmp_path, integer_VD, norm_V, settings=settings.items()))


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DROP TABLE magnitude_format", "no table 'magnitude_format'"),
        ("DROP TABLE magnitude", "no table 'magnitude'"),
        ("DELETE FROM magnitude_format WHERE key = 'dim'", "'dim' is None"),
        ("INSERT INTO magnitude_format VALUES ('dim', 3)", "'dim' is None"),
        ("UPDATE magnitude SET dim_1 = NULL WHERE key = 'a b'", "no number"),
        ("UPDATE magnitude SET dim_1 = 'text' WHERE key = 'a b'", "no number"),
        ("UPDATE magnitude SET magnitude = NULL", "no number"),
        ("UPDATE magnitude SET key = NULL WHERE key = 'tübingen'", "row 2: its key is None"),
        ("ALTER TABLE magnitude RENAME COLUMN key TO word", "no column 'key'"),
    ],
)
def test_tables_that_hold_something_else_are_refused(tmp_path, statement, said):
    path = save(tmp_path, *vectors(6))
    with closing(sqlite3.connect(path)) as database:
        database.execute(statement)
        database.commit()
    with pytest.raises(BadSource, match=said):
        read(path)


def test_a_view_in_place_of_the_table_is_refused(tmp_path):
    path = save(tmp_path, *vectors(6))
    with closing(sqlite3.connect(path)) as database:
        database.execute("ALTER TABLE magnitude RENAME TO other")
        database.execute("CREATE VIEW magnitude AS SELECT * FROM other")
        database.commit()
    with pytest.raises(BadSource, match="no table 'magnitude'"):
        read(path)


def test_a_file_cut_off_anywhere_is_refused_or_whole(tmp_path):
    """SQLite finds most of it by the pages that are missing; a cut in what is not read leaves the rows whole."""
    integer_VD, norm_V = vectors(300)
    path = save(tmp_path, integer_VD, norm_V, [f"wort{n}" for n in range(300)])
    whole = Path(path).read_bytes()
    refused = 0
    for cut in [*range(120), *range(120, len(whole), 211)]:
        with open(path, "wb") as file:
            file.write(whole[:cut])
        try:
            found_VD, _, _ = read(path)
        except BadSource:
            refused += 1
            continue
        np.testing.assert_array_equal(found_VD, expected(integer_VD, norm_V))
    assert refused > 200


def test_other_databases_and_other_files_are_refused(tmp_path):
    path = str(tmp_path / "other.db")
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE words (key TEXT)")
        database.commit()
    with pytest.raises(BadSource, match="no Magnitude file"):
        read(path)
    for raw in (b"", b"SQLite", b"SQLite format 3\0", b"SQLite format 3\0" + bytes(84), b"\0" * 5000):
        with open(path, "wb") as file:
            file.write(raw)
        with pytest.raises(BadSource):
            read(path)


def test_columns_that_were_not_asked_for_are_refused(tmp_path):
    with pytest.raises(BadSource, match="dim=300"):
        read(save(tmp_path, *vectors(6)), dim=300)


def test_stopping_early_closes_the_database(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "BLOCK_BYTES", 16)
    path = save(tmp_path, *vectors(6))
    source = magnitude.open_source(path, "magnitude", ReadOptions())
    next(iter(source.blocks()))
    source.close()
    source.close()
    assert path not in [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
