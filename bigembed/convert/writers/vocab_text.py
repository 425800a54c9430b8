"""The tokens of a file that has no place for them: `<target>.vocab.txt` beside it, one token a line, row 0 first.

A line is the token's bytes, where a backslash is written as two, a line feed as a backslash and n, a carriage return as
a backslash and r; so any bytes can be read back, and ordinary words look as they are. Every line ends in a line feed.
"""

import re
from collections.abc import Iterator

from bigembed.vocab.packed import PackedTokens

VOCAB_SUFFIX = ".vocab.txt"
READ_BYTES = 4 << 20

_ESCAPES = {b"\\": b"\\\\", b"\n": b"\\n", b"\r": b"\\r"}
_PLAIN = {escaped: plain for plain, escaped in _ESCAPES.items()}
_SPECIAL = re.compile(rb"[\\\n\r]")
_ESCAPED = re.compile(rb"\\[\\nr]")


def vocab_lines(tokens: PackedTokens) -> bytes:
    """The lines of some tokens; `read_vocab_lines` gives them back."""
    listed = tokens.to_list()
    if _SPECIAL.search(b"".join(listed)):
        listed = [_SPECIAL.sub(lambda found: _ESCAPES[found[0]], token) for token in listed]
    return b"".join(token + b"\n" for token in listed)


def read_vocab_lines(path: str) -> Iterator[PackedTokens]:
    """The tokens of a file that `vocab_lines` filled, in bounded memory (and that of the longest token)."""
    rest = b""
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            yield PackedTokens.of([_unescaped(line) for line in lines])
    if rest:
        yield PackedTokens.of([_unescaped(rest)])


def _unescaped(line: bytes) -> bytes:
    return _ESCAPED.sub(lambda found: _PLAIN[found[0]], line) if b"\\" in line else line
