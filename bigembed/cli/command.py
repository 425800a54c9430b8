"""What every subcommand shares: how it is added, its exit statuses, a progress bar, words that are safe to print."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OK, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130

Run = Callable[[argparse.Namespace], int]


def add_command(commands: Any, name: str, run: Run, text: str, examples: str = "") -> argparse.ArgumentParser:
    """A subcommand: its one-line help ends at the first full stop of its description."""
    parser = commands.add_parser(
        name,
        help=text.split(". ")[0].removesuffix("."),
        description=text,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=_Formatter,
    )
    parser.set_defaults(run=run)
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Examples stay line by line; the description is wrapped as usual."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def printable(text: str) -> str:
    """A user's words on one line of the terminal: control characters are shown, not obeyed."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


@contextmanager
def progress_bar(text: str, unit: str, **options: Any) -> Iterator[Callable[[int, int | None], None]]:
    """Gives a function of (done, total) that moves a bar on standard error; silent where that is no terminal."""
    from tqdm import tqdm

    with tqdm(desc=text, unit=unit, file=sys.stderr, disable=None, leave=False, **options) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
