"""Decimals: every number equals Python's float() of the same text, and every kernel its slow twin."""

import random
import struct

import naive_text as naive
import numpy as np
from text_sources import HARD, NOT_HERE, buffer_of, random_texts

from bigembed.kernels import decimals

U = np.uint64


def bits(value):
    return struct.pack("d", value)


def test_numbers_equal_pythons_float():
    fives_P2 = decimals.powers_of_five()
    left_open = 0
    texts = HARD + random_texts(0, 12_000)
    for text in texts:
        value, after = decimals.read_any_number(buffer_of(text.encode() + b" "), U(0), fives_P2)
        if after == 0:
            left_open += 1
            assert not abs(float(text)) < 3.4028235677973366e38 or len(text.split("e")[0].strip("-0.")) > 19, text
        else:
            assert (bits(value), after) == (bits(float(text)), len(text)), text
    assert left_open < len(texts) // 4


def test_read_any_number_equals_its_twin():
    fives_P2 = decimals.powers_of_five()
    for text in HARD + NOT_HERE + random_texts(2, 150) + ["1_0", "1e", "1e+", "0x10", "1e5.5", "5..", "1e5e5"]:
        for ending in (" ", "\n", "x"):
            data = (text + ending).encode()
            value, after = decimals.read_any_number(buffer_of(data), U(0), fives_P2)
            expected, count = naive.read_any_number(data)
            assert (bits(value), int(after)) == (bits(expected), count), text


def test_read_plain_numbers_equals_its_twin():
    rng = random.Random(3)
    cases = [[text] for text in HARD + NOT_HERE]
    cases += [random_texts(rng.random(), rng.randint(0, 4)) for _ in range(60)]
    cases += [[f"{rng.gauss(0, 1):.5g}" for _ in range(5)] for _ in range(20)]
    for case in cases:
        data = "".join(rng.choice([" ", " ", "\t", "  ", "  "]) + text for text in case).encode() + rng.choice(
            [b"\n", b" \n"]
        )
        values_D = np.full(5, -7, np.float32)
        d, after = decimals.read_plain_numbers(buffer_of(data), U(0), 0, values_D)
        expected, count = naive.read_plain_numbers(data, 5)
        assert (d, int(after)) == (len(expected), count), data
        assert values_D[:d].tobytes() == np.array(expected, np.float32).tobytes()


def test_scale_and_its_parts_equal_their_twins():
    np.testing.assert_array_equal(decimals.powers_of_five(), naive.powers_of_five())
    rng = random.Random(4)
    for _ in range(150):
        mantissa = rng.getrandbits(rng.choice([1, 10, 53, 54, 63, 64])) or 1
        tens = rng.choice([rng.randint(-30, 25), rng.randint(-345, 310), rng.randint(-330, -300)])
        expected = naive.scale(mantissa, tens)
        assert decimals.scale(U(mantissa), tens, decimals.powers_of_five()) == expected, (mantissa, tens)
        assert decimals.decimal_value(U(mantissa), tens, decimals.powers_of_five()) == expected, (mantissa, tens)
        other = rng.getrandbits(64)
        assert tuple(map(int, decimals.multiply_128(U(mantissa), U(other)))) == naive.multiply_128(mantissa, other)
        assert decimals.leading_zeros(U(mantissa)) == naive.leading_zeros(mantissa)
        digits = sum(rng.randint(0, 9) << (8 * i) for i in range(8))
        assert decimals.eight_digits(U(digits)) == naive.eight_digits(digits)
