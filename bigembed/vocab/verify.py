"""verify_stored: the immutable files of a vocabulary against their sums, and every entry against its own look-up."""

import zlib

import numpy as np

from bigembed.errors import DamagedTable
from bigembed.kernels.tokens import ABSENT
from bigembed.storage.readers import MappedFile
from bigembed.vocab.format import PIECE_BYTES
from bigembed.vocab.stored import StoredVocabulary

SLICE_ENTRIES = 1 << 16
RESTORE = "Restore it from a backup of the table."


def verify_stored(stored: StoredVocabulary) -> None:
    """Raises DamagedTable, naming file and place, unless everything is as it was written."""
    for kind, file in zip(stored.facts.files, stored.mapped, strict=True):
        _check_sums(file, stored.facts.files[kind].crc32)
    stored.entries.check_lengths()
    stored.trim()
    repeated = 0
    for start in range(0, stored.num_entries, SLICE_ENTRIES):
        repeated += _check_entries(stored, np.arange(start, min(start + SLICE_ENTRIES, stored.num_entries)))
        stored.trim()
    if repeated != stored.facts.duplicates:
        raise DamagedTable(
            f"{stored.folder}: {repeated} tokens came before; vocab.json says {stored.facts.duplicates}. {RESTORE}"
        )


def _check_sums(file: MappedFile, sums: list[int]) -> None:
    if len(sums) != -(-file.size_bytes // PIECE_BYTES):
        raise DamagedTable(f"{file.path} has {file.size_bytes} bytes, and {len(sums)} sums for them. {RESTORE}")
    for piece, expected in enumerate(sums):
        first = piece * PIECE_BYTES
        file.advise(np.array([first]), PIECE_BYTES)
        if zlib.crc32(file.bytes_B[first : first + PIECE_BYTES]) != expected:
            last = min(first + PIECE_BYTES, file.size_bytes)
            raise DamagedTable(f"{file.path} is damaged between bytes {first} and {last}. {RESTORE}")
        file.trim()


def _check_entries(stored: StoredVocabulary, entry_N: np.ndarray) -> int:
    """How many of these entries are found by an earlier one."""
    found_N = stored.find(stored.entries.packed(entry_N).checked())
    _expect(stored, "index", entry_N, found_N)
    row_N = stored.rows_of(entry_N)
    _expect(stored, "entries", entry_N, stored.entries_of(row_N))
    return int((found_N != entry_N).sum())


def _expect(stored: StoredVocabulary, kind: str, entry_N: np.ndarray, found_N: np.ndarray) -> None:
    """An entry is found as itself, or as an earlier one that is the same."""
    wrong = np.flatnonzero((found_N == ABSENT) | (found_N > entry_N))
    if len(wrong):
        entry, found = int(entry_N[wrong[0]]), int(found_N[wrong[0]])
        what = "is not found" if found == ABSENT else f"is found as the later entry {found}"
        raise DamagedTable(f"{stored.facts.path(stored.folder, kind)} is damaged: entry {entry} {what}. {RESTORE}")
