"""GGUF, "gguf": llama.cpp's models. The input embedding, dequantised by the gguf package, with the model's tokens."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigembed.convert.ahead import AheadSource
from bigembed.convert.candidates import Candidate, choose, note_of_choice
from bigembed.convert.gguf_header import GgufHeader, GgufTensor, StringList, read_header, read_strings
from bigembed.convert.libraries import load_library
from bigembed.convert.number_types import number_type
from bigembed.convert.regions import Region, RegionSource
from bigembed.convert.source import Block, ReadOptions, Source
from bigembed.errors import BadSource, InvalidArgument
from bigembed.storage.files import READ, File
from bigembed.threads import run

TOKENS = "tokenizer.ggml.tokens"
PLAIN = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
}
GRAIN_ROWS = 64  # fewer are not worth a second thread


def recognise(head: bytes, path: str) -> str | None:
    return "gguf" if head.startswith(b"GGUF") else None


def open_source(path: str, format: str, options: ReadOptions) -> Source:
    gguf = load_library("gguf", "GGUF")
    header = read_header(path)
    types = {each.value: each for each in gguf.GGMLQuantizationType}
    quantised = [each.name for each in types.values() if each.name not in PLAIN]
    candidates = [_candidate(tensor, types) for tensor in header.tensors]
    chosen = _choose(path, header, candidates, options, quantised)
    tensor = next(each for each in header.tensors if each.name == chosen.name)
    rows, dim = chosen.shape
    source: AheadSource
    known = number_type(chosen.dtype)
    if known is not None:
        source = RegionSource(path, format, [Region(path, tensor.offset, rows, dim, known)], options)
    else:
        source = QuantisedSource(path, format, chosen, tensor.offset, types[tensor.type], options)
    source.facts["tensor"] = chosen.name
    source.notes += note_of_choice(chosen, candidates, options.tensor)
    _add_tokens(source, path, header, rows)
    return source


def _candidate(tensor: GgufTensor, types: dict[int, Any]) -> Candidate:
    shape = tensor.shape
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    name = types[tensor.type].name if tensor.type in types else f"ggml type {tensor.type}"
    return Candidate(tensor.name, shape, PLAIN.get(name, name))


def _choose(
    path: str, header: GgufHeader, candidates: list[Candidate], options: ReadOptions, quantised: list[str]
) -> Candidate:
    try:
        return choose(path, candidates, options.tensor, readable=quantised)
    except (BadSource, InvalidArgument) as error:
        parts, part = header.values.get("split.count"), header.values.get("split.no")
        if isinstance(parts, int) and isinstance(part, int) and parts > 1:
            raise type(error)(
                f"{error}\nThe model is split, and this is part {part + 1} of {parts}: name the part that holds the "
                "table, mostly the first that holds tensors."
            ) from error
        raise


def _add_tokens(source: AheadSource, path: str, header: GgufHeader, rows: int) -> None:
    strings = header.values.get(TOKENS)
    if not isinstance(strings, StringList):
        return
    if not rows / 2 <= strings.count <= rows:
        source.notes.append(f"The model's {strings.count} tokens were left out: the table has {rows} rows.")
        return
    source.has_tokens = True
    source.late_tokens = _numbered(path, strings)
    source.notes.append(
        f"The vocabulary has the {strings.count} tokens of {TOKENS} as they are written there (a space is often 'Ġ' "
        "or '▁')."
    )


def _numbered(path: str, strings: StringList) -> Iterator[tuple[Any, np.ndarray]]:
    row = 0
    for tokens in read_strings(path, strings):
        yield tokens, np.arange(row, row + len(tokens), dtype=np.int64)
        row += len(tokens)


class QuantisedSource(AheadSource):
    """Rows of a quantised tensor: each row is whole blocks of some bytes that stand for some values."""

    def __init__(
        self, path: str, format: str, chosen: Candidate, offset: int, ggml_type: Any, options: ReadOptions
    ) -> None:
        super().__init__(path, format)
        gguf = load_library("gguf", "GGUF")
        self._quants, self._type = load_library("gguf.quants", "GGUF"), ggml_type
        self.dtype = chosen.dtype
        self.settle(chosen.shape[0], chosen.shape[1], options)
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
        if self.dim % block_values:
            raise self.bad(chosen.name, f"{self.dim} columns are no multiple of {self.dtype}'s {block_values} values.")
        self._row_bytes = self.dim // block_values * block_bytes
        self._check_known()
        raw_type = number_type("uint8")
        assert raw_type is not None
        raw = Region(path, offset, chosen.shape[0], self._row_bytes, raw_type)
        self.total_bytes = raw.size_bytes
        raw.check_inside(os.path.getsize(path))
        self._file: File | None = None
        self._offset = offset
        self._raw_MB = np.empty((min(self.block_rows, chosen.shape[0]), self._row_bytes), np.uint8)

    def _check_known(self) -> None:
        try:
            self._quants.dequantize(np.zeros((1, self._row_bytes), np.uint8), self._type)
        except NotImplementedError as error:
            raise self.bad(self.dtype, f"the gguf package cannot dequantise this type ({error}).") from error

    def pieces(self) -> Iterator[tuple[int, int]]:
        assert self.num_rows is not None
        for start in range(0, self.num_rows, self.block_rows):
            yield start, min(start + self.block_rows, self.num_rows)

    def fill(self, piece: tuple[int, int], buffer_MD: np.ndarray) -> Block:
        start, stop = piece
        raw_MB, out_MD = self._raw_MB[: stop - start], buffer_MD[: stop - start]
        offset = self._offset + start * self._row_bytes
        self._file = self._file or File(self.path, READ)
        if self._file.pread_into(raw_MB, offset) < raw_MB.nbytes:
            raise self.bad(f"byte {offset}", "the file ends here; it was longer when it was opened.")
        run(self._dequantise, stop - start, raw_MB, out_MD, grain=GRAIN_ROWS)
        self.done_bytes += raw_MB.nbytes
        return Block(out_MD)

    def _dequantise(self, start: int, stop: int, raw_MB: np.ndarray, out_MD: np.ndarray) -> None:
        """out_MD = values of rows start to stop - 1, a few at a time: the package makes several copies."""
        for first in range(start, stop, GRAIN_ROWS):
            rows = slice(first, min(first + GRAIN_ROWS, stop))
            with np.errstate(all="ignore"):
                out_MD[rows] = self._quants.dequantize(raw_MB[rows], self._type)

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
