"""Aside: new files written under names of their own, and moved to their names together when all are whole."""

import os
import secrets
from typing import Any

from bigembed.errors import TableExists, TableMissing
from bigembed.storage import files


class Output:
    """A new file, written from front to back.

    Attributes:
        size_bytes: how much was written.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.size_bytes = 0
        self._file = files.File(path, files.WRITE | os.O_EXCL)

    def write(self, buffer: Any) -> int:
        """Append bytes, or the bytes of a C-contiguous array; returns how many."""
        view = memoryview(buffer).cast("B")
        self._file.pwrite(view, self.size_bytes)
        self.size_bytes += len(view)
        return len(view)

    def patch(self, buffer: bytes, offset: int) -> None:
        """Overwrite what was written before."""
        self._file.pwrite(buffer, offset)

    def finish(self) -> None:
        """Close it when everything is on stable storage."""
        if self._file.fd >= 0:
            self._file.sync_all()
        self.close()

    def close(self) -> None:
        self._file.close()


class Aside:
    """What one writer makes: a file or a folder, and files beside it.

    The first name asked for is the main one: it is moved last, so what stands there is whole and has its company.

    Args:
        overwrite: replace files, and folders that hold nothing but what a writer makes, that stand at the names.
    """

    def __init__(self, overwrite: bool) -> None:
        self._overwrite = overwrite
        self._mark = secrets.token_hex(4)
        self._targets: list[str] = []
        self._outputs: list[Output] = []
        self._replaced: list[str] = []
        self._removed: list[str] = []  # of the targets: nothing new stands there

    def file(self, target: str) -> Output:
        """A new file that will stand at `target`.

        Raises:
            TableExists: something stands there, and is no file or must not be replaced. TableMissing: there is no
            such folder.
        """
        self._check_free(target, is_folder=False)
        self._targets.append(target)
        return self._open(self._aside(target))

    def gone(self, target: str) -> None:
        """What stands at `target` belongs to the file that is replaced, and goes with it."""
        if self._overwrite and os.path.isfile(target):
            self._targets.append(target)
            self._removed.append(target)

    def folder(self, target: str) -> None:
        """A new folder that will stand at `target`; see `file_within`."""
        self._check_free(target, is_folder=True)
        self._targets.append(target)
        files.make_directory(self._aside(target))

    def file_within(self, target: str, name: str) -> Output:
        """A new file in the folder that will stand at `target`."""
        return self._open(os.path.join(self._aside(target), name))

    def _open(self, path: str) -> Output:
        output = Output(path)
        self._outputs.append(output)
        return output

    def _aside(self, target: str) -> str:
        return f"{target}.new-{self._mark}"

    def _check_free(self, target: str, is_folder: bool) -> None:
        parent = os.path.dirname(target)
        if not os.path.isdir(parent):
            raise TableMissing(f"{parent} is no folder, so nothing can be written there. Make it first.")
        if not os.path.lexists(target):
            return
        if not self._overwrite:
            raise TableExists(f"{target} exists. Choose another target, or pass overwrite=True (--overwrite).")
        wrong = _not_a_folder_of_parts(target) if is_folder else _not_a_file(target)
        if wrong:
            raise TableExists(f"{target} {wrong}, so it is not overwritten. Choose another target.")

    def publish(self) -> None:
        """Make all of it durable, then move it to its names: after an error or a crash nothing half stands there.

        A single file is replaced in one step. Where there are several, what stood at the main name is moved away first.
        """
        for output in self._outputs:
            output.finish()
        for target in [target for target in self._targets if target not in self._removed]:
            self._check_free(target, os.path.isdir(self._aside(target)))
            if os.path.isdir(self._aside(target)):
                files.sync_directory(self._aside(target))
        parent = os.path.dirname(self._targets[0])
        main = self._targets[0]
        if len(self._targets) == 1 and os.path.isfile(main):
            files.rename(self._aside(main), main)
            files.sync_directory(parent)
            return
        away = {target: f"{target}.old-{self._mark}" for target in self._targets if os.path.lexists(target)}
        made = [target for target in self._targets if target not in self._removed]
        moves = [*away.items(), *((self._aside(target), target) for target in reversed(made))]
        try:
            for source, target in moves:
                files.rename(source, target)
            files.sync_directory(parent)
        except BaseException:
            for source, target in reversed(moves):
                if os.path.lexists(target) and not os.path.lexists(source):
                    os.rename(target, source)
            raise
        self._replaced = list(away.values())
        self._remove(self._replaced)

    def abandon(self) -> None:
        """Remove whatever was written; safe to repeat, and after `publish`."""
        for output in self._outputs:
            output.close()
        self._remove([self._aside(target) for target in self._targets] + self._replaced)

    def _remove(self, paths: list[str]) -> None:
        for path in paths:
            (files.remove_tree if os.path.isdir(path) else files.unlink)(path)


def _not_a_file(path: str) -> str | None:
    """What is wrong with replacing it by a file."""
    if os.path.isdir(path):
        return "is a folder"
    return None if os.path.isfile(path) else "is not a plain file"


def _not_a_folder_of_parts(path: str) -> str | None:
    """What is wrong with replacing it by a folder of safetensors files."""
    if not os.path.isdir(path):
        return "is not a folder"
    for name in sorted(os.listdir(path)):
        if not name.endswith((".safetensors", ".safetensors.index.json")) or not os.path.isfile(
            os.path.join(path, name)
        ):
            return f"holds {name!r}"
    return None
