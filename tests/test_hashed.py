"""Hashed vocabularies: against the slow twin, against values written down for ever, and for how evenly they spread."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import naive_subwords as naive
import numpy as np
import pytest

from bigembed import threads
from bigembed.errors import InvalidArgument
from bigembed.vocab import hashed
from bigembed.vocab.hashed import HashBuckets, HashVocab, NgramHash
from bigembed.vocab.packed import PackedTokens
from bigembed.vocab.primes import distinct_primes, is_prime

TOKENS = ["", "a", "der", "überspringen", "12345678", "123456789", b"\xff\x00", "x" * 1000, "\n"]
IDS = np.array([0, 1, -1, 2**62, -(2**63), 2**63 - 1, 50257])
PACKED = [naive.hash_token(token.encode() if isinstance(token, str) else token) for token in TOKENS]


@pytest.mark.parametrize("first_row", [0, 1 << 40])
@pytest.mark.parametrize(("num_rows", "num_hashes", "seed"), [(1, 1, 0), (1000, 3, 0), (1 << 61, 2, 2**64 - 1)])
def test_rows_of_tokens_and_ids_equal_the_twin(num_rows, num_hashes, seed, first_row):
    vocab = HashVocab(num_rows, num_hashes, first_row, seed)
    rest = (num_rows, num_hashes, first_row, seed)
    assert vocab.rows(TOKENS).tolist() == naive.hashed_rows(PACKED, *rest)
    assert vocab.rows(PackedTokens.of(TOKENS)).tolist() == naive.hashed_rows(PACKED, *rest)
    assert vocab.rows(IDS).tolist() == naive.hashed_rows(IDS.tolist(), *rest)
    assert vocab.rows("der").tolist() == naive.hashed_rows(PACKED[2:3], *rest)


def test_rows_of_no_tokens_and_of_ids_of_any_shape_and_type():
    vocab = HashVocab(100, 2)
    assert vocab.rows([]).shape == (0, 2)
    assert vocab.rows(np.zeros((0,), np.int64)).shape == (0, 2)
    expected = vocab.rows(np.arange(6))
    for dtype in (np.int8, np.uint16, np.int32, np.uint64, ">i4"):
        np.testing.assert_array_equal(vocab.rows(np.arange(6).astype(dtype).reshape(2, 3)), expected)
    np.testing.assert_array_equal(vocab.rows(np.arange(12)[::2]), vocab.rows(np.arange(12)[::2].copy()))


def test_rows_do_not_change_from_one_version_to_the_next():
    """A table trained with these rows is worthless with others. If this fails, the hash has changed: undo it."""
    assert HashVocab(10**9, 2, seed=7).rows(["der", "hund", "ü"]).tolist() == GOLDEN_TOKENS
    assert HashVocab(10**9, 2).rows(np.array([0, 1, -1, 50257])).tolist() == GOLDEN_IDS
    memory = NgramHash([10**9, 10**9 + 7, 3 * 10**8, 11], orders=(2, 3), heads=2, seed=7, pad=50256, layer=3)
    assert memory.rows(np.array([[464, 3290, 318, -5]])).tolist() == GOLDEN_NGRAMS


GOLDEN_TOKENS = [[999521598, 507219030], [56071815, 782255172], [52709484, 550102439]]
GOLDEN_IDS = [[580732898, 738532977], [626418605, 284735191], [791843042, 856181295], [546672143, 80006203]]
GOLDEN_NGRAMS = [
    [
        [425034593, 1443421655, 2042441489, 2300000013],
        [906710138, 1013814268, 2186372778, 2300000011],
        [912969488, 1306599687, 2237096052, 2300000015],
        [784683933, 1303041600, 2291619377, 2300000013],
    ]
]


def test_buckets_are_a_hash_vocabulary_of_one_row():
    buckets = HashBuckets(500, 100, seed=3)
    rows_N = buckets.rows_of(PackedTokens.of(TOKENS))
    assert rows_N.shape == (len(TOKENS),)
    assert rows_N.dtype == np.int64
    assert rows_N.tolist() == [row for (row,) in naive.hashed_rows(PACKED, 100, 1, 500, 3)]
    stored = json.loads(json.dumps(buckets.to_json()))
    assert HashBuckets.from_json(stored) == buckets
    assert HashBuckets.from_json({"kind": "hash-buckets", "first_row": 1, "count": 2}) == HashBuckets(1, 2)


def test_rows_spread_evenly_and_hashes_are_independent():
    """Chi-square over 1000 rows of 100,000 neighbouring ids: within five standard deviations of what chance gives."""
    rows_NK = HashVocab(1000, 2).rows(np.arange(100_000))
    pairs = rows_NK[:, 0] // 32 * 32 + rows_NK[:, 1] // 32  # 32 x 32 cells of 32 rows, the last of 8
    for k in range(2):
        count = np.bincount(rows_NK[:, k], minlength=1000)
        chi = ((count - 100.0) ** 2 / 100).sum()
        assert abs(chi - 999) < 5 * np.sqrt(2 * 999)
    count = np.bincount(pairs, minlength=1024).reshape(32, 32)[:31, :31]
    assert abs(((count - 102.4) ** 2 / 102.4).sum() - 960) < 5 * np.sqrt(2 * 960)


# --- n-grams


def sequences(rng, batch, length):
    return rng.integers(-3, 50000, (batch, length))


@pytest.mark.parametrize(
    ("num_rows", "options"),
    [
        (1000, {}),
        (1, {"orders": (1,)}),
        (1 << 58, {"orders": (2, 3, 4), "heads": 3, "seed": 9, "pad": -1, "layer": 2**64 - 1}),
        ([5, 7, 1000, 11], {"orders": (3, 1), "heads": 2, "pad": 50256}),
        ([8, 8, 8], {"orders": (5, 2, 9)}),
    ],
    ids=str,
)
def test_ngram_rows_equal_the_twin(num_rows, options):
    memory = NgramHash(num_rows, **options)
    ids_BT = sequences(np.random.default_rng(0), 4, 7)
    twin = {
        "orders": memory.orders,
        "heads": memory.heads,
        **{k: v for k, v in options.items() if k in ("seed", "pad", "layer")},
    }
    rows = memory.rows(ids_BT)
    assert rows.dtype == np.int64
    assert rows.shape == (4, 7, len(memory.orders) * memory.heads)
    assert rows.tolist() == naive.ngram_rows(ids_BT.tolist(), memory.sizes, **twin)
    assert memory.rows(ids_BT.astype(np.int32)).tolist() == rows.tolist()
    assert memory.rows(ids_BT.tolist()).tolist() == rows.tolist()
    for c, (first, size) in enumerate(zip(memory.first_rows, memory.sizes, strict=True)):
        assert (rows[..., c] >= first).all()
        assert (rows[..., c] < first + size).all()


def test_total_and_first_rows_are_the_sums_of_the_sizes():
    memory = NgramHash([5, 7, 1000, 11], orders=(3, 1), heads=2)
    assert memory.sizes == [5, 7, 1000, 11]
    assert memory.first_rows == [0, 5, 12, 1012]
    assert memory.total_rows == 1023
    assert "orders=(3, 1)" in repr(memory)


def test_each_sequence_begins_with_pads_whatever_stands_before_it():
    memory = NgramHash(10**6, orders=(2, 4), pad=77)
    ids_BT = sequences(np.random.default_rng(1), 3, 9)
    padded = np.concatenate([np.full((3, 5), 77), ids_BT], 1)
    np.testing.assert_array_equal(memory.rows(ids_BT), memory.rows(padded)[:, 5:])
    np.testing.assert_array_equal(memory.rows(ids_BT)[1:2], memory.rows(ids_BT[1:2]))
    np.testing.assert_array_equal(memory.rows(ids_BT)[:, :4], memory.rows(ids_BT[:, :4]))
    np.testing.assert_array_equal(memory.rows(ids_BT[0]), memory.rows(ids_BT)[0])


def test_rows_are_the_same_for_any_number_of_threads_and_shape():
    memory = NgramHash(10**6, orders=(2, 3), heads=2)
    ids_BT = sequences(np.random.default_rng(2), 130, 101)
    before = threads.get_num_threads()
    try:
        threads.set_num_threads(1)
        expected = memory.rows(ids_BT)
        threads.set_num_threads(5)
        np.testing.assert_array_equal(memory.rows(ids_BT), expected)
    finally:
        threads.set_num_threads(before)
    np.testing.assert_array_equal(memory.rows(np.asfortranarray(ids_BT)), expected)
    np.testing.assert_array_equal(memory.rows(ids_BT.reshape(13, 10, 101)), expected.reshape(13, 10, 101, 4))


def test_empty_batches_have_empty_rows():
    memory = NgramHash(10)
    assert memory.rows(np.zeros((0, 5), np.int64)).shape == (0, 5, 2)
    assert memory.rows(np.zeros((4, 0), np.int64)).shape == (4, 0, 2)


def test_order_of_ids_seed_layer_and_head_all_matter():
    ids = np.array([[1, 2, 3, 4]])
    first = NgramHash(1 << 40, orders=(2, 3), heads=2).rows(ids)
    assert not np.array_equal(first, NgramHash(1 << 40, orders=(2, 3), heads=2).rows(ids[:, ::-1])[:, ::-1])
    assert len(np.unique(first % (1 << 40))) == first.size, "columns share a hash"
    seen = {first.tobytes()}
    for options in [{"seed": 1}, {"seed": 2}, {"seed": 3}, {"layer": 1}, {"layer": 2}, {"layer": 3}, {"pad": 9}]:
        seen.add(NgramHash(1 << 40, orders=(2, 3), heads=2, **options).rows(ids).tobytes())
    assert len(seen) == 8


def test_ngrams_spread_evenly():
    """Chi-square over 1000 rows of 100,000 distinct pairs of neighbouring small ids, for each column."""
    a, b = np.divmod(np.arange(100_000), 400)
    rows = NgramHash(1000, orders=(2,), heads=2).rows(np.stack([a, b], 1))[:, 1]
    for c in range(2):
        count = np.bincount(rows[:, c] - 1000 * c, minlength=1000)
        assert abs(((count - 100.0) ** 2 / 100).sum() - 999) < 5 * np.sqrt(2 * 999)


def test_prime_sizes_are_the_next_ones_each_taken_once():
    memory = NgramHash(100, orders=(2, 3), heads=2, primes=True)
    assert memory.sizes == [101, 103, 107, 109]
    assert NgramHash([2, 2, 2], orders=(1, 2, 3), primes=True).sizes == [2, 3, 5]
    assert distinct_primes([1 << 40]) == [(1 << 40) + 15]


def test_primes_are_those_of_sympy():
    sympy = pytest.importorskip("sympy")
    pseudoprimes = [561, 3215031751, 3825123056546413051]
    for n in [*range(2000), 2**61 - 1, 2**61, 2**62 - 57, 2**64 - 59, 2**64 - 1, *pseudoprimes]:
        assert is_prime(n) == sympy.isprime(n), n


def test_tensors_give_tensors():
    torch = pytest.importorskip("torch")
    memory, vocab = NgramHash(1000), HashVocab(1000, 2)
    ids = torch.tensor([[5, 6, 7]])
    rows = memory.rows(ids)
    assert isinstance(rows, torch.Tensor)
    assert rows.dtype == torch.int64
    assert rows.tolist() == memory.rows(ids.numpy()).tolist()
    assert memory.rows(ids.int()).tolist() == rows.tolist()
    assert vocab.rows(ids).tolist() == vocab.rows(ids.numpy()).tolist()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: HashVocab(0), "num_rows is 0"),
        (lambda: HashVocab(2.5), "num_rows is 2.5"),
        (lambda: HashVocab(10, num_hashes=0), "num_hashes is 0"),
        (lambda: HashVocab(10, first_row=-1), "first_row is -1"),
        (lambda: HashVocab(10, seed=-1), "seed is -1"),
        (lambda: HashVocab(10).rows([1, 2]), "tokens hold 1"),
        (lambda: HashVocab(10).rows(np.array([1.0])), "float64"),
        (lambda: HashVocab(10).rows(np.array([True])), "bool"),
        (lambda: HashBuckets(0, 0), "count is 0"),
        (lambda: HashBuckets.from_json({"kind": "other"}), "hash-buckets"),
        (lambda: HashBuckets.from_json({"kind": "hash-buckets", "first_row": 0}), "count is None"),
        (lambda: NgramHash(10, orders=()), "at least one"),
        (lambda: NgramHash(10, orders=(2, 2)), "only once"),
        (lambda: NgramHash(10, orders=(0,)), "orders is 0"),
        (lambda: NgramHash(10, heads=0), "heads is 0"),
        (lambda: NgramHash([10]), "1 numbers; 2 were expected"),
        (lambda: NgramHash([10, 0]), "num_rows is 0"),
        (lambda: NgramHash(1 << 62), "sum of num_rows"),
        (lambda: NgramHash(10, pad=1 << 63), "pad is"),
        (lambda: NgramHash(10).rows(np.array([[1.5]])), "float64"),
        (lambda: NgramHash(10).rows(np.array(3)), "single number"),
    ],
)
def test_wrong_arguments_are_named(call, said):
    with pytest.raises(InvalidArgument, match=said):
        call()


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(hashed).failed == 0


@pytest.mark.parametrize("switch", ["NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"])
def test_kernels_are_right_without_the_compiler_and_within_bounds(switch, tmp_path):
    """The twins again, in a process where the kernels are plain Python, or check every index."""
    if os.environ.get("NUMBA_DISABLE_JIT") == "1" or os.environ.get("NUMBA_BOUNDSCHECK") == "1":
        pytest.skip("this is that process")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "twin and not threads"]
    command += ["-W", "ignore::RuntimeWarning"]  # numpy warns where uint64 scalars wrap around, as they must
    command += [str(here / "test_hashed.py")]
    environment = {**os.environ, switch: "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
