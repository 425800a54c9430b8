"""Tokens for the demo: a corpus as small integers, and what each of them means."""

import hashlib
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bigembed.demo.text import Document, find_sources, read_documents, split_documents

MAX_TEXT_BYTES = 64 << 20
MAX_KNOWN_WORDS = 1 << 20  # bounds the dictionary; later new words count as one rare word
NUM_WORD_CLASSES = 2048  # words that the model can name; the others are its class 0
WORD = re.compile(rb"[\w\x80-\xff]+|\s+|[^\w\s]")  # bytes of non-ASCII letters stay together


@dataclass(frozen=True)
class Tokens:
    """Documents one after the other.

    symbols_T: uint8 or int32, a number for each distinct token.
    starts: int64, ascending: where each document begins.
    """

    symbols_T: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.symbols_T)


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens held out, and what a symbol means.

    class_of_symbol: int64, what the model predicts for a symbol; 0 <= class < num_classes.
    hash_of_symbol: uint64, from the token's bytes alone, so that n-gram ids do not depend on the rest of the text.
    Both end with an entry for "before the document": class num_classes, and a hash of its own.
    """

    train: Tokens
    held_out: Tokens
    num_classes: int
    class_of_symbol: np.ndarray
    hash_of_symbol: np.ndarray
    num_files: int
    num_bytes: int


def load_corpus(roots: Sequence[str], kind: str, seed: int, max_bytes: int = MAX_TEXT_BYTES) -> Corpus:
    """Find, read, split and tokenise; memory is bounded by `max_bytes`, not by the text.

    Args:
        roots: files and folders; empty for the sources of Python's standard library.
        kind: "bytes" or "words".
        seed: decides the order in which files are taken until `max_bytes`, and which are held out.

    Raises:
        InvalidArgument: no text, text that cannot be read, or too little to hold some out.
    """
    documents = read_documents(find_sources(roots), seed, max_bytes)
    train, held_out = split_documents(documents, seed)
    encode = {"bytes": _encode_bytes, "words": _encode_words}[kind]
    return encode(train, held_out, len(documents), sum(len(document.data) for document in documents))


def _encode_bytes(train: list[Document], held_out: list[Document], num_files: int, num_bytes: int) -> Corpus:
    """Every byte is a token; its symbol, class and hash are its value."""
    return Corpus(
        train=_join([np.frombuffer(document.data, np.uint8) for document in train]),
        held_out=_join([np.frombuffer(document.data, np.uint8) for document in held_out]),
        num_classes=256,
        class_of_symbol=np.arange(257, dtype=np.int64),
        hash_of_symbol=np.arange(257, dtype=np.uint64),
        num_files=num_files,
        num_bytes=num_bytes,
    )


def _encode_words(train: list[Document], held_out: list[Document], num_files: int, num_bytes: int) -> Corpus:
    """Words, runs of white space and single other characters are tokens; the most frequent have a class."""
    symbols: dict[bytes, int] = {b"": 0}  # the empty word stands for words beyond MAX_KNOWN_WORDS
    train_tokens = _join([_word_symbols(document.data, symbols) for document in train])
    held_tokens = _join([_word_symbols(document.data, symbols) for document in held_out])
    counts = np.bincount(train_tokens.symbols_T, minlength=len(symbols))
    counts[0] = 0
    named = np.argsort(-counts, kind="stable")[: NUM_WORD_CLASSES - 1]
    named = named[counts[named] > 0]
    class_of_symbol = np.zeros(len(symbols) + 1, np.int64)
    class_of_symbol[named] = np.arange(1, len(named) + 1)
    class_of_symbol[-1] = len(named) + 1
    hashes = [hashlib.blake2b(word, digest_size=8).digest() for word in symbols]
    return Corpus(
        train=train_tokens,
        held_out=held_tokens,
        num_classes=len(named) + 1,
        class_of_symbol=class_of_symbol,
        hash_of_symbol=np.frombuffer(b"".join([*hashes, bytes(8)]), "<u8").astype(np.uint64),
        num_files=num_files,
        num_bytes=num_bytes,
    )


def _word_symbols(data: bytes, symbols: dict[bytes, int]) -> np.ndarray:
    """The symbols of one document's words; new words are added to `symbols`."""
    numbers = array("i")
    for match in WORD.finditer(data):
        word = match.group()
        number = symbols.get(word)
        if number is None:
            number = 0
            if len(symbols) < MAX_KNOWN_WORDS:
                number = symbols[word] = len(symbols)
        numbers.append(number)
    return np.frombuffer(numbers, np.int32)


def _join(documents: list[np.ndarray]) -> Tokens:
    lengths = np.array([len(symbols) for symbols in documents], np.int64)
    return Tokens(np.concatenate(documents), np.cumsum(lengths) - lengths)
