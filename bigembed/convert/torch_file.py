"""Torch's files: "torch", what torch.save wrote: a tensor, or dictionaries of tensors. Loaded with weights_only alone.

The zip files of torch 1.6 and later are mapped by torch; older ones have to be read into memory whole.
"""

import contextlib
import os
import re
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigembed.convert.ahead import AheadSource
from bigembed.convert.candidates import Candidate, choose, note_of_choice
from bigembed.convert.number_types import number_type
from bigembed.convert.source import Block, ReadOptions, Source
from bigembed.errors import BadSource
from bigembed.storage.memory import memory_limit_bytes

MAPPED_BYTES = 64 << 20  # pages of the file that stay mapped at most, about
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # a pickle of torch's magic number
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def recognise(head: bytes, path: str) -> str | None:
    if head.startswith(LEGACY_MAGIC):
        return "torch"
    if not head.startswith(ZIP_MAGIC):
        return None
    name_length = struct.unpack_from("<H", head.ljust(30, b"\0"), 26)[0]
    is_torch = head[30 : 30 + name_length].endswith(b"/data.pkl") or path.endswith(SUFFIXES)
    return "torch" if is_torch else None


def open_source(path: str, format: str, options: ReadOptions) -> Source:
    return open_tensors(path, format, {path: load_tensors(path)}, options)


def open_tensors(path: str, format: str, loaded: dict[str, dict[str, Any]], options: ReadOptions) -> AheadSource:
    """The table among the tensors of some files, as a source.

    Args:
        path: for messages. loaded: the tensors of each file.
    """
    found = {name: (file, tensor) for file, tensors in loaded.items() for name, tensor in tensors.items()}
    candidates = [_candidate(name, tensor) for name, (_, tensor) in found.items()]
    chosen = choose(path, candidates, options.tensor)
    file, tensor = found[chosen.name]
    source = TorchSource(path, format, file, chosen.name, tensor, options)
    source.facts["tensor"] = chosen.name
    source.notes += note_of_choice(chosen, candidates, options.tensor)
    return source


def load_tensors(path: str, warn: bool = False) -> dict[str, Any]:
    """All tensors in the file by their dotted names; mapped where torch can.

    Args:
        warn: let torch's warnings pass; they cannot be held back in one thread alone.

    Raises:
        BadSource: it is damaged, or holds objects that torch does not load as weights, or is too large to load whole.
    """
    import torch

    is_zip = _is_zip(path)
    limit_bytes = memory_limit_bytes() // 2
    if not is_zip and os.path.getsize(path) > limit_bytes:
        raise BadSource(
            f"{path}: it was saved in torch's format before 1.6, which has to be read into memory whole; it has "
            f"{os.path.getsize(path)} bytes, and half of the memory is {limit_bytes}. Load it on a larger machine and "
            "torch.save it again."
        )
    try:
        with contextlib.nullcontext() if warn else warnings.catch_warnings():
            if not warn:
                warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except MemoryError:
        raise
    except Exception as error:  # torch has no one class for what can be wrong with a file
        reason = re.sub(r"\s+", " ", str(error))[:300]
        raise BadSource(
            f"{path}: torch cannot load it as weights; it is cut off or damaged, or holds other objects than tensors "
            "and dictionaries, which are never unpickled. Of a whole model, save model.state_dict() instead. Torch "
            f"says: {type(error).__name__}: {reason}"
        ) from error
    return dict(_named_tensors(loaded))


def _is_zip(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == ZIP_MAGIC


def _named_tensors(loaded: Any) -> Iterator[tuple[str, Any]]:
    """Tensors in nested dictionaries and lists, depth first; a container that occurs again is passed over."""
    import torch

    seen: set[int] = set()
    left = [("", loaded)]
    while left:
        name, value = left.pop()
        if isinstance(value, torch.Tensor):
            yield name or "tensor", value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            inside = value.items() if isinstance(value, dict) else enumerate(value)
            prefix = name + "." if name else ""
            left += [(f"{prefix}{key}", each) for key, each in inside][::-1]


def _candidate(name: str, tensor: Any) -> Candidate:
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        dtype = f"{dtype} ({tensor.layout} on {tensor.device})"
    return Candidate(name, tuple(tensor.shape), dtype)


class TorchSource(AheadSource):
    """Rows of a tensor, sliced from torch's map, which is made anew before too much of the file counts as memory."""

    def __init__(self, path: str, format: str, file: str, name: str, tensor: Any, options: ReadOptions) -> None:
        super().__init__(path, format)
        self._file, self._name, self._tensor = file, name, tensor
        self._is_mapped = _is_zip(file)
        self.files = [file]
        self.dtype = str(self._tensor.dtype).removeprefix("torch.")
        self.settle(self._tensor.shape[0], self._tensor.shape[1], options)
        self.total_bytes = self._tensor.numel() * self._tensor.element_size()
        if self.total_bytes > os.path.getsize(file):
            raise self.bad(
                name,
                f"its shape {tuple(tensor.shape)} repeats stored values or is wrong: the file is smaller than that.",
            )
        if not self._is_mapped:
            self.notes.append("The file has torch's format before 1.6 and was read into memory whole.")

    def pieces(self) -> Iterator[tuple[int, int]]:
        assert self.num_rows is not None
        mapped_bytes = 0
        for start in range(0, self.num_rows, self.block_rows):
            stop = min(start + self.block_rows, self.num_rows)
            mapped_bytes += (stop - start) * self._row_bytes
            if self._is_mapped and mapped_bytes > MAPPED_BYTES:
                self._map_again()
                mapped_bytes = 0
            yield start, stop

    @property
    def _row_bytes(self) -> int:
        return self.dim * self._tensor.element_size()

    def _map_again(self) -> None:
        shape, dtype = self._tensor.shape, self._tensor.dtype
        self._tensor = None
        changed = f"{self._file}: the file was changed while it was read."
        try:
            self._tensor = load_tensors(self._file, warn=True).get(self._name)
        except BadSource as error:  # it could be loaded before; torch may have met the old file and the new one
            raise BadSource(changed) from error
        if self._tensor is None or (self._tensor.shape, self._tensor.dtype) != (shape, dtype):
            raise BadSource(changed)

    def fill(self, piece: tuple[int, int], buffer_MD: np.ndarray) -> Block:
        import torch

        start, stop = piece
        out_MD = buffer_MD[: stop - start]
        rows_MD = self._tensor.detach()[start:stop]
        known = number_type(self.dtype)
        if known is not None and known.stored.name == self.dtype:
            known.to_float32(rows_MD.numpy(), out_MD, self.losses)
        else:  # a type that NumPy lacks
            torch.from_numpy(out_MD).copy_(rows_MD)
        self.done_bytes += (stop - start) * self._row_bytes
        return Block(out_MD)

    def release(self) -> None:
        self._tensor = None
