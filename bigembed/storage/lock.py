"""WriterLock: one process, one Table, may write. The kernel's flock decides; the name inside is for the message."""

import contextlib
import errno
import json
import os
import socket
import sys
import time

from bigembed.errors import ReadOnlyTable, StorageFailed, TableLocked, UnsupportedPlatform
from bigembed.storage import files

try:
    import fcntl
except ImportError:  # pragma: no cover - not POSIX
    fcntl = None  # type: ignore[assignment]


class WriterLock:
    """An exclusive flock on `<table>/lock`, held until `release` or the end of the process. Never unlinked.

    Raises:
        TableLocked: another holder has it; names the holder.
    """

    def __init__(self, table_path: str) -> None:
        if fcntl is None:
            raise UnsupportedPlatform(
                "Writing a table needs file locks (flock), which this system lacks. Open it with mode='r'."
            )
        self._pid = os.getpid()
        try:
            self._file = files.File(os.path.join(table_path, "lock"), files.WRITE)
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
        name = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "program": sys.argv[0],
            "since": time.time(),
        }
        with contextlib.suppress(OSError):  # only advice: a full disk must not stop an open
            content = json.dumps(name).encode().ljust(512)
            self._file.pwrite(content[:512], 0)

    def _is_current(self, table_path: str) -> bool:
        """Whether the file we locked is the one at the path: a table may be overwritten between open and flock."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fd), os.stat(os.path.join(table_path, "lock")))
        return False

    def _holder(self) -> str:
        try:
            name = json.loads(self._file.pread(512, 0))
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(name["since"]))
            return f"process {name['pid']} on {name['host']} ({name['program'] or 'python'}, since {since})"
        except (ValueError, KeyError, TypeError):
            return "another process"

    def release(self) -> None:
        """Give the lock up; in a forked child, only close its copy of the descriptor.

        The holder unlocks before it closes: a child that was forked a moment ago may not have closed its copy yet.
        The child closes its copy because the lock would otherwise outlive a parent that dies.
        """
        if self._file.fd >= 0 and self._pid == os.getpid():
            fcntl.flock(self._file.fd, fcntl.LOCK_UN)
        self._file.close()
