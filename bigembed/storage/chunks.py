"""ChunkFiles: the chunk files of the weight array, opened when needed, at most a few hundred at a time."""

import os
from collections import OrderedDict

from bigembed.errors import DamagedTable
from bigembed.spec import TableSpec
from bigembed.storage import files

MAX_OPEN_FILES = 256


class ChunkFiles:
    """Which chunk files there are, and descriptors for reading them.

    A table that grows gives the same object a new `spec`.
    """

    def __init__(self, table_path: str, spec: TableSpec) -> None:
        self.folder = os.path.join(table_path, "weight")
        self.spec = spec
        self._open: OrderedDict[int, files.File] = OrderedDict()
        self.present: set[int] = set()
        self.look_again()

    def again(self) -> "ChunkFiles":
        """The same files under descriptors of their own, for another thread."""
        twin = ChunkFiles.__new__(ChunkFiles)
        twin.folder, twin.spec, twin.present = self.folder, self.spec, self.present
        twin._open = OrderedDict()
        return twin

    def look_again(self) -> None:
        """List the files anew (another process may have made some)."""
        names = (name.split(".") for name in os.listdir(self.folder))
        self.present = {int(name[1]) for name in names if len(name) == 3 and name[0] == "c" and name[1].isdigit()}

    def path(self, chunk: int) -> str:
        return os.path.join(self.folder, f"c.{chunk}.0")

    def for_reading(self, chunk: int) -> files.File:
        """A file stays open at least until `MAX_OPEN_FILES` others were asked for."""
        file = self._open.get(chunk)
        if file is None:
            file = files.File(self.path(chunk), files.READ)
            self._open[chunk] = file
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        else:
            self._open.move_to_end(chunk)
        return file

    def for_writing(self, chunk: int) -> files.File:
        """A descriptor of its own for writing; a file that is not there yet is made, all zeros, taking no disk."""
        if chunk not in self.present:
            aside = files.File(self.path(chunk) + ".new", files.WRITE)
            try:
                aside.truncate(self.spec.chunk_bytes)
                aside.sync_all()
            finally:
                aside.close()
            files.rename(aside.path, self.path(chunk))
            files.sync_directory(self.folder)
            self.present.add(chunk)
        return files.File(self.path(chunk), files.WRITE)

    def check_sizes(self, written_C: list[int]) -> None:
        """Every chunk that holds rows is there, and each has the right size.

        Raises:
            DamagedTable: names the file, its size and the size it should have.
        """
        for chunk, written in enumerate(written_C):
            if written and chunk not in self.present:
                first = chunk * self.spec.chunk_rows
                raise DamagedTable(
                    f"{self.path(chunk)} is missing; it held {written} rows from row {first} on. "
                    "Restore it from a backup."
                )
        for chunk in sorted(self.present):
            size = os.stat(self.path(chunk)).st_size
            if size != self.spec.chunk_bytes:
                raise DamagedTable(
                    f"{self.path(chunk)} has {size} bytes, a chunk of this table has {self.spec.chunk_bytes}. "
                    "Restore it from a backup."
                )

    def forget_pages(self) -> None:
        """Let the system drop the clean pages of the files open for reading from its cache."""
        for file in self._open.values():
            file.forget_pages()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()
