"""copy_table: a new table equal to the last commit of another one, in bounded memory, also beside its writer.

A reader's journal never changes under it, and a merge writes a row into the base only if the journal has it. So base
and journal together stay the commit that the reader opened, until a merge of *newer* commits begins. Whether one did
is looked up after the last row was read: the copy is one commit exactly, or it is not made.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from bigembed import threads
from bigembed.errors import BigembedError, DamagedTable, InvalidArgument, StorageFailed, TableLocked
from bigembed.kernels.records import count_and_sum, first_damaged
from bigembed.storage import files, zarr_format
from bigembed.storage.base import SCAN_BYTES
from bigembed.storage.bulk import BulkTable
from bigembed.storage.create import absolute_path
from bigembed.storage.rewrite import is_rewriting
from bigembed.storage.store import Limits, RecordStore
from bigembed.storage.superblock import Superblock
from bigembed.storage.token_frames import write_log
from bigembed.storage.token_log import NAME as ADDED
from bigembed.storage.token_log import VOCAB, TokenLog
from bigembed.storage.upkeep import Progress

ROUNDS = 5
GAP_BYTES = 64 << 10  # holes up to this size are read with what is around them
LOOK_SECONDS = 1.0


def copy_table(
    source_path: str | os.PathLike[str],
    target_path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Make a new table with every row, state, scalar and attribute of the source's last commit, and its vocabulary.

    The journal is merged in. Rows that were never written stay so, and take no disk. The copy is at its generation 0.

    Args:
        source_path: a table; its writer may go on meanwhile. target_path: a folder that does not exist yet.
        overwrite: replace a table at the target.
        progress: called with (rows done, all rows).

    Raises:
        TableLocked: the source's writer merged newer commits into the base whenever a copy was half done.
        DamagedTable, DamagedRow: the source is damaged; nothing is made. TableExists: something is at the target.
        InvalidArgument: source and target are the same, or one is inside the other.
    """
    source, target = absolute_path(source_path), absolute_path(target_path, overwrite)
    _check_apart(source, target)
    for _ in range(ROUNDS):
        if _copy(source, target, overwrite, progress):
            return
    raise TableLocked(
        f"{source} was changed by its writer each of the {ROUNDS} times that it was copied. Copy it while nobody "
        "writes it, or let its writer commit and merge less often."
    )


def _check_apart(source: str, target: str) -> None:
    here, there = os.path.realpath(source), os.path.realpath(target)
    if here == there:
        raise InvalidArgument(f"{source} cannot be copied onto itself. Choose another target.")
    for inner, outer in ((there, here), (here, there)):
        if os.path.commonpath([inner, outer]) == outer:
            raise InvalidArgument(f"{source} cannot be copied to {target}: {inner} is inside {outer}. Choose another.")


def _copy(source: str, target: str, overwrite: bool, progress: Progress | None) -> bool:
    """Try once; False if the source moved on meanwhile: then nothing is left."""
    store = RecordStore(source, False, Limits(), "cold")
    spec, head = store.spec, store.journal.head
    facts = {name: getattr(spec, name) for name in ("dim", "num_rows", "state", "owner", "init", "seed")}
    more = {name: getattr(spec, name) for name in ("chunk_rows", "padding_idx", "attributes")}
    try:
        with BulkTable(target, **facts, **more, overwrite=overwrite) as bulk:
            try:
                rows = _Rows(store, progress)
                if not rows.copy_to(bulk) or not copy_vocabulary(source, bulk.folder, spec.num_rows):
                    return False
            except (DamagedTable, StorageFailed, FileNotFoundError):
                if _is_as_opened(store):
                    raise
                return False
            if not _is_as_opened(store):
                return False
            rows.check_sums()
            bulk.finish(note=f"copy of generation {head.number}", scalars=head.scalars, payload=head.payload)
            return True
    finally:
        store.close()


def _is_as_opened(store: RecordStore) -> bool:
    """Whether what the store has read since it was opened is its head commit and nothing newer."""
    head = store.journal.head.number
    try:
        if is_rewriting(store.path) or not _same_facts(store):
            return False
        now = Superblock.read(store.path)
        if now.base.number > head:
            return False
        if not now.suspect:
            return True
        # A merge is under way: one of older commits, unless newer ones have come since.
        again = RecordStore(store.path, False, store.limits, "cold")
        again.close()
        return again.journal.head.number == head and _same_facts(store)
    except (BigembedError, FileNotFoundError):
        return False


def _same_facts(store: RecordStore) -> bool:
    spec, _, _ = zarr_format.read_metadata(store.path)
    return replace(spec, num_rows=store.spec.num_rows) == store.spec


class _Rows:
    """One pass over the rows of a store, chunk by chunk, that reads only what can hold written rows."""

    def __init__(self, store: RecordStore, progress: Progress | None) -> None:
        self._store, self._spec, self._progress = store, store.spec, progress
        self._rows, self._places = store.journal.active.index.sorted_items()
        self._counted: dict[int, tuple[int, int]] = {}
        self._looked = time.monotonic()

    def copy_to(self, bulk: BulkTable) -> bool:
        """Append every row; False, soon, when the base has moved on meanwhile."""
        for chunk in self._chunks():
            for first, count in self._stretches(chunk):
                bulk.skip(first - bulk.next_row)
                bulk.append_rows(*self._read(chunk, first, count))
                if self._progress is not None:
                    self._progress(bulk.next_row, self._spec.num_rows)
                if not self._is_still_there():
                    return False
            if self._store.base.is_larger_than_memory and chunk in self._store.base.chunks.present:
                self._store.base.chunks.for_reading(chunk).forget_pages()
        if self._progress is not None:
            self._progress(self._spec.num_rows, self._spec.num_rows)
        return True

    def _is_still_there(self) -> bool:
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return True
        self._looked = time.monotonic()
        return Superblock.read(self._store.path).base.number <= self._store.journal.head.number

    def _chunks(self) -> list[int]:
        in_journal = np.unique(self._rows // self._spec.chunk_rows).tolist()
        there = self._store.base.chunks.present | set(in_journal)
        return sorted(chunk for chunk in there if chunk < self._spec.num_chunks)

    def _stretches(self, chunk: int) -> Iterator[tuple[int, int]]:
        """(first row, count) of stretches that hold all written rows of a chunk, each at most 8 MiB."""
        first = chunk * self._spec.chunk_rows
        a, b = np.searchsorted(self._rows, [first, first + self._spec.chunk_rows])
        starts, stops = [self._rows[a:b]], [self._rows[a:b] + 1]
        if chunk in self._store.base.chunks.present:
            file, offset = self._store.base.chunks.for_reading(chunk), 0
            while (data := file.data_after(offset)) is not None:
                starts.append(np.array([first + data[0] // self._spec.record_bytes]))
                stops.append(np.array([first + -(-data[1] // self._spec.record_bytes)]))
                offset = data[1]
        step = max(1, SCAN_BYTES // self._spec.record_bytes)
        for start, stop in _joined(np.concatenate(starts), np.concatenate(stops), GAP_BYTES // self._spec.record_bytes):
            stop = min(stop, self._spec.num_rows)
            yield from ((row, min(step, stop - row)) for row in range(start, stop, step))

    def _read(self, chunk: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(weight and state of these rows, which of them were written)."""
        store, rows_M = self._store, np.arange(first, first + count)
        records_MW = store.base.read_stretch(first, count)
        written, total = map(int, count_and_sum(records_MW))
        before, sum_before = self._counted.get(chunk, (0, 0))
        self._counted[chunk] = before + written, (sum_before + total) % (1 << 64)
        a, b = np.searchsorted(self._rows, [first, first + count])
        if b > a:
            records_MW[self._rows[a:b] - first] = store.journal.read(self._places[a:b], self._rows[a:b], store.keys_W)
        for m in threads.run(first_damaged, count, rows_M, records_MW, store.keys_W):
            if m >= 0:
                raise store.base.damaged(first + int(m))
        return records_MW[:, :-1].view(np.float32), records_MW[:, -1] != 0

    def check_sums(self) -> None:
        """Where no merge was under way, each chunk held what the superblock says: no row was lost on the way here."""
        then = self._store.superblock
        if then.suspect or Superblock.read(self._store.path).encode() != then.encode():
            return
        for chunk, (written, total) in enumerate(zip(then.written_C.tolist(), then.sums_C.tolist(), strict=True)):
            if (written, total) != self._counted.get(chunk, (0, 0)):
                raise DamagedTable(
                    f"{self._store.base.chunks.path(chunk)} does not hold the {written} rows that the superblock says: "
                    "rows were lost or are stale. Restore the file from a backup."
                )


def _joined(start_G: np.ndarray, stop_G: np.ndarray, gap: int) -> list[tuple[int, int]]:
    """The union of ranges, ascending; those with at most `gap` between them become one."""
    if not len(start_G):
        return []
    order = np.argsort(start_G, kind="stable")
    start_G, reach_G = start_G[order], np.maximum.accumulate(stop_G[order])
    last = np.flatnonzero(start_G[1:] > reach_G[:-1] + gap)
    return list(
        zip([int(start_G[0]), *start_G[last + 1].tolist()], [*reach_G[last].tolist(), int(reach_G[-1])], strict=True)
    )


# -- the vocabulary ---------------------------------------------------------------------------------------------


def copy_vocabulary(source: str, target: str, num_rows: int) -> bool:
    """Copy `vocab/` of a table of V rows, with the added tokens that count; False if it changed meanwhile."""
    there, here = os.path.join(source, VOCAB), os.path.join(target, VOCAB)
    if not os.path.isdir(there):
        return True
    before = _moment(there)
    files.make_directory(here)
    for name in sorted(os.listdir(there)):
        if name != ADDED and not name.endswith(".new") and os.path.isfile(os.path.join(there, name)):
            _copy_file(os.path.join(there, name), os.path.join(here, name))
    log = TokenLog(source, num_rows, is_writer=False)
    try:
        if os.path.exists(log.path):
            write_log(here, log.parts(num_rows))
    finally:
        log.close()
    files.sync_directory(here)
    return _moment(there) == before


def _moment(folder: str) -> list[tuple[int, ...]]:
    """What changes when the folder or a file in it is replaced, but for the log, which only grows or goes back."""
    paths = [folder, *(os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name != ADDED)]
    return [(at.st_dev, at.st_ino, at.st_mtime_ns, at.st_size) for at in map(os.stat, paths)]


def _copy_file(source: str, target: str) -> None:
    read, write = files.File(source, files.READ), files.File(target, files.WRITE | os.O_EXCL)
    try:
        offset = 0
        while part := read.pread(SCAN_BYTES, offset):
            write.pwrite(part, offset)
            offset += len(part)
        write.sync_all()
    finally:
        read.close()
        write.close()
