"""SIGTERM while a command runs: an exception, so that everything is cleaned up as after Ctrl-C."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REPEAT_SECONDS = 1.0  # `timeout` sends the signal twice: to the process and to its group


class Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def raising_terminated() -> Iterator[None]:
    """While it lasts, SIGTERM raises Terminated, where its handler is the default one and can be set."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    raised = [float("-inf")]

    def handle(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - raised[0] > REPEAT_SECONDS:  # a repeat must not cut the cleaning up short
            raised[0] = time.monotonic()
            raise Terminated

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
