"""IndexBuilder: an open-addressing index of any number of entries, built in bounded memory and written in order."""

import math
import os
import weakref
from collections.abc import Callable

import numpy as np

from bigembed.errors import InvalidArgument
from bigembed.kernels import tokens as token_kernels
from bigembed.kernels.token_index import by_partition, fill_slots
from bigembed.kernels.tokens import entry_in, home_of, slot_of
from bigembed.storage import files
from bigembed.vocab.file_writer import FileWriter
from bigembed.vocab.format import MAX_ENTRIES

PARTITIONS = 256  # by the top 8 bits of the hash
PAIRS_IN_MEMORY = 2 << 20  # 32 MiB of (hash, entry), and as much while they are sorted
MAX_LOAD = 0.7
PAIR_BYTES = 16
KEPT_REPEATED = 20

Same = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (entries, earlier entries) -> bool: do they hold the same?


class IndexBuilder:
    """Collects (hash, entry) pairs, spills them sorted by partition, and writes the index partition after partition.

    A home is hash * num_homes >> 64, so partitions follow each other in the file, and each is filled in memory. What
    runs over the end of one is the start of the next.

    Args:
        spill_path: a file for pairs that do not fit in memory; it has no name once it is open.
        same: tells whether entries are the same thing, asked only where fingerprints are equal.
    """

    def __init__(self, spill_path: str, same: Same) -> None:
        self._spill_path, self._same = spill_path, same
        self._spill: files.File | None = None
        self._counts_RP: list[np.ndarray] = []  # pairs of each partition in each run
        self._hash_K = np.empty(0, np.uint64)
        self._entry_K = np.empty(0, np.int64)
        self._used = 0
        self.count = 0
        self.repeated = 0  # entries that are the same as an earlier one, so not in the index
        self.first_repeated_K2 = np.empty((0, 2), np.int64)  # the first of them, and the earlier ones

    def append(self, hash_M: np.ndarray, first_entry: int) -> None:
        """Entries first_entry, first_entry + 1, ... with these hashes; entries ascend from call to call."""
        start = 0
        while start < len(hash_M):
            if self._used == PAIRS_IN_MEMORY:
                self._write_run()
            taken = min(len(hash_M) - start, PAIRS_IN_MEMORY - self._used)
            self._reserve(self._used + taken)
            here = slice(self._used, self._used + taken)
            self._hash_K[here] = hash_M[start : start + taken]
            self._entry_K[here] = np.arange(first_entry + start, first_entry + start + taken)
            self._used += taken
            start += taken
        self.count += len(hash_M)

    def _reserve(self, count: int) -> None:
        if count > len(self._hash_K):
            size = min(PAIRS_IN_MEMORY, max(count, 2 * len(self._hash_K), 4096))
            self._hash_K = np.concatenate([self._hash_K[: self._used], np.empty(size - self._used, np.uint64)])
            self._entry_K = np.concatenate([self._entry_K[: self._used], np.empty(size - self._used, np.int64)])

    def _sorted_run(self) -> np.ndarray:
        """uint64 (K, 2): the pairs in memory by partition; counts go to the list of runs."""
        pairs_K2, count_P = np.empty((self._used, 2), np.uint64), np.empty(PARTITIONS, np.int64)
        by_partition(self._hash_K[: self._used], self._entry_K[: self._used], count_P, pairs_K2)
        self._counts_RP.append(count_P)
        self._used = 0
        return pairs_K2

    def _write_run(self) -> None:
        if self._spill is None:
            self._spill = files.File(self._spill_path, files.WRITE | os.O_TRUNC)
            weakref.finalize(self, self._spill.close)
            files.unlink(self._spill_path)
        written = int(sum(counts.sum() for counts in self._counts_RP))
        self._spill.pwrite(self._sorted_run(), written * PAIR_BYTES)

    def write(self, file: FileWriter) -> int:
        """Write the index into a new file, and count what it leaves out in `repeated`; returns the number of homes.

        Raises:
            InvalidArgument: more entries than an index can hold.
        """
        if self.count > MAX_ENTRIES:
            raise InvalidArgument(f"a vocabulary holds at most {MAX_ENTRIES:,} tokens; {self.count:,} were given.")
        num_homes = max(1, math.ceil(self.count / MAX_LOAD))
        last_PK2 = self._sorted_run()  # the last run stays in memory
        self._hash_K, self._entry_K = np.empty(0, np.uint64), np.empty(0, np.int64)
        offsets_RP = np.cumsum(np.array(self._counts_RP), axis=1) - np.array(self._counts_RP)
        carried_L = np.empty(0, np.uint64)
        step = PARTITIONS if self._spill is None else 1  # what fits in memory is filled at once
        for partition in range(0, PARTITIONS, step):
            pairs_K2 = last_PK2 if self._spill is None else self._pairs(partition, offsets_RP, last_PK2)
            first, stop = _first_home(partition, num_homes), _first_home(partition + step, num_homes)
            slots_L = np.zeros(max(stop - first, len(carried_L)) + len(pairs_K2) + 1, np.uint64)
            slots_L[: len(carried_L)] = carried_L
            self._note_repeated(self._fill(pairs_K2, num_homes, first, slots_L))
            file.append(slots_L[: stop - first])
            carried_L = _without_empty_end(slots_L[stop - first :])
        file.append(carried_L)
        file.append(np.zeros(1, np.uint64))  # every search ends at an empty slot
        self.close()
        return num_homes

    def _pairs(self, partition: int, offsets_RP: np.ndarray, last_PK2: np.ndarray) -> np.ndarray:
        """uint64 (K, 2): a partition's pairs, of all runs, entries ascending."""
        parts, written = [], 0
        for run, counts_P in enumerate(self._counts_RP):
            first, count = int(offsets_RP[run, partition]), int(counts_P[partition])
            if run == len(self._counts_RP) - 1:
                parts.append(last_PK2[first : first + count])
            elif count:
                assert self._spill is not None
                found = np.empty((count, 2), np.uint64)
                self._spill.pread_into(found, (written + first) * PAIR_BYTES)
                parts.append(found)
            written += int(counts_P.sum())
        return np.concatenate(parts)

    def _fill(self, pairs_K2: np.ndarray, num_homes: int, first_slot: int, slots_L: np.ndarray) -> np.ndarray:
        """Put a partition's pairs into its slots; returns those that are there already (entry, earlier one)."""
        mask, doubt_K2 = token_kernels.FINGERPRINT_MASK, np.empty((len(pairs_K2), 2), np.int64)
        doubtful = fill_slots(pairs_K2, mask, num_homes, first_slot, slots_L, doubt_K2)
        doubt_K2 = doubt_K2[:doubtful]
        doubtful_K = pairs_K2[doubt_K2[:, 0], 1].astype(np.int64)
        is_same_K = self._same(doubtful_K, doubt_K2[:, 1])
        found = np.stack([doubtful_K, doubt_K2[:, 1]], axis=1)
        for k in np.flatnonzero(~is_same_K):  # equal fingerprints by chance: one in millions
            pair = pairs_K2[doubt_K2[k, 0]]
            found[k, 1] = self._put_alone(pair[0], int(pair[1]), num_homes, first_slot, slots_L)
        return found[found[:, 1] >= 0]

    def _note_repeated(self, repeated_K2: np.ndarray) -> None:
        self.repeated += len(repeated_K2)
        both_K2 = np.concatenate([self.first_repeated_K2, repeated_K2])
        self.first_repeated_K2 = both_K2[np.argsort(both_K2[:, 0])[:KEPT_REPEATED]]

    def _put_alone(self, key: np.uint64, entry: int, num_homes: int, first_slot: int, slots_L: np.ndarray) -> int:
        """Put one pair past all that have its fingerprint; returns the entry that is the same, or -1."""
        slot = np.uint64(slot_of(key, entry, token_kernels.FINGERPRINT_MASK))
        at = int(home_of(key, num_homes)) - first_slot
        end = at + int(np.argmin(slots_L[at:] != 0))
        alike = slots_L[at:end][slots_L[at:end] >> np.uint64(40) == slot >> np.uint64(40)]
        earlier_K = np.array([entry_in(one) for one in alike], np.int64)
        is_same_K = self._same(np.full(len(earlier_K), entry), earlier_K)
        if is_same_K.any():
            return int(earlier_K[is_same_K][0])
        slots_L[end] = slot
        return -1

    def close(self) -> None:
        """Give up memory and disk; safe to repeat."""
        if self._spill is not None:
            self._spill.close()
            self._spill = None


def _first_home(partition: int, num_homes: int) -> int:
    """The lowest home that a hash of the partition may have."""
    return partition * num_homes // PARTITIONS


def _without_empty_end(slots_L: np.ndarray) -> np.ndarray:
    used = np.flatnonzero(slots_L)
    return slots_L[: used[-1] + 1] if len(used) else slots_L[:0]
