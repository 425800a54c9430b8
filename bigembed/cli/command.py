"""What every subcommand shares: how it is added, its exit statuses, a table to read, a progress bar."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bigembed.errors import TableMissing

if TYPE_CHECKING:
    from bigembed.storage.table import Table

OK, FAILED, WRONG_USE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 0, 1, 2, 130, 141, 143

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


def open_table(path: str) -> "Table":
    """The table that a command reads.

    Raises:
        TableMissing: nothing is there.
    """
    from bigembed.storage.table import Table

    with said_of_table(path):
        return Table.open(path, mode="r")


@contextmanager
def said_of_table(path: str) -> Iterator[None]:
    """Where a table to read is missing, its error says what the command line can do about it."""
    try:
        yield
    except TableMissing as error:
        if os.path.lexists(path):
            raise
        raise TableMissing(
            f"{os.path.abspath(path)} does not exist. Give the folder of a table, or make one with bigembed convert or "
            "bigembed demo."
        ) from error


@contextmanager
def progress_bar(text: str, unit: str, **options: Any) -> Iterator[Callable[[int, int | None], None]]:
    """Gives a function of (done, total) that moves a bar on standard error; silent where that is no terminal."""
    from tqdm import tqdm

    with tqdm(desc=text, unit=unit, file=sys.stderr, disable=None, leave=False, **options) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
