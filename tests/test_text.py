"""Text formats: every row is what gensim reads, every number np.float32(float(text)), and every fault is named."""

import hashlib
import os
import random
import subprocess
import sys
import threading

import naive_text as naive
import numpy as np
import pytest
from text_sources import (
    COMPRESSIONS,
    GOOD_LINES,
    HARD,
    compressed,
    random_texts,
    read,
    read_bytes,
    some_vectors,
    source_of,
)

from bigembed import threads
from bigembed.convert.lines import BadLine, read_line
from bigembed.convert.source import ReadOptions
from bigembed.convert.stream import ByteStream
from bigembed.convert.text import TextSource, open_source
from bigembed.errors import BadSource


def test_lines_of_numbers_equal_numpys_float32_of_pythons_float(tmp_path):
    texts = [text for text in HARD + random_texts(1, 30_000) if abs(float(text)) < 3.4028235677973366e38]
    for separator in (" ", "\t", "   "):
        stop, values_D = read_line(("word" + separator + separator.join(texts)).encode(), len(texts))
        expected_D = np.array([np.float32(float(text)) for text in texts])
        assert stop == 4
        assert values_D.tobytes() == expected_D.tobytes()
        rows = read_bytes(
            tmp_path, ("word" + separator + separator.join(texts) + "\n").encode(), "glove", dim=len(texts)
        )[1]
        assert rows.tobytes() == expected_D.tobytes()


# --- files


def test_a_file_of_gensims_is_read_as_gensim_reads_it(tmp_path):
    vectors, rows_VD = some_vectors(tmp_path)
    path = str(tmp_path / "vectors.txt")
    source = open_source(path, "word2vec-text", ReadOptions())
    assert (source.num_rows, source.dim, source.dtype, source.has_tokens) == (50, 7, "text", True)
    assert (source.files, source.total_bytes) == ([path], os.path.getsize(path))
    tokens, read_VD = read(source)
    loaded = pytest.importorskip("gensim.models").KeyedVectors.load_word2vec_format(path)
    assert [token.decode() for token in tokens] == loaded.index_to_key == vectors.index_to_key
    assert read_VD.tobytes() == loaded.vectors.tobytes() == rows_VD.tobytes()
    assert (source.notes, source.skipped.count, source.done_bytes) == ([], 0, source.total_bytes)


def test_a_file_without_a_header_is_read_as_gensim_reads_it(tmp_path):
    some_vectors(tmp_path)
    path = tmp_path / "glove.txt"
    path.write_bytes((tmp_path / "vectors.txt").read_bytes().split(b"\n", 1)[1])
    tokens, read_VD = read(open_source(str(path), "glove", ReadOptions()))
    loaded = pytest.importorskip("gensim.models").KeyedVectors.load_word2vec_format(str(path), no_header=True)
    assert [token.decode() for token in tokens] == loaded.index_to_key
    assert read_VD.tobytes() == loaded.vectors.tobytes()


def test_lines_as_fasttext_and_the_c_tool_write_them(tmp_path):
    tokens, rows = read_bytes(tmp_path, b"2 3\n</s> 0.001 -1e-05 3 \nd\xc3\xa9 0.5 0.25 -0 \n", "word2vec-text")
    assert tokens == [b"</s>", b"d\xc3\xa9"]
    assert rows.tobytes() == np.array([[0.001, -1e-05, 3], [0.5, 0.25, -0.0]], np.float32).tobytes()


def test_tokens_with_spaces_are_what_stands_before_the_last_numbers(tmp_path):
    data = b". . . 0.1 0.2\nat name@domain.com 0.3 0.4\n. 0.5 0.6\narea 51 0.7 0.8\n\xc2\xa0 1.5 2.5\n the 1.5 2.5\n"
    tokens, rows = read_bytes(tmp_path, data, "glove")
    assert tokens == [b". . .", b"at name@domain.com", b".", b"area 51", b"\xc2\xa0", b" the"]
    assert rows.shape == (6, 2)
    assert rows[3].tolist() == [np.float32(0.7), np.float32(0.8)]


def test_the_empty_token(tmp_path):
    tokens, rows = read_bytes(tmp_path, b"a 0.1 0.2\n0.3 0.4\nb 0.5 0.6\n 0.7 0.8\n1984 0.1 0.2\n", "glove")
    assert tokens == [b"a", b"", b"b", b"", b"1984"]
    assert rows[1].tolist() == [np.float32(0.3), np.float32(0.4)]
    tokens, _ = read_bytes(tmp_path, b"2 2\na 0.1 0.2\n 0.7 0.8\n", "word2vec-text")
    assert tokens == [b"a", b""]


def test_what_is_kept_passed_over_and_cleaned(tmp_path):
    """CRLF, blank lines, tabs, several spaces, a byte order mark, broken UTF-8, control characters, duplicates."""
    data = (
        b"\xef\xbb\xbf5 2\r\n\r\na\t0.1\t0.2\r\n\n \nb  0.3   0.4 \r\n\xff\xfe 1 2\r\n\x01\x7f 3 4\r\na 5 6\r\n\r\n\n"
    )
    source = source_of(tmp_path, data, "word2vec-text")
    tokens, rows = read(source)
    assert tokens == [b"a", b"b", b"\xff\xfe", b"\x01\x7f", b"a"]
    np.testing.assert_array_equal(rows, np.array([[0.1, 0.2], [0.3, 0.4], [1, 2], [3, 4], [5, 6]], np.float32))
    assert source.notes == []


@pytest.mark.parametrize("seed", range(30))
def test_random_files_equal_the_naive_reader(seed, tmp_path):
    """Whatever the line ends, the compression, the size of the windows and the number of threads."""
    rng = random.Random(seed)
    dim, count = rng.randint(1, 12), rng.randint(1, 60)
    words = ["a", "the", ". . .", "at x@y.z", "ü" * rng.randint(1, 40), "\udcff\udc80", "x" * rng.randint(1, 300)]
    separator, end = rng.choice([" ", "\t", "  "]), rng.choice(["\n", "\r\n", " \n"])
    lines = []
    for _ in range(count):
        numbers = [text for text in random_texts(rng.random(), dim * 3) if abs(float(text)) < 3e38][:dim]
        numbers += ["0.5"] * (dim - len(numbers))
        lines.append(rng.choice(words) + separator + separator.join(numbers))
    format = rng.choice(["glove", "word2vec-text"])
    header = f"{count} {dim}{end}" if format == "word2vec-text" else ""
    data = (header + end.join(lines) + end).encode("utf-8", "surrogateescape")
    path = tmp_path / "fuzz"
    path.write_bytes(compressed(rng.choice(COMPRESSIONS), data))
    expected = naive.read_text(data, None if header else dim)
    before = threads.get_num_threads()
    threads.set_num_threads(rng.choice([1, 2, 5]))
    try:
        options = ReadOptions(dim=dim)
        tokens, rows = read(TextSource(ByteStream.open(path), format, options, rng.choice([1, 5, 64, 1000, 1 << 20])))
    finally:
        threads.set_num_threads(before)
    assert tokens == [token for token, _ in expected]
    assert rows.tobytes() == np.array([values for _, values in expected], np.float32).tobytes()


def test_many_short_lines_are_several_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr("bigembed.convert.text.BLOCK_LINES", 10)
    data = b"".join(b"w%d %d.5\n\n" % (i, i) for i in range(105))
    tokens, rows = read_bytes(tmp_path, data, "glove")
    assert tokens == [b"w%d" % i for i in range(105)]
    np.testing.assert_array_equal(rows[:, 0], np.arange(105) + 0.5)


# --- faults

BAD_LINES = [
    (b"cat 0.1", "2 numbers were expected after the token, 1 found: 'cat 0.1'"),
    (b"cat", "2 numbers were expected after the token, 0 found: 'cat'"),
    (b"cat 0.1 0.2 0.3", "2 numbers were expected after the token, more found"),
    (b"cat 0.1 0.2 dog 0.3 0.4", "2 numbers were expected after the token, more found"),
    (b"cat 1 2 3", "2 numbers were expected after the token, 3 found"),
    (b" 0.1 0.2 0.3", "2 numbers were expected after the token, more found"),
    (b"cat nan 0.2", "'nan' is not a finite number"),
    (b"cat 0.1 -inf", "'-inf' is not a finite number"),
    (b"cat 0.1 1e39", "'1e39' is too large for float32"),
    (b"cat 0.1 -1e999", "'-1e999' is too large for float32"),
    (b"cat 0.1 zero", "'zero' is not a number, in 'cat 0.1 zero'"),
    (b"cat 1_0 0.2", "'1_0' is not a number"),
    (b"cat 0.1 0x10", "'0x10' is not a number"),
    (b"cat 0,1 0,2", "'0,1' is not a number"),
    (b"cat 0.1\r 0.2", r"'0.1\r' is not a number"),
    (b"c\0t 0.1 0.2", "a zero byte in the token"),
    (b"cat 0.1 0.\x002", r"'0.\x002' is not a number"),
    (b"cat 0.1 1e", "'1e' is not a number"),
    (b"cat 0.1 \xff", r"'\\xff' is not a number"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES)
@pytest.mark.parametrize("format", ["glove", "word2vec-text"])
@pytest.mark.parametrize("window_bytes", [8, 1 << 20])
def test_a_bad_line_is_named_or_left_out(format, line, problem, window_bytes, tmp_path):
    header = b"4 2\n" if format == "word2vec-text" else b""
    data = header + GOOD_LINES + line + b"\n" + b"to 0.5 0.6\n"
    with pytest.raises(BadSource) as caught:
        read(source_of(tmp_path, data, format, window_bytes, dim=2))
    place = f"line {3 + bool(header)} (byte {len(header + GOOD_LINES)})"
    assert f"{tmp_path}/source.txt, {place}: {problem}" in str(caught.value)
    assert str(caught.value).endswith("To leave such lines out, use skip_bad_lines (--skip-bad-lines).")
    source = source_of(tmp_path, data, format, window_bytes, dim=2, skip_bad_lines=True)
    tokens, rows = read(source)
    assert tokens == [b"the", b"of", b"to"]
    np.testing.assert_array_equal(rows, np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], np.float32))
    assert source.skipped.count == 1
    assert f"{place}: {problem}" in source.skipped.first[0]
    assert source.notes == []


def test_a_number_short_is_no_empty_token_in_a_file_with_a_header(tmp_path):
    with pytest.raises(BadSource, match=r"line 2 .*2 numbers were expected after the token, 1 found"):
        read_bytes(tmp_path, b"1 2\n1984 0.1\n", "word2vec-text")
    with pytest.raises(BadSource, match=r"line 2 .*2 numbers were expected after the token, 1 found"):
        read_bytes(tmp_path, b"a 0.1 0.2\n1984 0.1\n", "glove")


def test_many_bad_lines_are_counted_and_the_first_listed(tmp_path):
    source = source_of(tmp_path, b"a 0.1 0.2\n" + b"short\nlong nan nan\n" * 30, "glove", skip_bad_lines=True)
    assert read(source)[0] == [b"a"]
    assert (source.skipped.count, len(source.skipped.first)) == (60, source.skipped.KEPT)


def test_a_file_of_bad_lines_alone_is_an_error(tmp_path):
    with pytest.raises(BadSource, match=r"not one line could be read; the first is .*line 1 .*'nan' is not a finite"):
        read_bytes(tmp_path, b"a nan 1\nb nan 1\n", "glove", skip_bad_lines=True)


def test_lines_past_those_of_the_header_are_an_error_or_left_out(tmp_path):
    data = b"2 2\n" + GOOD_LINES + b"not a line\nof 1 2\n"
    for window_bytes in (3, 20, 1 << 20):
        with pytest.raises(BadSource, match="byte 27: the header says 2 rows, but 18 bytes follow them"):
            read(source_of(tmp_path, data, "word2vec-text", window_bytes))
        source = source_of(tmp_path, data, "word2vec-text", window_bytes, skip_bad_lines=True)
        assert read(source)[0] == [b"the", b"of"]
        assert len(source.notes) == 1
        assert source.notes[0].startswith("the header says 2 rows, but 18 bytes follow them.")
        source = source_of(tmp_path, data, "word2vec-text", window_bytes, limit=1)
        assert (read(source)[0], source.notes) == ([b"the"], [])
    source = source_of(tmp_path, b"2 2\n" + GOOD_LINES + b"\n \r\n", "word2vec-text")
    assert (len(read(source)[0]), source.notes) == (2, [])


def test_fewer_lines_than_the_header_says_are_an_error_or_noted(tmp_path):
    source = source_of(tmp_path, b"1000 2\n" + GOOD_LINES, "word2vec-text")
    assert source.num_rows is None  # the file has no room for a thousand
    with pytest.raises(BadSource, match=r"line 4 \(byte 30\): the header says 1,000 rows, but the file has 2"):
        read(source)
    source = source_of(tmp_path, b"3 2\n" + GOOD_LINES, "word2vec-text", skip_bad_lines=True)
    assert source.num_rows == 3
    assert len(read(source)[0]) == 2
    assert source.notes == ["the header says 3 rows, but the file has 2."]


def test_lines_past_the_limit_need_not_be_sound(tmp_path):
    for format, head in (("glove", b""), ("word2vec-text", b"9 2\n")):
        source = source_of(tmp_path, head + GOOD_LINES + b"bad\n" * 100, format, 16, limit=2, dim=2)
        assert (read(source)[0], source.skipped.count) == ([b"the", b"of"], 0)


def test_a_last_line_without_its_end(tmp_path):
    source = source_of(tmp_path, b"2 2\n" + GOOD_LINES[:-1], "word2vec-text")
    assert read(source)[0] == [b"the", b"of"]
    assert source.notes == ["The last line has no line end: if the file was cut off, so was its last number."]
    source = source_of(tmp_path, GOOD_LINES[:-1], "glove")
    assert read(source)[0] == [b"the", b"of"]
    assert len(source.notes) == 1
    with pytest.raises(BadSource, match=r"line 3 \(byte 16\): the file ends in this line, row 2 of 3: 'of 0.3 0.4'"):
        read_bytes(tmp_path, b"3 2\n" + GOOD_LINES[:-1], "word2vec-text")


@pytest.mark.parametrize("format", ["glove", "word2vec-text"])
def test_a_file_cut_anywhere_gives_whole_rows_or_an_error(format, tmp_path):
    """But for the last number of a file whose last row may have no line end: then a note says so."""
    body = b"the 0.12 -0.25\nof 1e-05 0.4\n1984 0.5 0.625\n"
    data = b"3 2\n" + body if format == "word2vec-text" else body
    whole = naive.read_text(body, 2)
    for cut in range(len(data)):
        try:
            source = source_of(tmp_path, data[:cut], format, 16, dim=2)
            tokens, rows = read(source)
        except BadSource:
            continue
        for m, token in enumerate(tokens):
            assert token == whole[m][0]
            may_be_short = m == len(tokens) - 1 and "no line end" in "".join(source.notes)
            np.testing.assert_array_equal(rows[m, : 1 if may_be_short else 2], whole[m][1][: 1 if may_be_short else 2])
        assert len(tokens) == 3 or format == "glove" or "The header says 3 rows" in source.notes[0]


@pytest.mark.parametrize("format", ["glove", "word2vec-text"])
def test_an_empty_file_is_an_error(format, tmp_path):
    with pytest.raises(BadSource, match="byte 0: the file is empty"):
        read_bytes(tmp_path, b"", format)


def test_headers_that_cannot_be(tmp_path):
    with pytest.raises(BadSource, match="line 2: the header says 3 rows, but nothing follows it"):
        read_bytes(tmp_path, b"3 2\n", "word2vec-text")
    with pytest.raises(BadSource, match="line 1: there are 0 columns"):
        read_bytes(tmp_path, b"3 0\n", "word2vec-text")
    with pytest.raises(BadSource, match="line 1: there are 99999999 columns"):
        read_bytes(tmp_path, b"3 99999999\n", "word2vec-text")
    with pytest.raises(BadSource, match=r'a header "rows columns" was expected, found \'the 0.1 0.2\'.*format glove'):
        read_bytes(tmp_path, GOOD_LINES, "word2vec-text")
    with pytest.raises(BadSource, match="there are 2 columns, but dim=3 was asked for"):
        read_bytes(tmp_path, b"2 2\n" + GOOD_LINES, "word2vec-text", dim=3)
    assert read_bytes(tmp_path, b"0 2\n", "word2vec-text")[0] == []


def test_a_line_without_end_stops_at_a_bound(monkeypatch, tmp_path):
    monkeypatch.setattr("bigembed.convert.text.LINE_BYTES", 1000)
    with pytest.raises(BadSource, match=r"line 2 \(byte 10\): there is no line end within 1,000 bytes"):
        read(source_of(tmp_path, b"a 0.1 0.2\n" + b"x" * 5000 + b" 0.1 0.2\n", "glove", 100, dim=2))


def test_standard_input_is_read_once_and_summed(tmp_path):
    code = (
        "import sys; from bigembed.convert.text import open_source; from bigembed.convert.source import ReadOptions\n"
        "with open_source('-', 'glove', ReadOptions()) as source:\n"
        "    count = sum(len(block.values_MD) for block in source.blocks())\n"
        "print(count, source.files, source.total_bytes, source.done_bytes, *source.facts.values())"
    )
    done = subprocess.run([sys.executable, "-c", code], input=GOOD_LINES, capture_output=True)
    size = len(GOOD_LINES)
    expected = f"2 [] None {size} {size} {hashlib.sha256(GOOD_LINES).hexdigest()}\n"
    assert done.stdout.decode() == expected, done.stderr.decode()


def test_closing_early_stops_the_reader(tmp_path):
    source = source_of(tmp_path, GOOD_LINES * 1000, "glove", 64)
    blocks = source.blocks()
    next(blocks)
    source.close()
    blocks.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "bigembed-read-ahead"]


@pytest.mark.parametrize(
    ("line", "token", "values"),
    [
        (b"a 1 2", b"a", [1, 2]),
        (b"a  1 \t 2 \r", b"a", [1, 2]),
        (b" 1 2", b"", [1, 2]),
        (b"1.5 2.5", b"", [1.5, 2.5]),
        (b"1 2", b"", [1, 2]),
        (b"area 51 1.5 2.5", b"area 51", [1.5, 2.5]),
    ],
)
def test_read_line(line, token, values):
    stop, values_D = read_line(line, 2, bare_empty=True)
    assert (line[:stop], values_D.tolist()) == (token, values)


def test_read_line_takes_no_integer_for_a_number_of_the_vector():
    with pytest.raises(BadLine):
        read_line(b"1984 0.5", 2, bare_empty=True)
    with pytest.raises(BadLine):
        read_line(b"1.5 2.5", 2)
