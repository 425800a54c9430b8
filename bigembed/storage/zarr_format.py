"""The Zarr v3 face of a table: metadata made and checked by zarr-python, written by us (only user of zarr).

zarr-python never writes a chunk of a table: its writes replace the file, rewrite whole chunks with zero padding,
and by default delete chunks equal to the fill value. Here it makes metadata in memory and judges what it reads.
"""

# zarr-python reads on a thread pool, whose module takes a lock ahead of every fork. Hooks ahead of a fork run last
# registered first. Imported before lifetime registers its own, a fork first waits until nobody is inside a table, and
# takes that lock only then: somebody who verifies a table needs it to get on.
import concurrent.futures.thread  # noqa: F401
import errno
import json
import os
from typing import Any

from bigembed.errors import DamagedTable, NotATable, StorageFailed, TableMissing
from bigembed.spec import TableSpec
from bigembed.storage import files

GROUP_FILE = "zarr.json"
ARRAY_FILE = os.path.join("weight", "zarr.json")
ATTRIBUTES = "bigembed"
METADATA_LIMIT_BYTES = 16 << 20
_NO_SUCH_FILE = {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EFBIG}  # it is none of ours; others are faults


def metadata(spec: TableSpec, plain: bool) -> dict[str, bytes]:
    """The two metadata files of a table, {"zarr.json": ..., "weight/zarr.json": ...}, as zarr-python writes them."""
    import zarr
    from zarr.storage import MemoryStore

    made: dict[str, Any] = {}
    store = MemoryStore(made)
    group = zarr.create_group(store, zarr_format=3, attributes={ATTRIBUTES: {**spec.to_attributes(), "plain": plain}})
    group.create_array(
        "weight",
        shape=(spec.num_rows, spec.dim),
        chunks=(spec.chunk_rows, spec.record_words),
        dtype="<f4",
        compressors=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    return {name: made[name].to_bytes() for name in (GROUP_FILE, ARRAY_FILE)}


def write_metadata(path: str, spec: TableSpec, plain: bool) -> None:
    """Bring both metadata files to `spec`; each is replaced atomically, the array's first."""
    made = metadata(spec, plain)
    for name in (ARRAY_FILE, GROUP_FILE):
        target = os.path.join(path, name)
        if not os.path.exists(target) or files.read_bytes(target, METADATA_LIMIT_BYTES) != made[name]:
            files.write_atomically(target, made[name])


def read_metadata(path: str) -> tuple[TableSpec, bool, dict[str, bytes]]:
    """The spec of the table at `path`, whether it is plain, and the metadata bytes it was read from.

    Raises:
        TableMissing: nothing is there. NotATable, NewerFormat: what is there is no table of ours.
        StorageFailed: the system refused a read.
    """
    found = {}
    if not os.path.lexists(path):
        raise TableMissing(f"{path} does not exist. Create a table with Table.create(path, num_rows, dim).")
    try:
        for name in (GROUP_FILE, ARRAY_FILE):
            found[name] = files.read_bytes(os.path.join(path, name), METADATA_LIMIT_BYTES)
        group, array = (json.loads(found[name]) for name in (GROUP_FILE, ARRAY_FILE))
        attributes = group["attributes"][ATTRIBUTES]
    except (FileNotFoundError, KeyError, TypeError, ValueError, StorageFailed) as error:
        if isinstance(error, StorageFailed) and error.errno not in _NO_SUCH_FILE:
            raise
        if os.path.isfile(path):
            raise NotATable(f"{path} is a file, not a table. Make a table of it with bigembed convert.") from error
        why = "it has no zarr.json" if isinstance(error, FileNotFoundError) else repr(error)
        raise NotATable(f"{path} is not a bigembed table: {why}. Choose another path.") from error
    attributes = dict(attributes)
    plain = attributes.pop("plain", False) is True
    spec = TableSpec.from_attributes(attributes, path)
    _check_array(array, spec, path)
    return spec, plain, found


def _check_array(array: Any, spec: TableSpec, path: str) -> None:
    """The array's metadata must be what `spec` says, but for the number of rows, which may lag behind a grow."""
    try:
        shape = array["shape"]
        grid = array["chunk_grid"]["configuration"]["chunk_shape"]
        codecs = [codec["name"] for codec in array["codecs"]]
        endian = array["codecs"][0].get("configuration", {}).get("endian")
        key = array["chunk_key_encoding"]
        separator = key.get("configuration", {}).get("separator", "/")
        given = (
            array["zarr_format"],
            array["data_type"],
            codecs,
            endian,
            key["name"],
            separator,
            array["fill_value"],
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise NotATable(f"{path}/weight/zarr.json is not a Zarr v3 array's metadata: {error!r}.") from error
    if given != (3, "float32", ["bytes"], "little", "default", ".", 0):
        raise NotATable(f"{path}/weight/zarr.json describes another kind of array than a table's: {given}.")
    if len(shape) != 2 or shape[1] != spec.dim or list(grid) != [spec.chunk_rows, spec.record_words]:
        raise DamagedTable(
            f"{path}: weight/zarr.json (shape {shape}, chunks {grid}) contradicts the group's attributes "
            f"(dim {spec.dim}, chunks [{spec.chunk_rows}, {spec.record_words}]). Restore zarr.json from a backup."
        )


def check_with_zarr(path: str, spec: TableSpec, also_rows: int | None = None) -> None:
    """zarr-python opens the array and sees what `spec` says.

    Args:
        also_rows: another V that the array may have.

    Raises:
        DamagedTable: it does not.
    """
    import zarr

    try:
        array = zarr.open_array(os.path.join(path, "weight"), mode="r")
    except Exception as error:  # zarr-python names no common class of its errors
        raise DamagedTable(f"zarr-python cannot open {path}/weight: {error}. Restore zarr.json.") from error
    shapes = [(rows, spec.dim) for rows in (spec.num_rows, also_rows)]
    if array.shape not in shapes or str(array.dtype) != spec.dtype:
        raise DamagedTable(
            f"{path}/weight is {array.shape} {array.dtype} to zarr-python, "
            f"{(spec.num_rows, spec.dim)} {spec.dtype} here. Restore zarr.json from a backup."
        )
