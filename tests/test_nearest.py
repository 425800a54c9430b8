"""nearest: exactly what comparing every row in float64 gives, whatever the blocks, threads and rounding are."""

import naive_export
import numpy as np
import pytest

from bigembed import threads
from bigembed.convert import nearest as module
from bigembed.convert.nearest import nearest
from bigembed.errors import InvalidArgument, RowOutOfRange
from bigembed.kernels.cosine import cosine, unit_rows
from bigembed.storage.table import Table


@pytest.fixture
def make(tmp_path):
    """A table that holds some values."""
    tables = []

    def filled(values_VD):
        path = str(tmp_path / f"t{len(tables)}")
        table = Table.create(path, *values_VD.shape, init="zeros", is_temporary=True)
        table.write(np.arange(len(values_VD)), values_VD)
        tables.append(table)
        return table

    yield filled
    for table in tables:
        table.close()


@pytest.fixture(params=[1, 3])
def num_threads(request):
    before = threads.get_num_threads()
    threads.set_num_threads(request.param)
    yield
    threads.set_num_threads(before)


def hard_values(rng, rows, dim):
    """Rows with ties, opposites, all sizes that float32 has, zeros, NaN and infinity."""
    values = rng.standard_normal((rows, dim)).astype(np.float32)
    values *= np.float32(10) ** rng.integers(-30, 30, (rows, 1)).astype(np.float32)
    for kind in range(8):
        at, of = rng.integers(0, rows, (2, max(1, rows // 20)))
        values[at] = {
            0: values[of],
            1: -values[of],
            2: np.float32(2) * values[of],
            3: np.float32(0),
            4: np.float32(np.nan),
            5: np.where(np.arange(dim) == 0, np.float32(np.inf), np.float32(1)),
            6: np.float32(1e-45),
            7: np.float32(3e38),
        }[kind]
    return values


def assert_same(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[0].dtype == np.int64
    assert found[1].tobytes() == expected[1].tobytes()


@pytest.mark.parametrize("seed", range(6))
def test_equals_its_twin(make, monkeypatch, num_threads, seed):
    rng = np.random.default_rng(seed)
    rows, dim, count = int(rng.integers(1, 400)), int(rng.integers(1, 9)), int(rng.integers(1, 30))
    values_VD = hard_values(rng, rows, dim)
    usable_V = np.flatnonzero(naive_export.unit_rows(values_VD)[1])
    queries_QD = rng.standard_normal((5, dim)).astype(np.float32)
    if len(usable_V):
        queries_QD[:2] = values_VD[rng.choice(usable_V, 2)]
    excluded = rng.integers(0, rows, 4)
    monkeypatch.setattr(module, "BLOCK_BYTES", int(rng.integers(1, 4 * dim * rows + 8)))
    monkeypatch.setattr(module, "GRAIN_NUMBERS", 8)
    assert_same(
        nearest(make(values_VD), queries_QD, count, exclude_rows=excluded),
        naive_export.nearest(values_VD, queries_QD, count, excluded),
    )


def test_rows_that_float32_cannot_tell_apart_are_in_the_right_order(make):
    """Thousands of nearly equal rows: a float32 product orders them wrongly, so it must not decide."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal(64).astype(np.float32)
    values_VD = query + np.float32(1e-3) * rng.standard_normal((3000, 64)).astype(np.float32)
    values_VD[2000:2900] = values_VD[100:1000]
    expected = naive_export.nearest(values_VD, query[None], 50)
    about_V = (values_VD / np.linalg.norm(values_VD, axis=1, keepdims=True)) @ query
    assert (np.argsort(-about_V, kind="stable")[:50] != expected[0][0]).any(), "this test tests nothing"
    assert_same(nearest(make(values_VD), query[None], 50), expected)


def test_agrees_with_a_plain_float64_product(make):
    rng = np.random.default_rng(1)
    values_VD = rng.standard_normal((5000, 50)).astype(np.float32)
    queries_QD = rng.standard_normal((20, 50)).astype(np.float32)
    rows_QC, similarity_QC = nearest(make(values_VD), queries_QD, 10)
    wide_VD, wide_QD = values_VD.astype(np.float64), queries_QD.astype(np.float64)
    exact_QV = (wide_QD / np.linalg.norm(wide_QD, axis=1, keepdims=True)) @ (
        wide_VD / np.linalg.norm(wide_VD, axis=1, keepdims=True)
    ).T
    expected_QC = np.argsort(-exact_QV, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(rows_QC, expected_QC)
    # The two sum in different orders, so they may differ by one unit in the last place of float32.
    np.testing.assert_allclose(similarity_QC, np.take_along_axis(exact_QV, expected_QC, 1), rtol=2.0**-23)


def test_equal_rows_come_in_order(make):
    values_VD = np.tile(np.array([[1, 2, 3]], np.float32), (5000, 1))
    rows_QC, similarity_QC = nearest(make(values_VD), values_VD[:2], 7)
    assert rows_QC.tolist() == [list(range(7))] * 2
    assert (similarity_QC == 1).all()


def test_what_has_no_direction_is_never_found(make):
    values_VD = np.array([[0, 0], [1, 1], [np.nan, 1], [np.inf, 0], [-1, -1]], np.float32)
    rows_QC, similarity_QC = nearest(make(values_VD), np.ones((1, 2), np.float32), 10)
    assert rows_QC.tolist() == [[1, 4]]
    assert similarity_QC.tolist() == [[1, -1]]
    rows_QC, _ = nearest(make(values_VD[:1]), np.ones((3, 2), np.float32))
    assert rows_QC.shape == (3, 0)


def test_no_queries(make):
    assert nearest(make(np.ones((4, 2), np.float32)), np.empty((0, 2), np.float32), 3)[0].shape == (0, 3)


def test_uncommitted_values_are_seen(make):
    table = make(np.eye(3, dtype=np.float32))
    table.write([2], np.array([[1, 0, 0.1]], np.float32))
    assert nearest(table, np.array([[1, 0, 0.1]], np.float32), 1)[0].tolist() == [[2]]


def test_progress_counts_rows(make, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 2 * 4)
    seen = []
    nearest(make(np.ones((10, 2), np.float32)), [[1, 1]], progress=lambda *step: seen.append(step))
    assert seen == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize(
    ("queries", "count", "exclude", "error", "text"),
    [
        ([1.0, 2.0], 1, None, InvalidArgument, "add a first dimension"),
        ([[1.0, 2.0, 3.0]], 1, None, InvalidArgument, "shape (Q, 2)"),
        ([["a", "b"]], 1, None, InvalidArgument, "numbers of shape"),
        ([[1.0, 2.0], [0.0, 0.0]], 1, None, InvalidArgument, "query 1 is all zeros"),
        ([[np.nan, 2.0]], 1, None, InvalidArgument, "query 0 is all zeros, or holds NaN"),
        ([[np.inf, 2.0]], 1, None, InvalidArgument, "has no direction"),
        ([[1.0, 2.0]], 0, None, InvalidArgument, "at least 1, not 0"),
        ([[1.0, 2.0]], 1.5, None, InvalidArgument, "at least 1, not 1.5"),
        ([[1.0, 2.0]], True, None, InvalidArgument, "at least 1, not True"),
        ([[1.0, 2.0]], 1, [4], RowOutOfRange, "valid ids are 0 to 3"),
    ],
)
def test_mistakes(make, queries, count, exclude, error, text):
    table = make(np.ones((4, 2), np.float32))
    with pytest.raises(error) as caught:
        nearest(table, queries, count, exclude_rows=exclude)
    assert text in str(caught.value)


def test_unit_rows_equals_its_twin(num_threads):
    values_MD = hard_values(np.random.default_rng(3), 200, 5)
    unit_MD, usable_M = np.empty_like(values_MD), np.empty(len(values_MD), bool)
    threads.run(unit_rows, len(values_MD), values_MD, unit_MD, usable_M, grain=7)
    expected_MD, expected_M = naive_export.unit_rows(values_MD)
    np.testing.assert_array_equal(usable_M, expected_M)
    assert unit_MD.tobytes() == expected_MD.tobytes()


def test_cosine_equals_its_twin(num_threads):
    values_MD = hard_values(np.random.default_rng(4), 200, 5)
    index_K = np.flatnonzero(naive_export.unit_rows(values_MD)[1])
    query_D, out_K = values_MD[index_K[3]], np.empty(len(index_K), np.float32)
    threads.run(cosine, len(index_K), values_MD, index_K, query_D, out_K, grain=7)
    assert out_K.tobytes() == np.array([naive_export.cosine(values_MD[m], query_D) for m in index_K]).tobytes()
