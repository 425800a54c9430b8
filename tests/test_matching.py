"""match against its slow twin, over lists of every relative length."""

import naive
import numpy as np
import pytest

from bigembed.kernels.matching import match


@pytest.mark.parametrize("seed", range(40))
def test_match_equals_its_twin(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 1, 2, 30, 400], 2)
    rows_M, others_L = (np.unique(rng.integers(0, 600, size)) for size in sizes)
    usable_L = rng.random(others_L.size) < rng.choice([0.0, 0.5, 1.0])
    at_M = np.full(rows_M.size, -7, np.int64)
    count = match(rows_M, others_L, usable_L, at_M)
    assert list(at_M) == naive.match(rows_M, others_L, usable_L)
    assert count == sum(at >= 0 for at in at_M)
