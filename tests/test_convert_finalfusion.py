"""finalfusion files, byte by byte from its sources (its package does not install any more): whole, cut off, lying."""

import struct

import naive_subwords as naive
import numpy as np
import pytest

from bigembed.convert import ahead, entries, finalfusion
from bigembed.convert.source import ReadOptions
from bigembed.errors import BadSource
from bigembed.vocab.packed import PackedTokens
from bigembed.vocab.subwords import Subwords

SIMPLE, ARRAY, BUCKETS, QUANTISED, METADATA, NORMS, FASTTEXT, EXPLICIT, FLORET = range(1, 10)
WORDS = [b"der", b"t\xc3\xbcbingen", b"a b", b"", b"x" * 40]


class Writer:
    """Puts chunks one after the other, padding as finalfusion does: by the position in the file."""

    def __init__(self, *kinds):
        self.raw = b"FiFu" + struct.pack(f"<2I{len(kinds)}I", 0, len(kinds), *kinds)

    def chunk(self, kind, before=b"", aligned=None):
        """A chunk of `before`, and with padding between them `aligned`."""
        at = len(self.raw) + 12 + len(before)
        content = before if aligned is None else before + bytes(4 - at % 4) + aligned
        self.raw += struct.pack("<IQ", kind, len(content)) + content
        return self

    def simple(self, words=WORDS):
        return self.chunk(SIMPLE, struct.pack("<Q", len(words)) + items(words))

    def grams(self, kind, words=WORDS, minn=3, maxn=6, buckets=3):
        return self.chunk(kind, struct.pack("<Q3I", len(words), minn, maxn, buckets) + items(words))

    def array(self, values_VD):
        return self.chunk(ARRAY, struct.pack("<QII", *values_VD.shape, 10), values_VD.tobytes())

    def norms(self, norm_V):
        return self.chunk(NORMS, struct.pack("<QI", len(norm_V), 10), norm_V.tobytes())


def items(words):
    return b"".join(struct.pack("<I", len(word)) + word for word in words)


def rows(count, dim=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def put(folder, raw):
    path = str(folder / "rows.fifu")
    with open(path, "wb") as file:
        file.write(raw)
    return path


def read(path, **options):
    """(values, tokens, source); None for the token of a row that has none."""
    with finalfusion.open_source(path, "finalfusion", ReadOptions(**options)) as source:
        values, tokens = [], []
        for block in source.blocks():
            values.append(block.values_MD.copy())
            tokens += [None] * len(block.values_MD) if block.tokens is None else block.tokens.to_list()
    values_VD = np.concatenate(values)
    assert values_VD.dtype == np.float32
    assert len(tokens) == len(values_VD) == source.num_rows
    assert source.done_bytes == source.total_bytes
    return values_VD, tokens, source


def test_words_and_rows_without_norms(tmp_path):
    values_VD = rows(5)
    raw = Writer(SIMPLE, ARRAY).simple().array(values_VD).raw
    assert finalfusion.recognise(raw[:4096], "rows") == "finalfusion"
    assert finalfusion.recognise(b"FiF", "rows.fifu") is None
    found_VD, tokens, source = read(put(tmp_path, raw))
    np.testing.assert_array_equal(found_VD, values_VD)
    assert tokens == WORDS
    assert source.subwords is None
    assert source.has_tokens
    assert source.facts == {"words": 5, "buckets": 0}
    assert any("as stored" in note for note in source.notes)


@pytest.mark.parametrize("shift", range(4))
def test_norms_are_multiplied_back_in_and_metadata_is_kept(tmp_path, shift):
    """For each of the four paddings; a row times its norm is one rounding of float32."""
    values_VD, norm_V = rows(5), np.random.default_rng(1).random(5).astype(np.float32)
    metadata = b'description = "' + b"x" * shift + b'"\n'
    raw = Writer(METADATA, SIMPLE, ARRAY, NORMS).chunk(METADATA, metadata).simple().array(values_VD).norms(norm_V).raw
    found_VD, tokens, source = read(put(tmp_path, raw))
    np.testing.assert_array_equal(found_VD, values_VD * norm_V[:, None])
    assert tokens == WORDS
    assert source.facts["metadata"] == metadata.decode()
    assert any("multiplied by their norms" in note for note in source.notes)


def test_rows_of_buckets_have_no_norms(tmp_path):
    values_VD, norm_V = rows(5 + 8), np.arange(1, 6, dtype=np.float32)
    raw = Writer(BUCKETS, ARRAY, NORMS).grams(BUCKETS).array(values_VD).norms(norm_V).raw
    found_VD, tokens, _ = read(put(tmp_path, raw))
    np.testing.assert_array_equal(found_VD[:5], values_VD[:5] * norm_V[:, None])
    np.testing.assert_array_equal(found_VD[5:], values_VD[5:])
    assert tokens == [*WORDS, *[None] * 8]


def subword_rows(source, words, own):
    rows_F, start_M1 = Subwords.from_settings(source.subwords).rows_of(PackedTokens.of(words), np.array(own))
    return [rows_F[start_M1[m] : start_M1[m + 1]].tolist() for m in range(len(words))]


def test_unknown_words_find_their_buckets(tmp_path):
    raw = Writer(BUCKETS, ARRAY).grams(BUCKETS, buckets=6).array(rows(5 + 64)).raw
    _, _, source = read(put(tmp_path, raw))
    expected = [5 + bucket for bucket in naive.finalfusion_buckets("hund", 3, 6, 6)]
    assert subword_rows(source, ["der", "hund"], [0, -1]) == [[0], expected]

    raw = Writer(FASTTEXT, ARRAY).grams(FASTTEXT, buckets=50).array(rows(5 + 50)).raw
    _, _, source = read(put(tmp_path, raw))
    expected = [5 + bucket for bucket in naive.fasttext_buckets(b"hund", 3, 6, 50, edges=True)]
    assert subword_rows(source, ["der", "hund"], [0, -1]) == [[0], expected]


def test_a_vocabulary_of_listed_ngrams_keeps_its_rows(tmp_path):
    grams = [(b"is>", 0), (b"is", 1), (b"<t", 1)]
    content = struct.pack("<QQII", 5, len(grams), 2, 3) + items(WORDS)
    content += b"".join(struct.pack("<I", len(gram)) + gram + struct.pack("<Q", place) for gram, place in grams)
    values_VD = rows(7)
    found_VD, tokens, source = read(
        put(tmp_path, Writer(EXPLICIT, ARRAY).chunk(EXPLICIT, content).array(values_VD).raw)
    )
    np.testing.assert_array_equal(found_VD, values_VD)
    assert tokens == [*WORDS, None, None]
    assert source.subwords is None
    assert any("unknown words have no vectors" in note for note in source.notes)


def test_a_floret_vocabulary_has_rows_of_ngrams_only(tmp_path):
    content = struct.pack("<IIQII", 2, 3, 10, 2, 2166136261) + items([b"<", b">"])
    values_VD = rows(10)
    found_VD, tokens, source = read(put(tmp_path, Writer(FLORET, ARRAY).chunk(FLORET, content).array(values_VD).raw))
    np.testing.assert_array_equal(found_VD, values_VD)
    assert tokens == [None] * 10
    assert not source.has_tokens
    assert subword_rows(source, ["der"], [-1]) == [[5, 6, 7, 5, 8, 2, 8, 9, 3, 3, 4, 6, 7, 3, 0, 2]]


def test_rows_without_a_vocabulary(tmp_path):
    values_VD = rows(4)
    found_VD, tokens, source = read(put(tmp_path, Writer(ARRAY).array(values_VD).raw))
    np.testing.assert_array_equal(found_VD, values_VD)
    assert tokens == [None] * 4
    assert not source.has_tokens


def quantised(count, dim, codes, choices, has_norms, projects=0, seed=0):
    """The fixed part of the chunk, the part behind the padding, and the values that it stands for."""
    rng = np.random.default_rng(seed)
    code_VQ = rng.integers(0, choices, (count, codes)).astype(np.uint8)
    piece_QCP = rng.standard_normal((codes, choices, dim // codes)).astype(np.float32)
    norm_V = rng.random(count).astype(np.float32)
    rotation_DD = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    before = struct.pack("<5IQII", projects, has_norms, codes, dim, choices, count, 1, 10)
    after = (rotation_DD.tobytes() if projects else b"") + piece_QCP.tobytes()
    after += (norm_V.tobytes() if has_norms else b"") + code_VQ.tobytes()
    values_VD = np.stack([np.concatenate([piece_QCP[q, code] for q, code in enumerate(row)]) for row in code_VQ])
    if projects:
        values_VD = (values_VD.astype(np.float64) @ rotation_DD.T.astype(np.float64)).astype(np.float32)
    return before, after, values_VD * norm_V[:, None] if has_norms else values_VD


@pytest.mark.parametrize("has_norms", [0, 1])
@pytest.mark.parametrize(("dim", "codes", "choices"), [(6, 3, 256), (4, 4, 7), (5, 1, 2)])
def test_a_quantised_matrix_has_the_values_of_its_codes(tmp_path, dim, codes, choices, has_norms):
    before, after, values_VD = quantised(5, dim, codes, choices, has_norms)
    raw = Writer(SIMPLE, QUANTISED).simple().chunk(QUANTISED, before, after).raw
    found_VD, tokens, source = read(put(tmp_path, raw))
    np.testing.assert_array_equal(found_VD, values_VD)
    assert tokens == WORDS
    assert source.dtype == "product-quantised"


def test_a_rotated_matrix_is_rotated_back(tmp_path):
    """A matrix product sums in an order of its own: equal to some roundings of float32."""
    before, after, values_VD = quantised(5, 6, 3, 16, 1, projects=1)
    raw = Writer(SIMPLE, QUANTISED).simple().chunk(QUANTISED, before, after).raw
    found_VD, _, _ = read(put(tmp_path, raw))
    np.testing.assert_allclose(found_VD, values_VD, rtol=1e-5, atol=1e-6)


def test_a_code_without_a_piece_is_refused(tmp_path):
    before, after, _ = quantised(5, 6, 3, 16, 0)
    raw = Writer(SIMPLE, QUANTISED).simple().chunk(QUANTISED, before, after[:-1] + b"\x10").raw
    with pytest.raises(BadSource, match="not below 16"):
        read(put(tmp_path, raw))


def test_many_words_over_many_blocks_and_buffers(tmp_path, monkeypatch):
    words = [b"w%d" % n + b"y" * (n % 23) for n in range(400)]
    values_VD, norm_V = rows(400 + 32), rows(400, 1)[:, 0]
    path = put(
        tmp_path, Writer(BUCKETS, ARRAY, NORMS).grams(BUCKETS, words, buckets=5).array(values_VD).norms(norm_V).raw
    )
    for block_bytes, buffer_bytes in ((12, 64), (12 * 7, 100), (1 << 20, 64), (12 * 400, 1 << 20)):
        monkeypatch.setattr(ahead, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(entries, "BUFFER_BYTES", buffer_bytes)
        found_VD, tokens, _ = read(path)
        np.testing.assert_array_equal(found_VD[:400], values_VD[:400] * norm_V[:, None])
        np.testing.assert_array_equal(found_VD[400:], values_VD[400:])
        assert tokens == words + [None] * 32


# --- what is wrong with a file


def whole_files():
    yield Writer(METADATA, SIMPLE, ARRAY, NORMS).chunk(METADATA, b"x = 1").simple().array(rows(5)).norms(rows(5, 1)).raw
    yield Writer(BUCKETS, ARRAY).grams(BUCKETS).array(rows(13)).raw
    before, after, _ = quantised(5, 6, 3, 4, 1)
    yield Writer(SIMPLE, QUANTISED).simple().chunk(QUANTISED, before, after).raw


@pytest.mark.parametrize("raw", whole_files(), ids=["array", "buckets", "quantised"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, raw):
    read(put(tmp_path, raw))
    for cut in range(len(raw)):
        with pytest.raises(BadSource, match=r"rows\.fifu"):
            read(put(tmp_path, raw[:cut]))


@pytest.mark.parametrize("raw", whole_files(), ids=["array", "buckets", "quantised"])
def test_any_changed_byte_is_refused_or_leaves_rows_that_fit_the_file(tmp_path, raw):
    for offset in range(len(raw)):
        for byte in (0, 0x7F, 0xFF):
            lying = bytearray(raw)
            lying[offset] = byte
            try:
                found_VD, _, source = read(put(tmp_path, bytes(lying)))
            except BadSource:
                continue
            assert found_VD.shape == (source.num_rows, source.dim)
            assert found_VD.nbytes < 100 * len(raw)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"FiFu" + struct.pack("<2I", 1, 0), "version 1"),
        (b"FiFu" + struct.pack("<2I", 0, 10**9), "1000000000 chunks"),
        (b"nope" + struct.pack("<2I", 0, 0), "'FiFu'"),
        (Writer(SIMPLE).simple().raw, "no rows"),
        (Writer().raw, "no rows"),
        (Writer(ARRAY, ARRAY).array(rows(2)).array(rows(2)).raw, "more than one matrix"),
        (Writer(SIMPLE, BUCKETS).simple().raw, "more than one vocabulary"),
        (Writer(SIMPLE, ARRAY).array(rows(5)).raw, "kind 2 begins here, but the header announces kind 1"),
        (Writer(42).chunk(42).raw, "kind 42 are not known"),
        (Writer(SIMPLE, ARRAY).simple().array(rows(4)).raw, "4 rows for 5 words"),
        (Writer(SIMPLE, ARRAY).simple().array(rows(6)).raw, "6 rows for 5 words"),
        (Writer(BUCKETS, ARRAY).grams(BUCKETS).array(rows(12)).raw, "5 words and 8 n-grams"),
        (Writer(BUCKETS, ARRAY).grams(BUCKETS, minn=0).array(rows(13)).raw, "minn is 0"),
        (Writer(SIMPLE, ARRAY, NORMS).simple().array(rows(5)).norms(rows(4, 1)).raw, "4 norms for 5 words"),
        (Writer(ARRAY).chunk(ARRAY, struct.pack("<QII", 1, 3, 11), bytes(24)).raw, "type 11"),
        (Writer(ARRAY).chunk(ARRAY, struct.pack("<QII", 2**63, 3, 10), bytes(24)).raw, "should follow"),
        (Writer(ARRAY).chunk(ARRAY, struct.pack("<QII", 3, 0, 10), bytes(24)).raw, "0 columns"),
        (Writer(ARRAY).chunk(ARRAY, struct.pack("<QII", 0, 3, 10), b"").raw, "0 rows"),
        (Writer(SIMPLE).chunk(SIMPLE, struct.pack("<Q", 2**61)).raw, "should follow"),
        (Writer(QUANTISED).chunk(QUANTISED, struct.pack("<5IQII", 0, 0, 4, 6, 9, 1, 1, 10), b"").raw, "in 4 codes"),
        (Writer(QUANTISED).chunk(QUANTISED, struct.pack("<5IQII", 0, 0, 3, 6, 9, 1, 2, 10), b"").raw, "type 2"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, raw, said):
    with pytest.raises(BadSource, match=said):
        read(put(tmp_path, raw))


def test_a_chunk_of_words_that_ends_inside_of_a_word_is_refused(tmp_path):
    content = struct.pack("<Q", 2) + items([b"der"]) + struct.pack("<I", 50) + b"hund"
    raw = Writer(SIMPLE, ARRAY).chunk(SIMPLE, content).array(rows(2)).raw
    with pytest.raises(BadSource, match="token 1"):
        read(put(tmp_path, raw))
