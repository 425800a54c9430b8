"""Rows as "npy": NumPy's own header, then the rows as they are; `np.load(path, mmap_mode="r")` reads it."""

import io

import numpy as np

from bigembed.convert.writers.writer import Writer
from bigembed.vocab.packed import PackedTokens

_DESCRIPTIONS = {"float32": "<f4", "float16": "<f2"}


class NpyWriter(Writer):
    """Writes "npy". NumPy has no bfloat16."""

    format = "npy"
    dtypes = ("float32", "float16")

    def _begin(self) -> None:
        header = io.BytesIO()
        facts = {
            "descr": _DESCRIPTIONS[self.options.dtype],
            "fortran_order": False,
            "shape": (self.num_rows, self.dim),
        }
        np.lib.format.write_array_header_1_0(header, facts)
        self._output = self._file(self.target)
        self._output.write(header.getvalue())

    def _append(self, values_MD: np.ndarray, tokens: PackedTokens | None) -> None:
        self._output.write(self._narrowed(values_MD))
