"""ReadAhead: a stream in windows, the next one read by a thread while the last one is worked on.

Two buffers go round. What was not used of a window, such as the first part of a line, is copied in front of the next
one, where each buffer keeps room for it; only what is longer than that room costs a larger copy.
"""

import threading
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from bigembed.convert.stream import ByteStream
from bigembed.kernels.decimals import SLACK_BYTES

WINDOW_BYTES = 16 << 20
ROOM_BYTES = 1 << 20
CLOSE_SECONDS = 0.5  # longer a thread is not waited for that itself waits for a pipe


@dataclass
class Window:
    """Bytes `start` to `stop` - 1 of a buffer; `SLACK_BYTES` more may be read and written.

    Args:
        offset: of the byte at `start`, in the unpacked stream. is_last: the stream ends here.
    """

    buffer_B: np.ndarray
    start: int
    stop: int
    offset: int
    is_last: bool

    def __len__(self) -> int:
        return self.stop - self.start

    def use(self, until: int) -> None:
        """The bytes before `until` are done with."""
        self.offset += until - self.start
        self.start = until


class ReadAhead:
    """Windows of a stream that is not otherwise read meanwhile.

    Args:
        offset: of the stream's next byte.
        window_bytes: read at once.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(b"abcdefgh") + file.seek(0)
        ...     with ReadAhead(ByteStream.open(file.name), window_bytes=5) as ahead:
        ...         first = ahead.next()
        ...         first.use(first.start + 3)
        ...         second = ahead.next()
        >>> bytes(second.buffer_B[second.start : second.stop]), second.offset, second.is_last
        (b'defgh', 3, True)
    """

    def __init__(self, stream: ByteStream, offset: int = 0, window_bytes: int = WINDOW_BYTES) -> None:
        self._is_file = stream.can_be_read_again
        self._is_closed = False
        self._room = min(ROOM_BYTES, window_bytes)
        self._empty: SimpleQueue[np.ndarray | None] = SimpleQueue()
        self._read: SimpleQueue[Any] = SimpleQueue()  # (buffer, bytes read), or the error that ended it
        for _ in range(2):
            self._empty.put(np.empty(self._room + window_bytes + SLACK_BYTES, np.uint8))
        self._buffer_B = np.empty(0, np.uint8)  # the current window's, to be given back
        self._window = Window(self._buffer_B, 0, 0, offset, False)
        self._thread = threading.Thread(
            target=_fill, args=(stream, self._room, self._empty, self._read), name="bigembed-read-ahead", daemon=True
        )
        self._thread.start()

    def next(self) -> Window:
        """The next window, which begins with what was not used of the last one; that one is void then.

        Not to be called after the one that `is_last`.

        Raises:
            Whatever reading the stream raises.
        """
        old = self._window
        kept = len(old)
        got = self._read.get()
        if isinstance(got, BaseException):
            raise got
        buffer_B, count = got
        start, stop = self._room - kept, self._room + count
        window_B = buffer_B
        if start < 0:
            window_B = np.empty(kept + count + SLACK_BYTES, np.uint8)
            window_B[kept : kept + count] = buffer_B[self._room : stop]
            start, stop = 0, kept + count
        window_B[start : start + kept] = old.buffer_B[old.start : old.stop]
        is_last = count < len(buffer_B) - self._room - SLACK_BYTES
        self._window = Window(window_B, start, stop, old.offset, is_last)
        if len(self._buffer_B):
            self._empty.put(self._buffer_B)
        self._buffer_B = buffer_B
        return self._window

    def close(self) -> None:
        """Stop reading; safe to repeat. A thread that waits for a pipe is left to itself after a while."""
        if not self._is_closed:
            self._is_closed = True
            self._empty.put(None)
            self._thread.join(None if self._is_file else CLOSE_SECONDS)

    @property
    def is_reading(self) -> bool:
        """Whether the thread still uses the stream."""
        return self._thread.is_alive()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _fill(stream: ByteStream, room: int, empty: "SimpleQueue[np.ndarray | None]", read: "SimpleQueue[Any]") -> None:
    """Fill buffers behind their room until the stream ends, or None is given instead of a buffer."""
    try:
        while (buffer_B := empty.get()) is not None:
            count = stream.read_into(buffer_B[room : len(buffer_B) - SLACK_BYTES])
            read.put((buffer_B, count))
            if count < len(buffer_B) - room - SLACK_BYTES:
                return
    except BaseException as error:
        read.put(error)
