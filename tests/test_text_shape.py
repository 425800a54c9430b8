"""What the first bytes of a file tell: its format, its number of columns, or that it is something else."""

import numpy as np
import pytest
from text_sources import GOOD_LINES, read, read_bytes, source_of

from bigembed.convert.text import recognise
from bigembed.errors import BadSource


@pytest.mark.parametrize(
    ("data", "looks"),
    [
        (b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head>\n", "an HTML page"),
        (b"\n  <html>\n", "an HTML page"),
        (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "XML"),
        (b'{"error": "not found"}', "JSON"),
        (b'[{"a": 1}]\n', "JSON"),
        (b"PK\x03\x04\x14\0\0\0", "a zip archive"),
        (b"\x93NUMPY\x01\0", "a .npy file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a Git LFS pointer"),
        ("a 0.1 0.2\n".encode("utf-16"), "text in UTF-16"),
        (bytes(range(256)) * 4, "binary data"),
        (b"a 0.1 0.2\rb 0.3 0.4\r", "text whose lines end in CR alone"),
        (b"Once upon a time\nthere was a file\n", "text without numbers after each token"),
        (b"a,0.1,0.2\nb,0.3,0.4\n", "text without numbers after each token"),
        (b"\n\n \n", "text without numbers after each token"),
    ],
)
def test_what_is_no_text_of_vectors_is_told(data, looks, tmp_path):
    assert recognise(data, "vectors.txt") is None
    for format, options in (("glove", {}), ("glove", {"dim": 300}), ("word2vec-text", {})):
        with pytest.raises(BadSource, match=f"source.txt, line 1: .*looks like {looks}"):
            read_bytes(tmp_path, data, format, **options)


def test_the_number_of_columns_is_what_most_lines_have(tmp_path):
    data = b"0.5 0.25\n. . . 0.1 0.2\n" + b"at 5 pm 0.1 0.2\n" + GOOD_LINES * 3
    assert source_of(tmp_path, data, "glove").dim == 2
    phrases = b"".join(b"new york%d 0.1 0.2 0.3\n" % i for i in range(9))
    source = source_of(tmp_path, phrases, "glove")
    assert source.dim == 3
    assert read(source)[0][0] == b"new york0"
    wide = b"w " + b" ".join([b"0.5"] * 40_000) + b"\n"  # longer than the first look at the file
    assert source_of(tmp_path, wide * 2, "glove").dim == 40_000
    with pytest.raises(BadSource, match=r"line 1 .*1 numbers were expected after the token, more found"):
        read_bytes(tmp_path, GOOD_LINES, "glove", dim=1)


@pytest.mark.parametrize(
    ("head", "format"),
    [
        (b"2 3\nthe 0.1 0.2 0.3\n", "word2vec-text"),
        (b"\xef\xbb\xbf2 3 \r\nthe 0.1 0.2 0.3\r\n", "word2vec-text"),
        (b"400000 50\nthe 0.1 0.2", "word2vec-text"),  # cut inside the first line
        (b"the 0.1 0.2 0.3", "glove"),
        (b"the 0.1 0.2 0.3\nof 0.1 0.2 0.3\n", "glove"),
        (b". . . 0.1 0.2\nthe 0.1 0.2\nof 0.1 0.2\n", "glove"),
        (b"5 3\n7 2\n9 4\n", "glove"),  # no header: the lines that follow have one number, not three
        (b"5 1\na 7\nb 8\n", "word2vec-text"),
        (b"1 1\n2 1\n3 1\n", "glove"),  # more lines than a header would allow
        (b"2 1\na 0.5\nb 0.5\n", "word2vec-text"),
        (b"a 0.5\nb 0.25\n", "glove"),
        (b"2 3\nthe 0.1 nan\nof 0.1 0.2 0.3\nto 0.1 0.2 0.3\n", "word2vec-text"),
        (b"0 300\n", "word2vec-text"),
        (b"the 1061396\nof 593677\n", None),  # counts
        (b"2 3\nthe " + np.arange(3, dtype="<f4").tobytes(), None),
        (
            b"3 300\nthe " + np.random.default_rng(0).normal(size=200).astype("<f4").tobytes().replace(b"\0", b"\x01"),
            None,
        ),
        (b"", None),
        (b"\n\n", None),
        (b"word", None),
        (b"one two\nthree four\n", None),
    ],
)
def test_formats_are_recognised(head, format):
    assert recognise(head, "vectors.txt") == format
