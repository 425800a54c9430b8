"""`bigembed info` and `bigembed verify`: what a table is, and whether it is sound."""

import argparse
import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bigembed.cli.command import OK, add_command, open_table, progress_bar
from bigembed.cli.output import counted, printable, show
from bigembed.errors import InvalidArgument

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
    show(json.dumps(facts, indent=2) if args.json else _as_text(facts))
    return OK


def table_facts(path: str) -> dict[str, Any]:
    """What `info` tells about the table at `path`: plain values that JSON can hold, sizes in bytes."""
    from bigembed.storage import files

    with open_table(path) as table:
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
    words, source = facts["vocabulary"], facts["source"]
    if words is not None:
        lines.append(("vocabulary", counted(words["tokens"], "token")))
        if words["subwords"] is not None:
            lines.append(("subwords", _subwords(words["subwords"])))
        if words["unknown"]["kind"] != "error":
            lines.append(("unknown tokens", _unknown(words["unknown"])))
    if isinstance(source, dict):
        names = ", ".join(printable(str(one["name"])) for one in source.get("files", []))
        lines.append(("converted from", f"{source.get('format')}: {names}" if names else str(source.get("format"))))
    return lines


def _subwords(settings: dict[str, Any]) -> str:
    """How vectors of unknown words are composed: the kind, its n-grams, and how many rows these share."""
    from bigembed.vocab.subwords import Subwords

    try:
        Subwords.from_settings(settings)
    except InvalidArgument:
        return f"{settings.get('kind')}, which this version does not know"
    if "bucket" in settings:
        buckets = counted(settings["bucket"], "bucket")
    elif "exponent" in settings:
        buckets = counted(1 << settings["exponent"], "bucket")
    else:
        buckets = f"{settings['hash_count']} of {counted(settings['num_rows'], 'row')} each"
    if settings.get("pruned") is not None:
        buckets = f"{len(settings['pruned']):,} of {buckets}"
    return f"{settings['kind']}, {settings['minn']} to {settings['maxn']} characters, {buckets}"


def _unknown(policy: dict[str, Any]) -> str:
    """What stands for a token that the vocabulary does not have."""
    if policy["kind"] == "hash-buckets":
        return f"hashed into {counted(policy['count'], 'row')} from row {policy['first_row']:,} on"
    if policy["kind"] == "row":
        return f"row {policy['row']:,}" if policy["row"] >= 0 else "no row"
    return str(policy["kind"])


def _as_text(facts: dict[str, Any]) -> str:
    from bigembed.demo.report import aligned, in_bytes

    journal, init = facts["journal"], facts["init"]
    parameters = f"{init['a']:g}" if init["kind"] == "constant" else f"{init['a']:g}, {init['b']:g}"
    segments = counted(journal["segments"], "segment")
    blocks = [f"{block['name']} ({block['width']})" for block in facts["state"]]
    owner = f"of {facts['owner']}" if facts["owner"] else "owned by no optimizer yet"
    generations = [
        f"{one['number']}  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(one['time']))}  {printable(one['note'])}"
        for one in facts["generations"]
    ]
    return aligned(
        [
            ("table", printable(facts["path"])),
            ("shape", f"{facts['shape'][0]:,} x {facts['shape'][1]} {facts['dtype']}"),
            ("state columns", f"{', '.join(blocks)}, {owner}" if blocks else "none"),
            ("initial values", f"{init['kind']}({parameters}), seed {facts['seed']}"),
            ("logical size", in_bytes(facts["logical_bytes"])),
            ("disk used", in_bytes(facts["disk_bytes"])),
            ("base", f"{counted(facts['base_rows'], 'row')} written"),
            ("journal", f"{counted(journal['rows'], 'row')}, {in_bytes(journal['disk_bytes'])} in {segments}"),
            ("undo", f"{counted(facts['undo']['rows'], 'row')}, {in_bytes(facts['undo']['disk_bytes'])}"),
            *_origin(facts),
            *[("generations" if i == 0 else "", line) for i, line in enumerate(generations)],
        ]
    )


def add_verify(commands: Any) -> None:
    text = "Read a whole table and compare it with every checksum. Exit status 1 and the first damage if there is any."
    add_command(commands, "verify", _verify, text).add_argument("table", metavar="TABLE", help="the table's folder")


def _verify(args: argparse.Namespace) -> int:
    from bigembed.vocab.vocabulary import Vocabulary

    with open_table(args.table) as table:
        with progress_bar("verifying", "chunk") as move:
            found = table.verify(move)
        base = f"{counted(found.written_rows, 'row')} in {counted(found.chunks, 'chunk')}"
        beside = f"{counted(found.journal_records, 'record')} in the journal, {found.undo_records:,} in undo"
        if Vocabulary.stands_at(table.path):
            words = Vocabulary.open(table)
            words.verify()
            beside += f", {counted(len(words), 'token')}"
        show(f"{printable(table.path)}: sound at generation {table.generation}: {base}, {beside}")
    return OK


COMMANDS = (add_info, add_verify)
