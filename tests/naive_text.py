"""Slow twins of the kernels and readers of text and word2vec, in the plainest words: split, float and Fraction."""

import math
import re
from fractions import Fraction

import numpy as np

GOOD, UNSURE, BLANK = 0, 1, 2
NUMBER = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
PLAIN = re.compile(rb"-?([0-9]+)(\.[0-9]*)?|-?(\.[0-9]+)")
LARGEST = Fraction(2**128 - 2**103)  # a float32 is at most 2**128 - 2**104; from the middle on it is infinite

# --- decimals


def powers_of_five():
    """The first 128 bits of each power; one more for the reciprocals of powers that fit 64 bits."""
    rows = []
    for q in range(-342, 309):
        power = Fraction(5) ** q
        while power >= 2**128:
            power /= 2
        while power < 2**127:
            power *= 2
        bits = math.floor(power) + (-27 <= q < 0)
        rows.append((bits >> 64, bits & (2**64 - 1)))
    return np.array(rows, np.uint64)


def eight_digits(digits):
    return int("".join(str((digits >> (8 * i)) & 0xFF) for i in range(8)))


def multiply_128(a, b):
    return (a * b) >> 64, (a * b) & (2**64 - 1)


def leading_zeros(x):
    return 64 - x.bit_length()


def scale(mantissa, tens):
    return nearest(Fraction(mantissa) * Fraction(10) ** tens)


decimal_value = scale


def nearest(value):
    """The float64 nearest to a fraction; Python divides integers that way."""
    try:
        return value.numerator / value.denominator
    except OverflowError:
        return math.inf


def read_any_number(text):
    """(value, bytes) of the longest number at the start; 0 bytes where 19 digits do not decide, or it is too large."""
    match = NUMBER.match(text)
    if match is None:
        return 0.0, 0
    found = match[0].decode()
    digits, _, exponent = found.lower().lstrip("+-").partition("e")
    whole, _, part = digits.partition(".")
    significant = (whole + part).lstrip("0")
    tens = int(exponent or 0) - len(part) + max(0, len(significant) - 19)
    value = float(found)
    if significant[19:].strip("0"):
        low = int(significant[:19])
        if nearest_power(low, tens) != nearest_power(low + 1, tens):
            return 0.0, 0
    if not Fraction(abs(value) if math.isfinite(value) else 2**200) < LARGEST:
        return 0.0, 0
    return value, len(match[0])


def nearest_power(mantissa, tens):
    return float(f"{mantissa}e{tens}")


def read_plain_numbers(text, dim):
    """(the numbers at the start that are written without an exponent, in 1 to 19 digits up to 2**53; bytes of them)."""
    values, at = [], 0
    while len(values) < dim:
        blank = len(text) - len(text[at:].lstrip(b" \t"))
        match = PLAIN.match(text, blank)
        if blank == at or match is None or text[match.end() : match.end() + 1].lower() == b"e":
            break
        digits = match[0].replace(b"-", b"").replace(b".", b"")
        if len(digits) > 19 or int(digits) > 2**53:
            break
        values.append(np.float32(float(match[0])))
        at = match.end()
    return values, at


# --- lines


def find_lines(data):
    """(start, stop) of each line that is ended by a line feed."""
    places, at = [], 0
    for line in data.split(b"\n")[:-1]:
        places.append((at, at + len(line)))
        at += len(line) + 1
    return places


def skip_blank(data, at, stop):
    return stop - len(data[at:stop].lstrip(b" \t\r"))


def read_numbers(text, dim):
    """(the D numbers at the start, bytes of them), or None where they are not all decided."""
    values, at = [], 0
    for _ in range(dim):
        blank = len(text) - len(text[at:].lstrip(b" \t"))
        value, count = read_any_number(text[blank:])
        if blank == at or count == 0:
            return None
        values.append(np.float32(value))
        at = blank + count
    return values, at


def token_end(line, fields):
    """The bytes before the last fields and the blanks in front of each; 0 where there are too few."""
    match = re.fullmatch(rb"(.*?)[ \t]*" + rb"(?:[ \t]+[^ \t]+|^[^ \t]+)" * fields, line.rstrip(b" \t\r"), re.DOTALL)
    return len(match[1]) if match else 0


def is_plain_token(token):
    fields = re.split(rb"[ \t]", token)[1:]
    return b"\0" not in token and not any(
        re.fullmatch(rb"[-+.0-9](.*[.0-9])?", f, re.DOTALL) and (f[-1:] not in b"-+") for f in fields
    )


def read_line(line, dim):
    """(token, values, status) of a line as the kernel settles it."""
    if not line.strip(b" \t\r"):
        return b"", [], BLANK
    if len(line) < 2 * dim - 1:
        return b"", [], UNSURE
    end = token_end(line, dim)
    found = read_numbers(line[end:] + b"\n", dim) if end else None
    if found is None or line[end + found[1] :].strip(b" \t\r") or not is_plain_token(line[:end]):
        return b"", [], UNSURE
    return line[:end], found[0], GOOD


def pack_tokens(data, start_M, stop_M):
    return b"".join(data[a:b] for a, b in zip(start_M, stop_M, strict=True))


# --- whole texts


def read_text(data, dim=None):
    """[(token, float32 (D,))] of a text: of its first V lines after a header, or of all, with D columns, where none is.

    A token has no field like a number after its first one here, so the last D fields are the numbers.
    """
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip(b" \t\r")]
    if dim is None:
        count, dim = map(int, lines[0].split())
        lines = lines[1 : 1 + count]
    rows = []
    for line in lines:
        fields = re.split(rb"[ \t]+", line.rstrip(b" \t\r"))
        token = line[: token_end(line, dim)]
        with np.errstate(over="ignore"):
            rows.append((token, np.array([np.float32(float(field)) for field in fields[-dim:]], np.float32)))
    return rows


# --- word2vec binary


def find_records(data, at, vector_bytes, limit):
    """([(token start, token stop)], where the rest begins, where a token holds a zero byte or -1)."""
    places = []
    while len(places) < limit:
        first = len(data) - len(data[at:].lstrip(b"\n"))
        token = data[first:].split(b" ")[0]
        if b"\0" in token:
            return places, at, first + token.index(b"\0")
        if first + len(token) + 1 + vector_bytes > len(data):
            break
        places.append((first, first + len(token)))
        at = first + len(token) + 1 + vector_bytes
    return places, at, -1


def copy_vectors(data, token_stops, vector_bytes):
    return b"".join(data[stop + 1 : stop + 1 + vector_bytes] for stop in token_stops)


def read_binary(data):
    """[(token, vector's bytes)] of a whole file."""
    header, _, body = data.partition(b"\n")
    count, dim = map(int, header.split())
    rows = []
    for _ in range(count):
        token, _, body = body.lstrip(b"\n").partition(b" ")
        rows.append((token, body[: 4 * dim]))
        body = body[4 * dim :]
    return rows
