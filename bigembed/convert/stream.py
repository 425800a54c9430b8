"""ByteStream: one way to read the bytes of a file, a pipe or standard input, unpacked where they are compressed."""

import hashlib
import io
import os
import stat
from typing import Any

from bigembed.convert.decompress import MAGIC_BYTES, Members, kind_of
from bigembed.errors import BadSource
from bigembed.storage.files import operation


class ByteStream:
    """The bytes of a source, in order, once. Not for two threads at a time.

    Attributes:
        path: as the user gave it; "-" is standard input.
        compression: "gzip", "bzip2", "xz", "zstd", or None.
        can_be_read_again: it is a file, so that its size and sum can be taken from it.
        total_bytes: the file's size as it lies there; None where it cannot be known (standard input, a pipe).
        done_bytes: how many of those were read.
    """

    def __init__(self, path: str, raw: io.FileIO) -> None:
        self.path = path
        self._raw = raw
        status = os.fstat(raw.fileno())
        self.can_be_read_again = path != "-" and stat.S_ISREG(status.st_mode)
        self.total_bytes = status.st_size if self.can_be_read_again else None
        self.done_bytes = 0
        self._sum = None if self.can_be_read_again else hashlib.sha256()
        self._has_ended = False
        start = b""
        while len(start) < MAGIC_BYTES and (part := self._read_raw(MAGIC_BYTES - len(start))):
            start += part
        self.compression = kind_of(start)
        self._members: Members | None = None
        self._held = start  # read ahead, to be given out first
        if self.compression is not None:
            self._members = Members(self.compression, start, self._read_raw, self._bad)
            self._held = b""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "ByteStream":
        """Open a file, or standard input ("-"); its first bytes say whether and how it is compressed.

        Raises:
            FileNotFoundError: there is nothing. StorageFailed: it cannot be opened or read.
            MissingLibrary: it is a .zst file, and the zstandard library is not installed.
        """
        name = os.fspath(path)
        with operation("open", name):
            # Not sys.stdin: its lock, held by a thread that waits for input, would abort the interpreter at its exit.
            raw = io.FileIO(0, "rb", closefd=False) if name == "-" else io.FileIO(name, "rb")
        try:
            return cls(name, raw)
        except BaseException:
            raw.close()
            raise

    @property
    def sha256(self) -> str | None:
        """Hex digest of the raw bytes once the end was read; None before, and for a file that can be read again."""
        return self._sum.hexdigest() if self._sum is not None and self._has_ended else None

    def head(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end, without taking them."""
        parts, have = [self._held], len(self._held)
        while have < count and (part := self._some(count - have)):
            parts.append(part)
            have += len(part)
        self._held = b"".join(parts)
        return self._held[:count]

    def read_into(self, buffer: Any) -> int:
        """Fill a buffer; returns the bytes read, fewer than there is room for only at the end.

        Raises:
            BadSource: compressed data are damaged or cut off; names the byte of the file. StorageFailed.
        """
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            room = view[done:]
            if not self._held and self._members is None:
                count = self._read_raw_into(room)
            else:
                part = self._held or self._some(len(room))
                count = min(len(part), len(room))
                room[:count] = part[:count]
                self._held = part[count:]
            if count == 0:
                break
            done += count
        return done

    def close(self) -> None:
        """Let go of the file; safe to repeat. Standard input stays open."""
        self._raw.close()

    def _some(self, limit_bytes: int) -> bytes:
        """Some more bytes, about `limit_bytes` at most; none at the end."""
        return self._read_raw(limit_bytes) if self._members is None else self._members.some(limit_bytes)

    def _read_raw(self, limit_bytes: int) -> bytes:
        buffer = bytearray(limit_bytes)
        return bytes(buffer[: self._read_raw_into(memoryview(buffer))])

    def _read_raw_into(self, view: memoryview) -> int:
        with operation("read", self.path):
            count = self._raw.readinto(view) or 0
        self.done_bytes += count
        self._has_ended |= count == 0
        if self._sum is not None:
            self._sum.update(view[:count])
        return count

    def _bad(self, problem: str) -> BadSource:
        return BadSource(f"{self.path}, byte {self.done_bytes} of the compressed file: {problem}.")
