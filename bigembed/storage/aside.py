"""Aside: the folder in which a new table is made until it is whole and moves to its path, and leftovers of dead ones.

Whoever makes a table holds the flock on its `lock` from the start. So a folder aside whose lock is free was left by a
process that died, and the next one that makes a table at the same path removes it.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator

from bigembed.errors import BigembedError, StorageFailed, TableExists, TableLocked
from bigembed.spec import TableSpec
from bigembed.storage import files, zarr_format
from bigembed.storage.lock import NAME as LOCK
from bigembed.storage.lock import WriterLock
from bigembed.storage.superblock import Superblock

REPLACED = "replaced"  # the table that a new one takes the place of, until it is removed
_ATTEMPTS = 100


class Aside:
    """A new table's folder `PATH.new-XXXXXXXX` beside its path, with empty `weight/`, `journal/` and `undo/`.

    Args:
        path: where the table will be; absolute.
        overwrite: take the place of a table that stands there. It stays locked until then.

    Raises:
        TableExists: something stands at the path, and is no table or `overwrite` is not given.
        TableLocked: the table to overwrite is open for writing.
    """

    def __init__(self, path: str, overwrite: bool) -> None:
        self.path = path
        self.folder = ""
        self._is_over = False
        self._pid = os.getpid()
        self._lock: WriterLock | None = None
        put_back(path)
        self._old_lock = _lock_what_stands_there(path, overwrite)
        try:
            with files.operation("mkdir", os.path.dirname(path)):
                os.makedirs(os.path.dirname(path), exist_ok=True)
            _remove_dead(path)
            self._make_folder()
            for folder in ("weight", "journal", "undo"):
                files.make_directory(os.path.join(self.folder, folder))
        except BaseException:
            self.remove()
            raise

    def _make_folder(self) -> None:
        """Make the folder and lock it; a name whose folder another process takes for a dead one is given up."""
        for left in reversed(range(_ATTEMPTS)):
            folder = f"{self.path}.new-{secrets.token_hex(4)}"
            files.make_directory(folder)
            try:
                self._lock = WriterLock(folder, is_making=True)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    _remove_folder(folder)
                if left == 0 or not isinstance(error, TableLocked | FileNotFoundError):
                    raise
            else:
                self.folder = folder
                return

    def place(self, spec: TableSpec, superblock: Superblock, plain: bool) -> None:
        """Write what describes the table and move it to its path: there it is whole, after any crash, or not at all.

        Everything else in the folder is on stable storage already, but for the entries of `weight/`.

        Raises:
            TableExists: meanwhile something else came to stand at the path.
            StorageFailed: `remove` takes everything away; but after the rename the message says that the table stands.
        """
        parent = os.path.dirname(self.path)
        zarr_format.write_metadata(self.folder, spec, plain)  # syncs the entries of weight/ too
        superblock.write(self.folder)
        files.sync_directory(self.folder)
        if self._old_lock is not None:
            files.rename(self.path, os.path.join(self.folder, REPLACED))
        elif os.path.lexists(self.path):
            raise TableExists(f"{self.path} was made by somebody else meanwhile. Choose another path.")
        files.rename(self.folder, self.path)
        self._is_over = True
        assert self._lock is not None
        self._lock.sign(is_making=False)
        self._release()
        with _standing(self.path, "but its name may not survive a power cut"):
            files.sync_directory(parent)
        with _standing(self.path, "but the table that it replaced is still inside: the next writer removes it"):
            files.remove_tree(os.path.join(self.path, REPLACED))

    def remove(self) -> None:
        """Leave nothing behind; what was to be replaced is where it was. Once the table is placed, only unlock it.

        Does nothing in a forked child: the folder is its parent's.
        """
        if self._pid != os.getpid():
            return
        try:
            if not self._is_over and os.path.isdir(self.folder):
                self._is_over = True
                replaced = os.path.join(self.folder, REPLACED)
                if os.path.lexists(replaced):
                    files.rename(replaced, self.path)
                _remove_folder(self.folder)
        finally:
            self._release()

    def _release(self) -> None:
        for lock in (self._lock, self._old_lock):
            if lock is not None:
                lock.release()
        self._lock = self._old_lock = None


@contextlib.contextmanager
def _standing(path: str, but: str) -> Iterator[None]:
    """What fails inside is said to have failed after the table was placed."""
    try:
        yield
    except StorageFailed as error:
        raise type(error)(error.errno, f"{path} is whole and at its place, {but}: {error.strerror}") from error


def _lock_what_stands_there(path: str, overwrite: bool) -> WriterLock | None:
    """None when the path is free, or the writer's lock of the table there: nobody else may open it meanwhile."""
    if not os.path.lexists(path):
        return None
    if not overwrite:
        raise TableExists(f"{path} exists. Open it with Table.open, choose another path, or pass overwrite=True.")
    try:
        zarr_format.read_metadata(path)
    except StorageFailed:
        raise
    except BigembedError as error:
        raise TableExists(f"{path} exists and is not a table, so it is not overwritten: {error}") from error
    return WriterLock(path)


# -- what is left of dead ones ----------------------------------------------------------------------------------


def put_back(path: str) -> None:
    """Where a process died between the two renames of an overwrite, the old table gets its place again."""
    if os.path.lexists(path):
        return
    for folder, lock in _dead(path):
        try:
            replaced = os.path.join(folder, REPLACED)
            if os.path.lexists(replaced) and not os.path.lexists(path):
                files.rename(replaced, path)
                files.sync_directory(os.path.dirname(path))
        finally:
            lock.release()


def _remove_dead(path: str) -> None:
    """Remove the folders that processes which died left beside `path`; what cannot be removed stays."""
    for folder, lock in _dead(path):
        try:
            with contextlib.suppress(OSError):
                _remove_folder(folder)
        finally:
            lock.release()


def _dead(path: str) -> "list[tuple[str, WriterLock]]":
    """The folders aside of tables that nobody makes any more, each with its lock, now ours."""
    parent, name = os.path.split(path)
    found: list[tuple[str, WriterLock]] = []
    entries = os.listdir(parent) if os.path.isdir(parent) else []
    for entry in entries:
        folder = os.path.join(parent, entry)
        if not re.fullmatch(re.escape(name) + r"\.new-[0-9a-f]{8}", entry) or os.path.islink(folder):
            continue
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # an empty one: its maker had no time to lock it
            continue
        with contextlib.suppress(OSError, BigembedError):
            lock = WriterLock.of_leftover(folder)
            if lock is not None:
                found.append((folder, lock))
    return found


def _remove_folder(folder: str) -> None:
    """Remove a folder that we have locked; its lock goes last, so that nobody else joins in before."""
    for name in os.listdir(folder):
        if name != LOCK:
            _remove(os.path.join(folder, name))
    files.unlink(os.path.join(folder, LOCK))
    # Now that the folder is empty, another maker may remove it too.
    with contextlib.suppress(FileNotFoundError), files.operation("rmdir", folder):
        os.rmdir(folder)


def remove_leftovers(path: str) -> None:
    """Remove what replacing a file or the table itself left behind when it was interrupted; for the writer."""
    files.remove_tree(os.path.join(path, REPLACED))
    for folder in (path, os.path.join(path, "weight"), os.path.join(path, "vocab")):
        if folder == path or os.path.isdir(folder):
            for name in os.listdir(folder):
                if name.endswith(".new"):
                    _remove(os.path.join(folder, name))


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        files.remove_tree(path)
    else:
        files.unlink(path)
