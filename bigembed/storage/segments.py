"""Segments: append-only files of frames, used by the journal and by undo. The bytes are in README.md beside this.

A frame of rows carries row numbers and their records; a commit frame makes everything before it count. Each frame's
checksum chains from the one before, and the first from the segment's header with its random salt, so that an old
tail cannot come back to life. Row numbers are under the chain, records under their own checks and a sum of them.
"""

import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bigembed.errors import DamagedTable, NewerFormat
from bigembed.spec import FORMAT_VERSION, TableSpec
from bigembed.storage import files
from bigembed.storage.superblock import Commit

JOURNAL, UNDO = b"BEJOURNL", b"BEUNDO\0\0"
_HEADER = struct.Struct("<8sIIQQQQ8x")  # magic, version, record bytes, sequence, salt, generation, table's salt
_FRAME = struct.Struct("<4sIQQQ")  # kind, 0, salt, count, sum of checks; then own crc32, chained crc32
_CHECKS = struct.Struct("<II")
HEADER_BYTES = _HEADER.size + 4 + 4
FRAME_BYTES = _FRAME.size + _CHECKS.size
ROWS, NULLS, COMMIT = b"ROWS", b"NULL", b"CMIT"


@dataclass(frozen=True)
class Frame:
    """One valid frame: rows_M and where their records start (0: all their records are zero), or a commit."""

    offset: int
    end: int
    check_sum: int
    records_offset: int = 0
    rows_M: np.ndarray | None = None
    commit: Commit | None = None


def segment_name(sequence: int) -> str:
    return f"{sequence:016d}"


def list_segments(folder: str) -> list[int]:
    """The sequence numbers of the segments in a folder, ascending."""
    names = [name for name in os.listdir(folder) if len(name) == 16 and name.isdigit()]
    return sorted(map(int, names))


def _padded(count: int) -> int:
    return -(-count // 8) * 8


class SegmentWriter:
    """Appends frames to one new segment.

    Args:
        folder: where the segment goes. kind: JOURNAL or UNDO. sequence: its number, higher than any before.
        generation: the last commit before it (journal) or the generation it restores (undo).
    """

    def __init__(self, folder: str, kind: bytes, sequence: int, generation: int, spec: TableSpec) -> None:
        self.sequence = sequence
        self.record_bytes = spec.record_bytes
        self._salt = secrets.randbits(64)
        path = os.path.join(folder, segment_name(sequence))
        self.file = files.File(path, files.WRITE | os.O_EXCL)
        header = _HEADER.pack(kind, FORMAT_VERSION, spec.record_bytes, sequence, self._salt, generation, spec.salt)
        self._chain = zlib.crc32(header)
        try:
            self.file.pwrite(header + struct.pack("<I4x", self._chain), 0)
            files.sync_directory(folder)
        except BaseException:
            self.file.close()
            raise
        self.end = HEADER_BYTES  # where the next frame goes
        self.written = HEADER_BYTES  # up to where frames are written: behind `end` while some are reserved only

    def append_rows(
        self, rows_M: np.ndarray, records_MW: np.ndarray, check_sum: int, records_first: bool = False
    ) -> int:
        """Append records of distinct rows; returns the offset of the first record.

        With `records_first` they are durable before the head is written: then a valid head vouches for them.
        """
        assert self.written == self.end, "frames before this one are reserved and not written"
        records_offset = self.reserve_rows(len(rows_M))
        try:
            self.write_rows(rows_M, records_MW, check_sum, records_first)
        except BaseException:
            self.end = self.written
            raise
        return records_offset

    def take_back(self, end: int | None) -> None:
        """Forget what was reserved behind `end`, or what is not written; whoever reserved it has given it up."""
        self.end = self.written if end is None else end

    def reserve_rows(self, count: int) -> int:
        """The next frame is of so many rows, and will be written by `write_rows`; the offset of its first record."""
        records_offset = self.end + FRAME_BYTES + 8 * count
        self.end = _padded(records_offset + count * self.record_bytes)
        return records_offset

    def write_rows(
        self, rows_M: np.ndarray, records_MW: np.ndarray, check_sum: int, records_first: bool = False
    ) -> None:
        """Write the first frame that was reserved and is not written yet."""
        ids = np.ascontiguousarray(rows_M, "<i8").tobytes()
        records_offset = self.written + FRAME_BYTES + len(ids)
        records = memoryview(np.ascontiguousarray(records_MW, "<u4")).cast("B")
        head, chain = self._frame_head(ROWS, len(rows_M), check_sum, ids)
        if records_first:
            self.file.pwrite(records, records_offset)
            self.file.sync()
            self.file.pwrite(head + ids, self.written)
        else:
            self.file.pwrite(head + ids, self.written)
            self.file.pwrite(records, records_offset)
        self.written, self._chain = _padded(records_offset + len(records)), chain

    def append_nulls(self, rows_M: np.ndarray) -> None:
        """Append rows whose record is all zero, without the record."""
        ids = np.ascontiguousarray(rows_M, "<i8").tobytes()
        head, chain = self._frame_head(NULLS, len(rows_M), 0, ids)
        self.file.pwrite(head + ids, self.end)
        self._advance(self.end + FRAME_BYTES + len(ids), chain)

    def append_commit(self, commit: Commit) -> None:
        assert self.written == self.end, "frames before this one are reserved and not written"
        text = json.dumps(commit.to_json()).encode()
        head, chain = self._frame_head(COMMIT, len(text), 0, text)
        whole = (head + text).ljust(_padded(len(head) + len(text)), b"\0")
        self.file.pwrite(whole, self.end)
        self._advance(self.end + len(whole), chain)

    def _advance(self, end: int, chain: int) -> None:
        """Only a frame written whole moves the end and the chain: after a failed write the next one goes there."""
        self.end, self.written, self._chain = end, end, chain

    def _frame_head(self, kind: bytes, count: int, check_sum: int, body: bytes) -> tuple[bytes, int]:
        head = _FRAME.pack(kind, 0, self._salt, count, check_sum)
        own = zlib.crc32(body, zlib.crc32(head))
        chain = zlib.crc32(body, zlib.crc32(head, self._chain))
        return head + _CHECKS.pack(own, chain), chain


class SegmentReader:
    """Reads the frames of one segment.

    Raises:
        DamagedTable: the header is damaged. NewerFormat: a later version wrote it.
    """

    def __init__(self, folder: str, kind: bytes, sequence: int, spec: TableSpec) -> None:
        self.sequence = sequence
        self.record_bytes = spec.record_bytes
        self.file = files.File(os.path.join(folder, segment_name(sequence)), files.READ)
        self.size_bytes = self.file.size_bytes()
        self.end = HEADER_BYTES  # of the last valid frame seen
        self.is_torn_header = self.size_bytes < HEADER_BYTES
        self.generation = -1
        self._salt: int | None = None
        if self.is_torn_header:
            return
        header = self.file.pread(HEADER_BYTES, 0)
        (self._chain,) = struct.unpack_from("<I", header, _HEADER.size)
        if self._chain != zlib.crc32(header[: _HEADER.size]):
            self.is_torn_header = True
            return
        magic, version, record_bytes, number, self._salt, self.generation, salt = _HEADER.unpack_from(header)
        if magic == kind and version > FORMAT_VERSION:
            raise NewerFormat(f"{self.file.path} has format version {version}; upgrade bigembed to read it.")
        if (magic, record_bytes, number, salt) != (kind, spec.record_bytes, sequence, spec.salt):
            raise DamagedTable(f"{self.file.path} does not belong to this table. Restore the table from a backup.")

    def frames(self) -> Iterator[Frame]:
        """Every valid frame from the start; stops at the first that is not."""
        if self.is_torn_header:
            return
        chain = self._chain
        while True:
            frame, chain = self._frame_at(self.end, chain)
            if frame is None:
                return
            self.end = frame.end
            yield frame

    def _frame_at(self, offset: int, chain: int | None) -> tuple[Frame | None, int]:
        """The frame at `offset` if it is whole (and follows `chain`, unless None), and the chain after it."""
        head = self.file.pread(FRAME_BYTES, offset)
        if len(head) < FRAME_BYTES:
            return None, 0
        kind, zero, salt, count, check_sum = _FRAME.unpack_from(head)
        own, chained = _CHECKS.unpack_from(head, _FRAME.size)
        if kind not in (ROWS, NULLS, COMMIT) or zero or self._salt not in (None, salt):
            return None, 0
        body_bytes = count if kind == COMMIT else count * 8
        records_bytes = count * self.record_bytes if kind == ROWS else 0
        body_offset = offset + FRAME_BYTES
        if body_offset + body_bytes + records_bytes > self.size_bytes:
            return None, 0
        body = self.file.pread(body_bytes, body_offset)
        bare = head[: _FRAME.size]
        if own != zlib.crc32(body, zlib.crc32(bare)):
            return None, 0
        if chain is not None and chained != zlib.crc32(body, zlib.crc32(bare, chain)):
            return None, 0
        end = offset + _padded(FRAME_BYTES + body_bytes + records_bytes)
        if kind == COMMIT:
            return self._commit_frame(offset, end, body), chained
        records_offset = body_offset + body_bytes if kind == ROWS else 0
        return Frame(offset, end, check_sum, records_offset, np.frombuffer(body, "<i8").astype(np.int64)), chained

    def _commit_frame(self, offset: int, end: int, body: bytes) -> Frame:
        try:
            return Frame(offset, end, 0, commit=Commit.from_json(json.loads(body)))
        except (ValueError, TypeError) as error:
            raise DamagedTable(
                f"{self.file.path}: the commit record at byte {offset} is not valid: {error}."
            ) from error

    def valid_frame_beyond(self, kind: bytes) -> int:
        """The offset of a valid frame of `kind` after the end of the valid chain, or -1: then the gap is damage."""
        needle = kind + struct.pack("<I", 0)
        block_bytes, offset = 1 << 20, self.end
        while offset < self.size_bytes:
            block = self.file.pread(block_bytes + len(needle), offset)
            at = block.find(needle)
            while at >= 0:
                if (offset + at) % 8 == 0 and self._frame_at(offset + at, None)[0] is not None:
                    return offset + at
                at = block.find(needle, at + 1)
            offset += block_bytes
        return -1

    def close(self) -> None:
        self.file.close()
