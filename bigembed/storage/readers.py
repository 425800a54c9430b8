"""Two ways to read records of the base, exact twins: ColdReader for large tables, MappedReader for small ones.

Contract of both: `read(chunk_M, offset_M, out_MW)` fills out_MW[m] with the record at byte offset_M[m] of chunk
chunk_M[m]; chunk_M ascends; a chunk without a file reads as zeros.

MappedFile is any other file that is read here and there: the maps of the library are all in this module.
"""

import mmap
import os
import weakref

import numba as nb
import numpy as np

from bigembed import threads
from bigembed.storage import files
from bigembed.storage.chunks import MAX_OPEN_FILES, ChunkFiles
from bigembed.storage.record_io import PAGE_BYTES, _advise, read_records


def _spans(chunk_M: np.ndarray) -> list[tuple[int, int, int]]:
    """(chunk, start, stop) of each stretch of equal chunks."""
    if not len(chunk_M):
        return []
    edges = np.flatnonzero(np.diff(chunk_M)) + 1
    starts = [0, *edges.tolist()]
    stops = [*edges.tolist(), len(chunk_M)]
    return [(int(chunk_M[start]), start, stop) for start, stop in zip(starts, stops, strict=True)]


class ColdReader:
    """Reads with advice ahead and pread: resident memory stays constant, an I/O error is an exception."""

    def __init__(self, chunks: ChunkFiles) -> None:
        self._chunks = chunks

    def read(self, chunk_M: np.ndarray, offset_M: np.ndarray, out_MW: np.ndarray) -> None:
        spans = _spans(chunk_M)
        for first in range(0, len(spans), MAX_OPEN_FILES):
            self._read_spans(spans[first : first + MAX_OPEN_FILES], offset_M, out_MW)

    def _read_spans(self, spans: list[tuple[int, int, int]], offset_M: np.ndarray, out_MW: np.ndarray) -> None:
        fd_parts, paths, kept = [], {}, []
        for chunk, start, stop in spans:
            if chunk not in self._chunks.present:
                out_MW[start:stop] = 0
                continue
            file = self._chunks.for_reading(chunk)
            paths[file.fd] = file.path
            fd_parts.append(np.full(stop - start, file.fd, np.int64))
            kept.append((start, stop))
        if not kept:
            return
        start, stop = kept[0][0], kept[-1][1]
        fd_M = np.concatenate(fd_parts)
        if len(fd_M) == stop - start:
            read_records(fd_M, offset_M[start:stop], out_MW[start:stop], paths)
            return
        where = np.concatenate([np.arange(a, b) for a, b in kept])
        found_MW = np.empty((len(where), out_MW.shape[1]), np.uint32)
        read_records(fd_M, offset_M[where], found_MW, paths)
        out_MW[where] = found_MW

    def close(self) -> None:
        """Nothing is held between calls."""


@nb.njit(nogil=True, cache=True)
def _gather_records(start, stop, map_B, offset_M, out_MW):
    for m in range(start, stop):
        first = offset_M[m] >> 2
        for w in range(out_MW.shape[1]):
            out_MW[m, w] = map_B[first + w]


MAX_MAPPED_CHUNKS = 4096


class _Stretch:
    """Memory from an address on, with these maps in it, which stay as long as this does, and with what is between."""

    def __init__(self, address: int, words: int, maps: list[mmap.mmap]) -> None:
        self._maps = maps
        self.__array_interface__ = {"version": 3, "data": (address, True), "shape": (words,), "typestr": "<u4"}


def _joined(address_C: np.ndarray, chunk_bytes: int, maps: list[mmap.mmap]) -> tuple[np.ndarray, np.ndarray]:
    """What `MappedReader.memory` returns, for the addresses of the chunks."""
    is_there = address_C >= 0
    if not is_there.any():
        return np.empty(0, np.uint32), address_C
    lowest, highest = int(address_C[is_there].min()), int(address_C.max())
    words_A = np.asarray(_Stretch(lowest, (highest + chunk_bytes - lowest) // 4, maps))
    return words_A, np.where(is_there, (address_C - lowest) // 4, -1)


class MappedReader:
    """Gathers straight from read-only maps of the chunk files, trimmed when `budget_bytes` of pages were touched.

    For tables that fit the budget or the page cache. Not for cold ones: every fault is served alone, and an I/O
    error is a signal instead of an exception.
    """

    def __init__(self, chunks: ChunkFiles, budget_bytes: int) -> None:
        self._chunks = chunks
        self._budget_bytes = budget_bytes
        self._maps: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._touched_bytes = 0
        self._memory: tuple[np.ndarray, np.ndarray] | None = None
        self._memory_of = (0, 0)  # chunks, and files

    def read(self, chunk_M: np.ndarray, offset_M: np.ndarray, out_MW: np.ndarray) -> None:
        for chunk, start, stop in _spans(chunk_M):
            if chunk not in self._chunks.present:
                out_MW[start:stop] = 0
                continue
            words = self._map(chunk)
            threads.run(_gather_records, stop - start, words, offset_M[start:stop], out_MW[start:stop])
            self.touched(stop - start, out_MW.shape[1])

    def memory(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(words_A, first_C): memory with the maps of all chunks in it, and where each begins, -1 without a file.

        None where there are too many chunks to map them all. It holds until `close`, and as long as no chunk is added.
        """
        spec, present = self._chunks.spec, self._chunks.present
        if spec.num_chunks > MAX_MAPPED_CHUNKS:
            return None
        if self._memory is None or self._memory_of != (spec.num_chunks, len(present)):
            address_C = np.full(spec.num_chunks, -1, np.int64)
            for chunk in present:
                if chunk < spec.num_chunks:
                    address_C[chunk] = self._map(chunk).ctypes.data
            maps = [whole for whole, _ in self._maps.values()]
            self._memory = _joined(address_C, spec.chunk_bytes, maps)
            self._memory_of = (spec.num_chunks, len(present))
        return self._memory

    def touched(self, records: int, record_words: int) -> None:
        """Count that so many records were touched; trims where they may be more than the budget."""
        mapped_bytes = len(self._maps) * self._chunks.spec.chunk_bytes
        self._touched_bytes = min(mapped_bytes, self._touched_bytes + records * (PAGE_BYTES + record_words * 4))
        self._trim()

    def _map(self, chunk: int) -> np.ndarray:
        if chunk not in self._maps:
            file = files.File(self._chunks.path(chunk), files.READ)
            try:
                if file.size_bytes() != self._chunks.spec.chunk_bytes:
                    raise files.StorageFailed(
                        5, f"{file.path} has {file.size_bytes()} bytes, not {self._chunks.spec.chunk_bytes}"
                    )
                with files.operation("map", file.path):
                    whole = mmap.mmap(file.fd, file.size_bytes(), mmap.MAP_SHARED, mmap.PROT_READ)
            finally:
                file.close()
            if hasattr(mmap, "MADV_RANDOM"):
                whole.madvise(mmap.MADV_RANDOM)
            self._maps[chunk] = (whole, np.frombuffer(whole, np.uint32))
        return self._maps[chunk][1]

    def _trim(self) -> None:
        if self._touched_bytes > self._budget_bytes and hasattr(mmap, "MADV_DONTNEED"):
            for whole, _ in self._maps.values():
                whole.madvise(mmap.MADV_DONTNEED)
            self._touched_bytes = 0

    def close(self) -> None:
        self._memory = None
        self._maps.clear()  # a map is released with its last array


FAULT_BYTES = 16 * PAGE_BYTES  # what Linux maps around a page that is touched, where the page cache has it


@nb.njit(nogil=True, cache=True)
def _advise_places(start, stop, fd, offset_N, count):
    for n in range(start, stop):
        _advise(fd, offset_N[n], count)


class MappedFile:
    """A file mapped read-only, for loops that touch a few bytes here and there.

    Pages stay mapped, so counted as this process's memory, until `trim`; `touched` says how many there may be. The file
    must not become shorter meanwhile: touching a page that is gone is a signal instead of an exception.

    Attributes:
        bytes_B: uint8, the whole file, not writeable.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = files.File(path, files.READ)
        weakref.finalize(self, self._file.close)
        self.size_bytes = self._file.size_bytes()
        self._touched_bytes = 0
        self._map: mmap.mmap | None = None
        self.bytes_B = np.empty(0, np.uint8)
        if self.size_bytes:  # nothing cannot be mapped
            with files.operation("map", path):
                self._map = mmap.mmap(self._file.fd, self.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
            if hasattr(mmap, "MADV_RANDOM"):
                self._map.madvise(mmap.MADV_RANDOM)
            self.bytes_B = np.frombuffer(self._map, np.uint8)
        self.bytes_B.flags.writeable = False

    def is_cold(self, offset_N: np.ndarray) -> bool:
        """Whether more than one in eight of these places is not in the page cache; a few dozen of them tell."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        buffer, absent = [bytearray(1)], 0
        for offset in offset_N.tolist():
            try:
                os.preadv(self._file.fd, buffer, offset, os.RWF_NOWAIT)
            except BlockingIOError:
                absent += 1
            except OSError:  # a filesystem that cannot tell
                return False
        return absent > len(offset_N) // 8

    def advise(self, offset_N: np.ndarray, count: int = 1) -> None:
        """Ask for the pages of `count` bytes from each offset on; returns before they are there."""
        threads.run(_advise_places, len(offset_N), self._file.fd, offset_N, np.int64(count))

    def touched(self, places: int) -> None:
        """Count that this many places were touched since the last trim."""
        self._touched_bytes = min(self.size_bytes, self._touched_bytes + places * FAULT_BYTES)

    @property
    def mapped_bytes(self) -> int:
        """How much of the file may be in this process's memory, at most."""
        return self._touched_bytes

    def trim(self) -> None:
        """Let go of the pages; what is touched again comes from the page cache or the disk."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        self._touched_bytes = 0
