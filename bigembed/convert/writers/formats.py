"""The formats that can be written: chosen by name or by the target's suffix, opened by their writers."""

import os

from bigembed.convert.writers.npy import NpyWriter
from bigembed.convert.writers.safetensors_file import SafetensorsWriter
from bigembed.convert.writers.text import GloveWriter, Word2vecTextWriter
from bigembed.convert.writers.torch_file import TorchWriter
from bigembed.convert.writers.word2vec_binary import Word2vecBinaryWriter
from bigembed.convert.writers.writer import Writer
from bigembed.errors import UnknownFormat

_WRITERS: tuple[type[Writer], ...] = (
    Word2vecTextWriter,
    GloveWriter,
    Word2vecBinaryWriter,
    NpyWriter,
    SafetensorsWriter,
    TorchWriter,
)
WRITERS = {writer.format: writer for writer in _WRITERS}
WRITE_FORMATS = tuple(WRITERS)
SUFFIXES = {
    ".txt": "word2vec-text",
    ".vec": "word2vec-text",
    ".bin": "word2vec-binary",
    ".npy": "npy",
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
}


def writer_for(target: str, format: str | None = None) -> type[Writer]:
    """The writer of a format, or of the one that the target's suffix stands for; a .txt file gets a header.

    Raises:
        UnknownFormat: the format does not exist, or the suffix stands for none.
    """
    known = ", ".join(WRITE_FORMATS)
    if format is not None:
        if format not in WRITERS:
            raise UnknownFormat(f"there is no format {format!r} to write; use one of {known}.")
        return WRITERS[format]
    suffix = os.path.splitext(target)[1].lower()
    if suffix not in SUFFIXES:
        raise UnknownFormat(
            f"{target}: the suffix {suffix!r} stands for no format to write ({', '.join(SUFFIXES)} do). Name one with "
            f"format= (--format): {known}."
        )
    return WRITERS[SUFFIXES[suffix]]
