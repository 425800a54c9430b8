"""Rewrite: the same rows with other state columns, made aside and switched in; old or new after any crash.

The new table is built whole in `next/`, whose rename to `ready/` is the moment that decides. What stands in `ready/`
is then moved into place, step by step, each step harmless to repeat.
"""

import os
import time

import numpy as np

from bigembed import threads
from bigembed.kernels.initial import fill_initial, initial_rows
from bigembed.kernels.records import check_keys, count_and_sum, seal, unseal
from bigembed.spec import TableSpec
from bigembed.storage import files, zarr_format
from bigembed.storage.segments import list_segments, segment_name
from bigembed.storage.store import RecordStore
from bigembed.storage.superblock import Commit, Superblock
from bigembed.storage.upkeep import Progress, begin_merge, finish_merges

NEXT, READY = "next", "ready"


def rewrite_state(store: RecordStore, spec: TableSpec, progress: Progress | None = None) -> None:
    """Give every record the state columns of `spec`, at their initial values; weights stay bit for bit.

    Everything must be committed. The result is a new explicit generation; earlier ones cannot be restored.
    Costs one read and one write of the rows ever written, and disk for both until it is done.
    """
    finish_merges(store)
    begin_merge(store)
    finish_merges(store)
    head = store.journal.head
    aside = store.folder(NEXT)
    files.remove_tree(aside)
    files.make_directory(aside)
    files.make_directory(os.path.join(aside, "weight"))
    commit = Commit(
        head.number + 1,
        head.number,
        head.num_rows,
        f"state columns for {spec.owner}",
        time.time(),
        True,
        {},
        None,
    )
    superblock = Superblock.fresh(spec.num_chunks, commit)
    try:
        zarr_format.write_metadata(aside, spec, plain=store.is_plain)
        for done, chunk in enumerate(sorted(store.base.chunks.present)):
            superblock.written_C[chunk], superblock.sums_C[chunk] = _rewrite_chunk(store, spec, aside, chunk)
            if progress is not None:
                progress(done + 1, len(store.base.chunks.present))
        superblock.write(aside)
        files.sync_directory(os.path.join(aside, "weight"))
        files.sync_directory(aside)
        files.rename(aside, store.folder(READY))
    except BaseException:
        files.remove_tree(aside)
        raise
    store.is_sound = False  # until it is in place: what is in memory are the old records
    files.sync_directory(store.path)
    store.close()
    finish_rewrite(store.path)
    store.load()


def _rewrite_chunk(store: RecordStore, spec: TableSpec, aside: str, chunk: int) -> tuple[int, int]:
    """Write one chunk of the new table; returns (rows written, sum of checks)."""
    name = os.path.basename(store.base.chunks.path(chunk))
    file = files.File(os.path.join(aside, "weight", name), files.WRITE)
    keys_W, initial = check_keys(spec), initial_rows(spec)
    written, total = 0, 0
    try:
        file.truncate(spec.chunk_bytes)
        for row, count in store.base.stretches(chunk):
            rows_M = np.arange(row, row + count)
            old_MW = store.base.read_stretch(row, count)
            kept = np.flatnonzero(old_MW[:, -1])
            store.base.check(rows_M, old_MW, store.keys_W)
            if not len(kept):
                continue
            rows, new_MW = rows_M[kept], np.zeros((count, spec.record_words), np.uint32)
            old_ME = np.empty((len(kept), store.spec.row_width), np.float32)
            threads.run(unseal, len(kept), rows, old_MW[kept], store.keys_W, store.initial, old_ME)
            values_ME = np.empty((len(kept), spec.row_width), np.float32)
            threads.run(fill_initial, len(kept), rows, initial, values_ME)
            values_ME[:, : spec.dim] = old_ME[:, : spec.dim]
            sealed_MW = np.empty((len(kept), spec.record_words), np.uint32)
            threads.run(seal, len(kept), rows, values_ME, keys_W, sealed_MW)
            new_MW[kept] = sealed_MW
            file.pwrite(new_MW, (row - chunk * spec.chunk_rows) * spec.record_bytes)
            some, part = count_and_sum(new_MW)
            written, total = written + int(some), (total + int(part)) % (1 << 64)
        file.sync_all()
    finally:
        file.close()
    return written, total


def finish_rewrite(path: str) -> None:
    """Move a finished rewrite into place; does nothing where there is none. Safe to repeat after a crash."""
    files.remove_tree(os.path.join(path, NEXT))
    ready = os.path.join(path, READY)
    if not os.path.isdir(ready):
        return
    weight, old = os.path.join(path, "weight"), os.path.join(ready, "old-weight")
    if os.path.isdir(os.path.join(ready, "weight")):
        if os.path.isdir(weight):
            files.rename(weight, old)
        files.rename(os.path.join(ready, "weight"), weight)
    for name in ("superblock", zarr_format.GROUP_FILE):
        if os.path.exists(os.path.join(ready, name)):
            files.rename(os.path.join(ready, name), os.path.join(path, name))
    for folder in ("journal", "undo"):
        whole = os.path.join(path, folder)
        for sequence in list_segments(whole):
            files.unlink(os.path.join(whole, segment_name(sequence)))
        files.sync_directory(whole)
    files.sync_directory(ready)
    files.sync_directory(path)
    files.remove_tree(ready)
    files.sync_directory(path)


def is_rewriting(path: str) -> bool:
    return os.path.isdir(os.path.join(path, READY))
