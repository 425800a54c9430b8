"""The kernels that cut dictionaries and decode rows, against their twins; and the reader of entries at its seams."""

import os
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import naive_entries as naive
import numpy as np
import pytest

from bigembed.convert import entries
from bigembed.convert.entries import Entries
from bigembed.convert.fields import Fields
from bigembed.errors import BadSource
from bigembed.kernels.entries import cut_counted, cut_ended
from bigembed.kernels.quantised import decode_rows
from bigembed.storage.files import READ, File


def room(count, most):
    return np.zeros(count, np.uint8), np.zeros(most, np.int64), np.zeros(most, np.uint8)


def tokens_of(token_B, end_M, count):
    edges = [0, *end_M[:count].tolist()]
    return [token_B[a:b].tobytes() for a, b in pairwise(edges)]


@pytest.mark.parametrize("tail_bytes", [1, 9])
def test_ended_entries_equal_the_twin_for_every_stretch(tail_bytes):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 4, 120).astype(np.uint8).tobytes()
    buffer_B = np.frombuffer(b"zz" + raw + b"\0\0", np.uint8)
    for last in range(len(raw) + 1):
        for most in (0, 1, 3, 1000):
            token_B, end_M, kind_M = room(last, most)
            count, at, used = cut_ended(buffer_B, 2, 2 + last, most, tail_bytes, token_B, end_M, kind_M)
            tokens, kinds, stop = naive.cut_ended(raw[:last], most, tail_bytes)
            assert tokens_of(token_B, end_M, count) == tokens
            assert kind_M[:count].tolist() == kinds
            assert (at, used) == (2 + stop, sum(map(len, tokens)))


def test_counted_entries_equal_the_twin_for_every_stretch():
    rng = np.random.default_rng(0)
    raw = b"".join(struct.pack("<I", n) + bytes(rng.integers(0, 256, n).tolist()) for n in (3, 0, 1, 17, 0, 40, 2))
    raw += b"\xff\xff\xff\xff" + b"x" * 20
    buffer_B = np.frombuffer(b"zz" + raw + b"\0\0", np.uint8)
    for last in range(len(raw) + 1):
        for most in (0, 1, 3, 1000):
            token_B, end_M, _ = room(last, most)
            count, at, used = cut_counted(buffer_B, 2, 2 + last, most, token_B, end_M)
            tokens, stop = naive.cut_counted(raw[:last], most)
            assert tokens_of(token_B, end_M, count) == tokens
            assert (at, used) == (2 + stop, sum(map(len, tokens)))


@pytest.mark.parametrize(("dim", "piece_dim", "choices"), [(6, 2, 256), (7, 3, 5), (5, 5, 2), (1, 1, 256), (9, 2, 7)])
def test_decoded_rows_equal_the_twin(dim, piece_dim, choices):
    rng = np.random.default_rng(0)
    code_MQ = rng.integers(0, choices, (20, -(-dim // piece_dim))).astype(np.uint8)
    piece_F = rng.standard_normal(dim * choices).astype(np.float32)
    out_MD = np.full((20, dim), np.nan, np.float32)
    decode_rows(0, 7, code_MQ, piece_F, choices, piece_dim, out_MD)
    decode_rows(7, 20, code_MQ, piece_F, choices, piece_dim, out_MD)
    np.testing.assert_array_equal(out_MD, naive.decode_rows(code_MQ, piece_F, choices, piece_dim, dim))


@pytest.fixture
def dictionary(tmp_path):
    """A file of 50 entries with something before and behind, and its tokens."""
    rng = np.random.default_rng(1)
    tokens = [bytes(rng.integers(1, 256, rng.integers(0, 30)).tolist()) for _ in range(50)]
    raw = b"".join(token + b"\0" + struct.pack("<qB", 7, n % 3) for n, token in enumerate(tokens))
    path = tmp_path / "dictionary"
    path.write_bytes(b"before" + raw + b"behind")
    file = File(str(path), READ)
    yield file, 6, 6 + len(raw), tokens
    file.close()


@pytest.mark.parametrize("buffer_bytes", [40, 41, 64, 1000, 1 << 20])
def test_entries_are_read_in_any_steps(dictionary, monkeypatch, buffer_bytes):
    monkeypatch.setattr(entries, "BUFFER_BYTES", buffer_bytes)
    file, first, end, tokens = dictionary
    for steps in ([50], [1] * 50, [0, 7, 0, 13, 30]):
        reader, found, kinds = Entries(file, first, end, 9), [], []
        for count in steps:
            some, kind_M = reader.take(count)
            assert len(some) == count
            found += some.to_list()
            kinds += kind_M.tolist()
        assert found == tokens
        assert kinds == [n % 3 for n in range(50)]
        assert reader.at == end
        assert reader.number == 50
        with pytest.raises(BadSource, match="token 50"):
            reader.take(1)
    reader = Entries(file, first, end, 9)
    assert reader.skip(50) == sum(n % 3 for n in range(50))
    assert reader.at == end


def test_an_entry_longer_than_the_buffer_is_refused(dictionary, monkeypatch):
    monkeypatch.setattr(entries, "BUFFER_BYTES", 20)
    file, first, end, _ = dictionary
    with pytest.raises(BadSource, match="takes more than 20 bytes"):
        Entries(file, first, end, 9).skip(50)


def test_fields_are_read_in_order_and_checked(tmp_path):
    path = tmp_path / "fields"
    path.write_bytes(struct.pack("<iqB", -5, 2**40, 200) + b"rest")
    file = File(str(path), READ)
    fields = Fields(file)
    assert fields.take("iq", "two numbers") == (-5, 2**40)
    assert fields.take("B", "a byte") == 200
    assert fields.skip(1, "a byte") == 13
    with pytest.raises(BadSource, match=r"fields, byte 14: a number should follow, 4 bytes, but only 3 do"):
        fields.take("i", "a number")
    assert fields.take_bytes(3, "the rest") == b"est"
    with pytest.raises(BadSource, match="byte 17"):
        fields.skip(-1, "nothing")
    with pytest.raises(BadSource, match="only 0 do"):
        Fields(file, 0, 0).take("B", "a byte")
    file.close()


@pytest.mark.parametrize("switch", ["NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"])
def test_kernels_are_right_without_the_compiler_and_within_bounds(switch, tmp_path):
    """The twins again, in a process where the kernels are plain Python, or check every index."""
    if os.environ.get("NUMBA_DISABLE_JIT") == "1" or os.environ.get("NUMBA_BOUNDSCHECK") == "1":
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "twin or steps", __file__]
    environment = {**os.environ, switch: "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
