"""BulkTable: a new table written whole, row after row, aside; it appears at its path when it is finished.

Rows are sealed into one of two buffers, while the background thread writes the other one into the chunk files. The
system is told to write a chunk out as soon as it is full, and a few chunks later it is synced: so `finish` has little
to wait for, and what is not on disk yet stays bounded.
"""

import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from bigembed import threads
from bigembed.errors import ForkedTable, InvalidArgument, TableClosed
from bigembed.init import InitialValues
from bigembed.kernels.records import check_keys
from bigembed.kernels.sealing import clear_unwritten, seal_next
from bigembed.spec import MAX_ROWS, StateColumns, TableSpec, default_chunk_rows
from bigembed.storage.aside import Aside
from bigembed.storage.chunk_writer import ChunkWriter
from bigembed.storage.create import absolute_path, checked_attributes, checked_integer, checked_json, new_spec
from bigembed.storage.superblock import Commit, Superblock

BUFFER_BYTES = 16 << 20
GAP_BYTES = 256 << 10  # never-written rows up to this size go through the buffer: faster than a write of their own
_NO_WORDS = np.empty(0, np.uint32)


class BulkTable:
    """Writes a new table at the disk's speed, in bounded memory; nothing is at `path` before `finish`.

    Best in a `with` block: leaving it without `finish` removes everything. Not for several threads at once.

    Args:
        path: a folder that does not exist yet. dim: D.
        num_rows: V, where it is known; `finish` may still say otherwise.
        state: the state columns of the records. owner: the optimizer rule they belong to; None: only reserved.
        init, seed, padding_idx: what rows hold that are not written, as for `Table.create`.
        chunk_rows: rows of a chunk file; by default files of 64 to 128 MiB.
        attributes: what else the table's metadata should say (where it was converted from, ...), as JSON can hold it.
        overwrite: take the place of a table at the path. It stays there, locked, until `finish`.

    Raises:
        TableExists, TableLocked: as for `Table.create`. InvalidArgument: a size that cannot be.

    Example:
        >>> import tempfile, numpy as np
        >>> from bigembed.storage.table import Table
        >>> path = tempfile.mkdtemp() + "/t"
        >>> with BulkTable(path, dim=2) as bulk:
        ...     bulk.append(np.ones((3, 2), np.float32))
        ...     bulk.append(np.zeros((2, 2), np.float32))
        ...     bulk.finish(note="five rows")
        >>> with Table.open(path, mode="r") as table:
        ...     table.read([2, 3])
        array([[1., 1.],
               [0., 0.]], dtype=float32)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dim: int,
        *,
        num_rows: int | None = None,
        state: tuple[StateColumns, ...] = (),
        owner: str | None = None,
        init: InitialValues | str | None = None,
        seed: int = 0,
        chunk_rows: int | None = None,
        padding_idx: int | None = None,
        attributes: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self._spec = new_spec(
            num_rows,
            dim,
            state=state,
            owner=owner,
            init=init,
            seed=seed,
            chunk_rows=chunk_rows,
            padding_idx=padding_idx,
            attributes=checked_attributes(attributes),
        )
        self._pid = os.getpid()
        self._num_rows = None if num_rows is None else int(num_rows)
        self._may_shrink = chunk_rows is None
        self._next_row = 0
        self._keys_W = check_keys(self._spec)
        self._state_K = np.array(self._spec.state_initial, np.float32).view(np.uint32)
        rows = max(1, BUFFER_BYTES // self._spec.record_bytes)
        self._buffers = [np.empty((rows, self._spec.record_words), np.uint32) for _ in range(2)]
        self._aside = Aside(absolute_path(path, overwrite), overwrite)
        self._chunks = ChunkWriter(os.path.join(self._aside.folder, "weight"), self._spec)
        self._end = weakref.finalize(self, _abandon, self._aside, self._chunks)
        self._tasks: list[threads.Task | None] = [None, None]  # what still writes each buffer
        self._filled = 0  # rows in buffer 0, the first of them is next_row - filled
        self._gap_rows = GAP_BYTES // self._spec.record_bytes

    # -- facts ----------------------------------------------------------------------------------------------

    @property
    def spec(self) -> TableSpec:
        """The facts as of now; while V is open, `num_rows` is the number of rows so far (at least 1)."""
        if self._num_rows is not None:
            return self._spec
        padding = self._spec.padding_idx
        return replace(self._spec, num_rows=max(1, self._next_row, 0 if padding is None else padding + 1))

    @property
    def folder(self) -> str:
        """The folder aside, in which `vocab/` may be built before `finish`."""
        return self._aside.folder

    @property
    def next_row(self) -> int:
        """The row that the next `append` starts with."""
        return self._next_row

    # -- rows -----------------------------------------------------------------------------------------------

    def append(self, values_MD: np.ndarray) -> None:
        """Write the weights of the next M rows, their state at its initial values; values_MD is free again then.

        Args:
            values_MD: float32 (M, D), any M.

        Raises:
            InvalidArgument: another shape or dtype, or more rows than V. DiskFull, StorageFailed: also for rows
            appended before.
        """
        self._append(values_MD, self._spec.dim, self._state_K, None)

    def append_rows(self, values_ME: np.ndarray, written_M: np.ndarray | None = None) -> None:
        """Write weight and state of the next M rows, but for those where written_M is False: they stay never-written.

        Args:
            values_ME: float32 (M, D + K). written_M: bool (M,); None: all.
        """
        self._append(values_ME, self._spec.row_width, _NO_WORDS, written_M)

    def skip(self, count: int) -> None:
        """Leave the next `count` rows never-written: they cost nothing."""
        self._check_rows(checked_integer("count", count))
        with self._whole():
            if self._filled + count <= min(len(self._buffers[0]) - 1, self._filled + self._gap_rows):
                self._buffers[0][self._filled : self._filled + count] = 0
                self._filled += int(count)
            else:
                self._pass_on()
            self._next_row += int(count)

    def _append(self, values_MX: np.ndarray, width: int, tail_T: np.ndarray, written_M: np.ndarray | None) -> None:
        given = values_MX if isinstance(values_MX, np.ndarray) else np.asarray(values_MX)
        if given.dtype != np.float32 or given.ndim != 2 or given.shape[1] != width:
            raise InvalidArgument(f"values are {given.dtype} {given.shape}; float32 (M, {width}) was expected.")
        if written_M is not None and (written_M.dtype != np.bool_ or written_M.shape != given.shape[:1]):
            raise InvalidArgument(f"written_M is {written_M.dtype} {written_M.shape}; bool {given.shape[:1]} expected.")
        self._check_rows(len(given))
        with self._whole():
            done = 0
            while done < len(given):
                count = min(len(given) - done, len(self._buffers[0]) - self._filled)
                words_MX = np.ascontiguousarray(given[done : done + count]).view(np.uint32)
                records_MW = self._buffers[0][self._filled : self._filled + count]
                threads.run(seal_next, count, self._next_row, words_MX, tail_T, self._keys_W, records_MW)
                if written_M is not None:
                    threads.run(clear_unwritten, count, written_M[done : done + count], records_MW)
                done, self._filled, self._next_row = done + count, self._filled + count, self._next_row + count
                if self._filled == len(self._buffers[0]):
                    self._pass_on()

    def _check_rows(self, count: int) -> None:
        most = MAX_ROWS if self._num_rows is None else self._num_rows
        if self._pid != os.getpid():
            raise ForkedTable(
                f"{self._aside.path} is being written by process {self._pid}; this forked child ({os.getpid()}) may "
                "not. Write it there, or make a table of its own in the child."
            )
        if not self._end.alive:
            raise TableClosed(f"{self._aside.path}: this BulkTable was finished or given up. Start with a new one.")
        if count < 0 or self._next_row + count > most:
            raise InvalidArgument(
                f"{count} more rows were given after {self._next_row}, but the table gets {most} rows. Give the right "
                "num_rows, or leave it open until finish()."
            )

    def _pass_on(self) -> None:
        """Hand the buffer to the background thread and go on with the other one, when that is written."""
        if self._filled:
            first = self._next_row - self._filled
            task = threads.write_behind(self._chunks.write, first, self._buffers[0][: self._filled])
            self._buffers.reverse()
            self._tasks = [self._tasks[1], task]
            self._filled = 0
        self._wait(0)

    def _wait(self, which: int) -> None:
        task = self._tasks[which]
        if task is not None:
            task.wait()
            self._tasks[which] = None
            if task.error is not None:
                raise task.error

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What breaks off inside leaves a table that nobody can finish: remove it."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    # -- the end --------------------------------------------------------------------------------------------

    def finish(
        self,
        num_rows: int | None = None,
        note: str = "created",
        *,
        scalars: dict[str, Any] | None = None,
        payload: Any = None,
        init: InitialValues | None = None,
        attributes: dict[str, Any] | None = None,
    ) -> None:
        """Make the table durable and move it to its path. When that fails, everything is removed, with one exception.

        The table appears by a rename, whole. If only what comes after that fails (the sync of the folder around it),
        StorageFailed says so: the table stands at its path, but its name may not survive a power cut.

        Any Zarr reader sees exactly the table if every row was written.

        Args:
            num_rows: V, at least `next_row`; by default what the constructor was given, or `next_row`.
            note, payload, scalars: of the first generation, number 0.
            init, attributes: what rows hold that are not written, and more attributes, where they are known only now.

        Raises:
            InvalidArgument: V is 0, or less than the rows there are. TableExists: somebody else made the path.
            StorageFailed, DiskFull: see above. ForkedTable: this is a forked child.
        """
        self._check_rows(0)
        spec = self._final_spec(num_rows, init, attributes)
        birth = Commit(0, 0, spec.num_rows, str(note), time.time(), True, dict(scalars or {}), payload)
        checked_json("payload", payload)
        with self._whole():
            self._pass_on()
            self._wait(1)
            self._chunks.finish(spec)
            superblock = Superblock.fresh(spec.num_chunks, birth)
            for chunk, (written, total) in self._chunks.sums.items():
                superblock.written_C[chunk], superblock.sums_C[chunk] = written, total
            self._aside.place(spec, superblock, plain=int(superblock.written_C.sum()) == spec.num_rows)
        self._end()

    def _final_spec(
        self, num_rows: int | None, init: InitialValues | None, attributes: dict[str, Any] | None
    ) -> TableSpec:
        given = num_rows if num_rows is not None else self._num_rows
        rows = self._next_row if given is None else checked_integer("num_rows", given)
        if rows < self._next_row:
            raise InvalidArgument(f"num_rows={rows} is less than the {self._next_row} rows that were appended.")
        attributes = checked_attributes(self._spec.attributes, attributes)
        chunk_rows = self._spec.chunk_rows
        if self._may_shrink and 0 < rows <= chunk_rows:  # V was open, and the table is small: so is its file
            chunk_rows = min(chunk_rows, default_chunk_rows(rows, self._spec.record_bytes))
        init = init or self._spec.init
        return replace(self._spec, num_rows=rows, chunk_rows=chunk_rows, init=init, attributes=attributes)

    def abandon(self) -> None:
        """Remove everything; does nothing after `finish`. Safe to repeat."""
        self._end()

    def __enter__(self) -> "BulkTable":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()


def _abandon(aside: Aside, chunks: ChunkWriter) -> None:
    """Stop writing and remove everything; a forked child only closes its copies of the files."""
    chunks.close()
    aside.remove()
