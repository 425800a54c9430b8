"""Copies of a table's first rows for zarr, tensorstore, h5py and LMDB, and how each gathers from its own.

Each gets the layout that suits random rows best: 4-KiB inner chunks in uncompressed shards, a contiguous dataset, keys
in order. Each is given sorted distinct ids and the result is spread afterwards, as our own read does. What is not
installed is left out.
"""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Gather = Callable[[np.ndarray], Any]
ReadRows = Callable[[np.ndarray], np.ndarray]
Opener = Callable[[str, int], contextlib.AbstractContextManager[Gather]]
BLOCK_BYTES = 64 << 20  # rows that are copied at once, and a shard
SMALL_CHUNK_BYTES = 4096
READS_AT_ONCE = 32


def copy(kind: str, path: str, shape: tuple[int, int], read: ReadRows) -> None:
    """Make a copy whose rows are those of `read`, whole or not at all; none where its library is not installed."""
    library, write, _ = COPIES[kind]
    if not is_installed(library):
        return
    aside = path + ".part"
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.remove(aside)
    write(aside, shape, read)
    os.rename(aside, path)


def openers(kind: str) -> list[tuple[str, Opener]]:
    """(name, how to open a copy of this kind) for each library that reads it and is installed."""
    return [(name, opener) for library, name, opener in COPIES[kind][2] if is_installed(library)]


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _spread(read: Callable[[np.ndarray], np.ndarray]) -> Gather:
    def gather(ids_N: np.ndarray) -> np.ndarray:
        rows_M, inverse_N = np.unique(ids_N, return_inverse=True)
        return read(rows_M)[inverse_N]

    return gather


def _blocks(shape: tuple[int, int], read: ReadRows) -> Iterator[tuple[int, int, np.ndarray]]:
    step = _inner_rows(shape[1]) * max(1, BLOCK_BYTES // SMALL_CHUNK_BYTES)
    for first in range(0, shape[0], step):
        last = min(shape[0], first + step)
        yield first, last, read(np.arange(first, last))


def _inner_rows(dim: int) -> int:
    return max(1, SMALL_CHUNK_BYTES // (4 * dim))


def write_zarr(path: str, shape: tuple[int, int], read: ReadRows) -> None:
    import zarr

    inner_rows = _inner_rows(shape[1])
    rows_of_shard = inner_rows * (BLOCK_BYTES // SMALL_CHUNK_BYTES)
    made: Any = zarr.create_array(
        path, shape=shape, chunks=(inner_rows, shape[1]), dtype="float32",
        shards=(rows_of_shard, shape[1]), compressors=None, overwrite=True,
    )  # fmt: skip
    target = _tensorstore(path) if is_installed("tensorstore") else made  # the same array, written faster
    for first, last, values in _blocks(shape, read):
        target[first:last] = values


def _tensorstore(path: str) -> Any:
    import tensorstore

    context = {"file_io_concurrency": {"limit": READS_AT_ONCE}, "cache_pool": {"total_bytes_limit": 16 << 20}}
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": os.path.abspath(path)}, "context": context}
    return tensorstore.open(spec).result()


@contextlib.contextmanager
def open_zarr(path: str, dim: int) -> Iterator[Gather]:
    import zarr

    array: Any = zarr.open_array(path, mode="r")
    yield _spread(lambda rows_M: array.get_orthogonal_selection((rows_M, slice(None))))


@contextlib.contextmanager
def open_tensorstore(path: str, dim: int) -> Iterator[Gather]:
    array = _tensorstore(path)
    yield _spread(lambda rows_M: array[rows_M].read().result())


def write_hdf5(path: str, shape: tuple[int, int], read: ReadRows) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        target = file.create_dataset("weight", shape, "f4")
        for first, last, values in _blocks(shape, read):
            target[first:last] = values


@contextlib.contextmanager
def open_hdf5(path: str, dim: int) -> Iterator[Gather]:
    import h5py

    with h5py.File(path, "r") as file:
        yield _spread(lambda rows_M: file["weight"][rows_M])


def write_lmdb(path: str, shape: tuple[int, int], read: ReadRows) -> None:
    import lmdb

    with lmdb.open(path, subdir=False, map_size=8 * shape[0] * (4 * shape[1] + 64) + (64 << 20)) as env:
        for first, last, values in _blocks(shape, read):
            with env.begin(write=True) as writing, writing.cursor() as cursor:
                pairs = zip(_keys(np.arange(first, last)), map(bytes, values), strict=True)
                cursor.putmulti(pairs, append=True)
    os.remove(path + "-lock")


def _keys(rows_M: np.ndarray) -> list[bytes]:
    packed = rows_M.astype(">u8").tobytes()
    return [packed[at : at + 8] for at in range(0, len(packed), 8)]


@contextlib.contextmanager
def open_lmdb(path: str, dim: int) -> Iterator[Gather]:
    import lmdb

    with lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False) as env:

        def read(rows_M: np.ndarray) -> np.ndarray:
            with env.begin() as reading, reading.cursor() as cursor:
                values = b"".join([value for _, value in cursor.getmulti(_keys(rows_M))])
            return np.frombuffer(values, np.float32).reshape(len(rows_M), dim)

        yield _spread(read)


# kind of copy: (the library that writes it, its writer, (library, name as printed, how to open) for reading)
COPIES: dict[str, tuple[str, Callable[..., None], list[tuple[str, str, Opener]]]] = {
    "zarr": (
        "zarr",
        write_zarr,
        [("tensorstore", "tensorstore", open_tensorstore), ("zarr", "zarr-python", open_zarr)],
    ),
    "hdf5": ("h5py", write_hdf5, [("h5py", "h5py", open_hdf5)]),
    "lmdb": ("lmdb", write_lmdb, [("lmdb", "LMDB", open_lmdb)]),
}
