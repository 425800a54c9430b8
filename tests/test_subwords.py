"""Rows of n-grams: against the slow twin, against the tools' own published values, and against gensim's FastText."""

import os
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path

import naive_subwords as naive
import numpy as np
import pytest

from bigembed import threads
from bigembed.errors import InvalidArgument
from bigembed.kernels.murmur import hash_strings, murmur128
from bigembed.vocab.packed import PackedTokens
from bigembed.vocab.subwords import Subwords

FASTTEXT = {"kind": "fasttext", "minn": 3, "maxn": 6, "bucket": 1000, "first_row": 50}
FINALFUSION = {"kind": "finalfusion", "minn": 3, "maxn": 6, "exponent": 10, "first_row": 7}
FINALFUSION_FASTTEXT = {"kind": "finalfusion-fasttext", "minn": 1, "maxn": 4, "bucket": 97, "first_row": 3}
FLORET = {
    "kind": "floret",
    "minn": 2,
    "maxn": 3,
    "hash_count": 2,
    "hash_seed": 2166136261,
    "num_rows": 10,
    "first_row": 0,
    "bow": "<",
    "eow": ">",
}
WORDS = ["", "a", "ab", "der", "</s>", "<", "tübingen", "überspringen", "实验", "a" * 40, "𝔘ni", "naïve café", "s>x\n"]
BROKEN = [b"\x80", b"\xff", b"a\x80\x80b", b"\xc3", b"\xe4\xbd", b"\x80\x80ab\xff\xfe"]


def as_lists(settings, words, word_rows):
    rows_F, start_M1 = Subwords.from_settings(settings).rows_of(PackedTokens.of(words), np.array(word_rows, np.int64))
    assert rows_F.dtype == start_M1.dtype == np.int64
    assert start_M1[0] == 0
    assert start_M1[-1] == len(rows_F)
    return [rows_F[a:b].tolist() for a, b in pairwise(start_M1)]


def variations():
    yield FASTTEXT
    yield FASTTEXT | {"minn": 1, "maxn": 2}
    yield FASTTEXT | {"minn": 0, "maxn": 3}
    yield FASTTEXT | {"minn": 4, "maxn": 3}
    yield FASTTEXT | {"maxn": 0}
    yield FASTTEXT | {"bucket": 0}
    yield FASTTEXT | {"bucket": 2_000_000, "first_row": 1 << 40}
    yield FASTTEXT | {"pruned": [5, 1, 999, 300, 7, *range(100, 200)]}
    yield FASTTEXT | {"pruned": []}
    yield FINALFUSION
    yield FINALFUSION | {"minn": 1, "maxn": 1, "exponent": 21}
    yield FINALFUSION_FASTTEXT
    yield FLORET
    yield FLORET | {"hash_count": 4, "num_rows": 1 << 40, "first_row": 12}
    yield FLORET | {"minn": 0, "maxn": 0, "hash_count": 1}
    yield FLORET | {"bow": "", "eow": "»»"}


@pytest.mark.parametrize("settings", variations(), ids=str)
def test_rows_equal_the_twin(settings):
    words = [word.encode() for word in WORDS]
    for word_rows in ([-1] * len(words), range(len(words)), [n if n % 2 else -1 for n in range(len(words))]):
        assert as_lists(settings, words, list(word_rows)) == naive.rows_of(settings, words, list(word_rows))


@pytest.mark.parametrize("settings", [FASTTEXT | {"minn": 1}, FASTTEXT | {"minn": 2, "bucket": 11}])
def test_broken_utf8_is_cut_as_fasttext_cuts_it(settings):
    assert as_lists(settings, BROKEN, [-1] * len(BROKEN)) == naive.rows_of(settings, BROKEN, [-1] * len(BROKEN))


@pytest.mark.parametrize("settings", [FINALFUSION, FINALFUSION_FASTTEXT, FLORET], ids=lambda s: s["kind"])
def test_broken_utf8_gives_rows_of_the_table_for_every_rule(settings):
    for rows in as_lists(settings, BROKEN, [-1] * len(BROKEN)):
        assert all(settings["first_row"] <= row < settings["first_row"] + 1024 for row in rows)


def test_many_words_over_many_threads_equal_the_twin():
    rng = np.random.default_rng(3)
    letters = "abcdefgäöü€实𝔘<>"
    words = ["".join(rng.choice(list(letters), rng.integers(0, 12))).encode() for _ in range(3000)]
    own = rng.integers(-1, 50, len(words)).tolist()
    before = threads.get_num_threads()
    try:
        for count in (1, 5):
            threads.set_num_threads(count)
            for settings in (FASTTEXT, FINALFUSION, FLORET):
                assert as_lists(settings, words, own) == naive.rows_of(settings, words, own)
    finally:
        threads.set_num_threads(before)


def test_tokens_that_do_not_begin_at_byte_zero():
    words = PackedTokens.of(WORDS).between(3, 9)
    rows_F, start_M1 = Subwords.from_settings(FASTTEXT).rows_of(words, np.full(6, -1))
    assert rows_F.tolist() == list(chain(*naive.rows_of(FASTTEXT, [w.encode() for w in WORDS[3:9]], [-1] * 6)))
    assert len(start_M1) == 7


def test_no_tokens_have_no_rows():
    for settings in (FASTTEXT, FINALFUSION, FLORET):
        rows_F, start_M1 = Subwords.from_settings(settings).rows_of(PackedTokens.of([]), np.zeros(0, np.int64))
        assert rows_F.shape == (0,)
        assert start_M1.tolist() == [0]


# --- the tools' own published values


def test_fasttext_buckets_are_those_that_finalfusion_published():
    """finalfusion-python, tests/test_subwords.py: 2,000,000 buckets, minn 3, maxn 6."""
    expected = [
        79599, 119685, 255527, 263610, 352266, 385524, 403356, 421853, 485366, 488156, 586161, 619228, 629649, 642367,
        716781, 751724, 754367, 771707, 799583, 887882, 894109, 904527, 908492, 978563, 991164, 992241, 1142035,
        1230973, 1278156, 1350653, 1414694, 1513262, 1533308, 1607098, 1607788, 1664269, 1712300, 1749574, 1793082,
        1891605, 1934955, 1992797,
    ]  # fmt: skip
    settings = FASTTEXT | {"bucket": 2_000_000, "first_row": 0}
    assert sorted(as_lists(settings, ["überspringen"], [-1])[0]) == expected
    assert sorted(as_lists(settings | {"kind": "finalfusion-fasttext"}, ["überspringen"], [-1])[0]) == expected


def test_finalfusion_buckets_are_the_published_ones():
    """finalfusion-python, tests/test_subwords.py: exponent 10."""
    expected = [
        12, 67, 72, 122, 166, 179, 195, 244, 248, 274, 298, 306, 323, 414, 547, 588, 646, 649, 705, 715, 759, 815, 818,
        855, 858, 1005,
    ]  # fmt: skip
    assert sorted(as_lists(FINALFUSION | {"first_row": 0}, ["tübingen"], [-1])[0]) == expected


def test_floret_rows_are_those_of_spacy():
    """spaCy, tests/vocab_vectors/test_vectors.py, test_floret_vectors."""
    assert as_lists(FLORET, ["der"], [-1]) == [[5, 6, 7, 5, 8, 2, 8, 9, 3, 3, 4, 6, 7, 3, 0, 2]]


def test_floret_vectors_are_those_of_floret():
    """The demo table of floret's README, and the vectors of three words that spaCy's tests hold beside it."""
    table = [
        "-2.2611 3.9302 2.6676 -11.233 0.093715 -10.52 -9.6463 -0.11853 2.101 -0.10145",
        "-3.12 -1.7981 10.7 -6.171 4.4527 10.967 9.073 6.2056 -6.1199 -2.0402",
        "9.5689 5.6721 -8.4832 -1.2249 2.1871 -3.0264 -2.391 -5.3308 -3.2847 -4.0382",
        "3.6268 4.2759 -1.7007 1.5002 5.5266 1.8716 -12.063 0.26314 2.7645 2.4929",
        "-11.683 -7.7068 2.1102 2.214 7.2202 0.69799 3.2173 -5.382 -2.0838 5.0314",
        "-4.3024 8.0241 2.0714 -1.0174 -0.28369 1.7622 7.8797 -1.7795 6.7541 5.6703",
        "8.3574 -5.225 8.6529 8.5605 -8.9465 3.767 -5.4636 -1.4635 -0.98947 -0.58025",
        "-10.01 3.3894 -4.4487 1.1669 -11.904 6.5158 4.3681 0.79913 -6.9131 -8.687",
        "-5.4576 7.1019 -8.8259 1.7189 4.955 -8.9157 -3.8905 -0.60086 -2.1233 5.892",
        "8.0678 -4.4142 3.6236 4.5889 -2.7611 2.4455 0.67096 -4.2822 2.0875 4.6274",
    ]
    vectors = {
        "der": "0.08224 2.6601 -1.173 1.1549 -0.42821 -0.097268 -2.5589 -1.609 -0.16968 0.84687",
        "und": "2.1558 1.8606 -1.382 0.45424 -0.65889 1.2706 0.5929 -2.0592 -2.6949 -1.6015",
        "(": "0.59263 2.1856 0.67346 1.0769 1.0701 1.2151 1.718 -3.0441 2.7291 3.719",
    }
    table_VD = np.array([line.split() for line in table], np.float64)
    for word, expected in vectors.items():
        vector_D = table_VD[as_lists(FLORET, [word], [-1])[0]].mean(0)
        # Both sides are printed with five significant digits.
        np.testing.assert_allclose(vector_D, np.array(expected.split(), float), atol=1e-3)


def test_spacy_numbers_strings_as_its_documentation_says():
    known = {
        "coffee": 3197928453018144401,
        "apple": 8566208034543834098,
        "cat": 5439657043933447811,
        "because": 16950148841647037698,
        "咖啡": 7962530705879205333,
        "猫": 12262475268243743508,
    }
    packed = PackedTokens.of(list(known))
    hash_M = np.zeros(len(packed), np.uint64)
    threads.run(hash_strings, len(packed), packed.bytes_B, packed.start_M1, 1, hash_M)
    assert hash_M.tolist() == list(known.values())
    assert [naive.murmur64a(word.encode(), 1) for word in known] == list(known.values())


def test_murmur_of_every_length_equals_the_twin():
    data = bytes(np.random.default_rng(0).integers(0, 256, 70).tolist())
    packed = PackedTokens.of([data[:n] for n in range(70)])
    hash_M = np.zeros(70, np.uint64)
    hash_strings(0, 70, packed.bytes_B, packed.start_M1, 77, hash_M)
    assert hash_M.tolist() == [naive.murmur64a(data[:n], 77) for n in range(70)]
    for n in range(70):
        pair = murmur128(np.frombuffer(data, np.uint8), 70 - n, 70, 2166136261)
        assert tuple(map(int, pair)) == naive.murmur128(data[70 - n :], 2166136261)


# --- settings


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "magic"}, "magic"),
        ({}, "None"),
        ({k: v for k, v in FASTTEXT.items() if k != "bucket"}, "bucket"),
        (FASTTEXT | {"minn": -1}, "minn"),
        (FASTTEXT | {"maxn": "6"}, "maxn"),
        (FASTTEXT | {"maxn": True}, "maxn"),
        (FASTTEXT | {"bucket": 2**31}, "bucket"),
        (FASTTEXT | {"first_row": -5}, "first_row"),
        (FASTTEXT | {"pruned": [1, 1]}, "twice"),
        (FASTTEXT | {"pruned": [1000]}, "999"),
        (FASTTEXT | {"pruned": "no"}, "list"),
        (FINALFUSION | {"exponent": 64}, "exponent"),
        (FINALFUSION | {"minn": 0}, "minn"),
        (FLORET | {"hash_count": 5}, "hash_count"),
        (FLORET | {"num_rows": 0}, "num_rows"),
        (FLORET | {"bow": None}, "bow"),
        (FLORET | {"eow": "\ud800"}, "eow"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(settings, named):
    with pytest.raises(InvalidArgument, match=named):
        Subwords.from_settings(settings)


def test_one_row_for_each_token_is_asked_for():
    with pytest.raises(InvalidArgument, match=r"\(1,\), not \(2,\)"):
        Subwords.from_settings(FASTTEXT).rows_of(PackedTokens.of(["a", "b"]), np.zeros(1, np.int64))


# --- gensim


@pytest.fixture(scope="module")
def trained():
    """A small FastText model that gensim trained."""
    gensim = pytest.importorskip("gensim")
    lines = [
        "der schnelle braune fuchs springt über den faulen hund",
        "实验 naïve café tübingen a ab",
        "x y z </s> 𝔘ni",
    ]
    sentences = [line.split() for line in lines] * 5
    options = {"vector_size": 8, "min_count": 1, "bucket": 200, "epochs": 1, "workers": 1, "seed": 1, "min_n": 1}
    return gensim.models.FastText(sentences, max_n=4, **options)


def test_vectors_are_those_of_gensim(trained):
    """In and out of the vocabulary: the mean over our rows. gensim adds float32 in the same order, then divides by the
    number of rows as we do, but adds a known word's rows into its own: one rounding may differ, hence 1e-6."""
    words = [*trained.wv.index_to_key, "fuchsbau", "ü", "a", "unbekannt", "猫", ""]
    words = [word for word in words if word != "</s>"]  # gensim gives it n-grams, fastText does not
    table_VD = np.concatenate([trained.wv.vectors_vocab, trained.wv.vectors_ngrams])
    settings = {"kind": "fasttext", "minn": 1, "maxn": 4, "bucket": 200, "first_row": len(trained.wv)}
    own = [trained.wv.key_to_index.get(word, -1) for word in words]
    for word, rows in zip(words, as_lists(settings, words, own), strict=True):
        vector_D = table_VD[rows].mean(0) if rows else np.zeros(8, np.float32)
        np.testing.assert_allclose(vector_D, trained.wv.get_vector(word), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("switch", ["NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"])
def test_kernels_are_right_without_the_compiler_and_within_bounds(switch, tmp_path):
    """The twins again, in a process where the kernels are plain Python, or check every index."""
    if os.environ.get("NUMBA_DISABLE_JIT") == "1" or os.environ.get("NUMBA_BOUNDSCHECK") == "1":
        pytest.skip("this is that process")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "twin and not threads"]
    command += ["-W", "ignore::RuntimeWarning"]  # numpy warns where uint64 scalars wrap around, as they must
    command += [str(here / "test_subwords.py")]
    environment = {**os.environ, switch: "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
