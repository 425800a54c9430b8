"""The row kernels against their twins, and the kernels of grouping, rows and probing without the compiler."""

import os
import subprocess
import sys
from pathlib import Path

import naive
import numpy as np
import pytest

from bigembed import threads
from bigembed.kernels import rows

SHAPES = [(1, 1, 1), (5, 3, 2), (40, 64, 1), (40, 7, 0)]  # S, D, K


@pytest.fixture(params=[1, 2, 5])
def num_threads(request):
    before = threads.get_num_threads()
    threads.set_num_threads(request.param)
    yield request.param
    threads.set_num_threads(before)


def some_slots(rng, num_slots, count):
    """Distinct slots, about a third of them ABSENT."""
    slots = rng.permutation(num_slots)[:count].astype(np.int64)
    slots[rng.random(slots.size) < 0.3] = naive.ABSENT
    return slots


def random_rows(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("num_slots", "dim", "state_dim"), SHAPES)
def test_gather_equals_its_twin(num_threads, num_slots, dim, state_dim):
    rng = np.random.default_rng(0)
    values_SE = random_rows(rng, num_slots, dim + state_dim)
    for past in (0, 1, 6):
        past_PE = random_rows(rng, past, dim + state_dim)
        slots_U = rng.permutation(num_slots + past).astype(np.int64)
        for num_positions in (0, 1, 500):
            inverse_N = rng.integers(0, slots_U.size, num_positions)
            out_ND = np.full((num_positions, dim), np.nan, np.float32)
            threads.run(rows.gather, num_positions, values_SE, past_PE, slots_U, inverse_N, out_ND, grain=64)
            expected = naive.gather(values_SE, past_PE, slots_U, inverse_N, dim)
            assert out_ND.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("num_slots", "dim", "state_dim"), SHAPES)
def test_take_rows_and_put_rows_equal_their_twins(num_threads, num_slots, dim, state_dim):
    rng = np.random.default_rng(1)
    width = dim + state_dim
    for _ in range(10):
        slots_M = some_slots(rng, num_slots, int(rng.integers(0, num_slots + 1)))
        values_SE, rows_ME = random_rows(rng, num_slots, width), random_rows(rng, slots_M.size, width)
        taken_ME, expected_ME = rows_ME.copy(), rows_ME.copy()
        threads.run(rows.take_rows, slots_M.size, values_SE, slots_M, taken_ME, grain=3)
        naive.take_rows(values_SE, slots_M, expected_ME)
        assert taken_ME.tobytes() == expected_ME.tobytes()
        put_SE, expected_SE = values_SE.copy(), values_SE.copy()
        threads.run(rows.put_rows, slots_M.size, put_SE, slots_M, rows_ME, grain=3)
        naive.put_rows(expected_SE, slots_M, rows_ME)
        assert put_SE.tobytes() == expected_SE.tobytes()


def test_set_flags_equals_its_twin(num_threads):
    rng = np.random.default_rng(2)
    for _ in range(30):
        num_slots = int(rng.integers(1, 60))
        flags_S = rng.random(num_slots) < 0.5
        slots_M = some_slots(rng, num_slots + 5, int(rng.integers(0, num_slots + 5)))
        value = bool(rng.random() < 0.5)
        expected_S = flags_S.copy()
        changed = sum(threads.run(rows.set_flags, slots_M.size, flags_S, slots_M, value, grain=3))
        assert changed == naive.set_flags(expected_S, slots_M, value)
        np.testing.assert_array_equal(flags_S, expected_S)


@pytest.mark.parametrize("switch", ["NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"])
def test_kernels_are_right_without_the_compiler_and_within_bounds(switch, tmp_path):
    """The small tests again, in a process where the kernels are plain Python, or check every index."""
    if os.environ.get("NUMBA_DISABLE_JIT") == "1" or os.environ.get("NUMBA_BOUNDSCHECK") == "1":
        pytest.skip("this is that process")
    here = Path(__file__).parent
    files = ["test_grouping.py", "test_rows.py", "test_cache_index.py", "test_row_cache.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-W", "ignore::RuntimeWarning"]  # numpy warns where uint64 scalars wrap around, as they must
    command += ["-k", "twin or admission or place", *[str(here / file) for file in files]]
    # Bounds checks are not part of the key of Numba's cache, so this process needs a cache of its own.
    environment = {**os.environ, switch: "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
