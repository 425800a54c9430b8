"""Two ways to read records of the base, exact twins: ColdReader for large tables, MappedReader for small ones.

Contract of both: `read(chunk_M, offset_M, out_MW)` fills out_MW[m] with the record at byte offset_M[m] of chunk
chunk_M[m]; chunk_M ascends; a chunk without a file reads as zeros.
"""

import mmap

import numba as nb
import numpy as np

from bigembed import threads
from bigembed.storage import files
from bigembed.storage.chunks import MAX_OPEN_FILES, ChunkFiles
from bigembed.storage.record_io import PAGE_BYTES, read_records


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

    def read(self, chunk_M: np.ndarray, offset_M: np.ndarray, out_MW: np.ndarray) -> None:
        for chunk, start, stop in _spans(chunk_M):
            if chunk not in self._chunks.present:
                out_MW[start:stop] = 0
                continue
            words = self._map(chunk)
            threads.run(_gather_records, stop - start, words, offset_M[start:stop], out_MW[start:stop])
            self._touched_bytes += (stop - start) * (PAGE_BYTES + out_MW.shape[1] * 4)
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
        self._maps.clear()  # a map is released with its last array
