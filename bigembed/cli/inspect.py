"""`bigembed info` and `bigembed verify`: what a table is, and whether it is sound."""

import argparse
import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bigembed.cli.command import OK, add_command, printable, progress_bar

if TYPE_CHECKING:
    from bigembed.storage.table import Table


def add_info(commands: Any) -> None:
    parser = add_command(
        commands, "info", _info, "Show what a table is: shape, optimizer state, sizes, generations, journal."
    )
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
            "vocabulary": _vocabulary(table),
            "source": spec.attributes.get("source"),
            "generations": [
                {"number": one.number, "note": one.note, "time": one.time, "payload": one.payload}
                for one in table.generations()
            ],
        }


def _vocabulary(table: "Table") -> dict[str, Any] | None:
    from bigembed.vocab.vocabulary import Vocabulary

    return Vocabulary.open(table).stats() if Vocabulary.stands_at(table.path) else None


def _origin(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines that tell where the rows and the vocabulary came from, as far as there are any."""
    lines = []
    if facts["vocabulary"] is not None:
        lines.append(("vocabulary", f"{facts['vocabulary']['tokens']:,} tokens"))
    if facts["source"] is not None:
        files = ", ".join(printable(str(one["name"])) for one in facts["source"].get("files", []))
        lines.append(("converted from", f"{facts['source'].get('format')}: {files or 'standard input'}"))
    return lines


def _as_text(facts: dict[str, Any]) -> str:
    from bigembed.demo.report import aligned, in_bytes

    journal, init = facts["journal"], facts["init"]
    parameters = f"{init['a']:g}" if init["kind"] == "constant" else f"{init['a']:g}, {init['b']:g}"
    blocks = [f"{block['name']} ({block['width']})" for block in facts["state"]]
    owner = f"of {facts['owner']}" if facts["owner"] else "owned by no optimizer yet"
    generations = [
        f"{one['number']}  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(one['time']))}  {printable(one['note'])}"
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
            *_origin(facts),
            *[("generations" if i == 0 else "", line) for i, line in enumerate(generations)],
        ]
    )


def add_verify(commands: Any) -> None:
    text = "Read a whole table and compare it with every checksum. Exit status 1 and the first damage if there is any."
    add_command(commands, "verify", _verify, text).add_argument("table", metavar="TABLE", help="the table's folder")


def _verify(args: argparse.Namespace) -> int:
    from bigembed.storage.table import Table
    from bigembed.vocab.vocabulary import Vocabulary

    with Table.open(args.table, mode="r") as table:
        with progress_bar("verifying", "chunk") as show:
            found = table.verify(show)
        base = f"{found.written_rows:,} rows in {found.chunks:,} chunks"
        beside = f"{found.journal_records:,} records in the journal, {found.undo_records:,} in undo"
        if Vocabulary.stands_at(table.path):
            words = Vocabulary.open(table)
            words.verify()
            beside += f", {len(words):,} tokens"
        print(f"{table.path}: sound at generation {table.generation}: {base}, {beside}")
    return OK


COMMANDS = (add_info, add_verify)
