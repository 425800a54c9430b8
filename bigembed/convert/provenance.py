"""Where rows came from: the size and SHA-256 of the files read, summed in a thread beside the conversion."""

import hashlib
import os
import threading
from typing import Any

from bigembed.errors import BadSource

BUFFER_BYTES = 4 << 20


class Provenance:
    """Sums files while they are converted; `result` waits for the rest.

    Args:
        paths: the files; each must stay as it is until `result`.
    """

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths
        self._before = [_state(path) for path in paths]
        self._sums: list[str] = []
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bigembed-sha256", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        buffer = bytearray(BUFFER_BYTES)
        view = memoryview(buffer)
        try:
            for path in self._paths:
                total = hashlib.sha256()
                with open(path, "rb", buffering=0) as file:
                    while not self._stop.is_set() and (count := file.readinto(buffer)):
                        total.update(view[:count])
                self._sums.append(total.hexdigest())
        except OSError as error:
            self._error = error

    def result(self) -> list[dict[str, Any]]:
        """{"name", "size", "sha256"} of each file.

        Raises:
            BadSource: a file changed meanwhile, so nobody knows what was read. OSError: it could not be read.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        for path, before in zip(self._paths, self._before, strict=True):
            if _state(path) != before:
                raise BadSource(f"{path} changed while it was read. Convert it again when nothing writes to it.")
        return [
            {"name": os.path.basename(path), "size": size, "sha256": total}
            for path, (size, _), total in zip(self._paths, self._before, self._sums, strict=True)
        ]

    def stop(self) -> None:
        """Give up early."""
        self._stop.set()
        self._thread.join()


def _state(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
