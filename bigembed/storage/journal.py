"""Journal: records appended since the base, and the index that says where the newest of each row is.

Two epochs at most: `active` takes appends; `frozen`, when there is one, is being merged into the base and never
changes. A row is looked up in active, then frozen; only what neither has is read from the base.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from bigembed import threads
from bigembed.errors import DamagedTable
from bigembed.kernels.records import check_keys, first_damaged
from bigembed.spec import TableSpec
from bigembed.storage import files
from bigembed.storage.places import offset_of, place_of, read_places, sequence_of
from bigembed.storage.row_index import NOWHERE, RowIndex
from bigembed.storage.segments import (
    COMMIT,
    JOURNAL,
    SegmentReader,
    SegmentWriter,
    list_segments,
    segment_name,
)
from bigembed.storage.superblock import Commit
from bigembed.storage.write_behind import WriteBehind


@dataclass
class Epoch:
    """Segments between two merges, and what is in them.

    `superseded` has, of rows written again after the retained commit, the place of their record at that commit.
    """

    index: RowIndex = field(default_factory=RowIndex)
    superseded: RowIndex = field(default_factory=RowIndex)
    sequences: list[int] = field(default_factory=list)
    disk_bytes: int = 0
    head: Commit | None = None  # the last commit in it, once it is frozen


class Journal:
    """The journal of one table.

    Args:
        folder: the table's journal folder.
        spec: the record layout.
        base: the commit that the base holds.
        retained: the last explicit commit known to the superblock.
        until: recover only commits up to this generation (what a rollback to it needs); None for all.

    Raises:
        DamagedTable: something before a valid commit record is invalid, or a segment is missing.
    """

    def __init__(self, folder: str, spec: TableSpec, base: Commit, retained: Commit, until: int | None = None) -> None:
        self._folder = folder
        self._spec = spec
        self._files: dict[int, files.File] = {}
        self._writer: SegmentWriter | None = None
        self._behind = WriteBehind(check_keys(spec))
        self.active = Epoch()
        self.frozen: Epoch | None = None
        self.head = base
        self.retained = retained
        self.retained_place = NOWHERE  # end of the retained commit in the journal; NOWHERE: it is in the base
        self.has_uncommitted = False
        self.is_poisoned = False  # a sync failed
        self.stale: list[int] = []  # segments that hold nothing above the base
        try:
            self._recover(base, until)
        except BaseException:
            self.close()
            raise

    # -- recovery -------------------------------------------------------------------------------------------

    def _recover(self, base: Commit, until: int | None) -> None:
        for sequence in list_segments(self._folder):
            reader = SegmentReader(self._folder, JOURNAL, sequence, self._spec)
            try:
                self._recover_segment(reader, base, until)
            except BaseException:
                reader.close()
                raise
        if until is None and self.head.number < self.retained.number:
            raise DamagedTable(
                f"{self._folder}: generation {self.retained.number} was committed, but its segment is missing. "
                "Restore the journal from a backup."
            )

    def _recover_segment(self, reader: SegmentReader, base: Commit, until: int | None) -> None:
        pending, last = [], -1
        for frame in reader.frames():
            if frame.commit is None:
                pending.append(frame)
                continue
            last = frame.commit.number
            if last > base.number and (until is None or last <= until):
                if reader.generation > self.head.number:
                    raise DamagedTable(
                        f"{self._folder}: the segment before {segment_name(reader.sequence)} is missing (it should "
                        f"end with generation {reader.generation}). Restore the journal from a backup."
                    )
                for rows in pending:
                    assert rows.rows_M is not None
                    self._check_rows(rows.rows_M, frame.commit, reader.file.path)
                    self._index(rows.rows_M, place_of(reader.sequence, rows.records_offset))
                self._note_commit(frame.commit, place_of(reader.sequence, frame.end))
            pending.clear()
        beyond = reader.valid_frame_beyond(COMMIT)
        if beyond >= 0:
            raise DamagedTable(
                f"{reader.file.path} is damaged between byte {reader.end} and the commit record at byte {beyond}. "
                "Restore the journal from a backup."
            )
        if last > base.number:
            self.active.sequences.append(reader.sequence)
            self.active.disk_bytes += reader.size_bytes
            self._files[reader.sequence] = reader.file
        else:
            self.stale.append(reader.sequence)
            reader.close()

    def _check_rows(self, rows_M: np.ndarray, commit: Commit, path: str) -> None:
        if len(rows_M) and not 0 <= rows_M.min() <= rows_M.max() < commit.num_rows:
            raise DamagedTable(f"{path} names rows outside the table's {commit.num_rows}. Restore it from a backup.")

    def _index(self, rows_M: np.ndarray, first_place: int) -> None:
        places_M = first_place + np.arange(len(rows_M), dtype=np.int64) * self._spec.record_bytes
        if self.retained_place != NOWHERE:
            old_M = self.active.index.find(rows_M)
            kept = (old_M != NOWHERE) & (old_M < self.retained_place)
            if kept.any():  # first: a Ctrl-C between the two must not lose where the retained ones are
                self.active.superseded.put(rows_M[kept], old_M[kept])
        self.active.index.put(rows_M, places_M)

    def _note_commit(self, commit: Commit, place: int) -> None:
        self.head = commit
        self.has_uncommitted = False
        if commit.explicit:
            self.retained = commit
            self.retained_place = place
            self.active.superseded = RowIndex()
            if self.frozen is not None:
                self.frozen.superseded = RowIndex()

    # -- reading --------------------------------------------------------------------------------------------

    def find(self, rows_M: np.ndarray) -> np.ndarray:
        """int64 places of the newest records, NOWHERE for rows that only the base can have."""
        places_M = self.active.index.find(rows_M)
        if self.frozen is not None:
            rest = np.flatnonzero(places_M == NOWHERE)
            places_M[rest] = self.frozen.index.find(rows_M[rest])
        return places_M

    def read(self, places_M: np.ndarray, rows_M: np.ndarray, keys_W: np.ndarray) -> np.ndarray:
        """The records at these places, checked: uint32 (M, W). Reads in file order.

        Raises:
            DamagedTable: a record's check is wrong.
        """
        self._behind.settle(places_M)
        records_MW = read_places(self._files, places_M, self._spec.record_words)
        damaged = [m for m in threads.run(first_damaged, len(rows_M), rows_M, records_MW, keys_W) if m >= 0]
        damaged.extend(np.flatnonzero(records_MW[:, -1] == 0)[:1].tolist())  # a lost page: none is appended unwritten
        if damaged:
            m = damaged[0]
            path = self._files[sequence_of(places_M[m])].path
            raise DamagedTable(
                f"{path}: the record of row {rows_M[m]} at byte {offset_of(places_M[m])} is damaged. "
                "Roll back, or restore the journal from a backup."
            )
        return records_MW

    def segments_again(self, sequences: Iterable[int]) -> dict[int, files.File]:
        """These segments under descriptors of their own: a merge that removes them does not take them away."""
        return {sequence: self._files[sequence].again() for sequence in sequences}

    # -- writing --------------------------------------------------------------------------------------------

    def append(self, rows_M: np.ndarray, records_MW: np.ndarray, check_sum: int) -> None:
        """Append records of distinct rows; not durable before `commit`."""
        self._behind.settle()
        writer = self._open_writer()
        before = writer.end
        self.has_uncommitted = True
        offset = writer.append_rows(rows_M, records_MW, check_sum)
        self._took(writer, before, rows_M, offset)

    def append_behind(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """As `append`, of rows that are not sealed yet: another thread does that and writes them.

        The arrays are the journal's from now on. What the system refuses is raised by a later call, see WriteBehind.
        """
        self._behind.make_room()
        writer = self._open_writer()
        before = writer.end
        self.has_uncommitted = True
        offset = writer.reserve_rows(len(rows_M))
        self._behind.put(writer, rows_M, values_ME, before, place_of(writer.sequence, offset))
        self._took(writer, before, rows_M, offset)

    def _took(self, writer: SegmentWriter, before: int, rows_M: np.ndarray, offset: int) -> None:
        self.active.disk_bytes += writer.end - before
        self._index(rows_M, place_of(writer.sequence, offset))

    def commit(self, commit: Commit) -> None:
        """Make everything appended durable, then the commit record that makes it count."""
        self._behind.settle()
        writer = self._open_writer()
        before = writer.end
        if self.has_uncommitted:
            self._sync(writer)
        try:
            writer.append_commit(commit)
        except Exception:
            raise  # nothing of it counts, and the next one goes to the same place
        except BaseException:  # Ctrl-C: it may be there whole
            self.is_poisoned = True
            raise
        self._sync(writer)
        self.active.disk_bytes += writer.end - before
        self._note_commit(commit, place_of(writer.sequence, writer.end))

    def _sync(self, writer: SegmentWriter) -> None:
        """Sync; a failure poisons: the kernel may have dropped the pages and call the next sync a success.

        So does Ctrl-C: a commit record may be there that nobody knows of, and its number must not be used again.
        """
        try:
            writer.file.sync()
        except BaseException:
            self.is_poisoned = True
            raise

    def _open_writer(self) -> SegmentWriter:
        if self._writer is None:
            sequence = max(list_segments(self._folder), default=0) + 1
            self._writer = SegmentWriter(self._folder, JOURNAL, sequence, self.head.number, self._spec)
            self._files[sequence] = self._writer.file
            self.active.sequences.append(sequence)
            self.active.disk_bytes += self._writer.end
        self._writer.take_back(self._behind.end)  # a frame that was reserved and, after a Ctrl-C, never noted
        return self._writer

    # -- merging --------------------------------------------------------------------------------------------

    def freeze(self) -> Epoch:
        """Close the active epoch, all of it committed, so that it can be merged; appends start a new one."""
        assert self.frozen is None
        assert not self.has_uncommitted
        self.frozen, self.active = self.active, Epoch()
        self.frozen.head = self.head
        self._writer = None
        return self.frozen

    def drop_frozen(self) -> None:
        """Forget and remove the frozen epoch: the base holds it."""
        assert self.frozen is not None
        epoch, self.frozen = self.frozen, None
        if self.retained_place != NOWHERE and sequence_of(self.retained_place) in epoch.sequences:
            self.retained_place = NOWHERE
        self._remove(epoch.sequences)

    def remove_stale(self) -> None:
        """Remove segments that the base has already taken in."""
        self._remove(self.stale)
        self.stale = []

    def _remove(self, sequences: list[int]) -> None:
        for sequence in sequences:
            file = self._files.pop(sequence, None)
            if file is not None:
                file.close()
            files.unlink(os.path.join(self._folder, segment_name(sequence)))
        if sequences:
            files.sync_directory(self._folder)

    # -- accounts -------------------------------------------------------------------------------------------

    @property
    def files(self) -> list[files.File]:
        """The segments that hold something above the base."""
        return list(self._files.values())

    @property
    def epochs(self) -> list[Epoch]:
        return [self.active] if self.frozen is None else [self.active, self.frozen]

    @property
    def disk_bytes(self) -> int:
        return sum(epoch.disk_bytes for epoch in self.epochs)

    @property
    def index_bytes(self) -> int:
        return sum(epoch.index.memory_bytes + epoch.superseded.memory_bytes for epoch in self.epochs)

    @property
    def behind(self) -> WriteBehind:
        """Frames that are being written."""
        return self._behind

    @property
    def rows(self) -> int:
        return sum(len(epoch.index) for epoch in self.epochs)

    def verify(self, keys_W: np.ndarray) -> int:
        """Check every committed record and every frame's sum; returns the number of records.

        Raises:
            DamagedTable: naming the file and the place.
        """
        self._behind.settle()
        checked = 0
        for sequence in sorted(s for epoch in self.epochs for s in epoch.sequences):
            reader = SegmentReader(self._folder, JOURNAL, sequence, self._spec)
            try:
                for frame in reader.frames():
                    if frame.rows_M is None or not len(frame.rows_M):
                        continue
                    step = self._spec.record_bytes
                    places_M = place_of(sequence, frame.records_offset) + np.arange(len(frame.rows_M)) * step
                    records_MW = self.read(places_M, frame.rows_M, keys_W)
                    if int(records_MW[:, -1].sum(dtype=np.uint64)) != frame.check_sum:
                        raise DamagedTable(
                            f"{reader.file.path}: the records of the frame at byte {frame.offset} "
                            "are not those that were written. Restore the journal from a backup."
                        )
                    checked += len(frame.rows_M)
            finally:
                reader.close()
        return checked

    def close(self) -> None:
        try:
            self._behind.wait()
        finally:
            self._close_files()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
