"""Places: where a record is in the journal, as one int64: (segment's sequence << 40) | byte offset.

Places compare in the order in which they were written.
"""

import numpy as np

from bigembed.storage import files
from bigembed.storage.record_io import read_records

OFFSET_BITS = 40
_OFFSET_MASK = (1 << OFFSET_BITS) - 1


def place_of(sequence: int, offset: int) -> int:
    return sequence << OFFSET_BITS | offset


def sequence_of(place: int) -> int:
    return int(place) >> OFFSET_BITS


def offset_of(place: int) -> int:
    return int(place) & _OFFSET_MASK


def sequences_of(places_M: np.ndarray) -> list[int]:
    """The segments that these places are in."""
    return [int(sequence) for sequence in np.unique(places_M >> OFFSET_BITS)]


def read_places(segments: dict[int, files.File], places_M: np.ndarray, record_words: int) -> np.ndarray:
    """The records at these places, unchecked: uint32 (M, W). Reads in file order.

    Args:
        segments: open files by sequence; those of `sequences_of(places_M)` at least.
    """
    order = np.argsort(places_M)
    sorted_M = places_M[order]
    sequence_M = sorted_M >> OFFSET_BITS
    fd_M = np.empty(len(order), np.int64)
    paths = {}
    for sequence in sequences_of(sorted_M):
        file = segments[sequence]
        fd_M[sequence_M == sequence] = file.fd
        paths[file.fd] = file.path
    found_MW = np.empty((len(order), record_words), np.uint32)
    read_records(fd_M, sorted_M & _OFFSET_MASK, found_MW, paths)
    records_MW = np.empty_like(found_MW)
    records_MW[order] = found_MW
    return records_MW
