"""RowIndex against a dict."""

import naive
import numpy as np
import pytest

from bigembed.storage import row_index
from bigembed.storage.row_index import NOWHERE, RowIndex

SPREADS = {"dense": 3000, "sparse": 2**47}


@pytest.mark.parametrize("most", SPREADS.values(), ids=SPREADS)
def test_index_equals_a_dict_after_every_step(most):
    rng, index, twin = np.random.default_rng(most), RowIndex(), naive.RowIndex()
    pool = np.unique(rng.integers(0, most, 6000))
    for step in range(60):
        rows = np.sort(rng.choice(pool, rng.integers(1, 300), replace=False))
        places = (np.int64(step) << 40) + np.arange(len(rows)) * 28
        assert index.put(rows, places).tolist() == twin.put(rows, places)
        probe = rng.integers(0, most, 200)
        assert index.find(probe).tolist() == twin.find(probe)
        assert len(index) == len(twin.places)
    rows, places = index.sorted_items()
    assert dict(zip(rows.tolist(), places.tolist(), strict=True)) == twin.places
    assert rows.tolist() == sorted(twin.places)


def test_an_empty_index_knows_nothing():
    index = RowIndex()
    assert index.find(np.array([0, 5])).tolist() == [NOWHERE, NOWHERE]
    assert len(index.sorted_items()[0]) == 0


def test_memory_stays_between_21_and_43_bytes_a_row_when_large():
    index = RowIndex()
    for start in range(0, 40_000, 500):
        index.put(np.arange(start, start + 500), np.arange(500))
        if len(index) > 2000:
            assert 21 <= index.memory_bytes / len(index) <= 43


def test_row_zero_and_place_zero_are_ordinary():
    index = RowIndex()
    assert index.put(np.array([0]), np.array([0])).tolist() == [NOWHERE]
    assert index.find(np.array([0, 1])).tolist() == [0, NOWHERE]
    assert index.put(np.array([0]), np.array([9])).tolist() == [0]


def test_an_interruption_behind_the_kernel_loses_no_row(monkeypatch):
    index = RowIndex()
    rows = np.arange(700)
    index.put(rows, rows * 8)
    real = row_index.map_put

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(row_index, "map_put", interrupted)
    for more in (np.arange(700, 710), np.arange(710, 5000)):  # without and with growing
        with pytest.raises(KeyboardInterrupt):
            index.put(more, more * 8)
    monkeypatch.undo()
    assert index.find(rows).tolist() == (rows * 8).tolist()
    assert index.find(np.arange(700, 710)).tolist() == list(range(5600, 5680, 8))
    assert len(index) == 710
    index.put(np.arange(20_000), np.arange(20_000))
    assert len(index) == 20_000
