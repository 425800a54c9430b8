"""The header of a GGUF file: its tensors, and where some of its metadata lies. Read by own code, in one pass.

gguf.GGUFReader makes an array of every element of every list, which takes hundreds of megabytes for a large
vocabulary, and trusts the counts. The layout is specified in ggml's docs/gguf.md; here versions 2 and 3, little-endian.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from bigembed.errors import BadSource
from bigembed.vocab.packed import PackedTokens

MAX_ENTRIES = 1 << 20  # of metadata, of tensors; models have thousands
MAX_NAME_BYTES = 1 << 16
DEFAULT_ALIGNMENT = 32
BATCH_TOKENS = 1 << 16
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True)
class StringList:
    """A list of strings in the file: its first byte, and how many there are."""

    offset: int
    count: int


@dataclass(frozen=True)
class GgufTensor:
    """A tensor: dimensions from the outermost in, the number of its ggml type, its first byte in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass
class GgufHeader:
    """What a file says before its tensors. `values` holds numbers, short strings and `StringList`s by their keys."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: list[GgufTensor] = field(default_factory=list)


class _Cursor:
    """Reads on in a file, and never believes a length that the file cannot have."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.position = 0
        self.left_bytes = os.path.getsize(path)
        self._file = open(path, "rb", buffering=1 << 20)  # noqa: SIM115 (closed by close)

    def read(self, count: int) -> bytes:
        content = self._file.read(self._take(count))
        if len(content) < count:
            self.bad("the file ends here; it was longer when it was opened")
        return content

    def skip(self, count: int) -> None:
        self._file.seek(self._take(count), os.SEEK_CUR)

    def _take(self, count: int) -> int:
        if count > self.left_bytes:
            self.bad(f"{count} bytes should follow, {self.left_bytes} do; the file is cut off or damaged")
        self.position += count
        self.left_bytes -= count
        return count

    def number(self, format: str) -> Any:
        return struct.unpack(format, self.read(struct.calcsize(format)))[0]

    def name(self) -> str:
        length = self.number("<Q")
        if length > MAX_NAME_BYTES:
            self.bad(f"a name of {length} bytes; at most {MAX_NAME_BYTES} are possible")
        return self.read(length).decode("utf-8", "replace")

    def bad(self, problem: str) -> NoReturn:
        raise BadSource(f"{self.path}, byte {self.position}: {problem}.")

    def close(self) -> None:
        self._file.close()


def read_header(path: str) -> GgufHeader:
    """All that precedes the tensors' values; every length is checked against the file's size.

    Raises:
        BadSource: it is cut off, damaged, of another version or byte order.
    """
    cursor = _Cursor(path)
    try:
        if cursor.read(4) != b"GGUF":
            cursor.bad("a GGUF file begins with 'GGUF'")
        version = cursor.number("<I")
        if version & 0xFFFF == 0:
            cursor.bad("the file is big-endian, which cannot be read; convert the model on this machine")
        if version not in (2, 3):
            cursor.bad(f"version {version} of the format cannot be read, only 2 and 3")
        num_tensors, num_values = cursor.number("<Q"), cursor.number("<Q")
        if max(num_tensors, num_values) > MAX_ENTRIES:
            cursor.bad(f"{num_tensors} tensors and {num_values} metadata entries; at most {MAX_ENTRIES} are possible")
        header = GgufHeader()
        for _ in range(num_values):
            key = cursor.name()
            header.values[key] = _value(cursor, cursor.number("<I"))
        entries = [_tensor(cursor) for _ in range(num_tensors)]
        alignment = header.values.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            cursor.bad(f"general.alignment is {alignment!r}")
        start = -(-cursor.position // alignment) * alignment
        header.tensors = [GgufTensor(name, shape, type, start + offset) for name, shape, type, offset in entries]
        return header
    finally:
        cursor.close()


def read_strings(path: str, strings: StringList) -> Iterator[PackedTokens]:
    """The strings of a list in order, some tens of thousands at a time."""
    cursor = _Cursor(path)
    try:
        cursor.skip(strings.offset)
        for start in range(0, strings.count, BATCH_TOKENS):
            count = min(BATCH_TOKENS, strings.count - start)
            tokens = [cursor.read(cursor.number("<Q")) for _ in range(count)]
            start_M1 = np.zeros(count + 1, np.int64)
            np.cumsum([len(token) for token in tokens], out=start_M1[1:])
            yield PackedTokens(np.frombuffer(b"".join(tokens), np.uint8), start_M1)
    finally:
        cursor.close()


def _value(cursor: _Cursor, type: int) -> Any:
    """A number; a short string; a `StringList`; None for what is only skipped."""
    if type in SCALARS:
        return cursor.number(SCALARS[type])
    if type == STRING:
        return _string(cursor)
    if type != ARRAY:
        cursor.bad(f"metadata of type {type}, which does not exist; the file is damaged")
    kind, count = cursor.number("<I"), cursor.number("<Q")
    if kind in SCALARS:
        cursor.skip(count * struct.calcsize(SCALARS[kind]))
        return None
    if kind != STRING:
        cursor.bad(f"a list of type {kind}, which cannot be read")
    if count * 8 > cursor.left_bytes:
        cursor.bad(f"a list of {count} strings, but only {cursor.left_bytes} bytes follow")
    found = StringList(cursor.position, count)
    for _ in range(count):
        cursor.skip(cursor.number("<Q"))
    return found


def _string(cursor: _Cursor) -> str | None:
    length = cursor.number("<Q")
    if length > MAX_NAME_BYTES:
        cursor.skip(length)
        return None
    return cursor.read(length).decode("utf-8", "replace")


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.name()
    num_dims = cursor.number("<I")
    if num_dims > 8:
        cursor.bad(f"tensor {name!r} has {num_dims} dimensions; the file is damaged")
    sizes = struct.unpack(f"<{num_dims}Q", cursor.read(8 * num_dims))
    return name, sizes[::-1], cursor.number("<I"), cursor.number("<Q")
