"""OpenTable: what being open means: the lock, the store, the cache above it, fork, and the end of it all.

What can be done with the rows of an open table is Table's, which is the only class made of it.
"""

import os
import threading
import warnings
import weakref
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from bigembed.errors import ForkedTable, InvalidArgument, ReadOnlyTable, TableClosed
from bigembed.spec import TableSpec
from bigembed.storage import files, lifetime, rewrite
from bigembed.storage.aside import remove_leftovers
from bigembed.storage.base import READERS
from bigembed.storage.create import checked_integer
from bigembed.storage.filesystem import warn_if_remote
from bigembed.storage.lock import WriterLock
from bigembed.storage.store import Limits, RecordStore
from bigembed.storage.token_log import TokenLog

DEFAULT_JOURNAL_BYTES = 1 << 30
DEFAULT_INDEX_BYTES = 64 << 20


class CacheLayer(Protocol):
    """What a table asks of the cache above it, which may hold newer values than the journal."""

    @property
    def dirty_rows(self) -> int: ...
    def write_back(self) -> None: ...
    def overlay(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None: ...
    def refresh(self, rows_M: np.ndarray, values_ME: np.ndarray) -> None: ...
    def drop(self) -> None: ...
    def stats(self) -> dict[str, Any]: ...


class OpenTable:
    """A table whose files are open, and locked where it may write.

    Args:
        path: the table's folder. mode: "r" or "r+". limits, reader: as for RecordStore.
        is_temporary: remove the folder when it is closed.

    Raises:
        TableLocked, DamagedTable: as `Table.open`.
    """

    def __init__(self, path: str, mode: str, limits: Limits, reader: str, is_temporary: bool = False) -> None:
        self.path = path
        self.mode = mode
        self.is_temporary = is_temporary
        self.pid = os.getpid()
        self.mutex = threading.RLock()
        self._cache: CacheLayer | None = None
        self._reshaped: weakref.WeakMethod[Any] | None = None
        self.rollbacks = 0  # how often rows went back; a gradient from before does not belong to the rows after
        if mode == "r+":
            warn_if_remote(path)
        self._lock = WriterLock(path) if mode == "r+" else None
        if is_temporary:
            files.do_not_sync(path)
        try:
            if mode == "r+":
                rewrite.finish_rewrite(path)
                remove_leftovers(path)
            self._store = RecordStore(path, mode == "r+", limits, reader)
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            files.sync_again(path)
            raise
        self.scalars: dict[str, Any] = dict(self._store.journal.head.scalars)
        self._uncommitted_rows = 0
        self._finalizer = weakref.finalize(
            self, lifetime.release, self._store, self._lock, self.pid, is_temporary, path
        )
        lifetime.register(self)

    # -- facts ----------------------------------------------------------------------------------------------

    @property
    def spec(self) -> TableSpec:
        """The facts of the table as of now."""
        return self._store.spec

    @property
    def shape(self) -> tuple[int, int]:
        """(V, D)."""
        return self.spec.num_rows, self.spec.dim

    @property
    def limits(self) -> Limits:
        """What journal and index may take."""
        return self._store.limits

    @property
    def generation(self) -> int:
        """The number of the last commit."""
        return self._store.journal.head.number

    @property
    def token_log(self) -> TokenLog:
        """The tokens of rows that were added, in the same commits as the rows."""
        with self.mutex:
            self._check_open()
            assert self._store.tokens is not None
            return self._store.tokens

    @property
    def is_closed(self) -> bool:
        return not self._finalizer.alive

    @property
    def may_write(self) -> bool:
        """Opened for writing, in this process, and not closed."""
        return self.mode == "r+" and self.pid == os.getpid() and not self.is_closed

    @property
    def has_rows(self) -> bool:
        """Whether any row was ever written."""
        dirty = self._cache.dirty_rows if self._cache is not None else 0
        return bool(dirty or self._store.journal.rows or self._store.superblock.written_C.any())

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"mode={self.mode!r}, generation={self.generation}"
        return f"Table({self.path!r}, {self.shape[0]} x {self.shape[1]} {self.spec.dtype}, {state})"

    # -- the cache above -------------------------------------------------------------------------------------

    def attach_cache(self, cache: CacheLayer | None, reshaped: Any = None) -> None:
        """Let every method see what `cache` holds; `reshaped` (a bound method) is called when V or K changes."""
        if self._cache is not None and self._cache is not cache and self._cache.dirty_rows:
            self._cache.write_back()
        self._cache = cache
        if reshaped is not None:
            self._reshaped = weakref.WeakMethod(reshaped)

    def _tell_reshaped(self) -> None:
        callback = self._reshaped() if self._reshaped is not None else None
        if callback is not None:
            callback()

    # -- the end --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the table. Uncommitted changes are discarded, with a warning that counts them. Safe to repeat."""
        with self.mutex:
            if self.is_closed:
                return
            lost = self._uncommitted_rows + (self._cache.dirty_rows if self._cache is not None else 0)
            mine = self.pid == os.getpid() and self.mode == "r+" and not self.is_temporary
            self._finalizer()
            if lost and mine:
                warnings.warn(
                    f"{self.path} was closed without a commit: changes to {lost} rows are discarded. Call commit() "
                    "before close().",
                    stacklevel=2,
                )

    def __del__(self) -> None:
        # A table that is dropped without close gives the same warning; _finalizer is missing if __init__ failed.
        if hasattr(self, "_finalizer"):
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._finalizer()  # an exception is in flight: its message matters, not ours
        else:
            self.close()

    def _check_open(self) -> None:
        if self.is_closed:
            raise TableClosed(f"{self.path} was closed. Open it again with Table.open.")
        if not self._store.is_writer and not self._store.is_sound:
            self._store.load()  # a reader that could not be refreshed tries again
        self._store.check_poison()

    def check_writable(self) -> None:
        self._check_open()
        if self.mode != "r+":
            raise ReadOnlyTable(f"{self.path} is open with mode='r'. Open it with mode='r+' to write.")
        if self.pid != os.getpid():
            raise ForkedTable(
                f"{self.path} belongs to process {self.pid}; this forked child ({os.getpid()}) may only read it. "
                "Write in the parent, or open the table in the child after the parent closed it."
            )

    def before_fork(self) -> None:
        """Wait until nobody is in the middle of a change, so that the child gets a whole table and cache."""
        self.mutex.acquire()

    def after_fork_in_parent(self) -> None:
        self.mutex.release()

    def after_fork_in_child(self) -> None:
        self.mutex = threading.RLock()  # whoever held it does not exist here
        if self._lock is not None:
            self._lock.release()
        if self._store.tokens is not None:
            self._store.tokens.after_fork_in_child()
        self._store.is_writer = False  # a read that finds a record moved by the parent looks again, as any reader


def checked_limits(
    *,
    journal_bytes: int = DEFAULT_JOURNAL_BYTES,
    index_bytes: int = DEFAULT_INDEX_BYTES,
    reader: str = "auto",
    is_temporary: bool = False,
    mode: str = "r+",
) -> Limits:
    """What `open` takes beside path and mode, checked before anything is touched."""
    if reader not in READERS:
        raise InvalidArgument(f"reader={reader!r} is unknown; use {', '.join(map(repr, READERS))}.")
    limits = Limits(checked_integer("journal_bytes", journal_bytes), checked_integer("index_bytes", index_bytes))
    if is_temporary and mode != "r+":
        raise InvalidArgument("is_temporary=True removes the table on close, so it needs mode='r+'.")
    if limits.journal_bytes < 1 or limits.index_bytes < 1:
        raise InvalidArgument(f"journal_bytes={journal_bytes} and index_bytes={index_bytes} must be positive.")
    return limits
