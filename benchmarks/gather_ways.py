"""Every way to gather rows that `bench_gather.py` compares: ours, and its peers over the same bytes or over copies.

A way is opened, tried on a few ids (whose rows must be exactly the table's), used, and closed again: what is mapped
cannot be dropped from the page cache, so a way that stayed open would warm the others. Ours, the maps and pread read
the table's own chunk files; zarr, tensorstore, h5py and LMDB get copies of the first rows (`gather_copies.py`).
"""

import contextlib
import glob
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba as nb
import numpy as np
from gather_copies import COPIES, Gather, copy, openers
from numba import types

from bigembed import Table, init

LOADED_BYTES = 64 << 20  # rows that index_select's tensor gets at once
PREAD_THREADS = 32
COLD, MAPPED, UNCHECKED = (
    "Table.read",
    "Table.read(out=), mapped",
    "Table.read(out=, check=False), mapped",
)  # names that the bars are about
PREADS, INDEX_SELECT = f"pread, {PREAD_THREADS} threads", "index_select(out=), in RAM"
_pread: Any = types.ExternalFunction("pread", types.int64(types.int32, types.uintp, types.int64, types.int64))


@dataclass(frozen=True)
class Stored:
    """A table whose every row is written, and the copies beside it.

    folder: where they are. row_bytes: of the weights alone. num_rows: V. copied_rows: of the copies, 0 for none.
    chunk_rows: of the table, None for its default.
    """

    folder: str
    row_bytes: int
    num_rows: int
    copied_rows: int
    chunk_rows: int | None = None

    @property
    def path(self) -> str:
        return os.path.join(self.folder, f"rows-{self.row_bytes}-{self.num_rows}")

    @property
    def dim(self) -> int:
        return self.row_bytes // 4

    def copy_path(self, kind: str) -> str:
        return os.path.join(self.folder, f"{kind}-{self.row_bytes}-{self.copied_rows}")

    @property
    def chunk_paths(self) -> list[str]:
        """The table's chunk files, in order of their rows."""
        return sorted(glob.glob(os.path.join(self.path, "weight", "c.*")), key=lambda p: int(p.split(".")[-2]))

    @property
    def files(self) -> list[str]:
        """All files that any way reads."""
        copies = [self.copy_path(kind) for kind in COPIES]
        inside = [path for copy in copies for path in glob.glob(os.path.join(copy, "**"), recursive=True)]
        return [path for path in (*self.chunk_paths, *copies, *inside) if os.path.isfile(path)]

    def build(self) -> None:
        """Make the table and the copies where they are not there yet; a build that was cut short leaves none."""
        if not os.path.exists(self.path):
            aside = self.path + ".part"
            facts: dict[str, Any] = {"state_dim": 0, "init": init.uniform(-1, 1), "seed": 1}
            with Table.create(
                aside, self.num_rows, self.dim, chunk_rows=self.chunk_rows, overwrite=True, **facts
            ) as table:
                table.publish()
            os.rename(aside, self.path)
        for kind in COPIES:
            path = self.copy_path(kind)
            if self.copied_rows and not os.path.exists(path):
                with Table.open(self.path, "r", reader="cold") as table:
                    copy(kind, path, (self.copied_rows, self.dim), table.read)


@dataclass(frozen=True)
class Way:
    """One way to gather.

    name: as printed. num_rows: ids are below it. open: gives the gather. is_ours: or a peer.
    is_single_call: one call of a library, no threads that the caller made.
    """

    name: str
    num_rows: int
    open: Callable[[], contextlib.AbstractContextManager[Gather]]
    is_ours: bool = False
    is_single_call: bool = True


def cold_ways(stored: Stored) -> list[Way]:
    rows = stored.num_rows
    return [
        Way(COLD, rows, partial(table_read, stored, "cold"), is_ours=True),
        Way(PREADS, rows, partial(preads, stored), is_single_call=False),
        Way("np.memmap, MADV_RANDOM", rows, partial(memmap, stored, True)),
        Way("np.memmap", rows, partial(memmap, stored, False)),
        Way("torch.from_file + F.embedding", rows, partial(from_file, stored)),
        *copied_ways(stored),
    ]


def warm_ways(stored: Stored) -> list[Way]:
    """Everything is in the page cache, or for index_select in this process's memory."""
    rows = stored.num_rows
    return [
        Way(INDEX_SELECT, rows, partial(index_select, stored)),
        Way(MAPPED, rows, partial(mapped_read, stored, True), is_ours=True),
        Way("Table.read, cold reader", rows, partial(table_read, stored, "cold"), is_ours=True),
        Way(UNCHECKED, rows, partial(mapped_read, stored, False), is_ours=True),
        *cold_ways(stored)[1:],
    ]


def copied_ways(stored: Stored) -> list[Way]:
    return [
        Way(name, stored.copied_rows, partial(opener, stored.copy_path(kind), stored.dim))
        for kind in COPIES
        if os.path.exists(stored.copy_path(kind))
        for name, opener in openers(kind)
    ]


# -- ours ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def table_read(stored: Stored, reader: str) -> Iterator[Gather]:
    with Table.open(stored.path, "r", reader=reader) as table:  # type: ignore[arg-type]
        yield table.read


@contextlib.contextmanager
def mapped_read(stored: Stored, check: bool) -> Iterator[Gather]:
    """`Table.read` of a mapped table into memory that is used again, as index_select's `out=`."""
    with Table.open(stored.path, "r", reader="mapped") as table:
        room_ND = np.empty((0, stored.dim), np.float32)

        def gather(ids_N: np.ndarray) -> np.ndarray:
            nonlocal room_ND
            if len(ids_N) > len(room_ND):
                room_ND = np.zeros((len(ids_N), stored.dim), np.float32)
            return table.read(ids_N, check=check, out=room_ND[: len(ids_N)])

        yield gather


# -- peers over the table's own bytes -----------------------------------------------------------------------


def _by_chunk(stored: Stored, take: Callable[[int, np.ndarray], np.ndarray]) -> Gather:
    """A gather that asks for the rows of each chunk file in turn: take(chunk, rows within it)."""
    with Table.open(stored.path, "r") as table:
        chunk_rows = table.spec.chunk_rows

    def gather(ids_N: np.ndarray) -> np.ndarray:
        out_ND = np.empty((len(ids_N), stored.dim), np.float32)
        chunk_N = ids_N // chunk_rows
        for chunk in range(-(-stored.num_rows // chunk_rows)):
            here = np.flatnonzero(chunk_N == chunk)
            if len(here):
                out_ND[here] = take(chunk, ids_N[here] - chunk * chunk_rows)
        return out_ND

    return gather


@contextlib.contextmanager
def memmap(stored: Stored, has_random_advice: bool) -> Iterator[Gather]:
    maps = [np.memmap(path, np.float32, "r").reshape(-1, stored.dim + 1) for path in stored.chunk_paths]
    if has_random_advice:
        for mapped in maps:
            mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    yield _by_chunk(stored, lambda chunk, rows_N: maps[chunk][rows_N, : stored.dim])


@contextlib.contextmanager
def from_file(stored: Stored) -> Iterator[Gather]:
    import torch

    width = stored.dim + 1
    maps = [
        torch.from_file(path, shared=False, size=os.path.getsize(path) // 4, dtype=torch.float32).view(-1, width)
        for path in stored.chunk_paths
    ]

    def take(chunk: int, rows_N: np.ndarray) -> np.ndarray:
        return torch.nn.functional.embedding(torch.from_numpy(rows_N), maps[chunk]).numpy()[:, : stored.dim]

    yield _by_chunk(stored, take)


@nb.njit(nogil=True)
def _pread_rows(start, stop, fd_C, ids_N, chunk_rows, record_bytes, out_ND):
    row_bytes = out_ND.shape[1] * 4
    for n in range(start, stop):
        chunk = ids_N[n] // chunk_rows
        at = np.uintp(out_ND.ctypes.data + n * row_bytes)
        offset = (ids_N[n] - chunk * chunk_rows) * record_bytes
        if _pread(np.int32(fd_C[chunk]), at, np.int64(row_bytes), np.int64(offset)) != row_bytes:
            return n
    return -1


@contextlib.contextmanager
def preads(stored: Stored) -> Iterator[Gather]:
    """A loop of pread in compiled code, in 32 threads: no interpreter lock holds them up."""
    with Table.open(stored.path, "r") as table:
        chunk_rows, record_bytes = table.spec.chunk_rows, table.spec.record_bytes
    fds = [os.open(path, os.O_RDONLY) for path in stored.chunk_paths]
    for fd in fds:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    fd_C = np.array(fds, np.int64)
    with ThreadPoolExecutor(PREAD_THREADS) as pool:

        def gather(ids_N: np.ndarray) -> np.ndarray:
            out_ND = np.empty((len(ids_N), stored.dim), np.float32)
            edges = [len(ids_N) * part // PREAD_THREADS for part in range(PREAD_THREADS + 1)]
            run = partial(_pread_rows, fd_C=fd_C, ids_N=ids_N, chunk_rows=chunk_rows, record_bytes=record_bytes,
                          out_ND=out_ND)  # fmt: skip
            assert all(bad < 0 for bad in pool.map(run, edges[:-1], edges[1:])), "a read came short"
            return out_ND

        yield gather
    for fd in fds:
        os.close(fd)


@contextlib.contextmanager
def index_select(stored: Stored) -> Iterator[Gather]:
    """torch's, from a tensor of all rows in memory into an output that is used again: the floor of a warm gather."""
    import torch

    weight = torch.empty((stored.num_rows, stored.dim))
    with Table.open(stored.path, "r", reader="cold") as table:
        for first in range(0, stored.num_rows, step := max(1, LOADED_BYTES // stored.row_bytes)):
            last = min(stored.num_rows, first + step)
            weight[first:last] = torch.from_numpy(table.read(np.arange(first, last)))
    outputs: dict[int, torch.Tensor] = {}

    def gather(ids_N: np.ndarray) -> np.ndarray:
        out = outputs.setdefault(len(ids_N), torch.zeros((0, stored.dim)))
        return torch.index_select(weight, 0, torch.from_numpy(ids_N), out=out).numpy()

    yield gather
