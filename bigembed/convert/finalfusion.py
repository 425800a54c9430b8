"""finalfusion files (.fifu): words, their rows and norms, and the rows of n-grams where there are some.

Layout, all little-endian: "FiFu", version 0 (u32), the number of chunks (u32) and their kinds (u32 each); then the
chunks: kind (u32), length in bytes (u64), content. Values are aligned to 4 bytes by 1 to 4 bytes of padding (4 where
none would be needed). Rows are stored with length 1; a chunk of norms has what the words' rows were divided by.

Source: finalfusion/finalfusion-rust, src/chunks/{io,norms}.rs, vocab/subword.rs, storage/{array,quantized}.rs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigembed.convert.ahead import AheadSource
from bigembed.convert.entries import Entries
from bigembed.convert.fields import Fields
from bigembed.convert.matrices import Float32Rows, QuantisedRows, read_floats, scale_rows
from bigembed.convert.source import Block, ReadOptions, Source
from bigembed.errors import InvalidArgument
from bigembed.storage.files import READ, File
from bigembed.vocab.subwords import Subwords

MAGIC = b"FiFu"
SIMPLE, ARRAY, BUCKETS, QUANTISED, METADATA, NORMS, FASTTEXT, EXPLICIT, FLORET = range(1, 10)
VOCABULARIES, STORAGES = (SIMPLE, BUCKETS, FASTTEXT, EXPLICIT, FLORET), (ARRAY, QUANTISED)
FLOAT32, UINT8 = 10, 1  # types of values
MOST_CHUNKS = 64
METADATA_BYTES = 1 << 16  # of metadata that are kept


@dataclass
class Words:
    """The vocabulary: how many words, where their entries begin and end, and what rows follow theirs.

    grams: rows of n-grams; None where the file does not say. subwords: how they are found, see bigembed.vocab.subwords.
    """

    count: int = 0
    at: int = 0
    end: int = 0
    grams: int | None = None
    subwords: dict[str, Any] | None = None


def recognise(head: bytes, path: str) -> str | None:
    return "finalfusion" if head.startswith(MAGIC) else None


def open_source(path: str, format: str, options: ReadOptions) -> Source:
    return FinalfusionSource(path, format, options)


class FinalfusionSource(AheadSource):
    """Rows and words of a file; norms are multiplied back in."""

    def __init__(self, path: str, format: str, options: ReadOptions) -> None:
        super().__init__(path, format)
        self._file = File(path, READ)
        self._words = Words()
        self._matrix: Float32Rows | QuantisedRows | None = None
        self._norms_at: int | None = None
        self._norms = 0
        try:
            self._open(options)
        except BaseException:
            self.release()
            raise

    def _open(self, options: ReadOptions) -> None:
        fields = Fields(self._file)
        for kind in self._read_header(fields):
            found, length = fields.take("IQ", "a chunk's kind and length")
            if found != kind:
                raise fields.bad(f"a chunk of kind {found} begins here, but the header announces kind {kind}.")
            fields.need(length, f"a chunk of kind {kind}")
            self._read_chunk(kind, Fields(self._file, fields.at, fields.at + length))
            fields.skip(length, "a chunk")
        matrix, words = self._matrix, self._words
        if matrix is None:
            raise fields.bad("the file has no rows, only words or metadata.")
        grams = matrix.rows - words.count
        if grams < 0 or words.grams not in (None, grams):
            more = f" and {words.grams} n-grams" if words.grams else ""
            raise fields.bad(f"there are {matrix.rows} rows for {words.count} words{more}.")
        if self._norms_at is not None and self._norms != words.count:
            raise fields.bad(f"there are {self._norms} norms for {words.count} words.")
        self.settle(matrix.rows, matrix.dim, options)
        self.dtype = matrix.dtype
        self.total_bytes = matrix.rows * matrix.row_bytes
        self._describe(words, grams)

    def _read_header(self, fields: Fields) -> list[int]:
        """The chunks' kinds."""
        if fields.take_bytes(4, "the magic bytes") != MAGIC:
            raise self.bad("byte 0", "the file should begin with 'FiFu'.")
        version, count = fields.take("2I", "the version and the number of chunks")
        if version != 0 or count > MOST_CHUNKS:
            raise fields.bad(f"version {version} with {count} chunks; version 0 and at most {MOST_CHUNKS} can be read.")
        kinds = [fields.take("I", "a chunk's kind") for _ in range(count)]
        for some, name in ((VOCABULARIES, "vocabulary"), (STORAGES, "matrix"), ((NORMS,), "norms")):
            if sum(kind in some for kind in kinds) > 1:
                raise fields.bad(f"the chunks are of kinds {kinds}: more than one {name} cannot be read.")
        return kinds

    def _read_chunk(self, kind: int, fields: Fields) -> None:
        if kind in VOCABULARIES:
            self._words = _read_words(kind, fields)
        elif kind == ARRAY:
            self._matrix = _read_array(fields)
        elif kind == QUANTISED:
            self._matrix = _read_quantised(fields)
        elif kind == NORMS:
            self._norms, type = fields.take("QI", "the norms' shape")
            _expect_type(fields, type, FLOAT32)
            self._norms_at = fields.skip(4 * self._norms, f"{self._norms} norms")
        elif kind == METADATA:
            text = fields.take_bytes(min(METADATA_BYTES, fields.end - fields.at), "metadata")
            self.facts["metadata"] = text.decode("utf-8", "replace")
        else:
            raise fields.bad(f"chunks of kind {kind} are not known; kinds 1 to {FLORET} can be read.")

    def _describe(self, words: Words, grams: int) -> None:
        """Fill in words, subwords and notes."""
        self.has_tokens = words.count > 0
        self.facts |= {"words": words.count, "buckets": grams}
        if words.subwords is not None:
            self.subwords = words.subwords | {"first_row": words.count, "num_words": words.count}
            if self.subwords["kind"] == "floret":
                self.subwords["num_rows"] = grams
            try:
                Subwords.from_settings(self.subwords)
            except InvalidArgument as error:
                raise self.bad("the vocabulary", str(error)) from error
            self.notes.append(
                f"After {words.count} rows of words come {grams} rows of character n-grams; an unknown word's vector "
                "is the mean of its n-grams' rows. (finalfusion itself also divides that mean by its length.)"
            )
        elif grams:
            self.notes.append(
                f"After {words.count} rows of words come {grams} rows of n-grams that the file lists one by one; the "
                "list is not kept, so unknown words have no vectors."
            )
        if self._norms_at is not None:
            self.notes.append("Rows of words were stored with length 1; they were multiplied by their norms.")
        else:
            self.notes.append("The rows are as stored; finalfusion stores them with length 1.")
        if isinstance(self._matrix, QuantisedRows):
            self.notes.append("The matrix is quantised; the values are those that its codes stand for.")

    # --- reading

    def pieces(self) -> Iterator[tuple[Entries | None, int, int]]:
        assert self.num_rows is not None
        words = self._words
        entries = Entries(self._file, words.at, words.end)
        for first, last, some in ((0, words.count, entries), (words.count, self.num_rows, None)):
            for start in range(first, last, self.block_rows):
                yield some, start, min(start + self.block_rows, last)

    def fill(self, piece: tuple[Entries | None, int, int], buffer_MD: np.ndarray) -> Block:
        assert self._matrix is not None
        entries, start, stop = piece
        out_MD = buffer_MD[: stop - start]
        self._matrix.read(self._file, start, out_MD)
        self.done_bytes += len(out_MD) * self._matrix.row_bytes
        if entries is None:
            return Block(out_MD)
        if self._norms_at is not None:
            scale_rows(out_MD, read_floats(self._file, self._norms_at + 4 * start, len(out_MD)))
        return Block(out_MD, entries.take(stop - start)[0])

    def release(self) -> None:
        self._file.close()


def _read_words(kind: int, fields: Fields) -> Words:
    """A chunk of words: their number, what finds the rows of n-grams, and the entries."""
    if kind == FLORET:
        return _read_floret(fields)
    words = Words(fields.take("Q", "the number of words"), grams=0)
    if kind == EXPLICIT:
        fields.take("QII", "the n-grams' sizes")
        words.grams = None  # several n-grams may share a row
    elif kind != SIMPLE:
        minn, maxn, buckets = fields.take("3I", "the n-grams' sizes and the number of buckets")
        words.subwords = {"minn": minn, "maxn": maxn}
        if kind == FASTTEXT:
            words.subwords |= {"kind": "finalfusion-fasttext", "bucket": buckets}
            words.grams = buckets
        else:
            words.subwords |= {"kind": "finalfusion", "exponent": buckets}
            words.grams = 1 << min(buckets, 64)
    fields.need(4 * words.count, f"{words.count} words")
    words.at, words.end = fields.at, fields.end
    return words


def _read_floret(fields: Fields) -> Words:
    """A chunk of floret's settings; it has no words, every row is one of n-grams."""
    minn, maxn, buckets, hashes, seed = fields.take("IIQII", "floret's settings")
    padding = []
    for name in ("beginning", "end"):
        raw = fields.take_bytes(fields.take("I", f"the length of the word's {name}"), f"the mark of a word's {name}")
        padding.append(raw.decode("utf-8", "replace"))
    settings = {"kind": "floret", "minn": minn, "maxn": maxn, "hash_count": hashes, "hash_seed": seed}
    return Words(grams=buckets, subwords=settings | {"bow": padding[0], "eow": padding[1]})


def _read_array(fields: Fields) -> Float32Rows:
    rows, dim, type = fields.take("QII", "the matrix's shape")
    _expect_type(fields, type, FLOAT32)
    if dim < 1:
        raise fields.bad(f"a matrix of {rows} rows and {dim} columns is not possible.")
    return Float32Rows(rows, dim, fields.skip(4 * rows * dim, f"a matrix of {rows} rows of {dim} float32 values"))


def _read_quantised(fields: Fields) -> QuantisedRows:
    projects, has_norms, codes, dim, choices, rows, *types = fields.take("5IQII", "the quantised matrix's shape")
    if types[0] != UINT8:
        raise fields.bad(f"codes of type {types[0]}; type {UINT8} (uint8) can be read.")
    if not 1 <= codes <= dim or dim % codes or not 1 <= choices <= 256:
        raise fields.bad(f"rows of {dim} columns in {codes} codes, each one of {choices}, are not possible.")
    _expect_type(fields, types[1], FLOAT32)
    rotation_at = fields.skip(4 * dim * dim, "the matrix that rotates the rows") if projects else None
    pieces_at = fields.skip(4 * dim * choices, "the quantiser's pieces")
    norms_at = fields.skip(4 * rows, f"{rows} norms") if has_norms else None
    codes_at = fields.skip(rows * codes, f"{rows * codes} codes")
    piece_F = read_floats(fields.file, pieces_at, dim * choices)
    rotation_DD = None if rotation_at is None else read_floats(fields.file, rotation_at, dim * dim).reshape(dim, dim)
    return QuantisedRows(rows, dim, codes_at, dim // codes, choices, piece_F, norms_at, None, rotation_DD)


def _expect_type(fields: Fields, type: int, expected: int) -> None:
    """Values of a type that can be read follow, after their padding."""
    if type != expected:
        raise fields.bad(f"values of type {type}; type {expected} (float32) can be read.")
    fields.skip(4 - fields.at % 4, "padding")
