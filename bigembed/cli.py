"""The command `bigembed`. Each subcommand is a parser and a function that imports what it needs and nothing more."""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from bigembed import __version__
from bigembed.demo.options import DemoOptions
from bigembed.errors import BigembedError, InvalidArgument, TableExists

OK, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130

EXAMPLES = """examples:
  bigembed demo                                      about a minute: a 51 GB table learns n-grams
  bigembed demo --text ~/books --tokens words --seconds 300 --path ngrams.bigembed
  bigembed info ngrams.bigembed
  bigembed verify ngrams.bigembed && echo sound
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0: done. 1: damage, or something that could not be done. 2: a command line or input that cannot be used.
    130: interrupted by Ctrl-C.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its message, or the help
        return int(stop.code or OK)
    try:
        return args.run(args)
    except (InvalidArgument, TableExists) as error:
        return _fail(error, WRONG_USE)
    except (BigembedError, OSError) as error:
        return _fail(error, FAILED)
    except MemoryError:
        return _fail(MemoryError("there is not enough memory for these sizes; make them smaller."), FAILED)
    except KeyboardInterrupt:
        print("bigembed: interrupted", file=sys.stderr)
        return INTERRUPTED


def _printable(text: str) -> str:
    """A user's words on one line of the terminal: control characters are shown, not obeyed."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _fail(error: Exception, status: int) -> int:
    print("bigembed: error: " + " ".join(str(error).split()), file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bigembed",
        description="Embedding tables too large for RAM that train like torch.nn.Embedding.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bigembed {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_demo, _add_info, _add_verify):
        add(commands)
    return parser


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    """A subcommand: its one-line help ends at the first full stop of its description."""
    parser = commands.add_parser(name, help=text.split(".")[0], description=text)
    parser.set_defaults(run=run)
    return parser


# -- demo -------------------------------------------------------------------------------------------------------


def _add_demo(commands: Any) -> None:
    default = DemoOptions()
    text = (
        "Train an n-gram memory on real text. A table with a row for each n-gram of 2, 3 and 4 tokens (hashed) and a "
        "small dense model learn to predict the next token, beside the same dense model without the table. Then the "
        "table is committed, closed, opened again, verified and compared. Ctrl-C ends training early."
    )
    parser = _add(commands, "demo", _demo, text)
    add = parser.add_argument
    add(
        "--text",
        action="append",
        metavar="PATH",
        default=[],
        help="a text file, or a folder of them; may be repeated (default: the sources of Python's standard library)",
    )
    add("--tokens", choices=("bytes", "words"), default=default.tokens, help="what a token is (default: bytes)")
    add("--rows", type=_count, default=default.rows, metavar="N", help=f"rows (default: {default.rows:_})")
    add("--dim", type=_count, default=default.dim, metavar="N", help=f"columns (default: {default.dim})")
    add(
        "--seconds",
        type=_seconds,
        default=default.seconds,
        metavar="S",
        help=f"time to train (default: {default.seconds:g})",
    )
    add("--steps", type=_count, metavar="N", help="train for so many steps instead")
    add("--batch", type=_count, default=default.batch, metavar="N", help=f"tokens in a step (default: {default.batch})")
    add(
        "--cache-bytes",
        type=_size,
        default=default.cache_bytes,
        metavar="SIZE",
        help="memory for hot rows and the journal's index, such as 2GiB (default: 512MiB)",
    )
    add("--path", help="where to make the table; it stays there (default: a temporary folder, removed at the end)")
    add("--keep", action="store_true", help="keep the temporary folder")
    add("--seed", type=_whole, default=default.seed, metavar="N", help="decides split, batches, weights (default: 0)")


def _demo(args: argparse.Namespace) -> int:
    from bigembed.demo.report import report
    from bigembed.demo.run import run_demo

    chosen = {name: getattr(args, name) for name in DemoOptions.__dataclass_fields__ if name != "text"}
    result = run_demo(DemoOptions(text=tuple(args.text), **chosen))
    print(report(result))
    return OK if result.is_same else FAILED


# -- info and verify --------------------------------------------------------------------------------------------


def _add_info(commands: Any) -> None:
    parser = _add(commands, "info", _info, "Show what a table is: shape, optimizer state, sizes, generations, journal.")
    parser.add_argument("table", metavar="TABLE", help="the table's folder")
    parser.add_argument("--json", action="store_true", help="as one JSON object, sizes in bytes")


def _info(args: argparse.Namespace) -> int:
    facts = table_facts(args.table)
    print(json.dumps(facts, indent=2) if args.json else _as_text(facts))
    return OK


def table_facts(path: str) -> dict[str, Any]:
    """What `info` tells about the table at `path`: plain values that JSON can hold, sizes in bytes."""
    from bigembed.storage import files
    from bigembed.storage.table import Table

    with Table.open(path, mode="r") as table:
        spec, stats = table.spec, table.stats()
        return {
            "path": table.path,
            "shape": list(table.shape),
            "dtype": spec.dtype,
            "state": [asdict(block) for block in spec.state],
            "owner": spec.owner,
            "init": asdict(spec.init),
            "seed": spec.seed,
            "logical_bytes": spec.logical_bytes,
            "disk_bytes": files.disk_bytes(table.path),
            "base_rows": stats["table"]["written_rows"],
            "journal": {"rows": stats["index"]["rows"], **stats["journal"]},
            "undo": stats["undo"],
            "generations": [
                {"number": one.number, "note": one.note, "time": one.time, "payload": one.payload}
                for one in table.generations()
            ],
        }


def _as_text(facts: dict[str, Any]) -> str:
    from bigembed.demo.report import aligned, in_bytes

    journal, init = facts["journal"], facts["init"]
    parameters = f"{init['a']:g}" if init["kind"] == "constant" else f"{init['a']:g}, {init['b']:g}"
    blocks = [f"{block['name']} ({block['width']})" for block in facts["state"]]
    owner = f"of {facts['owner']}" if facts["owner"] else "owned by no optimizer yet"
    generations = [
        f"{one['number']}  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(one['time']))}  {_printable(one['note'])}"
        for one in facts["generations"]
    ]
    return aligned(
        [
            ("table", facts["path"]),
            ("shape", f"{facts['shape'][0]:,} x {facts['shape'][1]} {facts['dtype']}"),
            ("state columns", f"{', '.join(blocks)}, {owner}" if blocks else "none"),
            ("initial values", f"{init['kind']}({parameters}), seed {facts['seed']}"),
            ("logical size", in_bytes(facts["logical_bytes"])),
            ("disk used", in_bytes(facts["disk_bytes"])),
            ("base", f"{facts['base_rows']:,} rows written"),
            (
                "journal",
                f"{journal['rows']:,} rows, {in_bytes(journal['disk_bytes'])} in {journal['segments']} segments",
            ),
            ("undo", f"{facts['undo']['rows']:,} rows, {in_bytes(facts['undo']['disk_bytes'])}"),
            *[("generations" if i == 0 else "", line) for i, line in enumerate(generations)],
        ]
    )


def _add_verify(commands: Any) -> None:
    text = "Read a whole table and compare it with every checksum. Exit status 1 and the first damage if there is any."
    _add(commands, "verify", _verify, text).add_argument("table", metavar="TABLE", help="the table's folder")


def _verify(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from bigembed.storage.table import Table

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with Table.open(args.table, mode="r") as table:
        with tqdm(desc="verifying", unit="chunk", file=sys.stderr, disable=None, leave=False) as bar:
            found = table.verify(show)
        base = f"{found.written_rows:,} rows in {found.chunks:,} chunks"
        beside = f"{found.journal_records:,} records in the journal, {found.undo_records:,} in undo"
        print(f"{table.path}: sound at generation {table.generation}: {base}, {beside}")
    return OK


# -- what options accept ----------------------------------------------------------------------------------------


def _whole(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number such as 200_000_000")
    return number


def _count(text: str) -> int:
    if _whole(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return _whole(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds


UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}


def _size(text: str) -> int:
    """Bytes: 512MiB is 512 * 2**20, 512MB is 512 * 10**6, a bare number is bytes."""
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MiB, 2GiB or 1_000_000")
    size = int(float(match[1]) * UNITS[match[2].upper()])
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than one byte")
    return size


if __name__ == "__main__":
    sys.exit(main())
