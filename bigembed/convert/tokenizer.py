"""The tokens of a tokenizer that lies beside a model, with the rows that they stand for."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigembed.vocab.packed import PackedTokens

MAX_FILE_BYTES = 512 << 20
BATCH_TOKENS = 1 << 16
FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class TokenRows:
    """Tokens in ascending order of their rows, as the file writes them, in UTF-8.

    Args:
        file: where they are from. tokens: M of them. row_M: int64, not negative, may repeat.
    """

    file: str
    tokens: list[bytes]
    row_M: np.ndarray

    def batches(self) -> Iterator[tuple[PackedTokens, np.ndarray]]:
        """As `Source.more_tokens` gives them."""
        for start in range(0, len(self.tokens), BATCH_TOKENS):
            stop = start + BATCH_TOKENS
            yield PackedTokens.of(self.tokens[start:stop]), self.row_M[start:stop]


def read_tokens(folder: str) -> TokenRows | None:
    """The tokens of the first of `FILES` in the folder; None where there is none.

    Raises:
        ValueError: the file is not what such files are; says why.
    """
    for name in FILES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
            if len(content) > MAX_FILE_BYTES:
                raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
            pairs = _lines(content) if name == "vocab.txt" else _pairs(_parse(content), folder)
            return _in_order(path, pairs)
    return None


def _lines(content: bytes) -> list[tuple[bytes, int]]:
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [(line.rstrip(b"\r"), row) for row, line in enumerate(lines)]


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _pairs(parsed: Any, folder: str) -> list[tuple[bytes, int]]:
    """Of tokenizer.json: the model's vocabulary and the added tokens; of vocab.json: what it maps."""
    if not isinstance(parsed, dict):
        raise ValueError("there is no vocabulary in it")
    pairs: list[tuple[Any, Any]]
    if "model" in parsed and isinstance(parsed["model"], dict):
        vocab = parsed["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: pairs of token and score, in order of the ids
            pairs = [(entry[0], row) for row, entry in enumerate(vocab)]
        else:
            pairs = list(vocab.items())
        pairs += [(entry["content"], entry["id"]) for entry in parsed.get("added_tokens") or []]
    else:
        pairs = list(parsed.items())
        path = os.path.join(folder, "added_tokens.json")
        if os.path.isfile(path):
            with open(path, "rb") as file:
                pairs += _parse(file.read(MAX_FILE_BYTES)).items()
    for token, row in pairs:
        if not isinstance(token, str) or type(row) is not int or not 0 <= row < 1 << 48:
            raise ValueError(f"it maps {token!r} to {row!r}, which is no row")
    return [(token.encode("utf-8", "surrogatepass"), row) for token, row in dict.fromkeys(pairs)]


def _in_order(path: str, pairs: list[tuple[bytes, int]]) -> TokenRows:
    pairs = sorted(pairs, key=lambda pair: pair[1])
    row_M = np.fromiter((row for _, row in pairs), np.int64, len(pairs))
    return TokenRows(path, [token for token, _ in pairs], row_M)
