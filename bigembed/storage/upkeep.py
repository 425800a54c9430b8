"""What keeps a RecordStore inside its limits and restores it: merges, rollback, publish. Functions of a store."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from bigembed import threads
from bigembed.kernels.records import count_and_sum, seal, unseal
from bigembed.storage.journal import Journal
from bigembed.storage.merge import EpochSource, Merge, RollbackSource, UndoNeeds
from bigembed.storage.superblock import Commit, Superblock

if TYPE_CHECKING:
    from bigembed.storage.store import RecordStore

Progress = Callable[[int, int], None]  # (done, total)


# -- merge ----------------------------------------------------------------------------------------------------


def begin_merge(store: "RecordStore") -> None:
    """Freeze what is committed and start folding it into the base; nothing of it may be uncommitted."""
    assert store.merge is None
    if store.journal.frozen is None:
        if store.journal.head.number == store.superblock.base.number:
            return
        store.journal.freeze()
    epoch = store.journal.frozen
    assert epoch is not None
    assert store.undo is not None
    broke_off = store.superblock.suspect
    working = _mark_suspect(store, "merge")
    if broke_off == "all":
        _recount_all(store, working)
    source = EpochSource(store.journal, epoch, store.keys_W)
    needs = UndoNeeds(store.journal, store.undo, epoch, source, store.keys_W)
    store.merge = Merge(store.spec, store.base, source, working, store.keys_W, needs.save, recount=broke_off == "merge")


def _mark_suspect(store: "RecordStore", suspect: str) -> Superblock:
    """Say durably that sums are about to be wrong; returns a copy to work on, kept when the work is done."""
    store.superblock.resize(store.spec.num_chunks)
    if store.superblock.suspect != "all":
        store.superblock.suspect = suspect
    store.superblock.write(store.path)
    return store.superblock.copy()


def advance_merge(store: "RecordStore", rows: int) -> bool:
    """Merge about `rows` more rows; True when no merge is left. On an error the merge starts over later."""
    if store.merge is None:
        return True
    before = store.merge.rows_done
    try:
        if not store.merge.advance(rows):
            store.counters.merged_rows += store.merge.rows_done - before
            return False
        store.counters.merged_rows += store.merge.rows_done - before
        _finish_merge(store)
    except BaseException:
        abandon_merge(store)
        raise
    return True


def _finish_merge(store: "RecordStore") -> None:
    assert store.merge is not None
    assert store.undo is not None
    epoch = store.journal.frozen
    assert epoch is not None
    assert epoch.head is not None
    working = store.merge.superblock
    working.base, working.retained, working.suspect = epoch.head, store.journal.retained, ""
    working.write(store.path)
    store.superblock, store.merge = working, None
    store.undo.end_segment()
    store.journal.drop_frozen()
    store.counters.merges += 1


def abandon_merge(store: "RecordStore") -> None:
    """Forget a merge under way. Its records stay in the journal; another merge writes every one again."""
    if store.merge is not None:
        store.merge = None
        store.base.abandon_writes()
        if store.undo is not None:
            store.undo.end_segment()


def keep_pace(store: "RecordStore", fill: float) -> None:
    """Advance a merge so that it is done well before the active epoch, now `fill` full, is 1.0 full."""
    if store.journal.frozen is None:
        return
    if store.merge is None:
        begin_merge(store)
    assert store.merge is not None
    goal = int(store.merge.total_rows * min(1.0, 1.25 * fill))
    if goal > store.merge.rows_done:
        advance_merge(store, goal - store.merge.rows_done)


def finish_merges(store: "RecordStore", progress: Progress | None = None) -> None:
    """Merge everything that is frozen; nothing is left of it in the journal."""
    if store.journal.frozen is not None and store.merge is None:
        begin_merge(store)
    while store.merge is not None:
        total = store.merge.total_rows
        if progress is not None:
            progress(store.merge.rows_done, total)
        if advance_merge(store, 1 << 16):
            return


def make_room(store: "RecordStore") -> None:
    """The active epoch is full and committed: see the one before off, and freeze this one."""
    if store.journal.frozen is not None:
        store.counters.stalls += 1
        start = time.perf_counter()
        finish_merges(store)
        store.counters.stall_seconds += time.perf_counter() - start
    begin_merge(store)


def _recount_all(store: "RecordStore", working: Superblock) -> None:
    for chunk in sorted(store.base.chunks.present):
        written, total = store.base.count_chunk(chunk)
        working.written_C[chunk], working.sums_C[chunk] = written, total


# -- rollback -------------------------------------------------------------------------------------------------


def rollback(store: "RecordStore", commit: Commit) -> None:
    """Make `commit`, whose rollback_to is the retained generation, the state of the table.

    The commit record is the promise; bringing the base there may be interrupted and is finished on the next open.
    """
    abandon_merge(store)
    store.journal.commit(commit)
    store.is_sound = False  # a commit after a rollback that stopped half-way would hide it: reload, or open anew
    finish_rollback(store, commit)


def finish_rollback(store: "RecordStore", commit: Commit) -> None:
    """Bring the base to the generation that `commit` restored, and empty journal and undo."""
    assert store.undo is not None
    superblock = store.superblock
    journal = Journal(
        store.folder("journal"), store.spec, superblock.base, superblock.retained, until=commit.rollback_to
    )
    try:
        broke_off = superblock.suspect
        working = _mark_suspect(store, "merge")
        source = RollbackSource(store.spec, journal, store.undo, store.keys_W)
        if broke_off == "all":
            _recount_all(store, working)
        merge = Merge(store.spec, store.base, source, working, store.keys_W, None, recount=broke_off == "merge")
        while not merge.advance(1 << 16):
            pass
        working.base, working.retained, working.suspect = commit, commit, ""
        working.write(store.path)
        store.superblock = working
    finally:
        journal.close()
        store.base.abandon_writes()
    store.journal.close()
    store.journal = Journal(store.folder("journal"), store.spec, commit, commit)
    store.journal.remove_stale()
    store.undo.start_anew(commit.number)
    store.set_num_rows(commit.num_rows)


# -- publish --------------------------------------------------------------------------------------------------


def publish(store: "RecordStore", progress: Progress | None = None) -> None:
    """Write initial values where nothing was ever written, so that any Zarr reader sees the whole table.

    Everything must be committed. Costs V records of disk.
    """
    begin_merge(store)
    finish_merges(store)
    working = _mark_suspect(store, "all")
    for chunk in range(store.spec.num_chunks):
        written, total = 0, 0
        for row, count in store.base.stretches(chunk):
            records_MW = store.base.read_stretch(row, count)
            _write_initial(store, np.arange(row, row + count), records_MW)
            store.base.write_stretch(row, records_MW)
            some, part = count_and_sum(records_MW)
            written, total = written + int(some), (total + int(part)) % (1 << 64)
        store.base.sync_written()
        working.written_C[chunk], working.sums_C[chunk] = written, total
        if progress is not None:
            progress(chunk + 1, store.spec.num_chunks)
    working.suspect = ""
    working.write(store.path)
    store.superblock = working
    store.write_metadata(plain=True)


def _write_initial(store: "RecordStore", rows_M: np.ndarray, records_MW: np.ndarray) -> None:
    """Turn all-zero records into records of their initial values; sound ones stay as they are."""
    values_ME = np.empty((len(rows_M), store.spec.row_width), np.float32)
    args = (rows_M, records_MW, store.keys_W, store.initial, values_ME)
    for m in threads.run(unseal, len(rows_M), *args, grain=256):
        if m >= 0:
            raise store.base.damaged(int(rows_M[m]))
    threads.run(seal, len(rows_M), rows_M, values_ME, store.keys_W, records_MW)
