"""`bigembed demo`."""

import argparse
from typing import Any

from bigembed.cli import values
from bigembed.cli.command import FAILED, OK, add_command
from bigembed.cli.output import show
from bigembed.demo.options import DemoOptions

EXAMPLES = """  bigembed demo                                      about a minute: a 51 GB table learns n-grams
  bigembed demo --text ~/books --tokens words --seconds 300 --path ngrams.bigembed
"""


def add_demo(commands: Any) -> None:
    default = DemoOptions()
    text = (
        "Train an n-gram memory on real text. A table with a row for each n-gram of 2, 3 and 4 tokens (hashed) and a "
        "small dense model learn to predict the next token, beside the same dense model without the table. Then the "
        "table is committed, closed, opened again, verified and compared. Ctrl-C ends training early."
    )
    parser = add_command(commands, "demo", _demo, text, EXAMPLES)
    add = parser.add_argument
    add(
        "--text",
        action="append",
        metavar="PATH",
        default=[],
        help="a text file, or a folder of them; may be repeated (default: the sources of Python's standard library)",
    )
    add("--tokens", choices=("bytes", "words"), default=default.tokens, help="what a token is (default: bytes)")
    add("--rows", type=values.count, default=default.rows, metavar="N", help=f"rows (default: {default.rows:_})")
    add("--dim", type=values.count, default=default.dim, metavar="N", help=f"columns (default: {default.dim})")
    add(
        "--seconds",
        type=values.seconds,
        default=default.seconds,
        metavar="S",
        help=f"time to train (default: {default.seconds:g})",
    )
    add("--steps", type=values.count, metavar="N", help="train for so many steps instead")
    add(
        "--batch",
        type=values.count,
        default=default.batch,
        metavar="N",
        help=f"tokens in a step (default: {default.batch})",
    )
    add(
        "--cache-bytes",
        type=values.size,
        default=default.cache_bytes,
        metavar="SIZE",
        help="memory for hot rows and the journal's index, such as 2GiB (default: 512MiB)",
    )
    add("--path", help="where to make the table; it stays there (default: a temporary folder, removed at the end)")
    add("--keep", action="store_true", help="keep the temporary folder")
    add(
        "--seed",
        type=values.whole,
        default=default.seed,
        metavar="N",
        help="decides split, batches, weights (default: 0)",
    )


def _demo(args: argparse.Namespace) -> int:
    from bigembed.demo.report import report
    from bigembed.demo.run import run_demo

    chosen = {name: getattr(args, name) for name in DemoOptions.__dataclass_fields__ if name != "text"}
    result = run_demo(DemoOptions(text=tuple(args.text), **chosen))
    show(report(result))
    return OK if result.is_same else FAILED


COMMANDS = (add_demo,)
