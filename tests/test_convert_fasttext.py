"""fastText's models: written by gensim, and byte by byte from fastText's sources; whole, cut off, and lying."""

import struct

import numpy as np
import pytest

from bigembed.convert import ahead, entries, fasttext
from bigembed.convert.source import ReadOptions
from bigembed.errors import BadSource
from bigembed.vocab.packed import PackedTokens
from bigembed.vocab.subwords import Subwords

MAGIC = 793712314
WORDS = [b"</s>", b"der", b"t\xc3\xbcbingen", b"\xff\xfe", b"x" * 50]


def args(dim=3, model=2, bucket=4, minn=3, maxn=6, **given):
    names = (
        "dim",
        "ws",
        "epoch",
        "minCount",
        "neg",
        "wordNgrams",
        "loss",
        "model",
        "bucket",
        "minn",
        "maxn",
        "rate",
        "t",
    )
    chosen = dict(zip(names, (dim, 5, 5, 1, 5, 1, 2, model, bucket, minn, maxn, 100, 1e-4), strict=True)) | given
    return struct.pack("<12id", *chosen.values())


def dictionary(words, labels=(), pruned=None, is_old=False):
    raw = struct.pack("<3iq", len(words) + len(labels), len(words), len(labels), 999)
    if not is_old:
        raw += struct.pack("<q", -1 if pruned is None else len(pruned))
    for kind, some in ((0, words), (1, labels)):
        for n, word in enumerate(some):
            raw += word + struct.pack("<bqb", 0, 1000 - n, kind)
    return raw + b"".join(struct.pack("<2i", *pair) for pair in pruned or ())


def dense(values_VD, is_old=False):
    return (b"" if is_old else b"\0") + struct.pack("<2q", *values_VD.shape) + values_VD.tobytes()


def quantiser(dim, piece_dim, pieces_F):
    codes = -(-dim // piece_dim)
    return struct.pack("<4i", dim, codes, piece_dim, dim - (codes - 1) * piece_dim) + pieces_F.tobytes()


def rows(count, dim=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def head(version=12):
    return struct.pack("<2i", MAGIC, version)


def model(words=WORDS, labels=(), bucket=4, version=12, **given):
    """A dense model of version 12, its matrix, and where that ends."""
    values_VD = rows(len(words) + bucket)
    raw = head(version) + args(bucket=bucket, **given) + dictionary(words, labels) + dense(values_VD)
    return raw + dense(rows(len(words), seed=1)), values_VD, len(raw)


def put(folder, raw):
    path = str(folder / "model.bin")
    with open(path, "wb") as file:
        file.write(raw)
    return path


def read(path, **options):
    """(values, tokens, source); None for the token of a row that has none."""
    with fasttext.open_source(path, "fasttext", ReadOptions(**options)) as source:
        values, tokens = [], []
        for block in source.blocks():
            values.append(block.values_MD.copy())
            assert block.values_MD.flags.c_contiguous
            tokens += [None] * len(block.values_MD) if block.tokens is None else block.tokens.to_list()
        assert list(source.more_tokens()) == []
    values_VD = np.concatenate(values)
    assert values_VD.dtype == np.float32
    assert len(tokens) == len(values_VD) == source.num_rows
    return values_VD, tokens, source


# --- gensim


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    gensim = pytest.importorskip("gensim")
    lines = ["der schnelle braune fuchs springt über den faulen hund", "实验 naïve café tübingen a ab", "𝔘ni x y"]
    options = {"vector_size": 6, "min_count": 1, "bucket": 300, "epochs": 1, "workers": 1, "seed": 1}
    trained = gensim.models.FastText([line.split() for line in lines] * 5, **options)
    path = str(tmp_path_factory.mktemp("gensim") / "model.bin")
    gensim.models.fasttext.save_facebook_model(trained, path)
    return path, trained, gensim.models.fasttext.load_facebook_vectors(path)


def test_rows_and_words_are_those_that_gensim_wrote(trained):
    path, model, _ = trained
    with open(path, "rb") as file:
        assert fasttext.recognise(file.read(4096), path) == "fasttext"
    values_VD, tokens, source = read(path)
    words = model.wv.index_to_key
    np.testing.assert_array_equal(values_VD[: len(words)], model.wv.vectors_vocab)
    np.testing.assert_array_equal(values_VD[len(words) :], model.wv.vectors_ngrams)
    assert tokens == [word.encode() for word in words] + [None] * 300
    assert source.has_tokens
    assert (source.dim, source.dtype, source.done_bytes) == (6, "float32", source.total_bytes)
    assert source.facts == {
        "model": "cbow", "words": len(words), "labels": 0, "version": 12, "bucket": 300, "minn": 3, "maxn": 6,
        "wordNgrams": 1,
    }  # fmt: skip


def test_vectors_in_and_out_of_the_vocabulary_are_those_that_gensim_loads(trained):
    """float32 means of the same rows; gensim may add them in another order, hence the tolerance of some roundings."""
    path, _, loaded = trained
    values_VD, tokens, source = read(path)
    words = [*loaded.index_to_key, "fuchsbau", "ü", "unbekannt", "猫", "hunde"]
    own_M = np.array([tokens.index(word.encode()) if word in loaded.key_to_index else -1 for word in words])
    rows_F, start_M1 = Subwords.from_settings(source.subwords).rows_of(PackedTokens.of(words), own_M)
    for m, word in enumerate(words):
        some = values_VD[rows_F[start_M1[m] : start_M1[m + 1]]]
        vector_D = some.mean(0) if len(some) else np.zeros(6, np.float32)
        np.testing.assert_allclose(vector_D, loaded.get_vector(word), rtol=1e-5, atol=1e-7)


# --- written from the sources of fastText


def test_a_dense_model_with_words_that_are_no_utf8(tmp_path):
    raw, values_VD, _ = model()
    found_VD, tokens, source = read(put(tmp_path, raw))
    np.testing.assert_array_equal(found_VD, values_VD)
    assert tokens == [*WORDS, None, None, None, None]
    assert source.facts["model"] == "skipgram"
    assert source.subwords == {
        "kind": "fasttext", "minn": 3, "maxn": 6, "bucket": 4, "first_row": 5, "num_words": 5, "word_ngrams": 1,
        "pruned": None,
    }  # fmt: skip
    assert len(source.notes) == 1


def test_labels_of_a_supervised_model_have_no_rows(tmp_path):
    raw, values_VD, _ = model(labels=[b"__label__a", b"__label__b"], model=3, wordNgrams=2)
    found_VD, tokens, source = read(put(tmp_path, raw))
    np.testing.assert_array_equal(found_VD, values_VD)
    assert tokens == [*WORDS, None, None, None, None]
    assert source.facts["labels"] == 2
    assert any("2 labels were left out" in note for note in source.notes)
    assert any("up to 2 words" in note for note in source.notes)


def test_a_supervised_model_of_version_11_has_no_ngrams(tmp_path):
    _, _, source = read(put(tmp_path, model(version=11, model=3)[0]))
    assert source.subwords["maxn"] == 0
    _, _, source = read(put(tmp_path, model(version=11, model=1)[0]))
    assert source.subwords["maxn"] == 6


def test_a_model_without_buckets_has_rows_of_words_only(tmp_path):
    raw = head() + args(bucket=4) + dictionary(WORDS) + dense(rows(5)) + dense(rows(5))
    found_VD, tokens, source = read(put(tmp_path, raw))
    assert found_VD.shape == (5, 3)
    assert tokens == WORDS
    assert source.subwords["bucket"] == 0
    rows_F, _ = Subwords.from_settings(source.subwords).rows_of(PackedTokens.of(["der", "die"]), np.array([1, -1]))
    assert rows_F.tolist() == [1]
    assert source.notes == []


def test_a_file_older_than_the_magic_number(tmp_path):
    values_VD = rows(9)
    raw = args() + dictionary(WORDS, is_old=True) + dense(values_VD, is_old=True) + dense(rows(5), is_old=True)
    assert fasttext.recognise(raw[:4096], "model.bin") == "fasttext"
    found_VD, tokens, source = read(put(tmp_path, raw))
    np.testing.assert_array_equal(found_VD, values_VD)
    assert tokens == [*WORDS, None, None, None, None]
    assert source.facts["version"] == 0
    assert any("2017" in note for note in source.notes)


def quantised(count, dim, piece_dim, has_norms, seed=0):
    """A quantised matrix as it lies in the file, and its values: by the words of productquantizer.cc."""
    rng = np.random.default_rng(seed)
    codes = -(-dim // piece_dim)
    code_VQ = rng.integers(0, 256, (count, codes)).astype(np.uint8)
    pieces_F = rng.standard_normal(dim * 256).astype(np.float32)
    norm_code_V, norm_F = rng.integers(0, 256, count).astype(np.uint8), rng.random(256).astype(np.float32)
    raw = struct.pack("<BB2qi", 1, has_norms, count, dim, code_VQ.size) + code_VQ.tobytes()
    raw += quantiser(dim, piece_dim, pieces_F)
    if has_norms:
        raw += norm_code_V.tobytes() + quantiser(1, 1, norm_F)
    values_VD = np.zeros((count, dim), np.float32)
    for v in range(count):
        for q in range(codes):
            width = dim - q * piece_dim if q == codes - 1 else piece_dim
            at = q * 256 * piece_dim + int(code_VQ[v, q]) * width
            norm = norm_F[norm_code_V[v]] if has_norms else np.float32(1)
            values_VD[v, q * piece_dim : q * piece_dim + width] = norm * pieces_F[at : at + width]
    return raw, values_VD


@pytest.mark.parametrize("has_norms", [0, 1])
@pytest.mark.parametrize(("dim", "piece_dim"), [(6, 2), (7, 2), (5, 5), (4, 1), (7, 3)])
def test_a_quantised_model_has_the_values_of_its_codes(tmp_path, dim, piece_dim, has_norms):
    raw, values_VD = quantised(9, dim, piece_dim, has_norms)
    raw = head() + args(dim=dim, model=3) + dictionary(WORDS, [b"__label__a"]) + raw + dense(rows(1, dim))
    found_VD, tokens, source = read(put(tmp_path, raw))
    np.testing.assert_array_equal(found_VD, values_VD)
    assert tokens == [*WORDS, None, None, None, None]
    assert source.dtype == "product-quantised"
    assert source.done_bytes == source.total_bytes
    assert any("quantised" in note for note in source.notes)


def test_a_pruned_model_finds_the_ngrams_that_it_kept(tmp_path):
    pairs = [(700, 1), (3, 0), (999, 2)]
    matrix, values_VD = quantised(8, 6, 2, 1)
    raw = head() + args(dim=6, model=3, bucket=1000, minn=2) + dictionary(WORDS, [b"__label__a"], pairs) + matrix
    found_VD, _, source = read(put(tmp_path, raw + dense(rows(1, 6))))
    np.testing.assert_array_equal(found_VD, values_VD)
    assert source.subwords["pruned"] == [3, 700, 999]
    whole = source.subwords | {"pruned": None, "first_row": 0}
    token = PackedTokens.of(["".join(chr(97 + n % 26) for n in range(2000))])
    buckets = Subwords.from_settings(whole).rows_of(token, np.array([-1]))[0]
    rows_F = Subwords.from_settings(source.subwords).rows_of(token, np.array([-1]))[0]
    assert rows_F.tolist() == [5 + [3, 700, 999].index(b) for b in buckets if b in (3, 700, 999)]


def test_a_pruned_model_that_kept_no_ngram(tmp_path):
    raw = head() + args(dim=6, model=3, bucket=1000) + dictionary(WORDS, [], []) + quantised(5, 6, 2, 0)[0]
    found_VD, _, source = read(put(tmp_path, raw + dense(rows(1, 6))))
    assert found_VD.shape == (5, 6)
    assert source.subwords["bucket"] == 0


def test_many_words_over_many_blocks_and_buffers(tmp_path, monkeypatch):
    words = [b"w%d" % n + b"y" * (n % 23) for n in range(400)]
    raw, values_VD, _ = model(words, [b"__label__%d" % n for n in range(70)], bucket=33)
    path = put(tmp_path, raw)
    for block_bytes, buffer_bytes in ((12, 64), (12 * 7, 100), (1 << 20, 64), (12 * 400, 1 << 20)):
        monkeypatch.setattr(ahead, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(entries, "BUFFER_BYTES", buffer_bytes)
        found_VD, tokens, _ = read(path)
        np.testing.assert_array_equal(found_VD, values_VD)
        assert tokens == words + [None] * 33


# --- what is wrong with a file


def test_a_file_cut_off_anywhere_is_refused_or_told_of(tmp_path):
    raw, values_VD, end = model()
    for cut in range(len(raw)):
        path = put(tmp_path, raw[:cut])
        if cut < end:
            with pytest.raises(BadSource, match=r"model\.bin"):
                read(path)
        else:
            found_VD, _, source = read(path)
            np.testing.assert_array_equal(found_VD, values_VD)
            assert "cut off or damaged behind the rows" in source.notes[-1]


@pytest.mark.parametrize("has_norms", [0, 1])
def test_a_quantised_file_cut_off_anywhere_is_refused(tmp_path, has_norms):
    raw = head() + args(dim=3, model=3, bucket=900) + dictionary([b"a"], [b"__label__a"], [(7, 0)])
    raw += quantised(2, 3, 2, has_norms)[0]
    for cut in [*range(300), *range(300, len(raw), 97), *range(len(raw) - 40, len(raw))]:
        with pytest.raises(BadSource):
            read(put(tmp_path, raw[:cut]))
    read(put(tmp_path, raw))


NUMBERS = {
    "dim": (8, "i"), "model": (8 + 28, "i"), "bucket": (8 + 32, "i"), "minn": (8 + 36, "i"), "maxn": (8 + 40, "i"),
    "size": (64, "i"), "words": (68, "i"), "labels": (72, "i"), "pruned": (84, "q"),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_cannot_be_are_refused(tmp_path, name):
    raw, values_VD, _ = model()
    offset, layout = NUMBERS[name]
    top = 2 ** (8 * struct.calcsize(layout) - 1)
    for number in (-top, -2, -1, 0, 1, 2, 10**6, top - 1):
        lying = bytearray(raw)
        struct.pack_into("<" + layout, lying, offset, number)
        try:
            found_VD, _, _ = read(put(tmp_path, bytes(lying)))
        except BadSource:
            continue
        np.testing.assert_array_equal(found_VD, values_VD)
        assert name in ("model", "minn", "maxn", "labels") or lying == raw, number


def test_any_changed_byte_is_refused_or_leaves_rows_of_the_same_shape(tmp_path):
    raw, values_VD, end = model(WORDS[:2], bucket=2)
    for offset in range(end - values_VD.nbytes):
        for byte in (0, 1, 0x7F, 0xFF):
            lying = bytearray(raw)
            lying[offset] = byte
            try:
                found_VD, _, _ = read(put(tmp_path, bytes(lying)))
            except BadSource:
                continue
            assert found_VD.shape == values_VD.shape


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (head(13) + args(), "version is 13"),
        (head() + args(model=9) + dictionary(WORDS), "kind of model is 9"),
        (head() + args() + dictionary(WORDS) + dense(rows(7)), "7 rows, but the dictionary tells of 5 words and 4"),
        (head() + args() + dictionary(WORDS) + dense(rows(9, 5)), "5 columns, but the model's dimension is 3"),
        (head() + args() + dictionary(WORDS, [], []) + dense(rows(9)), "issue 332"),
        (head() + args() + dictionary(WORDS, [], [(9, 0)]) + dense(rows(6)), "1 rows and as many of the 4 buckets"),
        (head() + args() + dictionary(WORDS, [], [(1, 0), (1, 1)]) + dense(rows(7)), "pruned index"),
        (head() + args() + dictionary(WORDS, [], [(1, 0), (2, 0)]) + dense(rows(7)), "pruned index"),
        (head() + args() + dictionary(WORDS, [], [(1, 0), (2, 5)]) + dense(rows(7)), "pruned index"),
        (head() + args() + dictionary([b"a" * 1_100_000]) + dense(rows(5)), "takes more than"),
        (head() + args() + dictionary(WORDS) + b"\7" + dense(rows(9))[1:], "is 7, not 0 or 1"),
        (head() + args(minn=-1) + dictionary(WORDS) + dense(rows(9)), "minn is -1"),
        (head() + args(dim=0) + dictionary(WORDS) + dense(rows(9, 0)), "0 columns"),
        (head() + args() + dictionary([]) + dense(rows(0)), "0 rows"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, raw, said):
    with pytest.raises(BadSource, match=said):
        read(put(tmp_path, raw))


def test_a_label_among_the_words_is_refused(tmp_path):
    raw = bytearray(model()[0])
    raw[raw.index(b"der\0") + 3 + 9] = 1
    with pytest.raises(BadSource, match="one is a label"):
        read(put(tmp_path, bytes(raw)))


def test_a_list_of_ngrams_that_is_too_long_to_keep_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fasttext, "MOST_PRUNED", 1)
    raw = head() + args() + dictionary(WORDS, [], [(1, 0), (2, 1)]) + dense(rows(7))
    with pytest.raises(BadSource, match="2 n-grams, more than 1"):
        read(put(tmp_path, raw))


def test_columns_that_were_not_asked_for_are_refused(tmp_path):
    with pytest.raises(BadSource, match="dim=300"):
        read(put(tmp_path, model()[0]), dim=300)


@pytest.mark.parametrize(
    "raw",
    [b"", b"3000000 300\nthe ", b"\x93NUMPY\x01\x00" + b"v\0{'descr': '<f4'" * 9, b"SQLite format 3\0" * 9, bytes(200)],
)
def test_other_files_are_not_recognised(raw):
    assert fasttext.recognise(raw, "model.bin") is None


def test_stopping_early_lets_go_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "BLOCK_BYTES", 12)
    source = fasttext.open_source(put(tmp_path, model()[0]), "fasttext", ReadOptions())
    next(iter(source.blocks()))
    source.close()
    source.close()
    assert source._file.fd == -1
