"""spaCy's word vectors: the folder `vocab` of a pipeline, or the pipeline's own folder.

`vectors` is a NumPy file. `key2row` (msgpack) maps 64-bit hashes of strings to rows, several to one row if they like;
the strings are in `strings.json`. `vectors.cfg` (JSON) says whether the table is floret's instead, which has no words:
a word's rows are then hashes of its n-grams.

Source: explosion/spaCy, spacy/vectors.pyx (to_disk, from_disk, get_batch) and spacy/strings.pyx.
"""

import io
import json
import os
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigembed import threads
from bigembed.convert.libraries import load_library
from bigembed.convert.npy import HEADER_BYTES, Header, read_header
from bigembed.convert.number_types import of_numpy
from bigembed.convert.regions import RegionSource
from bigembed.convert.source import ReadOptions, Source
from bigembed.errors import BadSource, InvalidArgument
from bigembed.kernels.murmur import hash_strings
from bigembed.storage.files import READ, File, read_bytes
from bigembed.vocab.packed import PackedTokens
from bigembed.vocab.subwords import Subwords

HASH_SEED = 1  # of a string's key
SYMBOLS = 1 << 16  # keys below are numbers of spaCy's own symbols, not hashes
SLICE_TOKENS = 1 << 16
NAMES = ("vectors", "key2row", "strings.json", "vectors.cfg")


def recognise(head: bytes, path: str) -> str | None:
    return "spacy" if _folder(path) else None


def open_source(path: str, format: str, options: ReadOptions) -> Source:
    folder = _folder(path)
    if folder is None:
        raise BadSource(f"{path}: no files 'vectors' and 'key2row', in this folder or in its folder 'vocab'.")
    return SpacySource(path, format, folder, options)


def _folder(path: str) -> str | None:
    """Where the vectors are."""
    for folder in (path, os.path.join(path, "vocab")):
        if all(os.path.isfile(os.path.join(folder, name)) for name in NAMES[:2]):
            return folder
    return None


class SpacySource(RegionSource):
    """Rows, and through `more_tokens` the strings that stand for them."""

    def __init__(self, path: str, format: str, folder: str, options: ReadOptions) -> None:
        self._folder = folder
        header = self._read_header(os.path.join(folder, "vectors"))
        super().__init__(path, format, [header.region(os.path.join(folder, "vectors"), 0)], options)
        self.files = [found for name in NAMES if os.path.isfile(found := os.path.join(folder, name))]
        has_settings = os.path.isfile(os.path.join(folder, "vectors.cfg"))  # older versions wrote none
        settings = self._read_json("vectors.cfg", dict) if has_settings else {}
        mode = settings.get("mode", "default")
        self.facts["mode"] = mode
        if mode == "floret":
            self._describe_floret(settings)
        elif mode == "default":
            self._find_tokens()
            if settings.get("attr") not in (None, "ORTH"):
                self.notes.append(f"spaCy looks these vectors up by the attribute {settings['attr']} of a token.")
        else:
            raise self.bad("vectors.cfg", f"the mode is {mode!r}; 'default' and 'floret' can be read.")

    def _read_header(self, vectors: str) -> Header:
        file = File(vectors, READ)
        try:
            header = read_header(vectors, io.BytesIO(file.pread(HEADER_BYTES, 0)))
        finally:
            file.close()
        if len(header.shape) != 2 or of_numpy(header.dtype) is None:
            raise BadSource(f"{vectors}: rows of numbers were expected, not {header.shape} of {header.dtype}.")
        if 0 in header.shape:
            raise BadSource(f"{vectors}: this pipeline has no word vectors; larger ones of the same language may have.")
        return header

    def _read_json(self, name: str, kind: type) -> Any:
        """A JSON file that holds a list or an object."""
        try:
            found = json.loads(read_bytes(os.path.join(self._folder, name)))
        except FileNotFoundError:
            raise self.bad(name, "the file is missing; without it nobody knows the words.") from None
        except (ValueError, RecursionError) as error:
            raise self.bad(name, f"the file is no JSON: {error}") from error
        if not isinstance(found, kind):
            raise self.bad(name, f"the file holds a {type(found).__name__}, not a {kind.__name__}.")
        return found

    def _describe_floret(self, settings: dict[str, Any]) -> None:
        names = ("minn", "maxn", "hash_count", "hash_seed", "bow", "eow")
        given = {name: settings.get(name) for name in names}
        self.subwords = {"kind": "floret", **given, "first_row": 0, "num_rows": self.num_rows}
        try:
            Subwords.from_settings(self.subwords)
        except InvalidArgument as error:
            raise self.bad("vectors.cfg", str(error)) from error
        self.notes.append("A floret table has no words: embed() makes any word's vector of the rows of its n-grams.")

    def _find_tokens(self) -> None:
        """Match the keys with the strings' hashes."""
        key_K, row_K = self._read_keys()
        strings, hash_S = self._read_strings()
        string_K = _match(key_K, hash_S)
        known_K, other_K = np.flatnonzero(string_K >= 0), np.flatnonzero(string_K < 0)
        special = self._special(key_K[other_K], row_K[other_K])
        if len(special) < len(other_K):
            unknown = len(other_K) - len(special)
            self.notes.append(f"{unknown} of {len(key_K)} keys have no string; no token finds their rows by them.")
        self.late_tokens = _tokens(strings, string_K[known_K], row_K[known_K], special)
        self.has_tokens = len(known_K) + len(special) > 0

    def _read_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys (uint64) and their rows (int64), in the file's order."""
        msgpack = load_library("msgpack", "spaCy")
        keys, rows = array("Q"), array("q")
        path = os.path.join(self._folder, "key2row")
        with open(path, "rb") as file:
            reader = msgpack.Unpacker(file, strict_map_key=False, max_buffer_size=1 << 24)
            try:
                count = reader.read_map_header()
                if 2 * count > os.path.getsize(path):
                    raise ValueError(f"a map of {count} keys cannot be in {os.path.getsize(path)} bytes")
                for _ in range(count):
                    keys.append(reader.unpack())
                    rows.append(reader.unpack())
            except Exception as error:  # msgpack has no one class for what can be wrong
                said = f"key {len(rows)} of the map from hashes to rows cannot be read: {error or type(error).__name__}"
                raise self.bad("key2row", said) from error
        key_K, row_K = np.array(keys, np.uint64), np.array(rows, np.int64)
        assert self.num_rows is not None
        outside = np.flatnonzero((row_K < 0) | (row_K >= self.num_rows))
        if len(outside):
            k = int(outside[0])
            raise self.bad("key2row", f"key {k} has row {row_K[k]}, but there are rows 0 to {self.num_rows - 1}.")
        return key_K, row_K

    def _read_strings(self) -> tuple[PackedTokens, np.ndarray]:
        """The strings, and the key of each (uint64)."""
        listed = self._read_json("strings.json", list)
        try:
            strings = PackedTokens.of(listed)
        except (InvalidArgument, UnicodeEncodeError) as error:
            raise self.bad("strings.json", f"it should list strings: {error}") from error
        hash_S = np.empty(len(strings), np.uint64)
        threads.run(hash_strings, len(strings), strings.bytes_B, strings.start_M1, HASH_SEED, hash_S)
        return strings, hash_S

    def _special(self, key_K: np.ndarray, row_K: np.ndarray) -> list[tuple[str, int]]:
        """(string, row) of keys that are no hashes.

        spaCy numbers the empty string 0, and the names in a table of its source otherwise; some are words ("case").
        """
        names = {0: ""}
        if ((key_K > 0) & (key_K < SYMBOLS)).any():
            try:
                from spacy.symbols import IDS  # type: ignore[import-not-found, unused-ignore]

                names |= {number: name for name, number in IDS.items() if number}
            except ImportError:
                self.notes.append(
                    "Words that are also names of spaCy's labels ('case') are only found with spaCy installed."
                )
        pairs = zip(key_K.tolist(), row_K.tolist(), strict=True)
        return [(names[key], row) for key, row in pairs if key in names]


def _match(key_K: np.ndarray, hash_S: np.ndarray) -> np.ndarray:
    """The place of each key among the hashes, -1 where it is not there."""
    if len(hash_S) == 0:
        return np.full(len(key_K), -1)
    order_S = np.argsort(hash_S, kind="stable")
    place_K = np.searchsorted(hash_S, key_K, sorter=order_S)
    string_K = order_S[np.minimum(place_K, len(hash_S) - 1)]
    return np.where(hash_S[string_K] == key_K, string_K, -1)


def _tokens(
    strings: PackedTokens, string_K: np.ndarray, row_K: np.ndarray, special: list[tuple[str, int]]
) -> Iterator[tuple[PackedTokens, np.ndarray]]:
    """Tokens and their rows, a slice at a time."""
    for start in range(0, len(string_K), SLICE_TOKENS):
        some = slice(start, start + SLICE_TOKENS)
        yield strings.select(string_K[some]), row_K[some]
    if special:
        names, rows = zip(*special, strict=True)
        yield PackedTokens.of(names), np.array(rows, np.int64)
