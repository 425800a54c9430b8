"""vocab.json: what a vocabulary's files are, how they were made, and their sums; written last, so it decides."""

import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

from bigembed.errors import DamagedTable, NewerFormat
from bigembed.storage import files

FOLDER = "vocab"
NAME = "vocab.json"
KINDS = ("tokens", "blocks", "index", "rows", "entries", "pairs")
FORMAT_VERSION = 1
PIECE_BYTES = 16 << 20  # of a file that each crc32 is for
MAX_ENTRIES = 3_000_000_000  # so that an index has fewer than 2**32 homes
MAX_TOKEN_BYTES = (1 << 31) - 1


@dataclass(frozen=True)
class FileFacts:
    """One file: its size, and the crc32 of each `PIECE_BYTES` of it."""

    bytes: int
    crc32: list[int]


@dataclass(frozen=True)
class VocabFacts:
    """The content of vocab.json; see README.md of this folder for each.

    Args:
        sequence: ends the names of the files, so that new ones can be built beside those in use.
        num_entries, duplicates: how many, and how many of them are found by an earlier entry instead.
        num_homes: of `index`. row_homes: of `entries`, 0 where there is none.
        seed: of the hashes.
        folded_rows: entries of the log with a row below are in these files.
        unknown: the policy for unknown tokens. subwords: settings of bigembed.vocab.subwords, or None.
        files: by kind.
    """

    sequence: int
    num_entries: int
    duplicates: int
    num_homes: int
    row_homes: int
    seed: int
    folded_rows: int
    unknown: dict[str, Any]
    subwords: dict[str, Any] | None
    files: dict[str, FileFacts] = field(default_factory=dict)

    def path(self, folder: str, kind: str) -> str:
        return file_path(folder, kind, self.sequence)

    def write(self, folder: str) -> None:
        """Replace vocab.json atomically: from here on these are the files that count."""
        files.write_atomically(os.path.join(folder, NAME), self.encode())

    def encode(self) -> bytes:
        facts = {"format_version": FORMAT_VERSION, **asdict(self), "seed": f"{self.seed:016x}"}
        return json.dumps({**facts, "crc32": _checksum(facts)}, indent=1).encode()

    @classmethod
    def read(cls, folder: str) -> "VocabFacts | None":
        """The facts of the vocabulary in a folder; None where there is none, whole or in part.

        Raises:
            DamagedTable, NewerFormat: it cannot be read.
        """
        path = os.path.join(folder, NAME)
        try:
            return cls.decode(files.read_bytes(path, limit_bytes=256 << 20), path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    @classmethod
    def decode(cls, content: bytes, path: str) -> "VocabFacts":
        try:
            facts = json.loads(content)
            checksum = facts.pop("crc32")
            version = facts.get("format_version")
            if isinstance(version, int) and version > FORMAT_VERSION and checksum == _checksum(facts):
                raise NewerFormat(
                    f"{path} has format version {version}; this library reads up to {FORMAT_VERSION}. Update bigembed."
                )
            if checksum != _checksum(facts):
                raise ValueError("its checksum is wrong")
            del facts["format_version"]
            facts["seed"] = int(facts["seed"], 16)
            facts["files"] = {kind: FileFacts(**one) for kind, one in facts["files"].items()}
            return cls(**facts)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, NewerFormat):
                raise
            raise DamagedTable(f"{path} is damaged: {error}. Restore it from a backup of the table.") from error


def _checksum(facts: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())


def file_path(folder: str, kind: str, sequence: int) -> str:
    return os.path.join(folder, f"{kind}.{sequence}")


def remove_leftovers(folder: str, facts: VocabFacts | None) -> None:
    """Remove what a build that broke off, or one that was replaced, left in the folder; for the writer."""
    kept = {os.path.basename(facts.path(folder, kind)) for kind in facts.files} if facts is not None else set()
    for name in os.listdir(folder):
        kind, _, sequence = name.partition(".")
        is_ours = (kind in KINDS and sequence.isdecimal()) or name == f"{NAME}.new"
        if is_ours and name not in kept:
            files.unlink(os.path.join(folder, name))


class Pieces:
    """The crc32 of each piece of a file, of bytes as they come."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._sums: list[int] = []

    def add(self, content: Any) -> None:
        view = memoryview(content).cast("B")
        while len(view):
            within = self.size_bytes % PIECE_BYTES
            part = view[: PIECE_BYTES - within]
            if within == 0:
                self._sums.append(0)
            self._sums[-1] = zlib.crc32(part, self._sums[-1])
            self.size_bytes += len(part)
            view = view[len(part) :]

    def result(self) -> FileFacts:
        return FileFacts(self.size_bytes, list(self._sums))
