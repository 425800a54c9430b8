"""Subwords: the rows of a word's own vector and of its character n-grams, so that unknown words have vectors too."""

from typing import Any

import numpy as np

from bigembed import threads
from bigembed.errors import InvalidArgument
from bigembed.kernels.subwords import fasttext_rows, finalfusion_rows, floret_rows, pad_words
from bigembed.vocab.packed import PackedTokens

KINDS = ("fasttext", "finalfusion-fasttext", "finalfusion", "floret")
GRAIN_TOKENS = 256
_BYTES_LIMIT = 2**31 - 1
_NONE = np.zeros(0, np.int64)


class Subwords:
    """How rows of unknown words are found. A word's vector is the mean of its rows' values, in their order.

    fastText's rule: n-grams of `minn` to `maxn` characters (UTF-8 code points) of "<word>", but for single characters
    at the padding; an n-gram's row is `first_row` + its hash % `bucket`, the hash 32-bit FNV-1a over sign-extended
    bytes. "</s>" has no n-grams. A known word has its own row before them. In a pruned model only the buckets that
    `pruned` lists have a row: `first_row` + their place in that list.

    "finalfusion-fasttext" is what finalfusion makes of it: the single characters and "</s>" too, and known words have
    their own row alone. "finalfusion" hashes code points to 64 bits and keeps the low `exponent` of them. "floret"
    hashes "<word>" and its n-grams by MurmurHash3_x64_128 with `hash_seed`, into `hash_count` of `num_rows` rows each;
    its padding is `bow` and `eow`, and no word has a row of its own.

    Args:
        settings: see `from_settings`.

    Source: facebookresearch/fastText, src/dictionary.cc (computeSubwords, pushHash, hash); finalfusion-python,
    subword/hash_indexers.pyx; spaCy, vectors.pyx (get_batch).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.kind: str = settings["kind"]
        self._pruned_P = self._pruned_row_P = _NONE
        if settings.get("pruned") is not None:
            bucket_P = np.asarray(settings["pruned"], np.int64)
            self._pruned_row_P = np.argsort(bucket_P, kind="stable")
            self._pruned_P = bucket_P[self._pruned_row_P]

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Subwords":
        """From what a vocabulary keeps: {"kind": one of `KINDS`, ...}, all of it as JSON has it.

        fasttext: minn, maxn, bucket, first_row, and pruned (a list of buckets, or None). finalfusion-fasttext: minn,
        maxn, bucket, first_row. finalfusion: minn, maxn, exponent, first_row. floret: minn, maxn, hash_count,
        hash_seed, num_rows, first_row, bow, eow. Other keys are ignored.

        Raises:
            InvalidArgument: the kind is not known, or a setting is missing or out of range; names it.
        """
        kind = settings.get("kind")
        if kind not in KINDS:
            raise InvalidArgument(f"subwords of kind {kind!r} are not known; the kinds are {', '.join(KINDS)}.")
        for name, low, high in _RANGES[kind]:
            value = settings.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise InvalidArgument(f"subwords ({kind}): {name} is {value!r}, not an integer from {low} to {high}.")
        for name in ("bow", "eow") if kind == "floret" else ():
            text = settings.get(name)
            if not isinstance(text, str) or text != text.encode("utf-8", "replace").decode():
                raise InvalidArgument(f"subwords (floret): {name} is {text!r}, not text that UTF-8 can hold.")
        if settings.get("pruned") is not None:
            _check_pruned(settings)
        return cls(settings)

    def rows_of(self, tokens: PackedTokens, word_row_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of each token, and where each token's begin: `naive_subwords.rows_of` exactly.

        Args:
            tokens: M words.
            word_row_M: int64, each word's own row, -1 for an unknown word; floret ignores it.

        Returns:
            rows_F (int64) and start_M1 (int64, M + 1): token m has rows_F[start_M1[m] : start_M1[m + 1]]; none where it
            has neither a row of its own nor n-grams (its vector is zero).
        """
        count = len(tokens)
        word_row_M = np.ascontiguousarray(word_row_M, np.int64)
        if word_row_M.shape != (count,):
            raise InvalidArgument(f"word_row_M has the shape {word_row_M.shape}, not ({count},), one for each token.")
        before, after = self._padding()
        padded = _padded(tokens, before, after)
        start_M1 = np.zeros(count + 1, np.int64)
        self._run(padded, word_row_M, len(before) + len(after), 0, start_M1, _NONE)
        np.cumsum(start_M1, out=start_M1)
        rows_F = np.empty(start_M1[-1], np.int64)
        self._run(padded, word_row_M, len(before) + len(after), 1, start_M1, rows_F)
        return rows_F, start_M1

    def _padding(self) -> tuple[bytes, bytes]:
        if self.kind == "floret":
            return self.settings["bow"].encode(), self.settings["eow"].encode()
        return b"<", b">"

    def _run(
        self,
        padded: PackedTokens,
        word_row_M: np.ndarray,
        padding: int,
        fill: int,
        start_M1: np.ndarray,
        rows_F: np.ndarray,
    ) -> None:
        """One pass of the rule's kernel."""
        given = self.settings
        words, out = (padded.bytes_B, padded.start_M1), (fill, start_M1, rows_F)
        grams = (given["minn"], given["maxn"])
        kernel: Any
        args: tuple[Any, ...]
        rule: tuple[int, ...]
        if self.kind == "floret":
            rule = (*grams, given["hash_count"], given["hash_seed"], given["num_rows"], given["first_row"])
            kernel, args = floret_rows, (padding, rule)
        elif self.kind == "finalfusion":
            kernel, args = finalfusion_rows, (word_row_M, (*grams, given["exponent"], given["first_row"]))
        else:
            own = int(self.kind == "finalfusion-fasttext")
            is_pruned = int(given.get("pruned") is not None)
            rule = (*grams, given["bucket"], given["first_row"], own, own, is_pruned)
            kernel, args = fasttext_rows, (word_row_M, rule, self._pruned_P, self._pruned_row_P)
        threads.run(kernel, len(padded), *words, *args, *out, grain=GRAIN_TOKENS)


_GRAMS = (("minn", 0, 1 << 20), ("maxn", 0, 1 << 20))
_SOME_GRAMS = (("minn", 1, 1 << 20), ("maxn", 1, 1 << 20))
_PLACE = (("first_row", 0, 1 << 62),)
_RANGES: dict[str, tuple[tuple[str, int, int], ...]] = {
    "fasttext": (*_GRAMS, *_PLACE, ("bucket", 0, _BYTES_LIMIT)),
    "finalfusion-fasttext": (*_SOME_GRAMS, *_PLACE, ("bucket", 0, 2**32 - 1)),
    "finalfusion": (*_SOME_GRAMS, *_PLACE, ("exponent", 0, 61)),
    "floret": (
        *_GRAMS,
        *_PLACE,
        ("hash_count", 1, 4),
        ("hash_seed", 0, 2**32 - 1),
        ("num_rows", 1, 1 << 62),
    ),
}


def _check_pruned(settings: dict[str, Any]) -> None:
    """A list of distinct buckets."""
    pruned, buckets = settings["pruned"], settings.get("bucket", 0)
    if not isinstance(pruned, list) or not all(type(b) is int and 0 <= b < buckets for b in pruned):
        raise InvalidArgument(f"subwords: pruned must be a list of buckets from 0 to {buckets - 1}.")
    if len(set(pruned)) != len(pruned):
        raise InvalidArgument("subwords: pruned lists a bucket twice; each kept bucket has one row.")


def _padded(tokens: PackedTokens, before: bytes, after: bytes) -> PackedTokens:
    """Each token between `before` and `after`."""
    length_M = tokens.length_M + (len(before) + len(after))
    start_M1 = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum(length_M, out=start_M1[1:])
    out_B = np.empty(start_M1[-1], np.uint8)
    before_B, after_B = np.frombuffer(before, np.uint8), np.frombuffer(after, np.uint8)
    whole = (tokens.bytes_B, tokens.start_M1, before_B, after_B, out_B, start_M1)
    threads.run(pad_words, len(tokens), *whole, grain=GRAIN_TOKENS)
    return PackedTokens(out_B, start_M1)
