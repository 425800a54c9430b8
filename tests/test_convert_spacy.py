"""spaCy's folders of vectors, written as spaCy writes them (numpy, msgpack, JSON); whole, cut off, and lying."""

import json
import sys
import types

import naive_subwords as naive
import numpy as np
import pytest

from bigembed.convert import spacy
from bigembed.convert.source import ReadOptions
from bigembed.errors import BadSource, MissingLibrary
from bigembed.vocab.packed import PackedTokens
from bigembed.vocab.subwords import Subwords

msgpack = pytest.importorskip("msgpack")

STRINGS = ["der", "coffee", "tübingen", "咖啡", "no vector", "Coffee"]
FLORET = {"mode": "floret", "minn": 2, "maxn": 3, "hash_count": 2, "hash_seed": 2166136261, "bow": "<", "eow": ">"}


def key(string):
    return naive.murmur64a(string.encode(), 1)


def rows(count, dim=3):
    return np.random.default_rng(count).standard_normal((count, dim)).astype(np.float32)


def save(folder, values_VD, key2row, strings=STRINGS, settings=None):
    """As Vectors.to_disk does."""
    folder.mkdir(exist_ok=True, parents=True)
    with open(folder / "vectors", "wb") as file:
        np.save(file, values_VD)
    (folder / "key2row").write_bytes(msgpack.packb(key2row))
    if strings is not None:
        (folder / "strings.json").write_text(json.dumps(strings, ensure_ascii=False), encoding="utf-8")
    if settings is not None:
        (folder / "vectors.cfg").write_text(json.dumps(settings))
    return str(folder)


def read(path, **options):
    """(values, (token, row) of each key, source)"""
    with spacy.open_source(path, "spacy", ReadOptions(**options)) as source:
        values = []
        for block in source.blocks():
            assert block.tokens is None
            values.append(block.values_MD.copy())
        pairs = []
        for tokens, row_M in source.more_tokens():
            assert row_M.dtype == np.int64
            pairs += zip(tokens.to_list(), row_M.tolist(), strict=True)
    assert source.has_tokens == bool(pairs)
    return np.concatenate(values), pairs, source


def test_rows_and_the_words_that_stand_for_them(tmp_path):
    values_VD = rows(4)
    key2row = {key("coffee"): 2, key("Coffee"): 2, key("咖啡"): 0, key("tübingen"): 3}
    path = save(tmp_path / "v", values_VD, key2row, settings={"mode": "default"})
    assert spacy.recognise(b"", path) == "spacy"
    found_VD, pairs, source = read(path)
    np.testing.assert_array_equal(found_VD, values_VD)
    words = ["coffee", "Coffee", "咖啡", "tübingen"]
    assert pairs == [(word.encode(), row) for word, row in zip(words, [2, 2, 0, 3], strict=True)]
    assert [name.rsplit("/", 1)[1] for name in source.files] == ["vectors", "key2row", "strings.json", "vectors.cfg"]
    assert source.notes == []
    assert source.subwords is None
    assert (source.path, source.dim, source.num_rows) == (path, 3, 4)


def test_a_pipelines_own_folder_and_one_without_settings(tmp_path):
    save(tmp_path / "pipeline" / "vocab", rows(2), {key("der"): 1})
    (tmp_path / "pipeline" / "config.cfg").write_text("")
    path = str(tmp_path / "pipeline")
    assert spacy.recognise(b"", path) == "spacy"
    assert read(path)[1] == [(b"der", 1)]


def test_other_things_are_not_recognised(tmp_path):
    assert spacy.recognise(b"", str(tmp_path)) is None
    assert spacy.recognise(b"", str(tmp_path / "nothing")) is None
    (tmp_path / "vectors").write_bytes(b"x")
    assert spacy.recognise(b"x", str(tmp_path / "vectors")) is None
    with pytest.raises(BadSource, match="key2row"):
        spacy.open_source(str(tmp_path), "spacy", ReadOptions())


@pytest.mark.parametrize("dtype", ["<f4", "<f2", ">f4", "<f8"])
def test_number_types_of_the_rows(tmp_path, dtype):
    values_VD = rows(5).astype(np.float16).astype(dtype)
    for order in "CF":
        path = save(tmp_path / order, np.array(values_VD, order=order), {key("der"): 4})
        np.testing.assert_array_equal(read(path)[0], values_VD.astype(np.float32))


def test_keys_without_a_string_are_counted(tmp_path):
    path = save(tmp_path / "v", rows(3), {key("der"): 1, key("lost"): 2, key("gone"): 0})
    _, pairs, source = read(path)
    assert pairs == [(b"der", 1)]
    assert source.notes == ["2 of 3 keys have no string; no token finds their rows by them."]


def test_the_empty_string_and_a_folder_without_keys(tmp_path):
    assert read(save(tmp_path / "a", rows(3), {0: 2, key("der"): 0}))[1] == [(b"der", 0), (b"", 2)]
    assert read(save(tmp_path / "b", rows(3), {}))[1] == []
    _, pairs, source = read(save(tmp_path / "c", rows(3), {key("der"): 0}, strings=[]))
    assert pairs == []
    assert source.notes


def test_names_of_labels_are_found_with_spacy_and_told_of_without(tmp_path, monkeypatch):
    path = save(tmp_path / "v", rows(3), {403: 1, key("der"): 0})
    monkeypatch.setitem(sys.modules, "spacy", None)
    monkeypatch.setitem(sys.modules, "spacy.symbols", None)
    _, pairs, source = read(path)
    assert pairs == [(b"der", 0)]
    assert any("only found with spaCy installed" in note for note in source.notes)
    symbols = types.ModuleType("spacy.symbols")
    symbols.IDS = {"": 0, "case": 403, "root": 404}
    monkeypatch.setitem(sys.modules, "spacy", types.ModuleType("spacy"))
    monkeypatch.setitem(sys.modules, "spacy.symbols", symbols)
    _, pairs, source = read(path)
    assert pairs == [(b"der", 0), (b"case", 1)]
    assert source.notes == []


def test_another_attribute_than_the_text_is_told_of(tmp_path):
    _, _, source = read(save(tmp_path / "v", rows(3), {key("der"): 0}, settings={"mode": "default", "attr": "LOWER"}))
    assert any("LOWER" in note for note in source.notes)


def test_a_floret_table_has_no_words(tmp_path):
    values_VD = rows(10)
    found_VD, pairs, source = read(save(tmp_path / "v", values_VD, {}, settings=FLORET))
    np.testing.assert_array_equal(found_VD, values_VD)
    assert pairs == []
    given = {name: value for name, value in FLORET.items() if name != "mode"}
    assert source.subwords == {"kind": "floret", **given, "first_row": 0, "num_rows": 10}
    rows_F, _ = Subwords.from_settings(source.subwords).rows_of(PackedTokens.of(["der"]), np.array([-1]))
    assert rows_F.tolist() == [5, 6, 7, 5, 8, 2, 8, 9, 3, 3, 4, 6, 7, 3, 0, 2]


def test_many_keys_come_in_slices_of_the_files_order(tmp_path, monkeypatch):
    monkeypatch.setattr(spacy, "SLICE_TOKENS", 64)
    words = [f"wort{n}" for n in range(1000)]
    shuffled = np.random.default_rng(0).permutation(1000).tolist()
    key2row = {key(words[n]): n % 77 for n in shuffled}
    _, pairs, _ = read(save(tmp_path / "v", rows(77), key2row, strings=sorted(words)))
    assert pairs == [(words[n].encode(), n % 77) for n in shuffled]


# --- what is wrong with a folder


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(MissingLibrary, match="msgpack"):
        read(save(tmp_path / "v", rows(3), {key("der"): 0}))


@pytest.mark.parametrize("name", ["vectors", "key2row", "strings.json", "vectors.cfg"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, name):
    key2row = {key(word): row for row, word in enumerate(STRINGS[:3])}
    path = save(tmp_path / "v", rows(3), key2row, settings={"mode": "default"})
    read(path)
    whole = (tmp_path / "v" / name).read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "v" / name).write_bytes(whole[:cut])
        with pytest.raises(BadSource):
            read(path)


@pytest.mark.parametrize(
    ("key2row", "said"),
    [
        ({key("der"): 3}, "row 3, but there are rows 0 to 2"),
        ({key("der"): -1}, "row -1"),
        ({"der": 1}, "key 0 of the map"),
        ({key("der"): "1"}, "key 0 of the map"),
        ({-5: 1}, "key 0 of the map"),
        ({key("der"): 2**63}, "key 0 of the map"),
        ([1, 2], "cannot be read"),
        ({key("der"): {"a": [1]}}, "key 0 of the map"),
    ],
)
def test_a_map_of_something_else_is_refused(tmp_path, key2row, said):
    with pytest.raises(BadSource, match=said):
        read(save(tmp_path / "v", rows(3), key2row))


@pytest.mark.parametrize("raw", [b"\xdf\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff\x01\x01", b"\xc1", b"\x91" * 5000])
def test_a_map_that_lies_about_its_size_is_refused(tmp_path, raw):
    path = save(tmp_path / "v", rows(3), {})
    (tmp_path / "v" / "key2row").write_bytes(raw)
    with pytest.raises(BadSource, match="key2row"):
        read(path)


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("strings.json", b"{}", "holds a dict, not a list"),
        ("strings.json", b"[1, 2]", "should list strings"),
        ("strings.json", b'["\\ud800"]', "should list strings"),
        ("strings.json", b"[" * 100_000, "no JSON"),
        ("strings.json", b"\xff\xfe\x00", "no JSON"),
        ("vectors.cfg", b"[]", "holds a list, not a dict"),
        ("vectors.cfg", b'{"mode": "other"}', "'other'"),
        ("vectors.cfg", b'{"mode": "floret"}', "minn is None"),
        ("vectors.cfg", b'{"mode": ["floret"]}', "mode"),
        ("vectors", b"", "header"),
        ("vectors", b"not numpy", "header"),
    ],
)
def test_files_that_hold_something_else_are_refused(tmp_path, name, raw, said):
    path = save(tmp_path / "v", rows(3), {key("der"): 0}, settings={"mode": "default"})
    (tmp_path / "v" / name).write_bytes(raw)
    with pytest.raises(BadSource, match=said):
        read(path)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((0, 0), np.float32), "no word vectors"),
        (np.zeros((0, 300), np.float32), "no word vectors"),
        (np.zeros(5, np.float32), "rows of numbers"),
        (np.zeros((2, 3), "U1"), "rows of numbers"),
        (np.zeros((2, 3, 4), np.float32), "rows of numbers"),
    ],
)
def test_vectors_that_are_no_rows_are_refused(tmp_path, array, said):
    with pytest.raises(BadSource, match=said):
        read(save(tmp_path / "v", array, {}))


def test_missing_strings_are_named(tmp_path):
    with pytest.raises(BadSource, match=r"strings\.json: the file is missing"):
        read(save(tmp_path / "v", rows(3), {key("der"): 0}, strings=None))
    read(save(tmp_path / "w", rows(3), {}, strings=None, settings=FLORET))
