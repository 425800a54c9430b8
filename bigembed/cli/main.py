"""The command `bigembed`. Each subcommand is a parser and a function that imports what it needs and nothing more."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from bigembed import __version__
from bigembed.cli import convert, demo, inspect, words
from bigembed.cli.command import BROKEN_PIPE, FAILED, INTERRUPTED, OK, TERMINATED, WRONG_USE
from bigembed.cli.output import drop_broken_outputs, prepare_outputs, printable, tell
from bigembed.cli.termination import Terminated, raising_terminated
from bigembed.errors import (
    BadSource,
    BigembedError,
    InvalidArgument,
    NoVocabulary,
    RowOutOfRange,
    TableExists,
    UnknownFormat,
    UnknownToken,
)

EXAMPLES = """examples:
  bigembed demo                                      about a minute: a 51 GB table learns n-grams
  bigembed convert glove.840B.300d.txt glove.bigembed
  bigembed nearest glove.bigembed king
  bigembed info glove.bigembed
  bigembed verify glove.bigembed && echo sound
  bigembed export glove.bigembed glove.safetensors
"""

# What the user gave cannot be used: the command line, or the file that it names.
NOT_USABLE = (InvalidArgument, RowOutOfRange, TableExists, BadSource, UnknownFormat, NoVocabulary, UnknownToken)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0: done. 1: damage, or something that could not be done. 2: a command line or input that cannot be used.
    130: interrupted by Ctrl-C. 141: whoever read the output has gone. 143: terminated by SIGTERM.
    """
    prepare_outputs()
    try:
        status = _run(argv)
        if status == OK:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # nobody is left to tell
        return BROKEN_PIPE
    except OSError as error:  # such as a full disk under standard output
        return _fail(error, FAILED)
    finally:
        drop_broken_outputs()


def _run(argv: Sequence[str] | None) -> int:
    """Parse, run, and turn what went wrong into words and a status."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its message, or the help
        return int(stop.code or OK)
    try:
        with raising_terminated():
            return args.run(args)
    except BrokenPipeError:
        raise
    except NOT_USABLE as error:
        return _fail(error, WRONG_USE)
    except (BigembedError, OSError) as error:
        return _fail(error, FAILED)
    except MemoryError:
        return _fail(MemoryError("there is not enough memory for these sizes; make them smaller."), FAILED)
    except KeyboardInterrupt:
        tell("interrupted")
        return INTERRUPTED
    except Terminated:
        tell("terminated")
        return TERMINATED


def _fail(error: Exception, status: int) -> int:
    tell(f"error: {error}")
    return status


class _Parser(argparse.ArgumentParser):
    """A command line that was typed wrong is not obeyed by the terminal either."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bigembed",
        description="Embedding tables too large for RAM that train like torch.nn.Embedding.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bigembed {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (demo, convert, inspect, words):
        for add in module.COMMANDS:
            add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
