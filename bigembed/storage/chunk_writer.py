"""ChunkWriter: the chunk files of a new table, written once, in row order, with holes where no row was written."""

import contextlib
import os
import threading
from collections import deque

import numpy as np

from bigembed.kernels.records import count_and_sum
from bigembed.spec import TableSpec
from bigembed.storage import files
from bigembed.storage.memory import memory_limit_bytes
from bigembed.storage.record_io import PAGE_BYTES

UNSYNCED_BYTES = 256 << 20  # of full chunks that the disk may still be busy with
UNSYNCED_FILES = 64


class ChunkWriter:
    """Writes records into new chunk files; a chunk without a written record gets no file.

    The system is told to write a chunk out as soon as the next one begins; some chunks later its file is synced, by
    the descriptor that wrote it. Of a table that would fill a good part of memory no pages stay in the cache.

    Attributes:
        sums: {chunk: (rows written, sum of checks modulo 2**64)} of the chunks that have a file.
    """

    def __init__(self, folder: str, spec: TableSpec) -> None:
        self._folder = folder
        self._spec = spec
        self._pid = os.getpid()
        self._mutex = threading.RLock()  # held while writing: whoever gives up waits
        self._file: files.File | None = None
        self._chunk = -1
        self._unsynced: deque[files.File] = deque()
        self._keeps_bytes = memory_limit_bytes() // 4
        self.is_closed = False
        self.sums: dict[int, tuple[int, int]] = {}

    def write(self, first_row: int, records_MW: np.ndarray) -> None:
        """Write records from first_row on, those that are not all zero; rows ascend from call to call."""
        with self._mutex:
            done = 0
            while done < len(records_MW) and not self.is_closed:
                chunk, within = divmod(first_row + done, self._spec.chunk_rows)
                count = min(len(records_MW) - done, self._spec.chunk_rows - within)
                self._write_chunk(chunk, within, records_MW[done : done + count])
                done += count

    def _write_chunk(self, chunk: int, within: int, records_MW: np.ndarray) -> None:
        written, total = map(int, count_and_sum(records_MW))
        if not written:
            return
        file = self._file_of(chunk)
        runs = [(0, len(records_MW))] if written == len(records_MW) else self._runs(records_MW[:, -1] != 0)
        for start, stop in runs:
            file.pwrite(records_MW[start:stop], (within + start) * self._spec.record_bytes)
        before, sum_before = self.sums.get(chunk, (0, 0))
        self.sums[chunk] = before + written, (sum_before + total) % (1 << 64)

    def _runs(self, written_M: np.ndarray) -> list[tuple[int, int]]:
        """Stretches that hold all written records; between two of them is a page or more without any."""
        at = np.flatnonzero(written_M)
        last = np.flatnonzero((np.diff(at) - 1) * self._spec.record_bytes >= PAGE_BYTES)
        starts = [int(at[0]), *at[last + 1].tolist()]
        stops = [*(at[last] + 1).tolist(), int(at[-1]) + 1]
        return list(zip(starts, stops, strict=True))

    def _file_of(self, chunk: int) -> files.File:
        if self._file is None or chunk != self._chunk:
            self._end_chunk()
            self._file = files.File(os.path.join(self._folder, f"c.{chunk}.0"), files.WRITE | os.O_EXCL)
            self._chunk = chunk
            self._file.truncate(self._spec.chunk_bytes)
        return self._file

    def _end_chunk(self) -> None:
        """No more rows come for this chunk."""
        if self._file is None:
            return
        self._file.forget_pages()  # dirty ones stay, but the system starts to write them out
        self._unsynced.append(self._file)
        self._file = None
        most = max(1, min(UNSYNCED_FILES, UNSYNCED_BYTES // self._spec.chunk_bytes))
        while len(self._unsynced) > most:
            self._sync_first()

    def _sync_first(self) -> None:
        file = self._unsynced[0]
        file.sync()
        if len(self.sums) * self._spec.chunk_bytes > self._keeps_bytes:
            file.forget_pages()
        self._unsynced.popleft().close()

    def finish(self, spec: TableSpec) -> None:
        """Everything written is on stable storage, but for the folder's entries.

        Args:
            spec: as it is in the end; its chunks may be smaller where there is one alone.
        """
        with self._mutex:
            if self._file is not None and spec.chunk_rows < self._spec.chunk_rows:
                self._file.truncate(spec.chunk_bytes)
            self._end_chunk()
            while self._unsynced:
                self._sync_first()
            self.is_closed = True

    def close(self) -> None:
        """Give up: what comes later is ignored. A forked child closes its copies of the descriptors."""
        if self._pid != os.getpid():
            # Whoever held the mutex does not exist here, and may have been closing one of the files.
            with contextlib.suppress(OSError):
                self._close_files()
            return
        with self._mutex:
            self._close_files()

    def _close_files(self) -> None:
        self.is_closed = True
        for file in (self._file, *self._unsynced):
            if file is not None:
                file.close()
        self._file = None
        self._unsynced.clear()
