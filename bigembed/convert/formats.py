"""The formats that can be read: recognised by their bytes, opened by their readers."""

import difflib
import importlib
import os
from typing import Any

from bigembed.convert.source import ReadOptions, Source
from bigembed.convert.stream import ByteStream
from bigembed.convert.text_shape import looks_like
from bigembed.errors import BadSource, InvalidArgument, UnknownFormat

HEAD_BYTES = 4096
STREAM_HEAD_BYTES = 64 << 10

# Readers in the order in which they are asked, each with the formats it knows.
BINARY_READERS = {
    "huggingface": ("huggingface",),
    "spacy": ("spacy",),
    "npy": ("npy", "npz"),
    "torch_file": ("torch",),
    "safetensors_file": ("safetensors", "safetensors-index"),
    "gguf_file": ("gguf",),
    "hdf5": ("hdf5",),
    "parquet": ("parquet", "arrow"),
    "fasttext": ("fasttext",),
    "finalfusion": ("finalfusion",),
    "magnitude": ("magnitude",),
}
# These get the first bytes unpacked.
STREAM_READERS = {"word2vec_binary": ("word2vec-binary",), "text": ("word2vec-text", "glove")}
READERS = {**BINARY_READERS, **STREAM_READERS}
FORMATS = tuple(format for formats in READERS.values() for format in formats)
WITHOUT_NAMES = ("npy", "fasttext", "finalfusion", "magnitude", "spacy", *STREAM_READERS["text"], "word2vec-binary")


def open_source(path: str, format: str | None, options: ReadOptions) -> Source:
    """Open a file, a folder or standard input ("-") for reading, as the format named or recognised.

    Raises:
        FileNotFoundError: there is nothing at the path. UnknownFormat: `format` does not exist, or the bytes are of no
            known format. BadSource: the file contradicts itself. MissingLibrary: the format needs a library.
    """
    if format is not None and format not in FORMATS:
        close = difflib.get_close_matches(format, FORMATS) or [known for known in FORMATS if known.startswith(format)]
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UnknownFormat(f"there is no format {format!r}; use one of {', '.join(FORMATS)}.{hint}")
    if path != "-" and not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist.")
    if os.path.isfile(path) or os.path.isdir(path):  # a pipe's first bytes would be gone
        head = _head(path)
        is_for_folders = format in ("huggingface", "spacy")
        if format is not None and is_for_folders != os.path.isdir(path):
            kind = "a folder" if is_for_folders else "a file"
            raise UnknownFormat(f"{path} cannot be of the format {format}, which is that of {kind}.")
        for name, formats in BINARY_READERS.items():
            if format is None or format in formats:
                reader = _reader(name)
                found = reader.recognise(head, path) if format is None else format
                if found is not None:
                    _check_tensor(found, options)
                    return reader.open_source(path, found, options)
        if os.path.isfile(os.path.join(path, "zarr.json")):
            raise UnknownFormat(f"{path} is a table already. Use bigembed copy, or bigembed export.")
        if os.path.isdir(path):
            raise UnknownFormat(
                f"{path} is a folder, but no Hugging Face model (config.json beside *.safetensors or "
                "pytorch_model.bin) and no spaCy vectors. Name the file that holds the rows."
            )
    elif format is not None and not any(format in formats for formats in STREAM_READERS.values()):
        raise UnknownFormat(f"{format} cannot be read from standard input; save it to a file first.")
    return _open_stream(path, format, options)


def _open_stream(path: str, format: str | None, options: ReadOptions) -> Source:
    stream = ByteStream.open(path)
    try:
        head = stream.head(STREAM_HEAD_BYTES)
        if not head:
            raise BadSource(f"{path}, byte 0: the file is empty; rows were expected.")
        for name, formats in STREAM_READERS.items():
            reader = _reader(name)
            found = format if format in formats else reader.recognise(head, path) if format is None else None
            if found is not None:
                _check_tensor(found, options)
                return reader.open_source(stream, found, options)
        _refuse_packed(path, head)
        raise UnknownFormat(
            f"{path} is of no format that is known: it looks like {looks_like(head)} (it begins with {head[:24]!r}). "
            f"Name it with --format if it is one of {', '.join(FORMATS)}."
        )
    except BaseException:
        stream.close()
        raise


def _refuse_packed(path: str, head: bytes) -> None:
    """Binary formats are read where they lie, so they cannot be read through a compression or a pipe."""
    for name in BINARY_READERS:
        found = _reader(name).recognise(head, path)
        if found is not None:
            remedy = "Unpack it" if os.path.isfile(path) else "It cannot be read through a pipe: save it to a file"
            raise UnknownFormat(f"{path} holds data in the format {found}. {remedy} first, then convert that.")


def _check_tensor(format: str, options: ReadOptions) -> None:
    if options.tensor is not None and format in WITHOUT_NAMES:
        raise InvalidArgument(f"tensor={options.tensor!r}: {format} files hold one table without a name. Leave it out.")


def _head(path: str) -> bytes:
    """The first bytes of a file; none of a folder."""
    if os.path.isdir(path):
        return b""
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def _reader(name: str) -> Any:
    return importlib.import_module(f"bigembed.convert.{name}")
