"""`bigembed convert`, `export` and `copy`: tables from files, files from tables, tables from tables."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from bigembed.cli import values
from bigembed.cli.command import OK, add_command, progress_bar, said_of_table
from bigembed.cli.output import counted, printable, show
from bigembed.errors import TableExists

if TYPE_CHECKING:
    from bigembed.convert.converter import ConvertReport

NO_NUMBER_TYPES = ("text", "decimal", "product-quantised")  # how the file has its numbers, not what they are

CONVERT_EXAMPLES = """  bigembed convert GoogleNews-vectors-negative300.bin.gz news.bigembed
  bigembed convert cc.en.300.bin english.bigembed           words and subwords: any word has a vector
  bigembed convert ~/models/qwen qwen.bigembed --optimizer Adam
  bigembed convert model.safetensors memory.bigembed --tensor 'ngram_embedding.*'
  zstd -dc vectors.txt.zst | bigembed convert - vectors.bigembed --unknown '<unk>'
"""
EXPORT_EXAMPLES = """  bigembed export words.bigembed words.safetensors --dtype bfloat16
  bigembed export words.bigembed words.txt --format glove
"""


def add_convert(commands: Any) -> None:
    text = (
        "Bring a file of embeddings into a new table, with its vocabulary. Reads word2vec (text and binary), GloVe, "
        "fastText (.vec and .bin), .npy, .npz, torch, safetensors, Hugging Face model folders, GGUF, HDF5, Parquet and "
        "Arrow, finalfusion, spaCy and Magnitude; text may be compressed (.gz, .bz2, .xz, .zst). The format is "
        "recognised by the file's bytes. The table appears when it is whole: an error or Ctrl-C leaves nothing."
    )
    parser = add_command(commands, "convert", _convert, text, CONVERT_EXAMPLES)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a file, a model's folder, or - for standard input")
    add("target", metavar="TARGET", help="the folder of the new table")
    add("--format", help="what the source is, if its bytes do not say (a wrong name lists the formats)")
    add("--tensor", metavar="NAME", help="which tensor, dataset or column holds the rows")
    add("--dim", type=values.count, metavar="N", help="columns, where a text file leaves them open")
    add("--dtype", default="float32", help="what the table stores: float32")
    add("--rows", type=values.count, metavar="N", help="rows of the table; those past the source's start at random")
    add("--limit", type=values.count, metavar="N", help="read the first N rows only")
    add("--optimizer", metavar="NAME", help="reserve the state of Adam, Adagrad, ... (default: RowwiseAdagrad's)")
    add("--normalize", action="store_true", help="divide each row by its 2-norm")
    add("--no-vocabulary", dest="vocabulary", action="store_false", help="leave the tokens out")
    add(
        "--unknown",
        metavar="TOKEN",
        help="the token whose row stands for unknown ones (default: an error); --unknown=-x if it begins with a dash",
    )
    add(
        "--skip-bad-lines", action="store_true", help="leave out lines that cannot be read; they are counted and listed"
    )
    add("--seed", type=values.whole, default=0, metavar="N", help="of the rows that start at random (default: 0)")
    add("--overwrite", action="store_true", help="replace the table at TARGET")
    add("--dry-run", action="store_true", help="read and check every row, write nothing")


def _convert(args: argparse.Namespace) -> int:
    from bigembed.convert.converter import ConvertOptions, convert

    options = ConvertOptions(**{name: getattr(args, name) for name in ConvertOptions.__dataclass_fields__})
    with progress_bar("converting", "B", unit_scale=True, unit_divisor=1024) as move:
        report = convert(args.source, args.target, options, move)
    show(_as_text(report))
    for line in report.skipped.first:
        print(f"skipped: {printable(line)}", file=sys.stderr)
    if more := report.skipped.count - len(report.skipped.first):
        print(f"skipped: {counted(more, 'more line')}", file=sys.stderr)
    return OK


def _as_text(report: "ConvertReport") -> str:
    made = "would be made" if report.is_dry else "made"
    size = f"{counted(report.rows, 'row')} x {report.dim}"
    if report.dtype not in NO_NUMBER_TYPES:
        size += f" of {report.dtype}"
    lines = [f"{printable(report.target)}: {made} from {report.format}, {size}, in {report.seconds:.1f} s"]
    if more := report.num_rows - report.rows:
        lines.append(f"{counted(more, 'more row')} {'starts at its' if more == 1 else 'start at their'} initial values")
    words = report.vocabulary
    if words is not None:
        lines.append(counted(words.num_tokens, "token"))
        if words.duplicates:
            lines[-1] += f", {words.duplicates:,} of them again (the first one counts)"
        for token, row, first in words.first_duplicates[:3]:
            lines.append(f"  {printable(token.decode('utf-8', 'replace'))!r}: row {row} again, row {first} counts")
    if report.skipped.count:
        lines.append(
            f"{counted(report.skipped.count, 'line')} {'was' if report.skipped.count == 1 else 'were'} skipped"
        )
    return "\n".join([*lines, *(f"note: {printable(note)}" for note in report.notes)])


def add_export(commands: Any) -> None:
    text = (
        "Write a table's last commit to a file that other tools read. Formats: word2vec-text, word2vec-binary, glove, "
        "npy, safetensors, torch; by default what the target's name says."
    )
    parser = add_command(commands, "export", _export, text, EXPORT_EXAMPLES)
    add = parser.add_argument
    add("table", metavar="TABLE", help="the table's folder")
    add("target", metavar="TARGET", help="the file to write")
    add("--format", help="one of these (.txt and .vec are word2vec text, with a header)")
    add("--dtype", default="float32", help="float16 with npy, safetensors, torch; bfloat16 with the last two")
    add("--tensor", metavar="NAME", help="the tensor's name in safetensors and torch files")
    add(
        "--part-bytes",
        type=values.size,
        metavar="SIZE",
        help="split safetensors into parts of this size; TARGET is a folder then",
    )
    add("--limit", type=values.count, metavar="N", help="write the first N rows only")
    add("--overwrite", action="store_true", help="replace the file at TARGET")


def _export(args: argparse.Namespace) -> int:
    from bigembed.convert.export import export

    names = ("format", "dtype", "tensor", "part_bytes", "limit", "overwrite")
    with progress_bar("exporting", "row", unit_scale=True) as move, said_of_table(args.table):
        report = export(args.table, args.target, progress=move, **{name: getattr(args, name) for name in names})
    size = f"{counted(report.rows, 'row')} x {report.dim}"
    show(f"{printable(report.target)}: {size} as {report.format}, in {report.seconds:.1f} s")
    for note in report.notes:
        show(f"note: {printable(note)}")
    return OK


def add_copy(commands: Any) -> None:
    text = (
        "Copy a table as of its last commit. Rows, optimizer state and vocabulary go along; the journal is merged in, "
        "and rows never written take no disk."
    )
    parser = add_command(commands, "copy", _copy, text, "  bigembed copy words.bigembed /backup/words.bigembed\n")
    parser.add_argument("table", metavar="TABLE", help="the table's folder")
    parser.add_argument("target", metavar="TARGET", help="the folder of the copy")
    parser.add_argument("--overwrite", action="store_true", help="replace the table at TARGET")


def _copy(args: argparse.Namespace) -> int:
    from bigembed.storage.copy import copy_table

    if os.path.lexists(args.target) and not args.overwrite:
        raise TableExists(f"{os.path.abspath(args.target)} exists. Choose another target, or pass --overwrite.")
    with progress_bar("copying", "row", unit_scale=True) as move, said_of_table(args.table):
        copy_table(args.table, args.target, overwrite=args.overwrite, progress=move)
    show(f"{printable(args.target)}: a copy of {printable(args.table)}")
    return OK


COMMANDS = (add_convert, add_export, add_copy)
