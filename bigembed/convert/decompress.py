"""Decompressors with one face: that of the standard library's bz2, for gzip, bzip2, xz and Zstandard."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Protocol

from bigembed.convert.libraries import load_library
from bigembed.errors import BadSource

RAW_BYTES = 256 << 10  # read at once
ZSTD_INPUT_BYTES = 2048  # at most 128 KiB come of 4 bytes, and zstandard knows no limit for one call


class Decompressor(Protocol):
    """Unpacks one member of a file."""

    @property
    def eof(self) -> bool:
        """The member has ended."""
        ...

    @property
    def unused_data(self) -> bytes:
        """What was given past its end."""
        ...

    @property
    def needs_input(self) -> bool:
        """Nothing is left to unpack."""
        ...

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Take input; return some output, about `max_length` bytes at most."""
        ...


class _Gzip:
    """zlib's object, which gives back the input that it has not used."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail  # the checksum at the end stays there until all output is taken

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _Zstd:
    """zstandard's object, fed in pieces so small that their output is bounded."""

    def __init__(self) -> None:
        self._inner = load_library("zstandard", ".zst").ZstdDecompressor().decompressobj()
        self._data = b""
        self._at = 0

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data + self._data[self._at :]

    @property
    def needs_input(self) -> bool:
        return self._at == len(self._data)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if data:
            self._data, self._at = self._data[self._at :] + data, 0
        found: list[bytes] = []
        size = 0
        while not self.eof and not self.needs_input and size < max_length:
            piece = self._data[self._at : self._at + ZSTD_INPUT_BYTES]
            self._at += len(piece)
            found.append(self._inner.decompress(piece))
            size += len(found[-1])
        return b"".join(found)


MAGIC_BYTES = 10
_PADDED = ("gzip", "xz")  # zeros may follow a member
_BLOCK, _END = b"1AY&SY", b"\x17rE8P\x90"  # what follows "BZh9": text could begin with BZh9 alone


def kind_of(head: bytes) -> str | None:
    """The name of the compression that a file (or a further member) begins with; None for none of these."""
    if head[:3] == b"\x1f\x8b\x08":
        return "gzip"
    if head[:3] == b"BZh" and head[3:4] in b"123456789" and head[4:10] in (_BLOCK, _END):
        return "bzip2"
    if head[:6] == b"\xfd7zXZ\0":
        return "xz"
    if head[:4] == b"\x28\xb5\x2f\xfd" or (len(head) >= 4 and head[0] >> 4 == 5 and head[1:4] == b"\x2a\x4d\x18"):
        return "zstd"
    return None


def decompressor(kind: str) -> Decompressor:
    """A new decompressor, for one member.

    Raises:
        MissingLibrary: the zstandard library is not installed.
    """
    if kind == "gzip":
        return _Gzip()
    if kind == "bzip2":
        return bz2.BZ2Decompressor()
    if kind == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)
    return _Zstd()


class Members:
    """The members of a compressed file, unpacked one after the other.

    Args:
        start: the file's first bytes, already read.
        read_raw: gives up to so many more bytes of the file, none at its end.
        bad: makes the error for what is wrong, in words that follow the place.
    """

    def __init__(
        self, kind: str, start: bytes, read_raw: Callable[[int], bytes], bad: Callable[[str], BadSource]
    ) -> None:
        self.kind = kind
        self._decoder = decompressor(kind)
        self._given = start
        self._read_raw, self._bad = read_raw, bad

    def some(self, limit_bytes: int) -> bytes:
        """Some more bytes, about `limit_bytes` at most; none at the end."""
        while not self._decoder.eof or self._next_member():
            data = b""
            if self._decoder.needs_input:
                data, self._given = self._given or self._read_raw(RAW_BYTES), b""
                if not data:
                    raise self._bad(f"the {self.kind} data end before they are complete; the file was cut off")
            try:
                found = self._decoder.decompress(data, limit_bytes)
            except Exception as error:
                if not _is_damage(error):
                    raise
                raise self._bad(f"the {self.kind} data are damaged before here ({error})") from error
            if found:
                return found
        return b""

    def _next_member(self) -> bool:
        """Begin the next member; False where the file ends."""
        rest = self._decoder.unused_data
        while len(rest := rest.lstrip(b"\0") if self.kind in _PADDED else rest) < MAGIC_BYTES:
            more = self._read_raw(RAW_BYTES)
            if not more:
                break
            rest += more
        if not rest:
            return False
        if kind_of(rest) != self.kind:
            raise self._bad(f"after the {self.kind} data comes something else: {rest[:MAGIC_BYTES]!r}")
        self._decoder, self._given = decompressor(self.kind), rest
        return True


def _is_damage(error: Exception) -> bool:
    """Whether a decompressor's error is about its input (zstandard's has a type of its own)."""
    return isinstance(error, zlib.error | lzma.LZMAError | EOFError | OSError) or type(error).__name__ == "ZstdError"
