"""What the tests of text formats share: hard numbers, small sources in any compression, and how one is read whole."""

import math
import random
import struct

import naive_text as naive
import numpy as np
import pytest

from bigembed.convert.source import ReadOptions
from bigembed.convert.stream import ByteStream
from bigembed.convert.text import TextSource
from bigembed.kernels.decimals import SLACK_BYTES

HARD = [
    "0", "-0", "0.0", "-0.0", "+1", "1.", ".5", "-.5", "00012.5", "1e0", "1E+2", "-1e-2", "1e-400", "0e999999999999",
    "9007199254740993", "9007199254740992", "9007199254740991.5", "1e22", "1e23", "123456789012345678901234567890",
    "4.9e-324", "2.4703282292062327e-324", "2.4703282292062328e-324", "2.2250738585072011e-308", "1e-45", "7e-46",
    "2.2250738585072014e-308", "1.4012984643248170e-45", "1.1754943508222875e-38", "3.4028234663852886e38",
    "3.40282346638528859811704183484516925440e38", "7.2057594037927933e16", "8.5e-5", "0.000000000000000000000000001",
    "1." + "0" * 800, "0." + "0" * 300 + "1", "1" * 38, "0." + "9" * 100, "5e-324", "1" + "0" * 37 + "e-37",
    "9999999999999999999", "18446744073709551615", "18446744073709551616", "99999999999999999999e-20", "1e-342",
    "1e-343", "9" * 19 + "e-343", "8.98846567431158e-300", "0." + "123456789" * 10,
]  # fmt: skip
NOT_HERE = ["1e39", "-1e400", "3.4028235677973366e38", "nan", "inf", "-Infinity", "", ".", "-", "+", "e5", "--1", "x"]

GOOD_LINES = b"the 0.1 0.2\nof 0.3 0.4\n"
COMPRESSIONS = ["none", "gzip", "bzip2", "xz", "zstd"]


def buffer_of(data):
    """What a kernel is given: the bytes and the slack after them."""
    return np.frombuffer(data + b"\0" * SLACK_BYTES, np.uint8).copy()


def random_texts(seed, count):
    rng = random.Random(seed)

    def float_of_bits(form, size):
        value = math.nan
        while not math.isfinite(value):
            value = struct.unpack(form, rng.getrandbits(8 * size).to_bytes(size, "little"))[0]
        return value

    def halfway():
        """Exactly between two neighbouring floats of 53 bits, or one digit off."""
        value = math.ldexp(rng.getrandbits(53) | 1 << 52, rng.randint(-60, 10)) + 0.0
        exact = (naive.Fraction(value) + naive.Fraction(math.nextafter(value, math.inf))) / 2
        power = exact.denominator.bit_length() - 1  # the denominator is a power of two
        digits = str(exact.numerator * 5**power).rjust(power + 1, "0")
        text = digits[: len(digits) - power] + "." + digits[len(digits) - power :]
        return text[:-1] + rng.choice(["4", "5", "6"]) + rng.choice(["", "0", "0001"])

    def digits():
        def some(most):
            return "".join(rng.choices("0123456789", k=rng.randint(0, most)))

        return rng.choice(["", "-"]) + some(12) + rng.choice("0123456789") + "." + some(30)

    makers = [
        lambda: repr(float_of_bits("f", 4)),
        lambda: f"{float_of_bits('f', 4):.9g}",
        lambda: f"{float_of_bits('f', 4):.17g}",
        lambda: f"{float_of_bits('f', 4):f}",
        lambda: f"{float_of_bits('d', 8):.17g}",
        lambda: repr(float_of_bits("d", 8)),
        lambda: f"{rng.gauss(0, 0.4):.5g}",
        lambda: f"{rng.gauss(0, 0.4):.6f}",
        lambda: f"{rng.gauss(0, 0.4):.18e}",
        lambda: f"{rng.getrandbits(64)}e{rng.randint(-345, 30)}",
        halfway,
        digits,
        lambda: digits() + f"e{rng.randint(-50, 20)}",
    ]
    return [rng.choice(makers)() for _ in range(count)]


def compressed(kind, data):
    if kind == "none":
        return data
    if kind == "zstd":
        return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)
    name = {"gzip": "gzip", "bzip2": "bz2", "xz": "lzma"}[kind]
    return __import__(name).compress(data)


def read(source):
    """(tokens, rows) of a source, which is closed."""
    tokens, blocks = [], []
    with source:
        for block in source.blocks():
            assert block.values_MD.dtype == np.float32
            assert block.values_MD.flags.c_contiguous
            assert len(block.tokens) == len(block.values_MD) > 0
            tokens += block.tokens.to_list()
            blocks.append(block.values_MD.copy())
    return tokens, np.concatenate(blocks) if blocks else np.empty((0, source.dim), np.float32)


def source_of(folder, data, format, window_bytes=1 << 20, **options):
    """The source of a text with these bytes."""
    path = folder / "source.txt"
    path.write_bytes(data)
    return TextSource(ByteStream.open(path), format, ReadOptions(**options), window_bytes)


def read_bytes(folder, data, format, **options):
    return read(source_of(folder, data, format, **options))


def some_vectors(tmp_path, count=50, dim=7, tokens=None):
    """vectors.txt and vectors.bin, written by gensim; (its vectors, the rows)."""
    models = pytest.importorskip("gensim.models")
    vectors = models.KeyedVectors(dim)
    rows_VD = np.random.default_rng(0).normal(0, 0.4, (count, dim)).astype(np.float32)
    vectors.add_vectors(tokens or [f"wörd{i}" for i in range(count)], rows_VD)
    vectors.save_word2vec_format(str(tmp_path / "vectors.txt"), binary=False)
    vectors.save_word2vec_format(str(tmp_path / "vectors.bin"), binary=True)
    return vectors, rows_VD
