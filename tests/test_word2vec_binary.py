"""word2vec's binary format: what gensim and the C tool write is read exactly, and every cut or wrong count is told."""

import os
import random
import threading

import naive_text as naive
import numpy as np
import pytest
from text_sources import COMPRESSIONS, buffer_of, compressed, read, some_vectors

from bigembed import threads
from bigembed.convert import text
from bigembed.convert.source import ReadOptions
from bigembed.convert.stream import ByteStream
from bigembed.convert.word2vec_binary import Word2vecBinarySource, open_source, recognise
from bigembed.errors import BadSource
from bigembed.kernels import word2vec as kernels

TOKENS = ["</s>", "the", "", "wörd", "\udcff\udc80", "x" * 300, "的", "a\tb"]


def file_of(seed, count=None, dim=None, ends=("\n", "", "\n\n")):
    """(bytes of a file, its tokens, its rows): line feeds between rows or not, at random."""
    rng = random.Random(seed)
    count = rng.randint(1, 40) if count is None else count
    dim = rng.randint(1, 12) if dim is None else dim
    rows_VD = np.frombuffer(rng.randbytes(4 * count * dim), "<f4").reshape(count, dim)  # NaN and infinity among them
    tokens = [rng.choice(TOKENS).encode("utf-8", "surrogateescape") for _ in range(count)]
    end = rng.choice(ends).encode()
    data = b"%d %d\n" % (count, dim)
    for token, row_D in zip(tokens, rows_VD, strict=True):
        data += token + b" " + row_D.tobytes() + (end if rng.random() < 0.9 else b"")
    return data, tokens, rows_VD


def source_of(tmp_path, data, window_bytes=1 << 20, **options):
    path = tmp_path / "source.bin"
    path.write_bytes(data)
    return Word2vecBinarySource(ByteStream.open(path), ReadOptions(**options), window_bytes)


def test_a_file_of_gensims_is_read_as_gensim_reads_it(tmp_path):
    _, rows_VD = some_vectors(tmp_path, dim=9, tokens=[f"tökén{i}" for i in range(50)])
    path = str(tmp_path / "vectors.bin")
    source = open_source(path, "word2vec-binary", ReadOptions())
    assert (source.format, source.num_rows, source.dim, source.dtype) == ("word2vec-binary", 50, 9, "float32")
    assert (source.files, source.total_bytes) == ([path], os.path.getsize(path))
    tokens, read_VD = read(source)
    loaded = pytest.importorskip("gensim.models").KeyedVectors.load_word2vec_format(path, binary=True)
    assert [token.decode() for token in tokens] == loaded.index_to_key
    assert read_VD.tobytes() == loaded.vectors.tobytes() == rows_VD.tobytes()
    assert (source.notes, source.done_bytes) == ([], source.total_bytes)


@pytest.mark.parametrize("seed", range(40))
def test_random_files_equal_the_naive_reader(seed, tmp_path):
    data, tokens, rows_VD = file_of(seed)
    rng = random.Random(seed)
    path = tmp_path / "fuzz"
    path.write_bytes(compressed(rng.choice(COMPRESSIONS), data))
    before = threads.get_num_threads()
    threads.set_num_threads(rng.choice([1, 3]))
    try:
        window_bytes = rng.choice([1, 5, 64, 1000, 1 << 20])
        found, read_VD = read(Word2vecBinarySource(ByteStream.open(path), ReadOptions(), window_bytes))
    finally:
        threads.set_num_threads(before)
    assert found == tokens == [token for token, _ in naive.read_binary(data)]
    assert read_VD.tobytes() == rows_VD.tobytes() == b"".join(vector for _, vector in naive.read_binary(data))


def test_blocks_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("bigembed.convert.word2vec_binary.BLOCK_BYTES", 100)
    data, tokens, rows_VD = file_of(1, count=100, dim=3)
    with source_of(tmp_path, data) as source:
        assert max(len(block.values_MD) for block in source.blocks()) == 8
    found, read_VD = read(source_of(tmp_path, data))
    assert (found, read_VD.tobytes()) == (tokens, rows_VD.tobytes())


@pytest.mark.parametrize("seed", range(6))
def test_find_records_and_copy_vectors_equal_their_twins(seed):
    data, _, rows_VD = file_of(seed)
    body = data.partition(b"\n")[2]
    vector_bytes, rng = 4 * rows_VD.shape[1], random.Random(seed)
    for cut in [len(body), *(rng.randint(0, len(body)) for _ in range(20))]:
        limit = rng.choice([1, 3, 100])
        start_M, stop_M = np.empty(limit, np.int64), np.empty(limit, np.int64)
        found = kernels.find_records(buffer_of(body[:cut]), 0, cut, vector_bytes, start_M, stop_M)
        places, rest, wrong_at = naive.find_records(body[:cut], 0, vector_bytes, limit)
        assert found == (len(places), rest, wrong_at)
        assert list(zip(start_M[: found[0]].tolist(), stop_M[: found[0]].tolist(), strict=True)) == places
        out_MB = np.zeros((found[0], vector_bytes), np.uint8)
        threads.run(kernels.copy_vectors, found[0], buffer_of(body), stop_M, out_MB, grain=2)
        assert out_MB.tobytes() == naive.copy_vectors(body, stop_M[: found[0]], vector_bytes)


def test_a_zero_byte_in_a_token_stops_as_its_twin():
    data = b"a " + b"\1\2\3\4" + b"b\0c " + b"\1\2\3\4"
    start_M, stop_M = np.empty(9, np.int64), np.empty(9, np.int64)
    found = kernels.find_records(buffer_of(data), 0, len(data), 4, start_M, stop_M)
    assert found == (1, 6, 7)
    assert naive.find_records(data, 0, 4, 9) == ([(0, 1)], 6, 7)


@pytest.mark.parametrize("ends", [("\n",), ("",)])
@pytest.mark.parametrize("window_bytes", [16, 1 << 20])
def test_a_file_cut_anywhere_gives_whole_rows_or_an_error(tmp_path, ends, window_bytes):
    data, tokens, rows_VD = file_of(3, count=4, dim=2, ends=ends)
    tokens_read, places = set(), set()
    for cut in range(len(data.rstrip(b"\n") if ends == ("\n",) else data)):
        try:
            source = source_of(tmp_path, data[:cut], window_bytes, skip_bad_lines=True)
            found, read_VD = read(source)
        except BadSource as error:
            places.add(str(error).split(": ")[0].endswith((f", byte {cut}", ", byte 0")))
            continue
        tokens_read.add(len(found))
        assert found == tokens[: len(found)]
        assert read_VD.tobytes() == rows_VD[: len(found)].tobytes()
        assert source.notes == [f"the header says 4 rows, but the file has {len(found)}."]
        with pytest.raises(BadSource, match=f"byte {cut}: the header says 4 rows, but the file has {len(found)}"):
            read(source_of(tmp_path, data[:cut], window_bytes))
    assert tokens_read == {1, 2, 3}
    assert places == {True}


def test_a_cut_row_is_named_with_its_byte(tmp_path):
    data = b"2 2\na " + bytes(8) + b"b " + bytes(5)
    expected = "byte 21: the file ends in row 1 of 2, after 7 bytes of its token, a space and 8 bytes of numbers"
    with pytest.raises(BadSource, match=expected):
        read(source_of(tmp_path, data))


def test_more_rows_than_the_header_says_are_an_error_or_left_out(tmp_path):
    data, tokens, rows_VD = file_of(4, count=5, dim=3)
    more = data.replace(b"5 3\n", b"2 3\n", 1)
    for window_bytes in (10, 1 << 20):
        with pytest.raises(BadSource, match="the header says 2 rows, but"):
            read(source_of(tmp_path, more, window_bytes))
        for options in ({"skip_bad_lines": True}, {"limit": 2}):
            source = source_of(tmp_path, more, window_bytes, **options)
            found, read_VD = read(source)
            assert (found, read_VD.tobytes()) == (tokens[:2], rows_VD[:2].tobytes())
        assert read(source_of(tmp_path, more, window_bytes, limit=1))[0] == tokens[:1]


def test_fewer_rows_than_the_header_says_are_an_error_or_noted(tmp_path):
    data, _, _ = file_of(5, count=3, dim=2, ends=("\n",))
    source = source_of(tmp_path, data.replace(b"3 2\n", b"900 2\n", 1), skip_bad_lines=True)
    assert source.num_rows is None  # the file has no room for 900
    assert len(read(source)[0]) == 3
    assert source.notes == ["the header says 900 rows, but the file has 3."]


def test_a_wrong_number_of_columns_is_noticed(tmp_path):
    rows_VD = np.arange(60, dtype="<f4").reshape(20, 3)
    data = b"".join(b"w%d " % m + row_D.tobytes() + b"\n" for m, row_D in enumerate(rows_VD))
    for dim in (2, 4):
        with pytest.raises(BadSource, match=r"byte \d+: (a zero byte in the token|the file ends in row)"):
            read(source_of(tmp_path, b"20 %d\n" % dim + data))
    with pytest.raises(BadSource, match=r"do not have the 2 columns that its first line says"):
        read(source_of(tmp_path, b"20 2\n" + data))


def test_a_token_without_end_stops_at_a_bound(tmp_path):
    data = b"1 2\n" + b"x" * (kernels.TOKEN_BYTES + 100) + b" 12345678"
    with pytest.raises(
        BadSource, match=f"byte {4 + kernels.TOKEN_BYTES}: no space within 1,048,576 bytes in the token"
    ):
        read(source_of(tmp_path, data))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "byte 0: the file is empty"),
        (b"<html>\n", "byte 0: a line \"rows columns\" was expected, found '<html>'; the file looks like an HTML page"),
        (b"2 x\n", "byte 0: a line"),
        (b"5 0\n", "line 1: there are 0 columns"),
        (b"5 99999999\n", "line 1: there are 99999999 columns"),
        (b"5 3\n", "byte 4: the file ends in row 0 of 5"),
        (b"5 3\n\n\n", "byte 6: the file ends in row 0 of 5"),
    ],
)
def test_what_is_no_such_file_is_told(tmp_path, data, problem):
    with pytest.raises(BadSource, match=problem):
        read(source_of(tmp_path, data))


def test_other_dimensions_than_asked_for_are_an_error(tmp_path):
    with pytest.raises(BadSource, match="there are 2 columns, but dim=3 was asked for"):
        source_of(tmp_path, b"1 2\na 12345678", dim=3)


def test_nan_and_infinity_are_data(tmp_path):
    rows_VD = np.array([[np.nan, 1], [-np.inf, 2]], "<f4")
    _, read_VD = read(source_of(tmp_path, b"2 2\na " + rows_VD[0].tobytes() + b"b " + rows_VD[1].tobytes()))
    assert read_VD.tobytes() == rows_VD.tobytes()


def test_it_is_recognised_and_not_taken_for_text(tmp_path):
    some_vectors(tmp_path)
    head = (tmp_path / "vectors.bin").read_bytes()[:4096]
    assert (recognise(head, "x"), text.recognise(head, "x")) == ("word2vec-binary", None)
    head = (tmp_path / "vectors.txt").read_bytes()[:4096]
    assert (recognise(head, "x"), text.recognise(head, "x")) == (None, "word2vec-text")
    for seed in range(50):
        head, _, _ = file_of(seed, count=30, dim=random.Random(seed).choice([5, 100, 300]))
        assert (recognise(head[:4096], "x"), text.recognise(head[:4096], "x")) == ("word2vec-binary", None)
    for head in (
        b"",
        b"2 3",
        b"2 3\n",
        b"2 3\nthe",
        b"2 3\nthe wrong word\n",
        b"the 1 2\n",
        b"2 0\n",
        "2 3\nü é ö\n".encode(),
    ):
        assert recognise(head, "x") is None


def test_closing_early_stops_the_reader(tmp_path):
    data, _, _ = file_of(6, count=300, dim=3)
    source = source_of(tmp_path, data, 64)
    blocks = source.blocks()
    next(blocks)
    source.close()
    blocks.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "bigembed-read-ahead"]
