"""The kernels that read lines, against their slow twins; without the compiler and with every index checked too."""

import os
import random
import subprocess
import sys
from pathlib import Path

import naive_text as naive
import numpy as np
import pytest
from text_sources import buffer_of, random_texts

from bigembed import threads
from bigembed.kernels import decimals
from bigembed.kernels import text as kernels

U = np.uint64


def random_line(rng, dim):
    token = rng.choice(["a", "", ".", ". . .", "at name@x.com", "area 51", "v 1.5", "\x01", "ü", "a\0b", " x", "a\tb"])
    if rng.random() < 0.1:
        return rng.choice(["", " ", "\t \r", "x", "x y"]).encode()
    count = dim + rng.choice([0, 0, 0, 0, -1, 1])
    numbers = random_texts(rng.random(), count) if rng.random() < 0.3 else [f"{rng.gauss(0, 1):.4f}"] * count
    if rng.random() < 0.1 and numbers:
        numbers[rng.randrange(len(numbers))] = rng.choice(["nan", "1e39", "x", "1_0", "-", "1,5"])
    between = rng.choice([" ", " ", "\t", "  "])
    line = token + between + between.join(numbers) + rng.choice(["", " ", "\r", " \r", "\t"])
    return line.encode("utf-8", "surrogateescape")


def read_with_kernel(data, places, dim, num_threads=1):
    before = threads.get_num_threads()
    threads.set_num_threads(num_threads)
    try:
        start_L, stop_L = np.array(places, np.int64).reshape(-1, 2).T.copy()
        has_row_L = stop_L - start_L >= 2 * dim - 1
        row_L = np.where(has_row_L, np.cumsum(has_row_L) - 1, -1)
        values_MD = np.full((has_row_L.sum(), dim), -7, np.float32)
        token_stop_L, status_L = np.full(len(start_L), -7), np.full(len(start_L), 7, np.uint8)
        arrays = (start_L, stop_L, row_L, decimals.powers_of_five(), values_MD, token_stop_L, status_L)
        threads.run(kernels.read_lines, len(start_L), buffer_of(data), *arrays, grain=2)
        return row_L, values_MD, token_stop_L, status_L
    finally:
        threads.set_num_threads(before)


@pytest.mark.parametrize("seed", range(8))
def test_read_lines_and_find_lines_equal_their_twins(seed):
    rng = random.Random(seed)
    dim = rng.choice([1, 2, 3, 9])
    lines = [random_line(rng, dim) for _ in range(40)]
    data = b"".join(line + b"\n" for line in lines) + rng.choice([b"", b"the rest"])
    start_L, stop_L = np.empty(60, np.int64), np.empty(60, np.int64)
    count = kernels.find_lines(buffer_of(data), 0, len(data), start_L, stop_L)
    places = list(zip(start_L[:count].tolist(), stop_L[:count].tolist(), strict=True))
    assert places == naive.find_lines(data)
    assert kernels.find_lines(buffer_of(data), 0, len(data), start_L[:7], stop_L[:7]) == 7
    row_L, values_MD, token_stop_L, status_L = read_with_kernel(data, places, dim, rng.choice([1, 3]))
    for line, (start, stop) in enumerate(places):
        token, values, status = naive.read_line(data[start:stop], dim)
        assert status_L[line] == status, data[start:stop]
        if status == kernels.GOOD:
            assert data[start : token_stop_L[line]] == token
            assert values_MD[row_L[line]].tobytes() == np.array(values, np.float32).tobytes()


def test_small_line_kernels_equal_their_twins():
    rng = random.Random(5)
    for _ in range(200):
        data = "".join(rng.choices([" ", "\t", "\r", "a", "1.5", "-", ".", "\0", "b1"], k=rng.randint(0, 9))).encode()
        buffer_B, stop, fields = buffer_of(data + b"\n"), U(len(data)), rng.randint(1, 3)
        assert kernels.skip_blank(buffer_B, U(0), stop) == naive.skip_blank(data, 0, len(data))
        assert kernels.is_plain_token(buffer_B, U(0), stop) == naive.is_plain_token(data), data
        assert kernels.token_end(buffer_B, U(0), stop, fields) == naive.token_end(data, fields), (data, fields)
        values_D = np.zeros(fields, np.float32)
        after = kernels.read_numbers(buffer_B, U(0), decimals.powers_of_five(), values_D)
        expected = naive.read_numbers(data + b"\n", fields)
        assert int(after) == (0 if expected is None else expected[1]), data
        if expected is not None:
            assert values_D.tobytes() == np.array(expected[0], np.float32).tobytes()


def test_pack_tokens_equals_its_twin():
    data = b"the quick brown fox"
    start_M, stop_M = np.array([0, 10, 4, 19]), np.array([3, 15, 9, 19])
    packed_M1 = np.concatenate([[0], np.cumsum(stop_M - start_M)])
    out_B = np.zeros(packed_M1[-1], np.uint8)
    threads.run(kernels.pack_tokens, 4, buffer_of(data), start_M, packed_M1, out_B, grain=1)
    assert out_B.tobytes() == naive.pack_tokens(data, start_M, stop_M)


@pytest.mark.parametrize("switch", ["NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"])
def test_kernels_are_right_without_the_compiler_and_within_bounds(switch, tmp_path):
    """The twins again, in a process where the kernels are plain Python, or check every index."""
    if os.environ.get("NUMBA_DISABLE_JIT") == "1" or os.environ.get("NUMBA_BOUNDSCHECK") == "1":
        pytest.skip("this is that process")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "twin"]
    command += ["-W", "ignore::RuntimeWarning"]  # numpy warns where uint64 scalars wrap around, as they must
    command += [str(here / f"test_{name}.py") for name in ("decimals", "text_kernels", "word2vec_binary")]
    # Bounds checks are not part of the key of Numba's cache, so this process needs a cache of its own.
    environment = {**os.environ, switch: "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
