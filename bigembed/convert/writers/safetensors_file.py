"""Rows as "safetensors": one file with one tensor, or a folder of files of a bounded size and their index.

In a folder each file holds a stretch of rows as a tensor of its own, numbered from 0 ("embedding.weight.0", ...), since
a tensor never spans files; `model.safetensors.index.json` says which file has which.
"""

import json
import struct
from typing import Any

import numpy as np

from bigembed.convert.writers.aside import Output
from bigembed.convert.writers.narrow import ITEM_BYTES
from bigembed.convert.writers.writer import Writer
from bigembed.errors import InvalidArgument
from bigembed.vocab.packed import PackedTokens

INDEX_NAME = "model.safetensors.index.json"
RESERVED_NAME = "__metadata__"
MAX_PARTS = 99_999  # the index is small, and names have five digits

_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def header(name: str, dtype: str, num_rows: int, dim: int) -> bytes:
    """What a file with one tensor begins with: the length of the JSON, and the JSON, padded to 8 bytes."""
    size_bytes = num_rows * dim * ITEM_BYTES[dtype]
    facts = {"dtype": _TYPES[dtype], "shape": [num_rows, dim], "data_offsets": [0, size_bytes]}
    text = json.dumps({RESERVED_NAME: {"format": "pt"}, name: facts}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class SafetensorsWriter(Writer):
    """Writes "safetensors"."""

    format = "safetensors"
    default_tensor = "embedding.weight"
    has_parts = True

    def _begin(self) -> None:
        if self.tensor == RESERVED_NAME:
            raise InvalidArgument(f"tensor={RESERVED_NAME!r} is a name that safetensors keeps for itself.")
        self._output: Output | None = None
        self._part = 0
        self._left_rows = 0
        self._part_rows = self.num_rows if self.options.part_bytes is None else self._rows_of_a_part()
        self._num_parts = -(-self.num_rows // self._part_rows)
        if self._num_parts > MAX_PARTS:
            raise InvalidArgument(
                f"part_bytes={self.options.part_bytes} makes {self._num_parts} files; at most {MAX_PARTS}."
            )
        if self.options.part_bytes is None:
            self._output = self._open_next()
        else:
            if self.target.endswith(".safetensors"):
                raise InvalidArgument(
                    f"{self.target} names a file, and parts are written into a folder. Name a folder, such as "
                    f"{self.target.removesuffix('.safetensors')!r}."
                )
            self._aside.folder(self.target)

    def _rows_of_a_part(self) -> int:
        """As many rows as fit the limit with their header."""
        limit = self.options.part_bytes or 0
        longest = len(header(f"{self.tensor}.{MAX_PARTS}", self.options.dtype, self.num_rows, self.dim))
        rows = (limit - longest) // (self.dim * ITEM_BYTES[self.options.dtype])
        if rows < 1:
            raise InvalidArgument(
                f"part_bytes={limit} is less than a row of {self.dim} columns and its header "
                f"({longest + self.dim * ITEM_BYTES[self.options.dtype]} bytes)."
            )
        return min(rows, self.num_rows)

    def _part_name(self, part: int) -> str:
        return f"model-{part + 1:05}-of-{self._num_parts:05}.safetensors"

    def _open_next(self) -> Output:
        """The file that the next rows go to, its header written."""
        if self.options.part_bytes is None:
            output, name = self._file(self.target), self.tensor
        else:
            if self._output is not None:
                self._output.finish()
            file_name = self._part_name(self._part)
            output, name = self._aside.file_within(self.target, file_name), f"{self.tensor}.{self._part}"
            self.files.append(f"{self.target}/{file_name}")
        self._left_rows = min(self._part_rows, self.num_rows - self._part * self._part_rows)
        output.write(header(name, self.options.dtype, self._left_rows, self.dim))
        self._part += 1
        return output

    def _append(self, values_MD: np.ndarray, tokens: PackedTokens | None) -> None:
        narrow_MD = self._narrowed(values_MD)
        done = 0
        while done < len(narrow_MD):
            if self._output is None or self._left_rows == 0:
                self._output = self._open_next()
            count = min(self._left_rows, len(narrow_MD) - done)
            self._output.write(narrow_MD[done : done + count])
            self._left_rows -= count
            done += count

    def _end(self) -> None:
        if self.options.part_bytes is None:
            return
        names = {f"{self.tensor}.{part}": self._part_name(part) for part in range(self._num_parts)}
        total = self.num_rows * self.dim * ITEM_BYTES[self.options.dtype]
        index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": names}
        self._aside.file_within(self.target, INDEX_NAME).write(json.dumps(index, indent=2).encode() + b"\n")
        self.files.append(f"{self.target}/{INDEX_NAME}")
