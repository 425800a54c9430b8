"""The bytes of the log of tokens: a header, then frames of tokens whose rows ascend. README.md has every byte.

Each frame's checksum chains from the one before, and the first from the header with its random salt, so that frames
which were cut off cannot come back to life. A log is made whole with its header and renamed into place.
"""

import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from bigembed.errors import DamagedTable, NewerFormat
from bigembed.storage import files

NAME = "added"
MAGIC, VERSION, KIND = b"BETOKENS", 1, b"TOKS"
_HEADER = struct.Struct("<8sIIQ")  # magic, version, 0, salt; then crc32, 0
_FRAME = struct.Struct("<4sIQQQQ")  # kind, 0, salt, first row, count, bytes of the tokens; then own and chained crc32
_CHECKS = struct.Struct("<II")
HEADER_BYTES = _HEADER.size + 8
FRAME_BYTES = _FRAME.size + _CHECKS.size
PART_BYTES = 16 << 20  # of tokens and their lengths in one frame; only a single longer token exceeds it

Tokens = tuple[np.ndarray, np.ndarray, int]  # bytes_B, start_M1, first row


@dataclass(frozen=True)
class TokenFrame:
    """Tokens of `count` rows from `first_row` on, in the file from `offset` to `end`; `chain` is the crc32 up to it."""

    offset: int
    end: int
    first_row: int
    count: int
    token_bytes: int
    chain: int

    @property
    def end_row(self) -> int:
        return self.first_row + self.count


class LogFile:
    """An open log: its header, and frames read or written at a place with the chain up to there."""

    def __init__(self, path: str, flags: int) -> None:
        self.file = files.File(path, flags)
        self.salt = self.chain = 0

    def start(self) -> None:
        """Write the header of a new log."""
        self.salt = secrets.randbits(64)
        head = _HEADER.pack(MAGIC, VERSION, 0, self.salt)
        self.chain = zlib.crc32(head)
        self.file.pwrite(head + _CHECKS.pack(self.chain, 0), 0)

    def read_header(self) -> None:
        """Raises DamagedTable or NewerFormat: a log never is without its header, since it is made whole."""
        head = self.file.pread(HEADER_BYTES, 0)
        whole = len(head) == HEADER_BYTES
        magic, version, _, self.salt = _HEADER.unpack_from(head) if whole else (b"", 0, 0, 0)
        if magic == MAGIC and version > VERSION:
            raise NewerFormat(f"{self.file.path} has version {version}; upgrade bigembed to read it.")
        self.chain = zlib.crc32(head[: _HEADER.size])
        if magic != MAGIC or head[_HEADER.size :] != _CHECKS.pack(self.chain, 0):
            raise DamagedTable(f"{self.file.path} has a damaged header. Restore it from a backup.")

    def write_frame(self, offset: int, tokens: Tokens, chain: int) -> TokenFrame:
        bytes_B, start_M1, first_row = tokens
        lengths = np.diff(start_M1).astype("<u4").tobytes()
        text = bytes_B[start_M1[0] : start_M1[-1]].tobytes()
        head = _FRAME.pack(KIND, 0, self.salt, first_row, len(start_M1) - 1, len(text))
        own, chain = (zlib.crc32(text, zlib.crc32(lengths, zlib.crc32(head, start))) for start in (0, chain))
        body = head + _CHECKS.pack(own, chain) + lengths + text
        self.file.pwrite(body.ljust(-(-len(body) // 8) * 8, b"\0"), offset)
        return TokenFrame(offset, offset + -(-len(body) // 8) * 8, first_row, len(start_M1) - 1, len(text), chain)

    def read_frame(self, offset: int, chain: int | None) -> tuple[TokenFrame, np.ndarray, np.ndarray] | None:
        """(frame, its bytes_B, its start_M1) if it is valid (and follows `chain`, unless None), else None."""
        head = self.file.pread(FRAME_BYTES, offset)
        if len(head) < FRAME_BYTES:
            return None
        kind, zero, salt, first_row, count, token_bytes = _FRAME.unpack_from(head)
        own, chained = _CHECKS.unpack_from(head, _FRAME.size)
        end = offset + -(-(FRAME_BYTES + 4 * count + token_bytes) // 8) * 8
        if kind != KIND or zero or salt != self.salt or end > self.file.size_bytes():
            return None
        body = self.file.pread(4 * count + token_bytes, offset + FRAME_BYTES)
        bare = head[: _FRAME.size]
        if own != zlib.crc32(body, zlib.crc32(bare)):
            return None
        if chain is not None and chained != zlib.crc32(body, zlib.crc32(bare, chain)):
            return None
        start_M1 = np.zeros(count + 1, np.int64)
        np.cumsum(np.frombuffer(body, "<u4", count), out=start_M1[1:])
        if start_M1[-1] != token_bytes:
            return None
        frame = TokenFrame(offset, end, first_row, count, token_bytes, chained)
        return frame, np.frombuffer(body, np.uint8, token_bytes, 4 * count), start_M1

    def frames(self) -> Iterator[TokenFrame]:
        """Every valid frame from the start, rows ascending; stops at the first that is not valid."""
        offset, chain, row = HEADER_BYTES, self.chain, 0
        while (found := self.read_frame(offset, chain)) is not None and found[0].first_row >= row:
            offset, chain, row = found[0].end, found[0].chain, found[0].end_row
            yield found[0]

    def counted_frame_beyond(self, offset: int, num_rows: int) -> int:
        """Where behind the valid frames, which end at `offset`, a frame of rows below num_rows is, or -1.

        It was synced, and so was all before it. Of one at `offset` itself the head says enough: an append that broke
        off left rows from V on.
        """
        needle = struct.pack("<4sIQ", KIND, 0, self.salt)
        head = self.file.pread(len(needle) + 8, offset)
        row_bytes = head[len(needle) :]
        if head.startswith(needle) and len(row_bytes) == 8 and int.from_bytes(row_bytes, "little") < num_rows:
            return offset
        block_bytes, size = 1 << 20, self.file.size_bytes()
        while offset < size:
            block = self.file.pread(block_bytes + len(needle), offset)
            at = block.find(needle)
            while at >= 0:
                found = self.read_frame(offset + at, None) if (offset + at) % 8 == 0 else None
                if found is not None and found[0].first_row < num_rows:
                    return offset + at
                at = block.find(needle, at + 1)
            offset += block_bytes
        return -1


def parts_of(tokens: Tokens) -> Iterator[Tokens]:
    """The tokens in parts, each for a frame."""
    bytes_B, start_M1, first_row = tokens
    cost_M1 = start_M1 - start_M1[0] + 4 * np.arange(len(start_M1))
    start = 0
    while start < len(start_M1) - 1:
        stop = max(start + 1, int(np.searchsorted(cost_M1, cost_M1[start] + PART_BYTES, "right")) - 1)
        yield bytes_B, start_M1[start : stop + 1], first_row + start
        start = stop


def write_log(folder: str, parts: Iterable[Tokens]) -> None:
    """Make or replace the log in a vocabulary's folder, whole and durable, from tokens of ascending rows."""
    path = os.path.join(folder, NAME)
    log = LogFile(path + ".new", files.WRITE | os.O_TRUNC)
    try:
        log.start()
        end, chain = HEADER_BYTES, log.chain
        for tokens in parts:
            for part in parts_of(tokens):
                frame = log.write_frame(end, part, chain)
                end, chain = frame.end, frame.chain
        log.file.sync_all()
    finally:
        log.file.close()
    files.rename(path + ".new", path)
    files.sync_directory(folder)
