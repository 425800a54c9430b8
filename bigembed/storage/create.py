"""Making a new table: built aside, renamed into place when whole."""

import operator
import os
import secrets
import time
from typing import Any

from bigembed.errors import BigembedError, InvalidArgument, TableExists
from bigembed.init import InitialValues, as_initial_values
from bigembed.spec import StateColumns, TableSpec, default_chunk_rows
from bigembed.storage import files, zarr_format
from bigembed.storage.lock import WriterLock
from bigembed.storage.superblock import Commit, Superblock

RESERVED = "reserved"
REPLACED = "replaced"  # the table that a new one takes the place of, until it is removed


def checked_integer(name: str, value: Any) -> int:
    """The value as an int.

    Raises:
        InvalidArgument: it is none.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidArgument(f"{name} must be an integer, not {value!r}.")
    return operator.index(value)


def new_spec(
    num_rows: int,
    dim: int,
    dtype: str,
    state_dim: int,
    init: InitialValues | str | None,
    seed: int,
    chunk_rows: int | None,
    padding_idx: int | None,
) -> TableSpec:
    """The spec of a fresh table, with a salt of its own."""
    for name, value in {"num_rows": num_rows, "dim": dim, "state_dim": state_dim, "seed": seed}.items():
        checked_integer(name, value)
    for name, optional in {"chunk_rows": chunk_rows, "padding_idx": padding_idx}.items():
        if optional is not None:
            checked_integer(name, optional)
    if state_dim < 0:
        raise InvalidArgument(f"state_dim must be at least 0, not {state_dim}.")
    record_bytes = 4 * (int(dim) + int(state_dim) + 1)
    return TableSpec(
        num_rows=int(num_rows),
        dim=int(dim),
        dtype=str(dtype).removeprefix("torch."),
        state=(StateColumns(RESERVED, int(state_dim)),) if state_dim else (),
        init=as_initial_values(init),
        seed=int(seed),
        salt=secrets.randbits(64),
        chunk_rows=default_chunk_rows(int(num_rows), record_bytes) if chunk_rows is None else int(chunk_rows),
        padding_idx=None if padding_idx is None else int(padding_idx),
    )


def create_table(path: str, overwrite: bool, **facts: Any) -> None:
    """Make the folder of a new, empty table.

    Raises:
        TableExists: something stands at the path, and is no table or `overwrite` is not given.
        TableLocked: the table to overwrite is open for writing.
    """
    spec = new_spec(**facts)
    lock = _lock_what_stands_there(path, overwrite)
    aside = f"{path}.new-{secrets.token_hex(4)}"
    parent = os.path.dirname(path)
    replaced = os.path.join(aside, REPLACED)
    try:
        with files.operation("mkdir", parent):
            os.makedirs(parent, exist_ok=True)
        files.make_directory(aside)
        for folder in ("weight", "journal", "undo"):
            files.make_directory(os.path.join(aside, folder))
        zarr_format.write_metadata(aside, spec, plain=False)
        birth = Commit(0, 0, spec.num_rows, "created", time.time(), explicit=True)
        Superblock.fresh(spec.num_chunks, birth).write(aside)
        files.File(os.path.join(aside, "lock"), files.WRITE).close()
        files.sync_directory(aside)
        if lock is not None:
            files.rename(path, replaced)
        files.rename(aside, path)
    except BaseException:
        if os.path.lexists(replaced):
            files.rename(replaced, path)
        files.remove_tree(aside)
        raise
    finally:
        if lock is not None:
            lock.release()
    files.sync_directory(parent)
    files.remove_tree(os.path.join(path, REPLACED))


def _lock_what_stands_there(path: str, overwrite: bool) -> WriterLock | None:
    """None when the path is free, or the writer's lock of the table there: nobody else may open it meanwhile."""
    if not os.path.lexists(path):
        return None
    if not overwrite:
        raise TableExists(f"{path} exists. Open it with Table.open, choose another path, or pass overwrite=True.")
    try:
        zarr_format.read_metadata(path)
    except BigembedError as error:
        raise TableExists(f"{path} exists and is not a table, so it is not overwritten: {error}") from error
    return WriterLock(path)


def remove_leftovers(path: str) -> None:
    """Remove what replacing a file or the table itself left behind when it was interrupted; for the writer."""
    files.remove_tree(os.path.join(path, REPLACED))
    for folder in (path, os.path.join(path, "weight")):
        for name in os.listdir(folder):
            if name.endswith(".new"):
                files.unlink(os.path.join(folder, name))
