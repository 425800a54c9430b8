"""HDF5, "hdf5": one dataset of rows, read through h5py; one that lies in one piece is read from the file itself."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from bigembed.convert.ahead import AheadSource
from bigembed.convert.candidates import Candidate, choose, note_of_choice
from bigembed.convert.libraries import load_library
from bigembed.convert.number_types import NumberType, of_numpy
from bigembed.convert.regions import Region, RegionSource
from bigembed.convert.source import BLOCK_BYTES, Block, ReadOptions, Source
from bigembed.errors import BadSource, BigembedError

MAGIC = b"\x89HDF\r\n\x1a\n"
# Unpacked chunks that are kept, since neighbouring blocks of rows share some: the least, and the most.
CACHE_BYTES, MAX_CACHE_BYTES = 2 * BLOCK_BYTES, 8 * BLOCK_BYTES


def recognise(head: bytes, path: str) -> str | None:
    starts = (0, 512, 1024, 2048)  # a user's own block may precede the format's
    return "hdf5" if any(head[start : start + 8] == MAGIC for start in starts) else None


def open_source(path: str, format: str, options: ReadOptions) -> Source:
    h5py = load_library("h5py", "HDF5")
    try:
        with h5py.File(path, "r") as file:
            found: dict[str, Candidate] = {}
            file.visititems(lambda name, node: _add_candidate(h5py, found, name, node))
            chosen = choose(path, list(found.values()), _plain(options.tensor))
            dataset = file[chosen.name]
            _refuse_elsewhere(path, dataset)
            source = _open_dataset(h5py, path, format, dataset, options)
    except BigembedError:
        raise
    except Exception as error:  # h5py has no one class for what can be wrong with a file
        raise BadSource(f"{path}: h5py cannot read it, it is cut off or damaged: {error}") from error
    source.facts["tensor"] = chosen.name
    source.notes += note_of_choice(chosen, list(found.values()), options.tensor)
    return source


def _plain(name: str | None) -> str | None:
    """Names without the slash that the root may be written with."""
    return None if name is None else name.lstrip("/")


def _add_candidate(h5py: Any, found: dict[str, Candidate], name: str, node: Any) -> None:
    if isinstance(node, h5py.Dataset):
        known = of_numpy(node.dtype)
        found[name] = Candidate(name, node.shape or (), known.name if known else str(node.dtype))


def _refuse_elsewhere(path: str, dataset: Any) -> None:
    """Rows in other files are not read: the provenance would be wrong, and a file could name any other."""
    if dataset.is_virtual or dataset.external:
        raise BadSource(f"{path}: the rows of {dataset.name} lie in other files; copy them into this one (h5repack).")


def _open_dataset(h5py: Any, path: str, format: str, dataset: Any, options: ReadOptions) -> AheadSource:
    known = of_numpy(dataset.dtype)
    assert known is not None, "only candidates of a readable dtype are chosen"
    rows, dim = dataset.shape
    offset = dataset.id.get_offset()
    stored = dataset.id.get_type()
    is_plain = stored.get_size() == dataset.dtype.itemsize and h5py.h5t.py_create(dataset.dtype).equal(stored)
    if offset is not None and is_plain and dataset.chunks is None:
        return RegionSource(path, format, [Region(path, offset, rows, dim, known)], options)
    return DatasetSource(path, format, dataset, known, options)


class DatasetSource(AheadSource):
    """Rows of a dataset in chunks, compressed or not, as h5py unpacks them."""

    def __init__(self, path: str, format: str, dataset: Any, known: NumberType, options: ReadOptions) -> None:
        super().__init__(path, format)
        self._name, self._type = dataset.name, known
        self._file: Any = None
        self.dtype = known.name
        rows, dim = dataset.shape
        self.settle(rows, dim, options)
        self.total_bytes = rows * dim * dataset.dtype.itemsize
        chunk_rows, chunk_columns = dataset.chunks or (1, dim)
        band_bytes = chunk_rows * -(-dim // chunk_columns) * chunk_columns * dataset.dtype.itemsize
        self._cache_bytes = min(max(CACHE_BYTES, 2 * band_bytes), MAX_CACHE_BYTES)
        if band_bytes > self._cache_bytes:
            self.notes.append(
                f"Chunks of {chunk_rows} rows are unpacked for every block of rows: h5repack makes smaller."
            )
        self._piece_rows = max(1, self.block_rows // chunk_rows) * chunk_rows
        self._piece_rows = min(self._piece_rows, self.block_rows, rows)
        self._raw_MD = np.empty((self._piece_rows, dim), dataset.dtype)

    def pieces(self) -> Iterator[tuple[int, int]]:
        assert self.num_rows is not None
        for start in range(0, self.num_rows, self._piece_rows):
            yield start, min(start + self._piece_rows, self.num_rows)

    def fill(self, piece: tuple[int, int], buffer_MD: np.ndarray) -> Block:
        start, stop = piece
        raw_MD, out_MD = self._raw_MD[: stop - start], buffer_MD[: stop - start]
        try:
            if self._file is None:
                self._file = load_library("h5py", "HDF5").File(self.path, "r", rdcc_nbytes=self._cache_bytes)
            self._file[self._name].read_direct(raw_MD, np.s_[start:stop])
        except Exception as error:
            raise self.bad(f"rows {start} to {stop - 1}", f"h5py cannot read them: {error}") from error
        self._type.to_float32(raw_MD, out_MD, self.losses)
        self.done_bytes += raw_MD.nbytes
        return Block(out_MD)

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
