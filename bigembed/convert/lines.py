"""One line of a text format in Python: what the kernel leaves undecided is read here, or told what is wrong with it."""

import re

import numpy as np

NUMBER = re.compile(rb"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
NOT_FINITE = re.compile(rb"[+-]?(?:inf|infinity|nan)", re.IGNORECASE)
_FIELD = re.compile(rb"[^ \t]+")
BLANKS = b" \t\r"
EXCERPT_BYTES = 60


class BadLine(ValueError):
    """What is wrong with a line, in words that follow its place."""


def excerpt(line: bytes) -> str:
    """The start of a line, for a message."""
    shown = line[:EXCERPT_BYTES].decode("utf-8", "backslashreplace")
    return repr(shown + ("..." if len(line) > EXCERPT_BYTES else ""))


def read_line(line: bytes, dim: int, bare_empty: bool = False) -> tuple[int, np.ndarray]:
    """(bytes of the token, which begins the line; float32 (D,): the last D fields), each as Python's float() reads it.

    Args:
        line: without its line feed.
        bare_empty: D numbers and nothing before them, not even a space, stand for the empty token.

    Raises:
        BadLine: too few or too many numbers, a field that is none, NaN or infinity, a zero byte.
    """
    line = line.rstrip(BLANKS)
    fields = list(_FIELD.finditer(line))
    has_token = bool(fields) and fields[0].start() == 0
    found = len(fields) - has_token
    # Without a space in front, D numbers are a line that lacks one, unless the first is written like the others.
    is_bare = bare_empty and len(fields) == dim and all(NUMBER.fullmatch(field[0]) for field in fields)
    if is_bare and has_token and (_is_decimal(fields[0][0]) or not _is_decimal(fields[-1][0])):
        found, has_token = dim, False
    if found < dim:
        raise BadLine(f"{dim} numbers were expected after the token, {found} found: {excerpt(line)}")
    values_D = np.array([_number(field[0], line) for field in fields[-dim:]], np.float64)
    with np.errstate(over="ignore"):
        values_D = values_D.astype(np.float32)
    if not np.isfinite(values_D).all():
        field = fields[-dim:][int(np.argmin(np.isfinite(values_D)))][0]
        raise BadLine(f"{excerpt(field)} is too large for float32")
    stop = len(line[: fields[-dim].start()].rstrip(BLANKS[:2]))
    _check_token(line, stop, dim, fields[has_token:], found)
    return stop, values_D


def _number(field: bytes, line: bytes) -> float:
    if NUMBER.fullmatch(field):
        return float(field)
    if NOT_FINITE.fullmatch(field):
        raise BadLine(f"{excerpt(field)} is not a finite number")
    raise BadLine(f"{excerpt(field)} is not a number, in {excerpt(line)}")


def _is_decimal(field: bytes) -> bool:
    """Whether a field is written as the numbers of vectors are: no plain integer."""
    return any(byte in b".eE" for byte in field)


def _check_token(line: bytes, stop: int, dim: int, after_first: list[re.Match[bytes]], found: int) -> None:
    """Refuse a token that ends in numbers like those of the vector, or holds a zero byte.

    Args:
        after_first: the fields after the token's first one. found: how many they are.
    """
    if b"\0" in line[:stop]:
        raise BadLine(f"a zero byte in the token {excerpt(line[:stop])}")
    extra = after_first[: found - dim]
    numbers = [field[0] for field in extra if NUMBER.fullmatch(field[0])]
    if any(map(_is_decimal, numbers)):
        raise BadLine(f"{dim} numbers were expected after the token, more found: {excerpt(line)}")
    # An integer before decimals may end a token such as "area 51"; before an integer it is one number too many.
    if extra and NUMBER.fullmatch(extra[-1][0]) and not _is_decimal(after_first[-dim][0]):
        raise BadLine(f"{dim} numbers were expected after the token, {dim + 1} found: {excerpt(line)}")
