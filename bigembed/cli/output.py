"""What is printed: words that are safe to print, counts with their nouns, outputs that take any text or may be gone."""

import os
import sys
from contextlib import suppress


def printable(text: str) -> str:
    """A user's words on one line of the terminal: control characters are shown, not obeyed."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def show(text: str) -> None:
    """Print lines, each of them `printable`."""
    print(_lines(text))


def tell(text: str) -> None:
    """As `show`, on standard error and after the command's name."""
    print(_lines(f"bigembed: {text}"), file=sys.stderr)


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.rstrip("\n").split("\n")))


def counted(count: int, noun: str) -> str:
    """A number and its noun: 1 line, 2,000 lines."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def prepare_outputs() -> None:
    """From here on nothing fails to print: what an output cannot encode is escaped; one that is closed swallows all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, as in 2>&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop_broken_outputs() -> None:
    """What an output cannot be told is dropped: the interpreter would try again at its end, and say so."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                _send_nowhere(stream.fileno())


def _send_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
