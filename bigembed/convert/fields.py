"""Fields: a position in a binary file from which packed little-endian numbers are read, each checked to be there."""

import struct
from typing import Any

from bigembed.errors import BadSource
from bigembed.storage.files import File


class Fields:
    """Reads numbers one after the other.

    Args:
        file: an open file.
        at: where to begin, in bytes; afterwards, where the next field is.
        end: the first byte that does not belong to them; the file's end by default.
    """

    def __init__(self, file: File, at: int = 0, end: int | None = None) -> None:
        self.file, self.at = file, at
        self.end = file.size_bytes() if end is None else end

    def take(self, layout: str, what: str) -> Any:
        """The numbers of a `struct` layout such as "3iq", without padding; a single one as itself.

        Raises:
            BadSource: the file ends before them; says `what` was expected.
        """
        raw = self.take_bytes(struct.calcsize("<" + layout), what)
        values = struct.unpack("<" + layout, raw)
        return values[0] if len(values) == 1 else values

    def take_bytes(self, count: int, what: str) -> bytes:
        self.need(count, what)
        raw = self.file.pread(count, self.at)
        if len(raw) < count:
            raise self.bad(f"the file ends here; it was longer when it was opened, and {what} should follow.")
        self.at += count
        return raw

    def skip(self, count: int, what: str) -> int:
        """Where `count` bytes begin, which are stepped over."""
        self.need(count, what)
        self.at += count
        return self.at - count

    def need(self, count: int, what: str) -> None:
        """Raise `BadSource` unless `count` bytes follow."""
        if not 0 <= count <= self.end - self.at:
            left = self.end - self.at
            raise self.bad(f"{what} should follow, {count} bytes, but only {left} do; it is cut off or damaged.")

    def bad(self, problem: str) -> BadSource:
        """The error for something wrong at this position."""
        return BadSource(f"{self.file.path}, byte {self.at}: {problem}")
