"""Matrices inside of binary files: plain float32, or quantised into codes; read in ranges of rows."""

from dataclasses import dataclass

import numpy as np

from bigembed import threads
from bigembed.convert.fields import Fields
from bigembed.kernels.quantised import decode_rows
from bigembed.storage.files import File

GRAIN_ROWS = 256


@dataclass(frozen=True)
class Float32Rows:
    """Rows of float32, one after the other.

    Args:
        rows, dim: the shape. offset: of the first value, in bytes.
    """

    rows: int
    dim: int
    offset: int
    dtype = "float32"

    @property
    def row_bytes(self) -> int:
        return 4 * self.dim

    def read(self, file: File, start: int, out_MD: np.ndarray) -> None:
        """out_MD = rows from `start` on."""
        read_whole(file, out_MD, self.offset + start * self.row_bytes)


@dataclass(frozen=True)
class QuantisedRows:
    """Rows of one code a piece; a piece is one of `choices` that were learned.

    Args:
        rows, dim: the shape. offset: of the first row's codes, in bytes.
        piece_dim: values of a piece; the last one may have fewer. choices: pieces to choose from, at most 256.
        piece_F: float32, the pieces, see `kernels.quantised`.
        norms_offset: of what the first row is multiplied by, None where there are no norms.
        norm_F: float32, the norms that codes of one byte stand for; None where they are float32 in the file.
        rotation_DD: float32, the orthogonal matrix that rows were multiplied by before; None where there was none.
    """

    rows: int
    dim: int
    offset: int
    piece_dim: int
    choices: int
    piece_F: np.ndarray
    norms_offset: int | None = None
    norm_F: np.ndarray | None = None
    rotation_DD: np.ndarray | None = None
    dtype = "product-quantised"

    @property
    def codes(self) -> int:
        return -(-self.dim // self.piece_dim)

    @property
    def row_bytes(self) -> int:
        return self.codes

    def read(self, file: File, start: int, out_MD: np.ndarray) -> None:
        """out_MD = rows from `start` on, decoded."""
        code_MQ = np.empty((len(out_MD), self.codes), np.uint8)
        read_whole(file, code_MQ, self.offset + start * self.codes)
        if code_MQ.max(initial=0) >= self.choices:
            raise Fields(file, self.offset + start * self.codes).bad(
                f"among the next {code_MQ.size} codes one is not below {self.choices}; the file is damaged."
            )
        plan = (code_MQ, self.piece_F, self.choices, self.piece_dim, out_MD)
        threads.run(decode_rows, len(out_MD), *plan, grain=GRAIN_ROWS)
        if self.rotation_DD is not None:
            with np.errstate(all="ignore"):
                np.matmul(out_MD.copy(), self.rotation_DD.T, out=out_MD)
        if self.norms_offset is not None:
            scale_rows(out_MD, self._norms(file, start, len(out_MD)))

    def _norms(self, file: File, start: int, count: int) -> np.ndarray:
        assert self.norms_offset is not None
        if self.norm_F is None:
            return read_floats(file, self.norms_offset + 4 * start, count)
        code_M = np.empty(count, np.uint8)
        read_whole(file, code_M, self.norms_offset + start)
        return self.norm_F[code_M]


def scale_rows(values_MD: np.ndarray, norm_M: np.ndarray) -> None:
    """values_MD *= each row's norm, in place; damaged numbers may become infinite without a warning."""
    with np.errstate(all="ignore"):
        np.multiply(values_MD, norm_M[:, None], out=values_MD)


def read_floats(file: File, offset: int, count: int) -> np.ndarray:
    """float32 (count,) from a place that was checked to be in the file."""
    out_F = np.empty(count, np.float32)
    read_whole(file, out_F, offset)
    return out_F


def read_whole(file: File, buffer: np.ndarray, offset: int) -> None:
    """Fill `buffer`, which was checked to be in the file."""
    if file.pread_into(buffer, offset) < buffer.nbytes:
        raise Fields(file, offset).bad("the file ends here; it was longer when it was opened.")
