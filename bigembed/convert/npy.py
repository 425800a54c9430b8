"""NumPy's own files: "npy", one array, and "npz", a zip of several. Pickled arrays are refused, never loaded."""

import io
import struct
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.lib import format as npy_format

from bigembed.convert.ahead import AheadSource
from bigembed.convert.candidates import Candidate, choose, note_of_choice
from bigembed.convert.number_types import NumberType, of_numpy
from bigembed.convert.regions import Region, RegionSource
from bigembed.convert.source import Block, ReadOptions, Source
from bigembed.errors import BadSource
from bigembed.storage.files import READ, File

HEADER_BYTES = 1 << 16  # more than any array of numbers has
MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class Header:
    """What precedes an array's numbers: their shape and type, and its own length in bytes."""

    shape: tuple[int, ...]
    columns_first: bool
    dtype: np.dtype
    length: int

    @property
    def type(self) -> NumberType:
        found = of_numpy(self.dtype)
        assert found is not None, "only candidates of a readable dtype are chosen"
        return found

    def region(self, path: str, offset: int) -> Region:
        rows, dim = self.shape
        return Region(path, offset + self.length, rows, dim, self.type, self.columns_first)


def recognise(head: bytes, path: str) -> str | None:
    if head.startswith(MAGIC):
        return "npy"
    if not head.startswith(b"PK\x03\x04"):
        return None
    name_length = struct.unpack_from("<H", head.ljust(30, b"\0"), 26)[0]
    return "npz" if head[30 : 30 + name_length].endswith(b".npy") or path.endswith(".npz") else None


def open_source(path: str, format: str, options: ReadOptions) -> Source:
    if format == "npz":
        return _open_npz(path, options)
    file = File(path, READ)
    try:
        header = read_header(path, io.BytesIO(file.pread(HEADER_BYTES, 0)))
    finally:
        file.close()
    choose(path, [_candidate("array", header)], "array")
    return RegionSource(path, format, [header.region(path, 0)], options)


def read_header(path: str, file: IO[bytes]) -> Header:
    """The header at the start of `file`, which need not hold more than `HEADER_BYTES`.

    Raises:
        BadSource: it is not what NumPy writes; `path` is for the message.
    """
    try:
        version = npy_format.read_magic(file)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"version {version} is not known")
        read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy warns of headers that Python 2 wrote, and reads them
            shape, columns_first, dtype = read(file)
    except Exception as error:  # a header is parsed as Python text, which fails in many ways
        raise BadSource(f"{path}, byte 0: the array's header cannot be read: {error}") from error
    if any(isinstance(size, bool) or size < 0 for size in shape):
        raise BadSource(f"{path}, byte 0: the header's shape {shape} is not possible.")
    return Header(shape, columns_first, dtype, file.tell())


def _candidate(name: str, header: Header) -> Candidate:
    kind, size = header.dtype.kind, header.dtype.itemsize
    if kind == "O":
        said = "Python objects (a pickle, which is never loaded; save numbers with their own dtype)"
    elif kind == "V" and size == 2 and header.dtype.names is None:
        said = "2-byte elements without a type (bfloat16 loses its name in NumPy's files; save float32 or safetensors)"
    else:
        said = header.dtype.name
    return Candidate(name, header.shape, said)


def _open_npz(path: str, options: ReadOptions) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            headers = {}
            for name, info in members.items():
                if info.filename.endswith(".npy"):
                    with archive.open(info) as file:
                        headers[name] = read_header(f"{path}, {name}", io.BytesIO(file.read(HEADER_BYTES)))
    except BadSource:
        raise
    except Exception as error:  # zipfile has no one class for what can be wrong with an archive
        raise BadSource(f"{path}: the archive cannot be read, it is cut off or damaged: {error}") from error
    candidates = [_candidate(name, header) for name, header in headers.items()]
    chosen = choose(path, candidates, options.tensor)
    source = _open_member(path, members[chosen.name], headers[chosen.name], options)
    source.facts["tensor"] = chosen.name
    source.notes += note_of_choice(chosen, candidates, options.tensor)
    return source


def _open_member(path: str, info: zipfile.ZipInfo, header: Header, options: ReadOptions) -> Source:
    region = header.region(path, 0)
    if header.length + region.size_bytes != info.file_size:
        raise BadSource(
            f"{path}, {info.filename}: its header tells of {region.size_bytes} bytes, but "
            f"{info.file_size - header.length} follow."
        )
    if not header.columns_first:
        return NpzSource(path, info, header, options)
    if info.compress_type != zipfile.ZIP_STORED:
        raise BadSource(
            f"{path}, {info.filename}: a compressed array in Fortran's order (column after column) cannot be read row "
            "by row. Save np.ascontiguousarray(array), or use np.savez, which does not compress."
        )
    return RegionSource(path, "npz", [header.region(path, _data_offset(path, info))], options)


def _data_offset(path: str, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: its local header repeats the name, with extra fields of its own."""
    file = File(path, READ)
    try:
        local = file.pread(30, info.header_offset)
    finally:
        file.close()
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise BadSource(f"{path}, byte {info.header_offset}: no zip member begins here; the archive is damaged.")
    return info.header_offset + 30 + sum(struct.unpack_from("<HH", local, 26))


class NpzSource(AheadSource):
    """Rows of a member, in one pass through zipfile, which checks its CRC at the end; compressed or not."""

    def __init__(self, path: str, info: zipfile.ZipInfo, header: Header, options: ReadOptions) -> None:
        super().__init__(path, "npz")
        self._info, self._type = info, header.type
        self._header_bytes = header.length
        self.dtype = self._type.name
        self.settle(header.shape[0], header.shape[1], options)
        self.total_bytes = info.file_size - header.length
        self._raw_B = np.empty(0, np.uint8)

    def pieces(self) -> Iterator[tuple[IO[bytes], int]]:
        assert self.num_rows is not None
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self._info) as file:
                file.read(self._header_bytes)
                for start in range(0, self.num_rows, self.block_rows):
                    yield file, min(self.block_rows, self.num_rows - start)
        except BadSource:
            raise
        except Exception as error:
            raise self._damaged(error) from error

    def fill(self, piece: tuple[IO[bytes], int], buffer_MD: np.ndarray) -> Block:
        file, rows = piece
        count = rows * self.dim * self._type.stored.itemsize
        if len(self._raw_B) < count:
            self._raw_B = np.empty(count, np.uint8)
        done = 0
        while done < count:
            try:
                read = file.readinto(self._raw_B[done:count])  # type: ignore[attr-defined]
            except Exception as error:
                raise self._damaged(error) from error
            if read == 0:
                raise self._damaged(EOFError("it ends early"))
            done += read
        out_MD = buffer_MD[:rows]
        self._type.to_float32(self._raw_B[:count].view(self._type.stored).reshape(rows, -1), out_MD, self.losses)
        self.done_bytes += count
        return Block(out_MD)

    def _damaged(self, error: BaseException) -> BadSource:
        return self.bad(self._info.filename, f"the array cannot be read, it is cut off or damaged: {error}")
