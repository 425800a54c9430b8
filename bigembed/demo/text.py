"""Text for the demo: which files there are, what they hold, and which of them are held out."""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigembed.errors import InvalidArgument

HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Source:
    """A file to read, and its name inside what the user gave: the same name on every machine."""

    path: str
    name: str


@dataclass(frozen=True)
class Document:
    """One file's bytes."""

    name: str
    data: bytes


def find_sources(roots: Sequence[str]) -> list[Source]:
    """Every text file under `roots`, each once: hidden files and files that look binary are left out of folders."""
    found: dict[str, Source] = {}
    for root in roots or [sysconfig.get_path("stdlib")]:
        if os.path.isdir(root):
            sources = _walk(Path(root), is_library=not roots)
        elif os.path.isfile(root):
            sources = [Source(root, os.path.basename(root))]
        else:
            raise InvalidArgument(f"{root} is no file and no folder. Name text files, or folders of them, with --text.")
        for source in sources:
            found.setdefault(os.path.realpath(source.path), source)
    if not found:
        where = ", ".join(roots) or f"the standard library at {sysconfig.get_path('stdlib')}"
        raise InvalidArgument(f"no text files in {where}. Name text files, or folders of them, with --text.")
    return list(found.values())


def _walk(root: Path, is_library: bool) -> list[Source]:
    """Files below `root`; of the standard library its own .py files, without its tests."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "__pycache__"} if is_library else set()
    found = []
    for folder, folders, names in os.walk(root, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        for name in names:
            path = Path(folder, name)
            is_wanted = name.endswith(".py") if is_library else not name.startswith(".")
            if is_wanted and path.is_file() and not _looks_binary(path):
                found.append(Source(str(path), path.relative_to(root).as_posix()))
    return found


def _looks_binary(path: Path) -> bool:
    return b"\0" in _read(str(path), 4096)


def _read(path: str, max_bytes: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(max_bytes)
    except OSError as error:
        raise _unreadable(path, error) from error


def _raise_unreadable(error: OSError) -> None:
    raise _unreadable(error.filename, error) from error


def _unreadable(path: str, error: OSError) -> InvalidArgument:
    return InvalidArgument(f"cannot read {path}: {error.strerror}. Name other text with --text.")


def read_documents(sources: Iterable[Source], seed: int, max_bytes: int) -> list[Document]:
    """The bytes of files in an order drawn from `seed`, until there are `max_bytes`; empty files are left out."""
    documents = []
    left = max_bytes
    for source in sorted(sources, key=lambda source: (_draw("order", seed, source.name), source.path)):
        if left == 0:
            break
        data = _read(source.path, left)
        left -= len(data)
        if data:
            documents.append(Document(source.name, data))
    if not documents:
        raise InvalidArgument("the text is empty: every file has 0 bytes. Name other text with --text.")
    return documents


def split_documents(documents: Sequence[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: whole files by a hash of their names; of a single file, its last tenth.

    A file's side depends on its name and `seed` alone, unless one side would be empty.
    """
    if len(documents) == 1:
        name, data = documents[0].name, documents[0].data
        cut = len(data) - max(1, len(data) // 10)
        if cut == 0:
            raise InvalidArgument(f"{name} has a single byte: nothing is left to train on. Name more with --text.")
        return [Document(name, data[:cut])], [Document(name, data[cut:])]
    first = min(documents, key=lambda document: _draw("split", seed, document.name))
    is_held = [_draw("split", seed, document.name) < HELD_OUT_SHARE for document in documents]
    if not any(is_held) or all(is_held):
        is_held = [document is first for document in documents]
    train = [document for document, held in zip(documents, is_held, strict=True) if not held]
    return train, [document for document, held in zip(documents, is_held, strict=True) if held]


def _draw(purpose: str, seed: int, name: str) -> float:
    """A number in [0, 1) that depends on nothing else."""
    text = f"{purpose}:{seed}:{name}".encode(errors="surrogateescape")
    digest = hashlib.blake2b(text, digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48
