"""Table.read of a mapped table, straight from the maps: the rows that the cold reader gives, in the order asked for."""

import os
import subprocess
import sys

import numpy as np
import pytest

from bigembed import Table, init
from bigembed.errors import DamagedRow, InvalidArgument, StateMismatch
from bigembed.spec import StateColumns

V, D = 10_000, 5


@pytest.fixture
def path(tmp_path):
    """Three chunks: some rows written, some not, the last chunk without a file; nothing left in the journal."""
    path = str(tmp_path / "t")
    with Table.create(path, V, D, chunk_rows=4096, seed=3, init=init.normal(1, 2)) as table:
        rows = np.random.default_rng(0).permutation(8000)[:3000]
        table.write(rows, np.random.default_rng(1).standard_normal((3000, D)).astype(np.float32))
        table.commit()
        table.merge()
    return path


def some_ids(seed=0, count=7000):
    return np.random.default_rng(seed).integers(0, V, count)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_equals_the_cold_reader(path, check, with_state):
    with Table.open(path, "r", reader="mapped") as mapped, Table.open(path, "r", reader="cold") as cold:
        for ids in (some_ids(), np.array([5]), np.array([], np.int64), np.arange(V).reshape(100, 100), np.int32(7)):
            expected = cold.read(ids, with_state=with_state)
            assert mapped.read(ids, with_state=with_state, check=check).tobytes() == expected.tobytes()
            out = np.full_like(expected, np.nan)
            assert mapped.read(ids, with_state=with_state, check=check, out=out) is out
            assert out.tobytes() == expected.tobytes()
            assert cold.read(ids, with_state=with_state, out=out).tobytes() == expected.tobytes()


def test_rows_in_the_journal_and_in_a_cache_are_the_newest(path):
    with Table.open(path, reader="mapped") as table:
        ids = some_ids()
        table.read(ids)
        table.write([int(ids[0]), 9999], np.full((2, D), 7.0, np.float32))
        assert (table.read([ids[0], 9999, ids[0]]) == 7.0).all()
        table.commit()
        table.merge()  # a file for the last chunk
        assert (table.read([ids[0], 9999]) == 7.0).all()
        table.grow(V + 5000)
        assert table.read([V + 4999]).shape == (1, D)
        assert (table.read([9999]) == 7.0).all()
        table.commit()


def test_a_damaged_record_is_named_and_found_only_where_it_is_checked(path):
    with Table.open(path, "r", reader="cold") as cold:
        row = next(row for row in range(100) if not np.array_equal(cold.read([row]), cold.read([row]) * 0))
        ids = np.concatenate([some_ids(), [row]])
        expected = cold.read(ids)
    written = next(r for r in np.random.default_rng(0).permutation(8000)[:3000] if r < 4096)
    with open(os.path.join(path, "weight", "c.0.0"), "r+b") as file:
        file.seek(int(written) * 4 * (D + 2))
        byte = file.read(1)
        file.seek(int(written) * 4 * (D + 2))
        file.write(bytes([byte[0] ^ 1]))
    with Table.open(path, "r", reader="mapped") as mapped:
        with pytest.raises(DamagedRow, match=f"row {written} is damaged"):
            mapped.read([written])
        others = ids[ids != written]
        assert mapped.read(others).tobytes() == expected[ids != written].tobytes()
        assert mapped.read([written], check=False).shape == (1, D)


def test_out_has_to_fit(path):
    with Table.open(path, "r") as table:
        for out in (np.empty((3, D)), np.empty((2, D), np.float32), np.empty((D, 3), np.float32).T, [0.0] * D):
            with pytest.raises(InvalidArgument, match="C-contiguous, writeable float32 array of shape"):
                table.read([1, 2, 3], out=out)
        out = np.empty((3, D), np.float32)
        out.flags.writeable = False
        with pytest.raises(InvalidArgument, match="out is float32"):
            table.read([1, 2, 3], out=out)


@pytest.mark.parametrize("reader", ["mapped", "cold"])
def test_other_state_columns_beside_a_reader_are_an_error_that_says_so(path, reader):
    with Table.open(path, "r", reader=reader) as reading:
        with Table.open(path) as writing:
            writing.set_state("adagrad", (StateColumns("sum", D),))
        with pytest.raises(StateMismatch, match="Call refresh"):
            reading.read(some_ids())
        reading.refresh()
        assert reading.read(some_ids(), with_state=True).shape == (7000, 2 * D)


def test_maps_outlast_a_close_in_the_middle(path):
    """What a read works on stays mapped until it lets go, whoever closes the table."""
    with Table.open(path, "r", reader="mapped") as table:
        table.read([1])
        words_A, first_C = table._store.base._reader.memory()
    assert words_A[first_C[0]] == np.fromfile(os.path.join(path, "weight", "c.0.0"), np.uint32, 1)[0]


@pytest.mark.parametrize("switch", ["NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"])
def test_kernels_without_compiler_and_with_bounds_checked(path, switch, tmp_path):
    if os.environ.get(switch):
        pytest.skip("this is that run")
    ids = some_ids(count=50)
    with Table.open(path, "r", reader="cold") as cold:
        np.save(tmp_path / "expected.npy", cold.read(ids))
    program = f"""
import numpy as np
from bigembed import Table
with Table.open({path!r}, "r", reader="mapped") as mapped, np.errstate(over="ignore"):
    ids, expected = np.array({ids.tolist()}), np.load({str(tmp_path / "expected.npy")!r})
    assert mapped.read(ids).tobytes() == mapped.read(ids, check=False).tobytes() == expected.tobytes()
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, switch: "1", "NUMBA_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
