"""Safetensors: "safetensors", one file, and "safetensors-index", the parts that an index lists; read by own code.

The file is: u64 N, N bytes of JSON (name -> dtype, shape, data_offsets), then the values, row after row, little-endian.
The safetensors library maps the file, and has no bfloat16 and float8 for NumPy.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigembed.convert.ahead import AheadSource
from bigembed.convert.candidates import Candidate, choose, join_numbered, note_of_choice
from bigembed.convert.number_types import Losses, NumberType, number_type
from bigembed.convert.regions import Region, RegionSource
from bigembed.convert.source import ReadOptions, Source
from bigembed.errors import BadSource
from bigembed.storage.files import READ, File

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
INDEX_NAME = "model.safetensors.index.json"
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: in which file, from which byte on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int

    @property
    def type(self) -> NumberType | None:
        return number_type(self.dtype)

    def region(self, scale: Region | float = 1.0) -> Region:
        """Of a tensor with two dimensions, or one: then every value is a row."""
        assert self.type is not None, "only tensors of a readable dtype are chosen"
        dim = math.prod(self.shape[1:])
        return Region(self.path, self.offset, self.shape[0] if self.shape else 1, dim, self.type, scale=scale)


def recognise(head: bytes, path: str) -> str | None:
    if path.endswith(".safetensors.index.json") or (
        head.lstrip().startswith(b"{") and b'"weight_map"' in head and b".safetensors" in head
    ):
        return "safetensors-index"
    if len(head) < 10 or head[8:9] != b"{":
        return None
    return "safetensors" if 2 <= struct.unpack_from("<Q", head)[0] <= MAX_HEADER_BYTES else None


def open_source(path: str, format: str, options: ReadOptions) -> Source:
    tensors = read_index(path) if format == "safetensors-index" else read_header(path)
    source = open_tensors(path, format, tensors, options)
    if format == "safetensors-index":
        source.files.insert(0, path)
    return source


def read_header(path: str) -> dict[str, Tensor]:
    """All tensors of a file; every size and offset is checked against the file.

    Raises:
        BadSource: the header is cut off, is not what the format asks for, or points outside the file.
    """
    file = File(path, READ)
    try:
        file_bytes = file.size_bytes()
        length = int.from_bytes(file.pread(8, 0), "little")
        if file_bytes < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise BadSource(
                f"{path}, byte 0: the header should have {length} bytes; the file has {file_bytes}, and a header at "
                f"most {MAX_HEADER_BYTES}. The file is cut off, or no safetensors file."
            )
        listed = _parse(path, file.pread(length, 8))
    finally:
        file.close()
    listed.pop("__metadata__", None)
    ends = [_check(path, name, entry, file_bytes - 8 - length) for name, entry in listed.items()]
    _check_apart(path, ends)
    return {
        name: Tensor(
            name,
            DTYPES.get(entry["dtype"], str(entry["dtype"])),
            tuple(entry["shape"]),
            path,
            8 + length + entry["data_offsets"][0],
        )
        for name, entry in listed.items()
    }


def read_index(path: str) -> dict[str, Tensor]:
    """The tensors of all parts that an index names; the parts lie beside it."""
    weight_map = read_weight_map(path)
    tensors: dict[str, Tensor] = {}
    for part in dict.fromkeys(weight_map.values()):
        found = read_part(path, os.path.join(os.path.dirname(path), part), read_header)
        tensors |= {name: each for name, each in found.items() if weight_map.get(name) == part}
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise BadSource(f"{path}: {len(missing)} tensors are in none of its files, the first is {missing[0]!r}.")
    return {name: tensors[name] for name in weight_map}


def read_weight_map(path: str) -> dict[str, str]:
    """The file name of each tensor, as an index gives them."""
    with open(path, "rb") as file:
        content = file.read(MAX_HEADER_BYTES + 1)
    if len(content) > MAX_HEADER_BYTES:
        raise BadSource(f"{path}: an index has at most {MAX_HEADER_BYTES} bytes.")
    weight_map = _parse(path, content).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(part, str) for part in weight_map.values()):
        raise BadSource(f'{path}: there is no "weight_map" of tensor names and file names in it.')
    for part in set(weight_map.values()):
        if os.path.basename(part) != part or part in ("", ".", ".."):
            raise BadSource(f"{path}: it names the file {part!r}, which does not lie beside it.")
    return weight_map


def read_part(index_path: str, part_path: str, read: Callable[[str], Any]) -> Any:
    """`read(part_path)`, or a `BadSource` that says which index names the missing file."""
    try:
        return read(part_path)
    except FileNotFoundError as error:
        raise BadSource(
            f"{index_path}: it names the file {os.path.basename(part_path)!r}, which is missing; download all parts."
        ) from error


def open_tensors(path: str, format: str, tensors: Mapping[str, Tensor], options: ReadOptions) -> AheadSource:
    """The table among some tensors, as a source; parts of one table are joined in the order of their numbers."""
    candidates = [Candidate(each.name, each.shape, each.dtype) for each in tensors.values()]
    joined = join_numbered(candidates)
    chosen = choose(path, candidates, options.tensor, joined)
    members = [tensors[name] for name in chosen.members or (chosen.name,)]
    notes: list[str] = []
    regions = [member.region(_scale_of(member, chosen, tensors, notes)) for member in members]
    source = RegionSource(path, format, [region for region in regions if region.rows] or regions, options)
    source.facts["tensor"] = chosen.name
    if chosen.members:
        notes.append(f"{len(members)} tensors {chosen.name} were joined, in the order of their numbers.")
    source.notes += dict.fromkeys([*notes, *note_of_choice(chosen, candidates, options.tensor)])
    return source


def _parse(path: str, content: bytes) -> dict[str, Any]:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise BadSource(f"{path}: its JSON cannot be read: {error}.") from error
    if not isinstance(parsed, dict):
        raise BadSource(f"{path}: its JSON is no object of names and tensors.")
    return parsed


def _check(path: str, name: str, entry: Any, data_bytes: int) -> tuple[int, int, str]:
    """(begin, end, name) of one tensor, once everything that the header says of it is possible."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            sizes_fit = len(shape) <= 64 and all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
            if sizes_fit and 0 <= begin <= end <= data_bytes:
                known = number_type(DTYPES.get(dtype, dtype))
                if known is None or end - begin == math.prod(shape) * known.stored.itemsize:
                    return begin, end, name
    raise BadSource(
        f"{path}: the header's entry of {name!r} is not possible in {data_bytes} bytes of values: {str(entry)[:200]}. "
        "The file is cut off or damaged."
    )


def _check_apart(path: str, ends: list[tuple[int, int, str]]) -> None:
    last_end, last_name = 0, ""
    for begin, end, name in sorted(ends):
        if begin < last_end and begin < end:
            raise BadSource(f"{path}: the values of {name!r} and {last_name!r} overlap; the header is damaged.")
        if end > last_end:
            last_end, last_name = end, name


def _scale_of(member: Tensor, chosen: Candidate, tensors: Mapping[str, Tensor], notes: list[str]) -> Region | float:
    """The factor that a quantised table's values still need: one for all, or one for each row."""
    base = member.name.removesuffix(".weight")
    parent = base.rpartition(".")[0]
    names = [owner + kind for owner in (base, member.name) for kind in ("_scale", ".weight_scale", "_weight_scale")]
    if parent and parent + ".weight" not in tensors:
        names.append(parent + ".weight_scale")  # one for all parts of a table
    found = [tensors[name + end] for name in dict.fromkeys(names) for end in ("", "_inv") if name + end in tensors]
    if not found:
        return 1.0
    scale = found[0]
    if len(found) == 1 and scale.type is not None and scale.shape in ((), (1,), (1, 1)):
        notes.append(f"{chosen.name} was multiplied by its scale {scale.name}.")
        return _single_value(scale)
    if len(found) == 1 and scale.type is not None and scale.shape in (member.shape[:1], (member.shape[0], 1)):
        notes.append(f"Each row of {chosen.name} was multiplied by its scale, as {scale.name} holds them.")
        return scale.region()
    listed = ", ".join(f"{each.name} {each.shape}" for each in found)
    notes.append(f"Values of {chosen.name} are not scaled: {listed} is neither one factor nor one for each row.")
    return 1.0


def _single_value(tensor: Tensor) -> float:
    assert tensor.type is not None
    file = File(tensor.path, READ)
    try:
        stored = np.frombuffer(file.pread(tensor.type.stored.itemsize, tensor.offset), tensor.type.stored)
    finally:
        file.close()
    out = np.empty(1, np.float32)
    tensor.type.to_float32(stored, out, Losses())
    return float(out[0])
