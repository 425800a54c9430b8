"""A Hugging Face model's folder, "huggingface": the input embedding, with the tokenizer's tokens for its rows."""

import os
from typing import Any

from bigembed.convert import safetensors_file, torch_file
from bigembed.convert.ahead import AheadSource
from bigembed.convert.source import ReadOptions, Source
from bigembed.convert.tokenizer import read_tokens
from bigembed.errors import BadSource

TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_NAME = "pytorch_model.bin"
WEIGHTS = (safetensors_file.INDEX_NAME, "model.safetensors", TORCH_INDEX, TORCH_NAME)


def recognise(head: bytes, path: str) -> str | None:
    if not os.path.isdir(path):
        return None
    names = os.listdir(path)
    has_weights = any(name in WEIGHTS for name in names)
    return "huggingface" if has_weights or ("config.json" in names and _safetensors(path)) else None


def open_source(path: str, format: str, options: ReadOptions) -> Source:
    source = _open_weights(path, format, options)
    try:
        _add_tokens(source, path)
    except BaseException:
        source.close()
        raise
    return source


def _open_weights(path: str, format: str, options: ReadOptions) -> AheadSource:
    """safetensors before pickles, an index before single files, as transformers looks for them."""
    index, single, torch_index, torch_single = (os.path.join(path, name) for name in WEIGHTS)
    if os.path.isfile(index):
        source = safetensors_file.open_tensors(path, format, safetensors_file.read_index(index), options)
        source.files.insert(0, index)
        return source
    found = [single] if os.path.isfile(single) else _safetensors(path)
    if found:
        tensors: dict[str, safetensors_file.Tensor] = {}
        for file in found:
            tensors = safetensors_file.read_header(file) | tensors
        return safetensors_file.open_tensors(path, format, tensors, options)
    if os.path.isfile(torch_index):
        source = torch_file.open_tensors(path, format, _torch_parts(torch_index), options)
        source.files.insert(0, torch_index)
        return source
    if os.path.isfile(torch_single):
        loaded = {torch_single: torch_file.load_tensors(torch_single)}
        return torch_file.open_tensors(path, format, loaded, options)
    raise BadSource(f"{path}: it holds no weights; looked for *.safetensors, {', '.join(WEIGHTS)}.")


def _safetensors(path: str) -> list[str]:
    return sorted(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".safetensors"))


def _torch_parts(index: str) -> dict[str, dict[str, Any]]:
    """The tensors of each file that an index names."""
    names = dict.fromkeys(safetensors_file.read_weight_map(index).values())
    files = [os.path.join(os.path.dirname(index), name) for name in names]
    return {file: safetensors_file.read_part(index, file, torch_file.load_tensors) for file in files}


def _add_tokens(source: AheadSource, path: str) -> None:
    try:
        found = read_tokens(path)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        source.notes.append(f"The tokenizer's file gives no vocabulary: {error}.")
        return
    assert source.num_rows is not None
    if found is None or not found.tokens:
        return
    name = os.path.basename(found.file)
    count, last = len(found.tokens), int(found.row_M[-1])
    if last >= source.num_rows or count < source.num_rows / 2:
        source.notes.append(
            f"The {count} tokens of {name} were left out: they go up to row {last} of {source.num_rows}."
        )
        return
    source.has_tokens = True
    source.late_tokens = found.batches()
    source.files.append(found.file)
    source.notes.append(
        f"The vocabulary has the {count} tokens of {name} as they are written there (a space is often 'Ġ' or '▁')."
    )
