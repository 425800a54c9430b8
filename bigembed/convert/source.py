"""Source: what every reader of a file format gives to the converter; one small contract, many formats."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigembed.errors import BadSource
from bigembed.vocab.packed import PackedTokens

BLOCK_BYTES = 16 << 20  # float32 values of a block, about


@dataclass(frozen=True)
class Block:
    """The next rows of a source, in its order.

    Args:
        values_MD: float32, C-contiguous. Belongs to the reader: valid until the next block is asked for.
        tokens: M tokens, one of each row; None where the rows have none. Valid as long as values_MD.
    """

    values_MD: np.ndarray
    tokens: PackedTokens | None = None


@dataclass
class ReadOptions:
    """What a user may say about a source.

    Args:
        dim: the number of columns, where the file leaves it open.
        tensor: which tensor, dataset, array or column holds the rows, where there are several.
        skip_bad_lines: leave lines out that cannot be read, instead of stopping at the first; and take what rows there
            are where a header says another number.
        limit: nobody will ask for more rows, so what comes behind them need not be read, nor be sound.
    """

    dim: int | None = None
    tensor: str | None = None
    skip_bad_lines: bool = False
    limit: int | None = None


@dataclass
class SkippedLines:
    """Lines left out under `skip_bad_lines`: how many, and what was wrong with the first ones.

    Args:
        first: up to `KEPT` messages, each with file, line and reason.
    """

    KEPT = 20

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, error: BadSource) -> None:
        self.count += 1
        if len(self.first) < self.KEPT:
            self.first.append(str(error))


class Source:
    """An open file of some format. A reader fills in the facts in its constructor, and overrides `blocks`.

    Reading is one pass, in bounded memory, from anything that can be streamed. What cannot be right is a `BadSource`
    that names the file, the line or byte offset, and what was expected there.

    Attributes:
        format: the format's name, such as "word2vec-text".
        path: what was opened, as the user gave it ("-" for standard input).
        files: the files that are read, for the provenance (their sizes and sums); none for standard input.
        dim: D.
        num_rows: rows there should be; None where only reading tells.
        dtype: the numbers' type in the file, such as "float16", "text", "Q4_K".
        has_tokens: blocks carry tokens, or `more_tokens` gives some.
        total_bytes: bytes to read, for a progress bar; None where unknown. done_bytes: how many were read.
        skipped: lines left out under `skip_bad_lines`.
        facts: what else should be kept in the table's attributes, as JSON can hold it (the tensor's name, ...).
        notes: what a user should be told at the end, such as that there were fewer rows than the header says.
        subwords: how rows of unknown tokens are found (fastText), see bigembed.vocab.subwords; None mostly.
    """

    def __init__(self, path: str, format: str) -> None:
        self.path = path
        self.format = format
        self.files = [] if path == "-" else [path]
        self.dim = 0
        self.num_rows: int | None = None
        self.dtype = "float32"
        self.has_tokens = False
        self.total_bytes: int | None = None
        self.done_bytes = 0
        self.skipped = SkippedLines()
        self.facts: dict[str, Any] = {}
        self.notes: list[str] = []
        self.subwords: dict[str, Any] | None = None

    def blocks(self) -> Iterator[Block]:
        """All rows in order, about `BLOCK_BYTES` at a time; may be called once."""
        raise NotImplementedError

    def more_tokens(self) -> Iterator[tuple[PackedTokens, np.ndarray]]:
        """After `blocks`: tokens that stand for rows in another order, with their rows (int64, M); mostly none."""
        yield from ()

    def close(self) -> None:
        """Let go of the file; safe to repeat."""

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def bad(self, where: str, problem: str) -> BadSource:
        """The error for something wrong: `where` is a line or byte offset, such as "line 17" or "byte 4096"."""
        return BadSource(f"{self.path}, {where}: {problem}")
