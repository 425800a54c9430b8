"""The kernels a converter runs over rows equal their twins."""

import naive
import numpy as np
import pytest

from bigembed import threads
from bigembed.kernels import norms

ODD = np.float32([[np.nan, 1, 2], [np.inf, 0, -np.inf], [0, 0, 0], [1e38, 1e38, 1e38], [1e-45, 0, 0], [3, 4, 0]])


@pytest.fixture
def values():
    random = np.random.default_rng(0).standard_normal((5000, 3)).astype(np.float32)
    return np.concatenate([ODD, random, ODD])


def test_normalize_rows_equals_its_twin(values):
    values_MD = values
    out_MD = np.empty_like(values_MD)
    threads.run(norms.normalize_rows, len(values_MD), values_MD, out_MD)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(out_MD, naive.normalize_rows(values_MD))
    assert out_MD[5].tolist() == [np.float32(0.6), np.float32(0.8), 0]


def test_survey_rows_equals_its_twin(values):
    assert norms.survey_rows(0, len(values), values) == naive.survey_rows(values)
    assert norms.survey_rows(0, len(values), values)[0] == 4
    parts = threads.run(norms.survey_rows, len(values), values, grain=1)
    assert sum(count for count, _ in parts) == 4
