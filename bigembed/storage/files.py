"""Every file operation of a table passes through here: one place for clear errors and for injected faults.

An operation that the system refuses raises `StorageFailed` (or `DiskFull`) naming the operation and the path, with
the OSError as its cause. `before`, when a test sets it, is called with (operation, path) ahead of each.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bigembed.errors import DiskFull, StorageFailed

before: Callable[[str, str], None] | None = None

# Roots of temporary tables: a crash loses them anyway, so nothing under them waits for the disk.
_temporary_roots: set[str] = set()

READ = os.O_RDONLY
WRITE = os.O_RDWR | os.O_CREAT


@contextmanager
def operation(name: str, path: str) -> Iterator[None]:
    """Announce an operation, and translate the OSError that it may raise."""
    try:
        if before is not None:
            before(name, path)
        yield
    except (FileNotFoundError, StorageFailed):
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space and try again" if full else ""
        failed = (DiskFull if full else StorageFailed)(
            error.errno, f"{name} of {path} failed: {error.strerror or error}{advice}"
        )
        raise failed from error


def do_not_sync(root: str) -> None:
    """Let every sync under `root` (a path, a table's) return at once."""
    _temporary_roots.add(root)


def sync_again(root: str) -> None:
    """Undo `do_not_sync`."""
    _temporary_roots.discard(root)


def _is_temporary(path: str) -> bool:
    return any(path == root or path.startswith(root + os.sep) for root in _temporary_roots)


class File:
    """An open file: positioned reads and writes, whole or an error."""

    def __init__(self, path: str, flags: int) -> None:
        self.path = path
        with operation("open", path):
            self.fd = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o644)

    def again(self) -> "File":
        """The same open file under a descriptor of its own: closing or unlinking this one does not touch it."""
        twin = File.__new__(File)
        twin.path = self.path
        with operation("open", self.path):
            twin.fd = os.dup(self.fd)
        return twin

    def pread(self, count: int, offset: int) -> bytes:
        """Up to `count` bytes from `offset`; fewer only at the end of the file."""
        parts = []
        with operation("read", self.path):
            while count > 0:
                part = os.pread(self.fd, count, offset)
                if not part:
                    break
                parts.append(part)
                count -= len(part)
                offset += len(part)
        return b"".join(parts)

    def pread_into(self, buffer: Any, offset: int) -> int:
        """Fill `buffer` from `offset`; returns the bytes read, fewer only at the end of the file."""
        view = memoryview(buffer).cast("B")
        done = 0
        with operation("read", self.path):
            while done < len(view):
                count = os.preadv(self.fd, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
        return done

    def pwrite(self, buffer: Any, offset: int) -> None:
        view = memoryview(buffer).cast("B")
        with operation("write", self.path):
            while view:
                count = os.pwrite(self.fd, view, offset)
                view = view[count:]
                offset += count

    def sync(self) -> None:
        """Data, and the size needed to read it, are on stable storage."""
        if _is_temporary(self.path):
            return
        with operation("sync", self.path):
            (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(self.fd)

    def sync_all(self) -> None:
        """Data and all of the file's metadata are on stable storage."""
        if _is_temporary(self.path):
            return
        with operation("sync", self.path):
            os.fsync(self.fd)

    def forget_pages(self, keep_bytes: int = 0) -> None:
        """Let the system write out and drop this file's pages, but for the last `keep_bytes`; advice only."""
        count = self.size_bytes() - keep_bytes
        if count > 0 and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, 0, count, os.POSIX_FADV_DONTNEED)

    def data_after(self, offset: int) -> tuple[int, int] | None:
        """(start, end) of the next bytes from `offset` on that are not a hole; None where only a hole is left.

        What reads as zeros is either a hole or not; a system that cannot tell calls everything data.
        """
        size = self.size_bytes()
        if offset >= size:
            return None
        if not hasattr(os, "SEEK_DATA"):
            return offset, size
        with operation("read", self.path):
            try:
                start = os.lseek(self.fd, offset, os.SEEK_DATA)
                return start, os.lseek(self.fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return None
                if error.errno == errno.EINVAL:
                    return offset, size
                raise

    def truncate(self, size_bytes: int) -> None:
        with operation("truncate", self.path):
            os.ftruncate(self.fd, size_bytes)

    def size_bytes(self) -> int:
        return os.fstat(self.fd).st_size

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1  # first: whoever closes it too, in a forked child, finds it closed
            os.close(fd)


def read_bytes(path: str, limit_bytes: int = 1 << 30) -> bytes:
    """The content of a file of at most `limit_bytes`."""
    file = File(path, READ)
    try:
        if file.size_bytes() > limit_bytes:
            raise StorageFailed(errno.EFBIG, f"{path} has {file.size_bytes()} bytes, expected at most {limit_bytes}")
        return file.pread(file.size_bytes(), 0)
    finally:
        file.close()


def write_atomically(path: str, content: bytes) -> None:
    """Replace a file by new content: after any crash it is the old or the new one, whole."""
    aside = path + ".new"
    file = File(aside, WRITE | os.O_TRUNC)
    try:
        file.pwrite(content, 0)
        file.sync_all()
    finally:
        file.close()
    rename(aside, path)
    sync_directory(os.path.dirname(path))


def rename(source: str, target: str) -> None:
    with operation("rename", target):
        os.replace(source, target)


def unlink(path: str) -> None:
    """Remove a file; one that is gone already is no error."""
    with operation("unlink", path):
        try:
            os.unlink(path)
        except FileNotFoundError:
            return


def make_directory(path: str) -> None:
    with operation("mkdir", path):
        os.mkdir(path)


def remove_tree(path: str) -> None:
    """Remove a directory and what is in it; symbolic links are removed, never followed."""
    if os.path.islink(path):
        unlink(path)
    if not os.path.isdir(path):
        return
    for name in os.listdir(path):
        child = os.path.join(path, name)
        if os.path.isdir(child) and not os.path.islink(child):
            remove_tree(child)
        else:
            unlink(child)
    with operation("rmdir", path):
        os.rmdir(path)


def sync_directory(path: str) -> None:
    """The directory's entries are on stable storage."""
    if _is_temporary(path):
        return
    with operation("sync directory", path):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def disk_bytes(path: str) -> int:
    """Bytes of disk that a file or a tree occupies (allocated blocks, not sizes)."""
    if not os.path.isdir(path):
        return os.lstat(path).st_blocks * 512
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:  # a segment that was merged meanwhile
                continue
    return total
