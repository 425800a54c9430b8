"""Making a new, empty table: its facts checked, its folder built aside and renamed into place when whole."""

import json
import operator
import os
import secrets
import time
from typing import Any

from bigembed.errors import InvalidArgument
from bigembed.init import InitialValues, as_initial_values
from bigembed.spec import MAX_ROWS, StateColumns, TableSpec, default_chunk_rows
from bigembed.storage.aside import Aside
from bigembed.storage.superblock import Commit, Superblock

RESERVED = "reserved"


def checked_integer(name: str, value: Any) -> int:
    """The value as an int.

    Raises:
        InvalidArgument: it is none.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidArgument(f"{name} must be an integer, not {value!r}.")
    return operator.index(value)


def absolute_path(path: Any, overwrite: bool = False) -> str:
    """The path as an absolute string; one to overwrite is that of the table, not of a link to it.

    Raises:
        InvalidArgument: it is empty, or no path.
    """
    if not isinstance(path, str | bytes | os.PathLike) or not os.fspath(path):
        raise InvalidArgument(f"path must name a folder, not {path!r}.")
    absolute = os.path.abspath(os.fsdecode(path))
    return os.path.realpath(absolute) if overwrite else absolute


def checked_json(name: str, value: Any) -> None:
    """Raises InvalidArgument for what JSON cannot hold."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{name} must be what JSON can hold: {error}.") from error


def checked_attributes(*given: dict[str, Any] | None) -> dict[str, Any]:
    """Attributes beside those that the format itself needs, later ones over earlier ones.

    Raises:
        InvalidArgument: a name that the format uses itself, or a value that JSON cannot hold.
    """
    attributes = {name: value for part in given for name, value in (part or {}).items()}
    taken = {"plain", *TableSpec(1, 1).to_attributes()} & attributes.keys()
    if taken:
        raise InvalidArgument(f"attributes hold {', '.join(sorted(taken))}, which the table's own facts use.")
    checked_json("attributes", attributes)
    return attributes


def reserved_state(state_dim: int) -> tuple[StateColumns, ...]:
    """`state_dim` state columns that no optimizer owns yet."""
    if checked_integer("state_dim", state_dim) < 0:
        raise InvalidArgument(f"state_dim must be at least 0, not {state_dim}.")
    return (StateColumns(RESERVED, int(state_dim)),) if state_dim else ()


def new_spec(
    num_rows: int | None,
    dim: int,
    *,
    state: tuple[StateColumns, ...],
    dtype: str = "float32",
    owner: str | None = None,
    init: InitialValues | str | None = None,
    seed: int = 0,
    chunk_rows: int | None = None,
    padding_idx: int | None = None,
    attributes: dict[str, Any] | None = None,
) -> TableSpec:
    """The spec of a fresh table, with a salt of its own; where V is open (None), for as many rows as there can be."""
    for name, value in {"dim": dim, "seed": seed}.items():
        checked_integer(name, value)
    for name, optional in {"num_rows": num_rows, "chunk_rows": chunk_rows, "padding_idx": padding_idx}.items():
        if optional is not None:
            checked_integer(name, optional)
    rows = MAX_ROWS if num_rows is None else int(num_rows)
    record_bytes = 4 * (int(dim) + sum(block.width for block in state) + 1)
    return TableSpec(
        num_rows=rows,
        dim=int(dim),
        dtype=str(dtype).removeprefix("torch."),
        state=tuple(state),
        owner=owner,
        init=as_initial_values(init),
        seed=int(seed),
        salt=secrets.randbits(64),
        chunk_rows=default_chunk_rows(rows, record_bytes) if chunk_rows is None else int(chunk_rows),
        padding_idx=None if padding_idx is None else int(padding_idx),
        attributes=dict(attributes or {}),
    )


def create_table(path: str, overwrite: bool, num_rows: int, dim: int, state_dim: int, **facts: Any) -> None:
    """Make the folder of a new, empty table.

    Raises:
        TableExists: something stands at the path, and is no table or `overwrite` is not given.
        TableLocked: the table to overwrite is open for writing.
        StorageFailed: nothing was made, unless the message says that the table stands: then only its name may not
        survive a power cut.
    """
    spec = new_spec(checked_integer("num_rows", num_rows), dim, state=reserved_state(state_dim), **facts)
    birth = Commit(0, 0, spec.num_rows, "created", time.time(), explicit=True)
    aside = Aside(path, overwrite)
    try:
        aside.place(spec, Superblock.fresh(spec.num_chunks, birth), plain=False)
    except BaseException:
        aside.remove()
        raise
