"""StoredZip: a zip file of uncompressed members, each member's data on a border of 64 bytes, streamed.

Python's zipfile needs its handle closed in order even when the file is given up, and places data where it falls; this
is the small part of the format that is needed. Sizes over 4 GiB are written as zip64 says (APPNOTE 6.3, section 4.5.3).
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Any

from bigembed.convert.writers.aside import Output

BORDER_BYTES = 64

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_VERSION = 45  # the first that knows zip64
_MIDNIGHT = (1 << 5) | 1  # 1 January 1980: the same rows give the same bytes
_ELSEWHERE = 0xFFFFFFFF  # the zip64 field has the number
_CRC_OFFSET = 14


@dataclass
class _Member:
    name: bytes
    offset: int
    size_bytes: int
    left_bytes: int
    crc: int = 0


class StoredZip:
    """Writes members one after the other to an output that begins with them."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._members: list[_Member] = []

    def add(self, name: str, content: bytes) -> None:
        """A whole member."""
        self.begin(name, len(content))
        self.write(content)

    def begin(self, name: str, size_bytes: int) -> None:
        """A member of exactly so many bytes, which `write` brings."""
        encoded = name.encode()
        member = _Member(encoded, self._output.size_bytes, size_bytes, size_bytes)
        sizes = struct.pack("<2H2Q", 1, 16, size_bytes, size_bytes)
        before = member.offset + _LOCAL.size + len(encoded) + len(sizes) + 4
        padding = b"Z" * (-before % BORDER_BYTES)
        extra = sizes + b"FB" + struct.pack("<H", len(padding)) + padding
        numbers = (_VERSION, 0, 0, 0, _MIDNIGHT, 0, _ELSEWHERE, _ELSEWHERE, len(encoded), len(extra))
        self._output.write(_LOCAL.pack(b"PK\3\4", *numbers) + encoded + extra)
        self._members.append(member)

    def write(self, buffer: Any) -> None:
        """The next bytes of the member begun last; its checksum is written where its last bytes come."""
        member = self._members[-1]
        member.crc = zlib.crc32(memoryview(buffer).cast("B"), member.crc)
        member.left_bytes -= self._output.write(buffer)
        assert member.left_bytes >= 0, "more than was announced"
        if member.left_bytes == 0:
            self._output.patch(struct.pack("<I", member.crc), member.offset + _CRC_OFFSET)

    def finish(self) -> None:
        """Write the directory that ends the file."""
        first = self._output.size_bytes
        for member in self._members:
            assert member.left_bytes == 0, "a member is not whole"
            extra = struct.pack("<2H3Q", 1, 24, member.size_bytes, member.size_bytes, member.offset)
            numbers = (_VERSION, _VERSION, 0, 0, 0, _MIDNIGHT, member.crc, _ELSEWHERE, _ELSEWHERE)
            lengths = (len(member.name), len(extra), 0, 0, 0, 0, _ELSEWHERE)
            self._output.write(_CENTRAL.pack(b"PK\1\2", *numbers, *lengths) + member.name + extra)
        end, count = self._output.size_bytes, len(self._members)
        self._output.write(
            _END64.pack(b"PK\6\6", _END64.size - 12, _VERSION, _VERSION, 0, 0, count, count, end - first, first)
            + _LOCATOR.pack(b"PK\6\7", 0, end, 1)
            + _END.pack(b"PK\5\6", 0, 0, count, count, min(end - first, _ELSEWHERE), _ELSEWHERE, 0)
        )
