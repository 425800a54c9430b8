"""What outlives a single call on a table: which tables are open, what fork and the program's end do to them."""

import atexit
import os
import shutil
import weakref
from typing import TYPE_CHECKING

from bigembed.storage import files
from bigembed.storage.lock import WriterLock
from bigembed.storage.store import RecordStore

if TYPE_CHECKING:
    from bigembed.storage.open_table import OpenTable

_open_tables: "weakref.WeakSet[OpenTable]" = weakref.WeakSet()


def register(table: "OpenTable") -> None:
    """Let an open table hear of fork and of the program's end."""
    if not _open_tables:
        # Later than the finalizers' own exit hook, so called before it: a program that ends gets the warning too.
        atexit.unregister(_close_all)
        atexit.register(_close_all)
    _open_tables.add(table)


def open_tables() -> "list[OpenTable]":
    """The tables of this process that are open."""
    return [table for table in _open_tables if not table.is_closed]


def release(store: RecordStore, lock: WriterLock | None, pid: int, is_temporary: bool, path: str) -> None:
    """Close files and give the lock up; in a forked child nothing is touched."""
    if pid != os.getpid():
        return
    try:
        store.close()
    finally:  # a Ctrl-C must not leave it locked
        if is_temporary:
            shutil.rmtree(path, ignore_errors=True)
            files.sync_again(path)
        if lock is not None:
            lock.release()


def _close_all() -> None:
    for table in list(_open_tables):
        table.close()


_forking: "list[OpenTable]" = []


def _before_fork() -> None:
    for table in open_tables():
        table.before_fork()
        _forking.append(table)


def _after_fork_in_parent() -> None:
    while _forking:
        _forking.pop().after_fork_in_parent()


def _after_fork_in_child() -> None:
    _forking.clear()
    for table in list(_open_tables):
        table.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
