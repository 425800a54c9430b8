"""WriterLock: one process, one Table, may write. The kernel's flock decides; the name inside is for the message."""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from typing import Any

from bigembed.errors import ReadOnlyTable, StorageFailed, TableLocked, UnsupportedPlatform
from bigembed.storage import files

try:
    import fcntl
except ImportError:  # pragma: no cover - not POSIX
    fcntl = None  # type: ignore[assignment]

NAME = "lock"
CONTENT_BYTES = 512


class WriterLock:
    """An exclusive flock on `<table>/lock`, held until `release` or the end of the process. Never unlinked.

    Args:
        is_making: the table is being made; what a killed process leaves of it may be removed (see `of_leftover`).

    Raises:
        TableLocked: another holder has it; names the holder.
    """

    def __init__(self, table_path: str, is_making: bool = False) -> None:
        self._take(table_path, files.WRITE)
        try:
            self.sign(is_making)
        except BaseException:
            self.release()
            raise

    @classmethod
    def of_leftover(cls, folder: str) -> "WriterLock | None":
        """The lock of a folder in which a table was being made, by a process that is gone; None for any other."""
        lock = cls.__new__(cls)
        try:
            lock._take(folder, os.O_RDWR)
        except (TableLocked, ReadOnlyTable, FileNotFoundError):
            return None
        is_ours = False
        try:
            content = lock._content()
            is_ours = content.get("making") is True or (not content and os.listdir(folder) == [NAME])
        finally:
            if not is_ours:
                lock.release()
        return lock if is_ours else None

    def _take(self, table_path: str, flags: int) -> None:
        if fcntl is None:
            raise UnsupportedPlatform(
                "Writing a table needs file locks (flock), which this system lacks. Open it with mode='r'."
            )
        self._pid = os.getpid()
        try:
            self._file = files.File(os.path.join(table_path, NAME), flags)
        except StorageFailed as error:
            if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                raise
            raise ReadOnlyTable(f"{table_path} cannot be written ({error.strerror}). Open it with mode='r'.") from error
        try:
            fcntl.flock(self._file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder()
            self._file.close()
            raise TableLocked(
                f"{table_path} is open for writing by {holder}. Close it there, or open it here with mode='r'."
            ) from error
        if not self._is_current(table_path):
            self._file.close()
            raise TableLocked(f"{table_path} was replaced while it was opened. Open it again.")

    def sign(self, is_making: bool) -> None:
        """Write down who holds the lock, and whether the table is still being made."""
        name = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "program": sys.argv[0],
            "since": time.time(),
        }
        if is_making:
            name["making"] = True
        if len(json.dumps(name)) > CONTENT_BYTES:
            name["program"] = ""
        with contextlib.suppress(OSError):  # only advice: a full disk must not stop an open
            self._file.pwrite(json.dumps(name).encode().ljust(CONTENT_BYTES), 0)
            if is_making:
                self._file.sync()  # a folder that says nothing would not be removed

    def _is_current(self, table_path: str) -> bool:
        """Whether the file we locked is the one at the path: a table may be overwritten between open and flock."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fd), os.stat(os.path.join(table_path, NAME)))
        return False

    def _content(self) -> dict[str, Any]:
        """What is written in the file; empty where that is nothing that we wrote."""
        with contextlib.suppress(ValueError):
            content = json.loads(self._file.pread(CONTENT_BYTES, 0))
            return content if isinstance(content, dict) else {}
        return {}

    def _holder(self) -> str:
        try:
            name = self._content()
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(name["since"]))
            return f"process {name['pid']} on {name['host']} ({name['program'] or 'python'}, since {since})"
        except (KeyError, TypeError, ValueError, OverflowError):
            return "another process"

    def release(self) -> None:
        """Give the lock up; in a forked child, only close its copy of the descriptor.

        The holder unlocks before it closes: a child that was forked a moment ago may not have closed its copy yet.
        The child closes its copy because the lock would otherwise outlive a parent that dies.
        """
        if self._file.fd >= 0 and self._pid == os.getpid():
            fcntl.flock(self._file.fd, fcntl.LOCK_UN)
        self._file.close()
