"""RecordStore: rows of one table by number, newest version first: journal, then base, then initial values.

It knows bytes, commits and limits; who may call it, and the cache above, are Table's.
"""

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bigembed import threads
from bigembed.errors import BigembedError, DamagedTable, PoisonedTable, ReadOnlyTable, StateMismatch, StorageFailed
from bigembed.kernels.initial import initial_rows
from bigembed.kernels.records import check_keys, seal, unseal
from bigembed.storage import files, upkeep, zarr_format
from bigembed.storage.base import Base
from bigembed.storage.journal import Journal
from bigembed.storage.merge import Merge
from bigembed.storage.row_index import NOWHERE, index_rows
from bigembed.storage.superblock import Commit, Superblock
from bigembed.storage.token_log import TokenLog
from bigembed.storage.undo import Undo

STAGING_BYTES = 16 << 20
BEHIND_BYTES = 512 << 10  # rows that are worth another thread
READER_ROUNDS = 3
LOAD_ROUNDS = 100


@dataclass(frozen=True)
class Limits:
    """What a table may take beside its base, in bytes: journal on disk, journal index in memory."""

    journal_bytes: int = 1 << 30
    index_bytes: int = 64 << 20


@dataclass
class Upkeep:
    """Counters of merges, for `stats`."""

    merges: int = 0
    merged_rows: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    auto_commits: int = 0


class RecordStore:
    """The storage of one table.

    Args:
        path: the table's folder.
        is_writer: the caller holds the writer's lock.
        limits: see Limits.
        reader: how the base is read, see Base.
    """

    def __init__(self, path: str, is_writer: bool, limits: Limits, reader: str) -> None:
        self.path = path
        self.is_writer = is_writer
        self.limits = limits
        self._reader = reader
        self._staging = np.empty(0, np.uint32)
        self.counters = Upkeep()
        self.tokens: TokenLog | None = None
        self.load()

    # -- opening --------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Bring everything in memory to the last commit on disk; uncommitted changes are gone.

        A reader starts over when the superblock moved while it looked: segments that it saw may be gone.
        """
        self.is_sound = False
        for left in reversed(range(LOAD_ROUNDS)):
            try:
                self._load_once()
                moved = not self.is_writer and self.superblock.encode() != Superblock.read(self.path).encode()
            except BaseException as error:
                self.close()
                if not isinstance(error, FileNotFoundError | BigembedError):
                    raise
                if self.is_writer or left == 0 or not self._may_have_moved(error, LOAD_ROUNDS - left):
                    explained = self._explained(error)
                    if explained is error:
                        raise
                    raise explained from error
                time.sleep(0.001)
            else:
                if not moved:
                    break
                self.close()
        self.is_sound = True

    def _may_have_moved(self, error: BaseException, rounds: int) -> bool:
        """Whether an error may come from a writer that works beside this reader."""
        if isinstance(error, FileNotFoundError) or self._seen is None:
            return rounds < READER_ROUNDS or os.path.isdir(self.folder("ready"))
        return self._seen.encode() != Superblock.read(self.path).encode()

    def _explained(self, error: BaseException) -> BaseException:
        if os.path.isdir(self.folder("ready")) and not self.is_writer:
            return DamagedTable(
                f"{self.path}: its state columns are being changed, or that was interrupted. Try again when it is "
                "done, or open the table once with mode='r+' to finish it."
            )
        if isinstance(error, FileNotFoundError) and not isinstance(error, BigembedError):
            return DamagedTable(f"{error.filename} is missing. Restore it from a backup of the table.")
        return error

    def _load_once(self) -> None:
        self._seen: Superblock | None = None
        self.spec, self.is_plain, _ = zarr_format.read_metadata(self.path)
        self.superblock = self._seen = Superblock.read(self.path)
        self.journal = Journal(self.folder("journal"), self.spec, self.superblock.base, self.superblock.retained)
        head = self.journal.head
        unfinished = head if head.rollback_to is not None and head.number > self.superblock.base.number else None
        stored_rows = self.stored_rows = self.spec.num_rows
        self.spec = replace(
            self.spec, num_rows=head.num_rows if unfinished is None else max(stored_rows, head.num_rows)
        )
        self.keys_W = check_keys(self.spec)
        self.initial = initial_rows(self.spec)
        self.merge: Merge | None = None
        self.base = Base(self.path, self.spec, self._reader)
        kept = self.journal.retained.number
        if unfinished is not None and unfinished.rollback_to is not None:
            kept = unfinished.rollback_to
        self.undo = Undo(self.folder("undo"), self.spec, kept) if self.is_writer else None
        self.base.chunks.check_sizes(self.superblock.written_C.tolist())
        if not self.is_writer:
            if unfinished is not None:
                raise DamagedTable(
                    f"{self.path}: a rollback to generation {unfinished.rollback_to} is under way or was interrupted. "
                    "Try again when it is done, or open the table once with mode='r+' to finish it."
                )
            self._load_tokens()
            return
        assert self.undo is not None
        self._make_durable()
        self.journal.remove_stale()
        if unfinished is not None:
            upkeep.finish_rollback(self, unfinished)
        self.undo.remove_stale()
        if self.spec.num_rows != stored_rows:
            self.write_metadata(self.is_plain)
        self._load_tokens()

    def _load_tokens(self) -> None:
        if self.tokens is None:
            self.tokens = TokenLog(self.path, self.spec.num_rows, self.is_writer)
        else:
            self.tokens.reload(self.spec.num_rows)

    def _make_durable(self) -> None:
        """What we found may be in the page cache only, if a process died before its sync: build on nothing less."""
        for folder in (self.path, self.folder("weight"), self.folder("journal"), self.folder("undo")):
            files.sync_directory(folder)
        assert self.undo is not None
        for file in (*self.journal.files, *self.undo.files):
            file.sync()

    def folder(self, name: str) -> str:
        return os.path.join(self.path, name)

    def set_num_rows(self, num_rows: int) -> None:
        """Grow or shrink in memory; a commit makes it last."""
        self.spec = replace(self.spec, num_rows=num_rows)
        self.base.resize(self.spec)

    def replace_spec(self, **changes: Any) -> None:
        """Change facts that leave the records' layout as it is; durable at once."""
        spec = replace(self.spec, **changes)
        zarr_format.write_metadata(self.path, spec, self.is_plain)
        self.spec = spec
        self.base.resize(spec)
        self.initial = initial_rows(spec)

    def write_metadata(self, plain: bool) -> None:
        zarr_format.write_metadata(self.path, self.spec, plain)
        self.is_plain, self.stored_rows = plain, self.spec.num_rows

    # -- reading --------------------------------------------------------------------------------------------

    def fetch(self, rows_M: np.ndarray, out_ME: np.ndarray) -> None:
        """Write the newest values (weight, then state) of ascending distinct rows into out_ME.

        Raises:
            DamagedRow, DamagedTable: a record fails its check. A reader first looks again, in case the writer
            moved it meanwhile.
        """
        step = max(1, STAGING_BYTES // self.spec.record_bytes)
        for start in range(0, len(rows_M), step):
            self._fetch_slice(rows_M[start : start + step], out_ME[start : start + step])

    def gather(self, rows_N: np.ndarray, out_NX: np.ndarray, checks: bool) -> bool:
        """The newest values of rows in any order, where all of them can be had from maps of the base; else False."""
        if not self.base.is_mapped or (self.journal.find(rows_N) != NOWHERE).any():
            return False
        return self.base.gather(rows_N, self.keys_W, self.initial, checks, out_NX)

    def _fetch_slice(self, rows_M: np.ndarray, out_ME: np.ndarray) -> None:
        for attempt in range(READER_ROUNDS):
            try:
                self._fetch_once(rows_M, out_ME)
            except (DamagedTable, StorageFailed, FileNotFoundError):
                if self.is_writer or attempt == READER_ROUNDS - 1:
                    raise
                self.close()
                self.load()
                if self.spec.row_width != out_ME.shape[1]:
                    raise StateMismatch(
                        f"{self.path}: its writer gave the records other state columns. Call refresh()."
                    ) from None
            else:
                return

    def _fetch_once(self, rows_M: np.ndarray, out_ME: np.ndarray) -> None:
        records_MW = self._stage(len(rows_M))
        places_M = self.journal.find(rows_M)
        here = np.flatnonzero(places_M != NOWHERE)
        if len(here) == 0:
            self.base.read(rows_M, records_MW)
        else:
            records_MW[here] = self.journal.read(places_M[here], rows_M[here], self.keys_W)
            rest = np.flatnonzero(places_M == NOWHERE)
            if len(rest):
                rest_MW = np.empty((len(rest), records_MW.shape[1]), np.uint32)
                self.base.read(rows_M[rest], rest_MW)
                records_MW[rest] = rest_MW
        args = (rows_M, records_MW, self.keys_W, self.initial, out_ME)
        for m in threads.run(unseal, len(rows_M), *args, grain=256):
            if m >= 0:
                raise self.base.damaged(int(rows_M[m]))

    def _stage(self, count: int) -> np.ndarray:
        """A buffer for `count` records, used again from call to call."""
        words = count * self.spec.record_words
        if len(self._staging) < words:
            self._staging = np.empty(words, np.uint32)
        return self._staging[:words].reshape(count, self.spec.record_words)

    @property
    def staging_bytes(self) -> int:
        return self._staging.nbytes + self.journal.behind.memory_bytes

    # -- writing --------------------------------------------------------------------------------------------

    def append(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None:
        """Append changed rows (ascending, distinct) to the journal; they count from the next commit on.

        The arrays are the store's from now on: many rows are sealed and written by another thread.
        """
        self._check_sound()
        if self.is_plain:
            self.write_metadata(plain=False)
        step = max(1, STAGING_BYTES // self.spec.record_bytes)
        for start in range(0, len(rows_M), step):
            rows, values = rows_M[start : start + step], values_ME[start : start + step]
            if values.nbytes >= BEHIND_BYTES:
                is_part = len(rows) < len(rows_M)  # a view would keep the whole array in memory
                self.journal.append_behind(rows, values.copy() if is_part else values)
                continue
            records_MW = self._stage(len(rows))
            sums = threads.run(seal, len(rows), rows, values, self.keys_W, records_MW)
            self.journal.append(rows, records_MW, sum(map(int, sums)) % (1 << 64))

    def commit(self, note: str, payload: Any, scalars: dict[str, Any], explicit: bool) -> Commit:
        """Make everything appended durable as one new generation.

        Raises:
            PoisonedTable afterwards on every call, when a sync failed.
        """
        self._check_sound()
        parent = self.journal.head
        commit = Commit(
            parent.number + 1,
            parent.number,
            self.spec.num_rows,
            note,
            time.time(),
            explicit,
            dict(scalars),
            payload,
        )
        if self.is_plain and parent.num_rows != commit.num_rows:
            self.write_metadata(plain=False)  # new rows are at their initial values, which no other reader computes
        assert self.tokens is not None
        self.tokens.sync(commit.num_rows)
        self.journal.commit(commit)
        assert self.undo is not None
        if explicit:
            self.undo.start_anew(commit.number)
        else:
            self.counters.auto_commits += 1
        if self.stored_rows != commit.num_rows:
            self.write_metadata(plain=False)  # rows that nobody published yet
        return commit

    def _check_sound(self) -> None:
        if not self.is_writer:
            raise ReadOnlyTable(f"{self.path} is open with mode='r'. Open it with mode='r+' to write.")
        self.check_poison()

    def check_poison(self) -> None:
        if self.is_poisoned:
            raise PoisonedTable(
                f"{self.path}: a sync of the journal, a rollback or a rewrite failed, so what is on disk is unknown. "
                "Close the table and open it again: it will be at its last whole commit."
            )

    # -- limits ---------------------------------------------------------------------------------------------

    def epoch_fill(self, dirty_rows: int) -> float:
        """How full the active epoch would be with `dirty_rows` more, as a fraction of its limits."""
        epoch = self.journal.active
        row_bytes = self.spec.record_bytes + 8
        disk = (epoch.disk_bytes + dirty_rows * row_bytes) / max(1, self.limits.journal_bytes // 2)
        rows = (len(epoch.index) + len(epoch.superseded) + dirty_rows) / index_rows(self.limits.index_bytes)
        return max(disk, rows)

    @property
    def is_poisoned(self) -> bool:
        """What is in memory may not be what is on disk: only opening anew helps."""
        return not self.is_sound or self.journal.is_poisoned

    def close(self) -> None:
        self.is_sound = False  # what is in memory is no longer what is on disk: `load` comes before anything else
        for part in (self.__dict__.get(name) for name in ("journal", "base", "undo", "tokens")):
            if part is not None:
                part.close()
