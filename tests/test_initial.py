"""Initial values: equal to their slow twin to the last bit, whatever the order, and of the promised distribution."""

from statistics import NormalDist

import naive
import numpy as np
import pytest

from bigembed import init, threads
from bigembed.kernels.initial import fill_initial, initial_rows, normal_quantile
from bigembed.spec import StateColumns, TableSpec

KINDS = [init.normal(0.25, 3.0), init.uniform(-0.1, 0.3), init.constant(1.5), init.zeros()]
ROWS = np.array([0, 1, 2, 4095, 4096, 10**6, 2**31, 2**32 + 5, 2**47 + 11])
STATE = (StateColumns("sum", 1, 0.1), StateColumns("moments", 2, 0.0))


def filled(spec, rows_M):
    out_ME = np.full((len(rows_M), spec.row_width), np.nan, np.float32)
    fill_initial(0, len(rows_M), rows_M, initial_rows(spec), out_ME)
    return out_ME


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_values_equal_the_numpy_twin_to_the_last_bit(kind, seed):
    spec = TableSpec(2**48, 70, state=STATE, init=kind, seed=seed, padding_idx=2)
    np.testing.assert_array_equal(filled(spec, ROWS).view(np.uint32), naive.fill_initial(spec, ROWS).view(np.uint32))


def test_the_padding_row_is_zero_and_its_state_is_not_special():
    spec = TableSpec(100, 5, state=STATE, padding_idx=7)
    assert filled(spec, np.array([7])).tolist() == [[0.0] * 5 + [np.float32(0.1), 0.0, 0.0]]


def test_any_order_and_any_chunking_give_the_same_rows():
    spec, rng = TableSpec(50_000, 6, seed=3), np.random.default_rng(0)
    rows = rng.permutation(50_000)
    whole = np.empty((50_000, 6), np.float32)
    whole[rows] = filled(spec, rows)
    pieces = [filled(spec, piece) for piece in np.split(np.arange(50_000), np.sort(rng.integers(0, 50_000, 9)))]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_the_thread_count_does_not_matter():
    spec, rows, before = TableSpec(20_000, 3), np.arange(20_000), threads.get_num_threads()
    try:
        threads.set_num_threads(5)
        out_ME = np.empty((20_000, 3), np.float32)
        threads.run(fill_initial, 20_000, rows, initial_rows(spec), out_ME, grain=100)
    finally:
        threads.set_num_threads(before)
    np.testing.assert_array_equal(out_ME, filled(spec, rows))


def test_seeds_rows_and_columns_all_matter_and_the_number_of_rows_does_not():
    one, other = TableSpec(1000, 4, seed=1), TableSpec(1000, 4, seed=2)
    rows = np.arange(1000)
    assert len(np.unique(np.concatenate([filled(one, rows), filled(other, rows)]))) == 8000
    np.testing.assert_array_equal(filled(one, rows), filled(TableSpec(10**9, 4, seed=1), rows))


def test_the_normal_quantile_is_exact_to_a_few_last_bits():
    tails = 10.0 ** -np.arange(1.0, 17.0)
    for p in [*tails, *(1 - tails[:-1]), *np.linspace(0.001, 0.999, 999), 0.075, 0.925, 2.0**-54]:
        want = NormalDist().inv_cdf(p)
        assert normal_quantile(p, np.empty(1)) == pytest.approx(want, rel=2e-15, abs=1e-16), p


def test_moments_are_those_of_the_distribution():
    rows = np.arange(100_000)
    normal = filled(TableSpec(10**6, 10, init=init.normal(2.0, 3.0)), rows).astype(np.float64)
    z = (normal - 2.0) / 3.0
    assert abs(z.mean()) < 0.005
    assert [(z**k).mean() for k in (2, 3, 4)] == pytest.approx([1.0, 0.0, 3.0], abs=0.03)
    assert np.abs(np.corrcoef(z.T) - np.eye(10)).max() < 0.02
    uniform = filled(TableSpec(10**6, 10, init=init.uniform(-1.0, 3.0)), rows).astype(np.float64)
    assert uniform.min() >= -1.0
    assert uniform.max() <= 3.0
    assert [uniform.mean(), uniform.var()] == pytest.approx([1.0, 16 / 12], abs=0.01)
