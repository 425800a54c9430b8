"""fastText's own models (.bin, .ftz): the input matrix as one table, the words' rows first, then those of the n-grams.

Layout, all little-endian and packed: magic and version (none in the oldest files); 12 int32 and a float64, see `ARGS`;
the dictionary's size, its words and labels (int32), tokens (int64), the length of the pruned index (int64, -1 for none;
not in the oldest files); the entries: bytes, a zero byte, a count (int64), a kind (0 word, 1 label), words first; the
pruned index: a bucket and its row (int32) each; whether the matrix is quantised (a byte, not in the oldest files); the
input matrix; the same byte and the output matrix, which is not read.

Source: facebookresearch/fastText, src/{fasttext,args,dictionary,densematrix,quantmatrix,productquantizer}.cc.
"""

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigembed.convert.ahead import AheadSource
from bigembed.convert.entries import Entries
from bigembed.convert.fields import Fields
from bigembed.convert.matrices import Float32Rows, QuantisedRows, read_floats
from bigembed.convert.source import Block, ReadOptions, Source
from bigembed.errors import BadSource, InvalidArgument
from bigembed.storage.files import READ, File
from bigembed.vocab.subwords import Subwords

MAGIC = 793712314
VERSIONS = (11, 12)
ARGS = struct.Struct("<12id")
ARG_NAMES = (
    *("dim", "ws", "epoch", "minCount", "neg", "wordNgrams", "loss", "model", "bucket", "minn", "maxn"),
    *("lrUpdateRate", "t"),
)
TAIL_BYTES = 9  # of a dictionary entry after its zero byte
MODELS = {1: "cbow", 2: "skipgram", 3: "supervised"}
MOST_PRUNED = 1 << 20  # n-grams of a pruned model: their list is kept in the vocabulary's settings
CHOICES = 256  # of a product quantiser

Matrix = Float32Rows | QuantisedRows


def recognise(head: bytes, path: str) -> str | None:
    if head.startswith(struct.pack("<i", MAGIC)):
        return "fasttext"
    if len(head) < ARGS.size:
        return None
    dim, window, epoch, least, negatives, words, loss, model, bucket, minn, maxn, rate, t = ARGS.unpack_from(head)
    is_likely = (
        *(1 <= dim <= 1 << 14, 1 <= window <= 1 << 12, 1 <= epoch <= 1 << 20, 0 <= negatives <= 1 << 20, least >= 0),
        *(1 <= words <= 64, 1 <= loss <= 4, model in MODELS, bucket >= 0, 0 <= minn <= 255, 0 <= maxn <= 255),
        *(rate >= 0, 0 <= t <= 1),
    )
    return "fasttext" if all(is_likely) else None


def open_source(path: str, format: str, options: ReadOptions) -> Source:
    return FastTextSource(path, format, options)


class FastTextSource(AheadSource):
    """Rows and words of a model, and in `subwords` how vectors are composed of them."""

    def __init__(self, path: str, format: str, options: ReadOptions) -> None:
        super().__init__(path, format)
        self._file = File(path, READ)
        try:
            self._open(options)
        except BaseException:
            self.release()
            raise

    def _open(self, options: ReadOptions) -> None:
        fields = Fields(self._file)
        given, is_old = self._read_args(fields)
        size, self._words, pruned = self._read_sizes(fields, is_old)
        self._words_at, self._words_end = fields.at, self._skip_entries(fields, size)
        kept = self._read_pruned(fields, pruned, given["bucket"])
        self._matrix = self._read_matrix(fields, is_old)
        rows, dim = self._matrix.rows, self._matrix.dim
        if dim != given["dim"]:
            raise fields.bad(f"the input matrix has {dim} columns, but the model's dimension is {given['dim']}.")
        self._check_rows(rows, given["bucket"], pruned)
        self.settle(rows, dim, options)
        self.dtype = self._matrix.dtype
        self.has_tokens = True
        self.total_bytes = self._words_end - self._words_at + rows * self._matrix.row_bytes
        self._describe(given, size - self._words, is_old, kept)
        self._look_at_output(fields, is_old)

    def _read_args(self, fields: Fields) -> tuple[dict[str, Any], bool]:
        """What the model was trained with, and whether the file is older than the magic number."""
        magic, version = fields.take("ii", "the magic number and the version")
        is_old = magic != MAGIC
        if is_old:
            fields.at, version = 0, 0
        elif version not in VERSIONS:
            raise fields.bad(f"the file's version is {version}; versions {VERSIONS[0]} and {VERSIONS[1]} can be read.")
        values = fields.take("12id", "the model's parameters")
        given = dict(zip(ARG_NAMES, values, strict=True)) | {"version": version}
        if given["model"] not in MODELS:
            raise fields.bad(f"the kind of model is {given['model']}; 1 (cbow), 2 (skipgram) or 3 (supervised) exist.")
        if version == 11 and given["model"] == 3:  # fastText reads them so: they were trained without n-grams
            given["maxn"] = 0
        return given, is_old

    def _read_sizes(self, fields: Fields, is_old: bool) -> tuple[int, int, int]:
        """Entries of the dictionary, words among them, and the length of the pruned index (-1: none)."""
        size, words, labels, _ = fields.take("3iq", "the dictionary's sizes")
        pruned = -1 if is_old else fields.take("q", "the length of the pruned index")
        if not 0 <= words <= size or labels < 0 or pruned < -1:
            raise fields.bad(
                f"a dictionary of {size} entries cannot have {words} words and {labels} labels, and a pruned index of "
                f"{pruned}. (A model of floret has another layout; save its vectors with spaCy and convert those.)"
            )
        fields.need(size * (1 + TAIL_BYTES), f"a dictionary of {size} entries")
        return size, words, pruned

    def _skip_entries(self, fields: Fields, size: int) -> int:
        """Step over the dictionary, which has no length of its own; returns where the words end."""
        entries = Entries(self._file, fields.at, fields.end, TAIL_BYTES)
        if entries.skip(self._words):
            raise fields.bad(f"the first {self._words} entries of the dictionary should be words, but one is a label.")
        words_end = entries.at
        entries.skip(size - self._words)
        fields.at = entries.at
        return words_end

    def _read_pruned(self, fields: Fields, pruned: int, buckets: int) -> list[int] | None:
        """The buckets that kept a row, in order of their rows; None where all did."""
        if pruned < 0:
            return None
        if pruned > MOST_PRUNED:
            raise fields.bad(
                f"the pruned model keeps {pruned} n-grams, more than {MOST_PRUNED}, which a vocabulary can list. "
                "Quantise it with a smaller -cutoff, or convert its .bin."
            )
        raw = fields.take_bytes(8 * pruned, "the pruned index")
        bucket_P, row_P = np.frombuffer(raw, "<i4").reshape(-1, 2).T
        bucket_of_row = np.full(pruned, -1, np.int64)
        if pruned and row_P.min() >= 0 and row_P.max() < pruned:
            bucket_of_row[row_P] = bucket_P
        if (bucket_of_row < 0).any() or (bucket_of_row >= buckets).any() or len(set(bucket_P.tolist())) != pruned:
            raise fields.bad(f"the pruned index should name {pruned} rows and as many of the {buckets} buckets.")
        return bucket_of_row.tolist()

    def _read_matrix(self, fields: Fields, is_old: bool) -> Matrix:
        """Where the matrix is, which is checked to be inside of the file; steps over it."""
        is_quantised = 0 if is_old else fields.take("B", "whether the matrix is quantised")
        if is_quantised not in (0, 1):
            raise fields.bad(f"a byte that says whether the matrix is quantised is {is_quantised}, not 0 or 1.")
        if is_quantised:
            return self._read_quantised(fields)
        rows, dim = fields.take("2q", "the matrix's shape")
        if rows < 0 or dim < 1:
            raise fields.bad(f"a matrix of {rows} rows and {dim} columns is not possible.")
        return Float32Rows(rows, dim, fields.skip(4 * rows * dim, f"a matrix of {rows} rows of {dim} float32 values"))

    def _read_quantised(self, fields: Fields) -> QuantisedRows:
        has_norms, rows, dim, count = fields.take("B2qi", "the quantised matrix's shape")
        if rows < 0 or dim < 1 or has_norms > 1:
            raise fields.bad(f"a quantised matrix of {rows} rows and {dim} columns is not possible.")
        codes_at = fields.skip(count, f"{count} codes")
        piece_dim, piece_F = self._read_quantiser(fields, dim)
        if count != rows * -(-dim // piece_dim):
            raise fields.bad(f"{rows} rows of {dim} columns in pieces of {piece_dim} do not have {count} codes.")
        if not has_norms:
            return QuantisedRows(rows, dim, codes_at, piece_dim, CHOICES, piece_F)
        norms_at = fields.skip(rows, f"{rows} codes of norms")
        _, norm_F = self._read_quantiser(fields, 1)
        return QuantisedRows(rows, dim, codes_at, piece_dim, CHOICES, piece_F, norms_at, norm_F)

    def _read_quantiser(self, fields: Fields, dim: int) -> tuple[int, np.ndarray]:
        """Values of a piece, and the pieces."""
        its_dim, codes, piece_dim, last_dim = fields.take("4i", "a product quantiser's shape")
        fits = its_dim == dim and 1 <= piece_dim <= dim and codes == -(-dim // piece_dim)
        if not fits or last_dim != dim - (codes - 1) * piece_dim:
            raise fields.bad(
                f"a product quantiser of {its_dim} values in {codes} pieces of {piece_dim}, the last of {last_dim}, "
                f"does not fit rows of {dim} columns."
            )
        offset = fields.skip(4 * CHOICES * dim, "the product quantiser's pieces")
        return piece_dim, read_floats(self._file, offset, CHOICES * dim)

    def _check_rows(self, rows: int, buckets: int, pruned: int) -> None:
        """The matrix has a row for each word and each n-gram's bucket; some models dropped all of the buckets."""
        grams = rows - self._words
        if grams in ((0, buckets) if pruned < 0 else (pruned,)):
            return
        expected = f"{self._words} words and {buckets if pruned < 0 else pruned} n-grams"
        advice = " fastText itself refuses such files (its issue 332): fetch the model again." if pruned == 0 else ""
        raise self.bad("the input matrix", f"it has {rows} rows, but the dictionary tells of {expected}.{advice}")

    def _describe(self, given: dict[str, Any], labels: int, is_old: bool, kept: list[int] | None) -> None:
        """Fill in subwords, facts and notes."""
        assert self.num_rows is not None
        buckets = given["bucket"] if self.num_rows > self._words else 0
        self.subwords = {
            "kind": "fasttext",
            "minn": given["minn"],
            "maxn": given["maxn"],
            "bucket": buckets,
            "first_row": self._words,
            "num_words": self._words,
            "word_ngrams": given["wordNgrams"],
            "pruned": kept if buckets else None,
        }
        try:
            Subwords.from_settings(self.subwords)
        except InvalidArgument as error:
            raise self.bad("the model's parameters", str(error)) from error
        self.facts = {"model": MODELS[given["model"]], "words": self._words, "labels": labels} | {
            key: given[key] for key in ("version", "bucket", "minn", "maxn", "wordNgrams")
        }
        if buckets:
            self.notes.append(
                f"{self._words} rows of words are followed by {self.num_rows - self._words} rows of character n-grams; "
                "a word's vector is the mean of its row and its n-grams' rows."
            )
        if labels:
            self.notes.append(f"{labels} labels were left out: they have no rows in the input matrix.")
        if given["wordNgrams"] > 1 and buckets:
            self.notes.append(f"The rows of n-grams are also those of n-grams of up to {given['wordNgrams']} words.")
        if isinstance(self._matrix, QuantisedRows):
            self.notes.append("The model is quantised; the values are those that its codes stand for.")
        if is_old:
            self.notes.append("The file is of a fastText before 2017; its n-grams are taken by the rule of later ones.")

    def _look_at_output(self, fields: Fields, is_old: bool) -> None:
        """The output matrix is not needed; but where it is cut off, the user should know that the file is."""
        try:
            self._read_matrix(fields, is_old)
        except BadSource as error:
            self.notes.append(f"The file is cut off or damaged behind the rows, which are whole: {error}")

    # --- reading

    def pieces(self) -> Iterator[tuple[Entries | None, int, int]]:
        assert self.num_rows is not None
        words = Entries(self._file, self._words_at, self._words_end, TAIL_BYTES)
        for first, last, entries in ((0, self._words, words), (self._words, self.num_rows, None)):
            for start in range(first, last, self.block_rows):
                yield entries, start, min(start + self.block_rows, last)

    def fill(self, piece: tuple[Entries | None, int, int], buffer_MD: np.ndarray) -> Block:
        entries, start, stop = piece
        out_MD = buffer_MD[: stop - start]
        self._matrix.read(self._file, start, out_MD)
        self.done_bytes += len(out_MD) * self._matrix.row_bytes
        if entries is None:
            return Block(out_MD)
        before = entries.at
        tokens, _ = entries.take(stop - start)
        self.done_bytes += entries.at - before
        return Block(out_MD, tokens)

    def release(self) -> None:
        self._file.close()
