"""verify: read everything a table has and compare it with every check and sum."""

import time
from dataclasses import dataclass, replace

from bigembed.errors import DamagedTable
from bigembed.storage import zarr_format
from bigembed.storage.store import RecordStore
from bigembed.storage.superblock import Superblock
from bigembed.storage.upkeep import Progress

PAUSES = 0.01, 0.1, 0.5  # seconds that a reader gives the writer for its metadata


@dataclass(frozen=True)
class VerifyReport:
    """What was read and found sound."""

    chunks: int
    written_rows: int
    journal_records: int
    undo_records: int


def verify_store(store: RecordStore, progress: Progress | None = None) -> VerifyReport:
    """Check every record, every chunk's count and sum, every journal checksum, and zarr-python's view.

    Raises:
        DamagedTable, DamagedRow: the first damage found, naming file and row.
    """
    _check_metadata(store)
    store.base.chunks.check_sizes(store.superblock.written_C.tolist())
    rows = 0
    present = sorted(store.base.chunks.present)
    for done, chunk in enumerate(present):
        rows += _verify_chunk(store, chunk)
        if progress is not None:
            progress(done + 1, len(present))
    in_journal = store.journal.verify(store.keys_W)
    in_undo = store.undo.verify(store.keys_W) if store.undo is not None else 0
    if store.tokens is not None:
        store.tokens.entries(store.spec.num_rows)  # which checks the log of added tokens
    return VerifyReport(len(present), rows, in_journal, in_undo)


def _check_metadata(store: RecordStore) -> None:
    if store.is_writer:
        zarr_format.check_with_zarr(store.path, replace(store.spec, num_rows=store.stored_rows))  # it may have grown
        return
    # Beside a reader the writer may replace the array's metadata, then the group's; or it was stopped in between.
    for pause in (*PAUSES, None):
        try:
            spec, _, _ = zarr_format.read_metadata(store.path)
            zarr_format.check_with_zarr(store.path, spec, also_rows=store.spec.num_rows)
            return
        except DamagedTable:
            if pause is None:
                raise
            time.sleep(pause)


def _verify_chunk(store: RecordStore, chunk: int) -> int:
    superblock = store.superblock
    while True:
        written, total = store.base.count_chunk(chunk, store.keys_W)
        if superblock.suspect:  # an unfinished merge or publish: its chunks' sums come right when it is done
            return written
        inside = chunk < len(superblock.written_C)
        expected = (int(superblock.written_C[chunk]), int(superblock.sums_C[chunk])) if inside else (0, 0)
        if (written, total) == expected:
            return written
        now = superblock if store.is_writer else Superblock.read(store.path)
        if now.encode() == superblock.encode():
            raise DamagedTable(
                f"{store.base.chunks.path(chunk)} holds {written} written rows (checks sum to {total:016x}), the "
                f"superblock says {expected[0]} ({expected[1]:016x}): rows were lost or are stale. "
                "Restore the file from a backup."
            )
        superblock = now  # the writer beside this reader has merged since
