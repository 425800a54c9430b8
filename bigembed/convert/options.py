"""ConvertOptions: what a user may say about a conversion, checked before and after the source is open."""

from dataclasses import dataclass
from typing import Any

from bigembed.convert.source import Source
from bigembed.errors import InvalidArgument
from bigembed.storage.create import checked_integer


@dataclass(frozen=True)
class ConvertOptions:
    """What a user may say about a conversion.

    Args:
        format: the source's format, see bigembed.convert.formats.FORMATS; None to recognise it by its bytes.
        dim: columns, where a text file leaves them open. tensor: which tensor, dataset or column holds the rows.
        skip_bad_lines: leave out lines that cannot be read, instead of stopping at the first.
        rows: rows of the table; those past the source's start at random, with the spread of those read.
        limit: read at most so many rows.
        dtype: "float32", the only one so far.
        optimizer: reserve the state columns of this optimizer, such as "Adam"; None reserves row-wise Adagrad's one.
        normalize: divide each row by its 2-norm.
        vocabulary: keep the tokens.
        unknown: what stands for a token that is not there: None (an error), a row, or a token.
        seed: decides the initial values of rows past the source's.
        overwrite: replace a table that stands at the target.
        dry_run: read and check every row, write nothing.
    """

    format: str | None = None
    dim: int | None = None
    tensor: str | None = None
    skip_bad_lines: bool = False
    rows: int | None = None
    limit: int | None = None
    dtype: str = "float32"
    optimizer: str | None = None
    normalize: bool = False
    vocabulary: bool = True
    unknown: int | str | bytes | None = None
    seed: int = 0
    overwrite: bool = False
    dry_run: bool = False


def checked_options(options: ConvertOptions | None, more: dict[str, Any]) -> ConvertOptions:
    """The options, given in one of two ways; InvalidArgument for what cannot be."""
    if options is not None and more:
        raise InvalidArgument(f"options are given twice: as an object, and as {', '.join(sorted(more))}.")
    try:
        chosen = options or ConvertOptions(**more)
    except TypeError as error:
        known = ", ".join(ConvertOptions.__dataclass_fields__)
        raise InvalidArgument(f"{error}. The options are {known}.") from error
    if chosen.dtype != "float32":
        raise InvalidArgument(f"dtype {chosen.dtype!r} is not supported; this version stores float32.")
    for name in ("rows", "limit", "dim"):
        value = getattr(chosen, name)
        if value is not None and checked_integer(name, value) < 1:
            raise InvalidArgument(f"{name} must be at least 1, not {value}.")
    if chosen.tensor is not None and not isinstance(chosen.tensor, str):
        raise InvalidArgument(f"tensor must be a name, not {chosen.tensor!r}.")
    if chosen.rows is not None and chosen.limit is not None and chosen.rows < chosen.limit:
        raise InvalidArgument(f"rows={chosen.rows} is less than limit={chosen.limit}: read rows need room.")
    return chosen


def check_applies(reader: Source, options: ConvertOptions) -> None:
    """Raises InvalidArgument for what would mean nothing for this source."""
    if reader.num_rows is not None and options.limit is None:
        check_rows(reader, options, reader.num_rows)
    if reader.subwords is not None and options.normalize:
        raise InvalidArgument(
            f"normalize: the vectors of words in {reader.path} are means of several rows, which would not be of unit "
            "length. Normalise what you look up."
        )
    if reader.subwords is not None and options.unknown is not None:
        raise InvalidArgument(
            f"unknown={options.unknown!r}: unknown words get a vector from the subwords in {reader.path}. Leave it out."
        )
    if type(options.unknown) is int and not 0 <= options.unknown < (options.rows or reader.num_rows or 1 << 62):
        raise InvalidArgument(f"unknown={options.unknown} is no row of the table.")


def check_rows(reader: Source, options: ConvertOptions, rows: int) -> None:
    if options.rows is not None and options.rows < rows:
        raise InvalidArgument(f"{reader.path} has at least {rows} rows, more than rows={options.rows}. Use limit too.")
