"""WriteBehind: frames of rows that another thread seals and writes to the journal, in order, while the caller goes on.

A frame's place is decided when it is put here; only its bytes come later. It is noted before it is handed over, so no
error and no Ctrl-C loses it: rows stay in memory until their frame is written whole, and a write that fails is tried
again, in turn, by whoever needs it (the next append, a read of these rows, a commit), which then raises what the system
says.
"""

import os
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from bigembed import threads
from bigembed.errors import ForkedTable
from bigembed.kernels.records import seal
from bigembed.storage.segments import SegmentWriter

MAX_WAITING = 2  # frames; the next one waits for the oldest
_NOTHING = np.empty(0, np.float32)


@dataclass(eq=False)
class _Frame:
    """Rows on their way into a segment, from a byte offset to an end that are theirs."""

    writer: SegmentWriter
    offset: int
    end: int
    rows_M: np.ndarray
    values_ME: np.ndarray
    first_place: int
    task: threads.Task = field(init=False)


class WriteBehind:
    """The frames of one journal that are not known to be written.

    Args:
        keys_W: of the records' checks.
    """

    def __init__(self, keys_W: np.ndarray) -> None:
        self._keys_W = keys_W
        self._pid = os.getpid()
        self._frames: deque[_Frame] = deque()
        self._records_B = np.empty(0, np.uint32)

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def memory_bytes(self) -> int:
        return self._records_B.nbytes + sum(f.values_ME.nbytes + f.rows_M.nbytes for f in self._frames)

    @property
    def tasks(self) -> list[threads.Task]:
        return [frame.task for frame in self._frames]

    @property
    def end(self) -> int | None:
        """Where the newest frame ends; None where all are written."""
        return self._frames[-1].end if self._frames else None

    def make_room(self) -> None:
        """Raise what a write of before has met, and wait until another frame may be put here."""
        self._forget_written()
        while self._frames and (self._frames[0].task.is_done or len(self._frames) >= MAX_WAITING):
            self._finish_oldest()

    def put(
        self, writer: SegmentWriter, rows_M: np.ndarray, values_ME: np.ndarray, offset: int, first_place: int
    ) -> None:
        """Write these rows into the frame reserved at `offset`; the arrays are ours from now on."""
        frame = _Frame(writer, offset, writer.end, rows_M, values_ME, first_place)
        frame.task = threads.Task(self._write, (frame,))
        self._frames.append(frame)
        try:
            threads.hand_behind(frame.task)
        except BaseException as error:  # whoever needs the frame writes it
            frame.task.cancel(error)
            if not isinstance(error, Exception):
                raise

    def settle(self, places_M: np.ndarray | None = None) -> None:
        """Return when all frames are written, or those that hold these places.

        Raises:
            StorageFailed, DiskFull: a write was refused, twice. ForkedTable: this is a child, and the parent could not
            write them.
        """
        self._forget_written()
        last = None if places_M is None else int(places_M.max(initial=-1))
        while self._frames and (last is None or self._frames[0].first_place <= last):
            self._finish_oldest()

    def wait(self) -> None:
        """Return when nothing is under way; what is not written by then is forgotten."""
        for frame in self._frames:
            is_cancelled = frame.task.cancel(RuntimeError("the table was closed"))
            if not is_cancelled and not threads.is_behind():  # a table may be collected in the thread that writes it
                frame.task.wait()
        self._frames.clear()

    def _forget_written(self) -> None:
        while self._frames and self._frames[0].task.is_done and self._frames[0].task.error is None:
            self._frames.popleft()

    def _finish_oldest(self) -> None:
        frame = self._frames[0]
        frame.task.wait()
        if frame.task.error is not None:
            if os.getpid() != self._pid:
                raise ForkedTable(
                    f"{frame.writer.file.path}: rows that process {self._pid} has not been able to write cannot be "
                    "read in a forked child. Read them in the parent."
                )
            self._write(frame)
        self._frames.popleft()

    def _write(self, frame: _Frame) -> None:
        """Seal and write one frame; out of turn (the one before has failed) it does nothing but fail."""
        if frame.writer.written != frame.offset:
            raise RuntimeError("the frame before this one is not written yet")
        count, words = len(frame.rows_M), len(self._keys_W)
        if self._records_B.size < count * words:
            self._records_B = np.empty(count * words, np.uint32)
        records_MW = self._records_B[: count * words].reshape(count, words)
        sums = threads.run(seal, count, frame.rows_M, frame.values_ME, self._keys_W, records_MW)
        frame.writer.write_rows(frame.rows_M, records_MW, sum(map(int, sums)) % (1 << 64))
        frame.values_ME = _NOTHING  # the frame may stay noted for a while
