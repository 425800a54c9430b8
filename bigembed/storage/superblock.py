"""The superblock: which generation the base holds, and what its chunks should sum to. Replaced atomically.

Bytes: magic (8) | length of the JSON (uint32) | JSON | rows written, int64 per chunk | sums of checks, uint64 per
chunk | crc32 of all before (uint32).
"""

import json
import os
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigembed.errors import DamagedTable
from bigembed.storage import files

MAGIC = b"BESUPER1"
NAME = "superblock"


@dataclass(frozen=True)
class Commit:
    """One commit of a table: what `Table.generations` lists and a commit record holds.

    Args:
        number: the generation; grows with every commit, never used twice.
        parent: the generation it was made from.
        num_rows: V as of this commit.
        note: the user's words; "auto" where the table committed by itself.
        time: seconds since 1970; a rollback's is that of the generation whose rows it has.
        explicit: made by a user's call, so kept restorable until the next explicit one.
        scalars: what optimizers keep beside their rows (rule, step count, hyperparameters).
        payload: the user's JSON.
        rollback_to: the generation this commit restored, or None.
    """

    number: int
    parent: int
    num_rows: int
    note: str
    time: float
    explicit: bool
    scalars: dict[str, Any] = field(default_factory=dict)
    payload: Any = None
    rollback_to: int | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @classmethod
    def from_json(cls, given: Any) -> "Commit":
        return cls(**given)


@dataclass
class Superblock:
    """The state of the base.

    Args:
        base: the commit that the base holds (every journal segment up to it is merged).
        retained: the last explicit commit as of the last merge.
        suspect: "" when sums can be believed; "merge" while a merge is under way or broke off (the chunks that the
            journal touches cannot); "all" likewise for a publish (no chunk can).
        written_C: int64, rows ever written of each chunk. sums_C: uint64, their checks' sums modulo 2**64.
    """

    base: Commit
    retained: Commit
    suspect: str
    written_C: np.ndarray
    sums_C: np.ndarray

    @classmethod
    def fresh(cls, num_chunks: int, commit: Commit) -> "Superblock":
        return cls(commit, commit, "", np.zeros(num_chunks, np.int64), np.zeros(num_chunks, np.uint64))

    def copy(self) -> "Superblock":
        return Superblock(self.base, self.retained, self.suspect, self.written_C.copy(), self.sums_C.copy())

    def resize(self, num_chunks: int) -> None:
        """Make room for the chunks of a grown table; never shrinks."""
        more = num_chunks - len(self.written_C)
        if more > 0:
            self.written_C = np.concatenate([self.written_C, np.zeros(more, np.int64)])
            self.sums_C = np.concatenate([self.sums_C, np.zeros(more, np.uint64)])

    def encode(self) -> bytes:
        facts = {
            "base": self.base.to_json(),
            "retained": self.retained.to_json(),
            "suspect": self.suspect,
            "num_chunks": len(self.written_C),
        }
        text = json.dumps(facts).encode()
        body = MAGIC + struct.pack("<I", len(text)) + text
        body += self.written_C.astype("<i8").tobytes() + self.sums_C.astype("<u8").tobytes()
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def decode(cls, content: bytes, path: str) -> "Superblock":
        try:
            if content[:8] != MAGIC or struct.unpack("<I", content[-4:])[0] != zlib.crc32(content[:-4]):
                raise ValueError("its checksum is wrong")
            (length,) = struct.unpack_from("<I", content, 8)
            facts = json.loads(content[12 : 12 + length])
            chunks = facts["num_chunks"]
            if len(content) != 12 + length + 16 * chunks + 4:
                raise ValueError("its length is wrong")
            written_C = np.frombuffer(content, "<i8", chunks, 12 + length).astype(np.int64)
            sums_C = np.frombuffer(content, "<u8", chunks, 12 + length + 8 * chunks).astype(np.uint64)
            base, retained = Commit.from_json(facts["base"]), Commit.from_json(facts["retained"])
            return cls(base, retained, str(facts["suspect"]), written_C, sums_C)
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise DamagedTable(f"{path} is damaged: {error}. Restore it from a backup.") from error

    def write(self, table_path: str) -> None:
        files.write_atomically(os.path.join(table_path, NAME), self.encode())

    @classmethod
    def read(cls, table_path: str) -> "Superblock":
        path = os.path.join(table_path, NAME)
        try:
            return cls.decode(files.read_bytes(path), path)
        except FileNotFoundError as error:
            raise DamagedTable(f"{path} is missing. Restore it from a backup of the table.") from error
