"""What the first bytes of a file say about it: a header, the number of columns, or that it is no text of vectors."""

import re
from collections import Counter

from bigembed.convert.lines import BLANKS, NOT_FINITE, NUMBER

BOM = b"\xef\xbb\xbf"
DIM_LINES = 1000  # the number of columns is what most of so many lines have
_HEADER = re.compile(rb"[ \t]*([0-9]{1,18})[ \t]+([0-9]{1,9})[ \t]*\r?\n")
_SAMPLE_LINES = 20

# (how a file begins, what it is then called)
_BEGINNINGS = [
    (b"PK\x03\x04", "a zip archive: unpack it first, or pipe it in (unzip -p FILE | bigembed convert - TARGET)"),
    (b"%PDF", "a PDF"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x04\x22\x4d\x18", "an lz4 file: unpack it first"),
    (b"\x1f\x9d", "a compress (.Z) file: unpack it first"),
    (b"\x1f\x8b", "a gzip file inside another compression: unpack it once first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
    (b"\xff\xfe", "text in UTF-16: convert it to UTF-8 first"),
    (b"\xfe\xff", "text in UTF-16: convert it to UTF-8 first"),
    (b"\x93NUMPY", "a .npy file"),
    (b"\x80", "a Python pickle"),
    (b"SQLite format 3", "an SQLite database"),
    (b"GGUF", "a GGUF file"),
]


def read_header(head: bytes) -> tuple[int, int, int] | None:
    """(V, D, bytes) of a first line "V D", or None."""
    skipped = len(BOM) if head.startswith(BOM) else 0
    match = _HEADER.match(head, skipped)
    return None if match is None else (int(match[1]), int(match[2]), match.end())


def lines_of(head: bytes, limit: int = DIM_LINES) -> list[bytes]:
    """The first whole lines that are not blank."""
    lines = head.removeprefix(BOM).split(b"\n", limit + 1)[:-1]
    return [line for line in (line.rstrip(BLANKS) for line in lines) if line][:limit]


def piece_of(head: bytes) -> bytes:
    """The last line, which is not whole, without its last field, which may not be whole either."""
    piece = head.removeprefix(BOM).rpartition(b"\n")[2]
    return piece[: max(piece.rfind(b" "), piece.rfind(b"\t"), 0)]


def numbers_after_token(line: bytes) -> int:
    """How many fields there are from the first number after the first field on."""
    fields = line.split()
    for f in range(1, len(fields)):
        if is_number(fields[f]):
            return len(fields) - f
    return 0


def is_number(field: bytes) -> bool:
    return bool(NUMBER.fullmatch(field) or NOT_FINITE.fullmatch(field))


def guess_dim(lines: list[bytes]) -> int:
    """D of lines without a header: the most common number of numbers after a token; 0 where there are none.

    Lines whose token holds spaces, or is missing, are the exception, so the most common number is the right one.
    """
    counts = Counter(map(numbers_after_token, lines))
    return counts.most_common(1)[0][0] if counts else 0


def fits(line: bytes, dim: int) -> bool:
    """Whether a line ends in `dim` numbers."""
    fields = line.split()
    return len(fields) >= dim > 0 and all(map(is_number, fields[-dim:]))


def may_fit(piece: bytes, dim: int) -> bool:
    """Whether a piece of a line is a token and numbers, as far as it goes."""
    fields = piece.split()
    return fits(piece, dim) if len(fields) > dim else all(map(is_number, fields[1:]))


def recognise(head: bytes) -> str | None:
    """ "word2vec-text" or "glove", or None for whatever is no text of vectors.

    A first line "V D" is a header where most of the next lines have D numbers. It is not, with D = 1, where more lines
    than V follow at once: then it is a token and its one number.
    """
    if b"\0" in head:
        return None
    header = read_header(head)
    if header is not None and _is_header(head, *header):
        return "word2vec-text"
    lines = lines_of(head, _SAMPLE_LINES)
    piece = piece_of(head)
    dim = guess_dim(lines or [piece])
    if not _mostly_fits(lines, piece, dim):
        return None
    # One plain integer after a word is a list of counts, not of vectors.
    if dim == 1 and header is None and not any(b"." in line.split()[-1] for line in lines):
        return None
    return "glove"


def _is_header(head: bytes, num_rows: int, dim: int, length: int) -> bool:
    rest = head[length:]
    lines = lines_of(rest, num_rows + 2 if dim == 1 else _SAMPLE_LINES)
    if not rest.strip():
        return True
    return (dim > 1 or len(lines) <= num_rows) and _mostly_fits(lines[:_SAMPLE_LINES], piece_of(rest), dim)


def _mostly_fits(lines: list[bytes], piece: bytes, dim: int) -> bool:
    """Whether more than half of some lines fit; where there are few, the piece of the next one counts too."""
    if len(lines) < 2 and not may_fit(piece, dim):
        return False
    if not lines:
        return len(piece.split()) > 1
    return 2 * sum(fits(line, dim) for line in lines) > len(lines)


def looks_like(head: bytes) -> str:
    """What a file that is no text of vectors seems to be, in words for a message."""
    for beginning, name in _BEGINNINGS:
        if head.startswith(beginning):
            return name
    start = head.removeprefix(BOM).lstrip()[:512].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page: the download went wrong"
    if start.startswith((b"<?xml", b"<")):
        return "XML"
    if re.match(rb'[{\[]\s*(["{\[}\]]|$)', start):
        return "JSON"
    if b"\0" in head:
        return "binary data"
    if b"\r" in head and b"\n" not in head:
        return "text whose lines end in CR alone"
    return "text without numbers after each token"
