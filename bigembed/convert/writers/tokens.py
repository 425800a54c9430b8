"""Which tokens a format can hold: checked before they are written, so that a file can always be read back."""

import numpy as np

from bigembed import threads
from bigembed.kernels.token_records import FIRST, INSIDE, LAST, first_refused
from bigembed.vocab.packed import PackedTokens


def refused_bytes(inside: bytes = b"", first: bytes = b"", last: bytes = b"") -> np.ndarray:
    """uint8 (256,): for each byte where it may not stand in a token."""
    refused_256 = np.zeros(256, np.uint8)
    for flag, listed in ((INSIDE, inside), (FIRST, first), (LAST, last)):
        refused_256[list(listed)] |= flag
    return refused_256


def find_refused(tokens: PackedTokens, refused_256: np.ndarray) -> int | None:
    """The position of the first token that holds a byte where it may not stand."""
    found = threads.run(first_refused, len(tokens), tokens.bytes_B, tokens.start_M1, refused_256)
    return next((m for m in found if m >= 0), None)


def with_blanks(tokens: PackedTokens) -> list[int]:
    """The positions of tokens that hold a space or a tab; few do."""
    bytes_B = tokens.bytes_B[tokens.start_M1[0] : tokens.start_M1[-1]]
    blank_E = np.flatnonzero((bytes_B == ord(" ")) | (bytes_B == ord("\t"))) + tokens.start_M1[0]
    return np.unique(np.searchsorted(tokens.start_M1, blank_E, side="right") - 1).tolist()
