"""Regions: stretches of files that hold rows of numbers one after the other, read by positioned reads into blocks."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bigembed.convert.ahead import AheadSource
from bigembed.convert.number_types import NumberType
from bigembed.convert.source import Block, ReadOptions
from bigembed.errors import BadSource
from bigembed.storage.files import READ, File


@dataclass(frozen=True)
class Region:
    """`rows` times `dim` numbers of one type in a file.

    Args:
        path: the file. offset: of the first number, in bytes.
        columns_first: column after column (Fortran's order), not row after row.
        scale: what every number is multiplied by: one factor, or a region with one factor for each row.
    """

    path: str
    offset: int
    rows: int
    dim: int
    type: NumberType
    columns_first: bool = False
    scale: "Region | float" = 1.0

    @property
    def size_bytes(self) -> int:
        return self.rows * self.dim * self.type.stored.itemsize

    def check_inside(self, file_bytes: int) -> None:
        """Raise `BadSource` unless the file is long enough."""
        if self.offset < 0 or self.offset + self.size_bytes > file_bytes:
            raise BadSource(
                f"{self.path}, byte {self.offset}: {self.rows} rows of {self.dim} {self.type.name} values should "
                f"follow, {self.size_bytes} bytes, but the file has only {file_bytes} bytes; it is cut off or damaged."
            )


class RegionSource(AheadSource):
    """The rows of some regions, one region after the other; all have the same columns and type."""

    def __init__(self, path: str, format: str, regions: Sequence[Region], options: ReadOptions) -> None:
        super().__init__(path, format)
        self._regions = list(regions)
        self._file: File | None = None
        self._scratch_B = np.empty(0, np.uint8)
        self.files = list(dict.fromkeys(region.path for region in regions))
        self.dtype = regions[0].type.name
        self.settle(sum(region.rows for region in regions), regions[0].dim, options)
        self.total_bytes = sum(region.size_bytes for region in regions)
        for region in regions:
            region.check_inside(os.path.getsize(region.path))
            if isinstance(region.scale, Region):
                region.scale.check_inside(os.path.getsize(region.scale.path))
        if regions[0].columns_first:
            self.notes.append("The array lies column after column (Fortran's order), which is slower to read by rows.")

    def pieces(self) -> Iterator[tuple[Region, int, int]]:
        for region in self._regions:
            for start in range(0, region.rows, self.block_rows):
                yield region, start, min(start + self.block_rows, region.rows)

    def fill(self, piece: tuple[Region, int, int], buffer_MD: np.ndarray) -> Block:
        region, start, stop = piece
        out_MD = buffer_MD[: stop - start]
        self._read(region, start, out_MD)
        if isinstance(region.scale, Region):
            scale_M1 = np.empty((stop - start, 1), np.float32)
            self._read(region.scale, start, scale_M1)
            np.multiply(out_MD, scale_M1, out=out_MD)
        elif region.scale != 1.0:
            np.multiply(out_MD, np.float32(region.scale), out=out_MD)
        self.done_bytes += out_MD.size * region.type.stored.itemsize
        return Block(out_MD)

    def _read(self, region: Region, start: int, out_MD: np.ndarray) -> None:
        """out_MD = rows from `start` on."""
        rows, dim = out_MD.shape
        itemsize = region.type.stored.itemsize
        if region.type.is_float32 and not region.columns_first:
            self._pread(region.path, out_MD, region.offset + start * dim * itemsize)
            return
        raw_B = self._scratch(rows * dim * itemsize)
        values = raw_B.view(region.type.stored)
        if region.columns_first:
            column_bytes = rows * itemsize
            for d in range(dim):
                column_B = raw_B[d * column_bytes : (d + 1) * column_bytes]
                self._pread(region.path, column_B, region.offset + (d * region.rows + start) * itemsize)
            region.type.to_float32(values.reshape(dim, rows).T, out_MD, self.losses)
        else:
            self._pread(region.path, raw_B, region.offset + start * dim * itemsize)
            region.type.to_float32(values.reshape(rows, dim), out_MD, self.losses)

    def _scratch(self, count: int) -> np.ndarray:
        if len(self._scratch_B) < count:
            self._scratch_B = np.empty(count, np.uint8)
        return self._scratch_B[:count]

    def _pread(self, path: str, buffer: np.ndarray, offset: int) -> None:
        if self._open(path).pread_into(buffer, offset) < buffer.nbytes:
            raise BadSource(f"{path}, byte {offset}: the file ends here; it was longer when it was opened.")

    def _open(self, path: str) -> File:
        """The file, kept open until another one is needed."""
        if self._file is None or self._file.path != path:
            self.release()
            self._file = File(path, READ)
        return self._file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
