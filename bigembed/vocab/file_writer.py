"""FileWriter: a file written from its start to its end, with its sums on the way."""

import os
import weakref
from typing import Any

from bigembed.storage import files
from bigembed.vocab.format import FileFacts, Pieces

BUFFER_BYTES = 1 << 20


class FileWriter:
    """Appends to a new file, many small parts in one write; an old file of the name is written over."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = files.File(path, files.WRITE | os.O_TRUNC)
        weakref.finalize(self, self._file.close)
        self._pieces = Pieces()
        self._buffer = bytearray()

    @property
    def size_bytes(self) -> int:
        return self._pieces.size_bytes

    def append(self, content: Any) -> None:
        view = memoryview(content).cast("B")
        if len(self._buffer) + len(view) > BUFFER_BYTES:
            self._flush()
        if len(view) > BUFFER_BYTES:
            self._file.pwrite(view, self.size_bytes)
        else:
            self._buffer += view
        self._pieces.add(view)

    def _flush(self) -> None:
        if self._buffer:
            self._file.pwrite(self._buffer, self.size_bytes - len(self._buffer))
            self._buffer = bytearray()

    def finish(self) -> FileFacts:
        """Write what is left, sync and close it."""
        self._flush()
        self._file.sync_all()
        self._file.close()
        return self._pieces.result()

    def close(self) -> None:
        self._file.close()
