"""TokenFile: the entries of a vocabulary on disk, read by their number."""

import numpy as np

from bigembed import threads
from bigembed.errors import DamagedTable
from bigembed.kernels.token_search import TokenBytes, copy_ranges, locate_entries, same_entries, walk_entries
from bigembed.kernels.tokens import BLOCK_ENTRIES, BLOCK_SHIFT
from bigembed.storage.readers import MappedFile
from bigembed.vocab.cold import bring, is_cold, sample
from bigembed.vocab.packed import PackedTokens

OFFSET_BYTES = 8
BLOCK_BYTES = 256  # of a block of 16 tokens, about
WALKED_ENTRIES, WALKED_BYTES = 1 << 20, 16 << 20


class TokenFile:
    """The files `tokens` and `blocks`, mapped.

    Raises:
        DamagedTable: their sizes do not fit the number of entries.
    """

    def __init__(self, tokens_path: str, blocks_path: str, num_entries: int) -> None:
        self.tokens, self.blocks = MappedFile(tokens_path), MappedFile(blocks_path)
        self.num_entries = num_entries
        expected = (num_entries + BLOCK_ENTRIES - 1) // BLOCK_ENTRIES * OFFSET_BYTES
        if self.blocks.size_bytes != expected:
            raise DamagedTable(
                f"{blocks_path} has {self.blocks.size_bytes} bytes; {expected} were expected for {num_entries} tokens. "
                "Restore it from a backup of the table."
            )
        self.bytes = TokenBytes(self.tokens.bytes_B, self.blocks.bytes_B.view(np.uint64), num_entries)

    def packed(self, entry_N: np.ndarray) -> PackedTokens:
        """The tokens of entries (int64), empty ones for ABSENT.

        Raises:
            DamagedTable: an entry cannot be found.
        """
        self._bring_if_cold(entry_N)
        offset_N, length_N = np.empty(len(entry_N), np.int64), np.empty(len(entry_N), np.int64)
        self._check(threads.run(locate_entries, len(entry_N), entry_N, self.bytes, offset_N, length_N), entry_N)
        start_N1 = np.zeros(len(entry_N) + 1, np.int64)
        np.cumsum(length_N, out=start_N1[1:])
        out_B = np.empty(start_N1[-1], np.uint8)
        threads.run(copy_ranges, len(entry_N), self.bytes.tokens_T, offset_N, length_N, start_N1, out_B)
        self.touched(len(entry_N))
        return PackedTokens(out_B, start_N1)

    def are_same(self, a_N: np.ndarray, b_N: np.ndarray) -> np.ndarray:
        """bool (N,): whether pairs of entries hold the same token."""
        self._bring_if_cold(a_N)
        self._bring_if_cold(b_N)
        out_N = np.empty(len(a_N), bool)
        self._check(threads.run(same_entries, len(a_N), a_N, b_N, self.bytes, out_N), a_N)
        self.touched(2 * len(a_N))
        return out_N

    def _check(self, found: list[int], entry_N: np.ndarray) -> None:
        for n in found:
            if n >= 0:
                raise self.damaged(int(entry_N[n]))

    def damaged(self, entry: int) -> DamagedTable:
        """The error for an entry whose bytes cannot be found."""
        block = entry >> BLOCK_SHIFT
        inside = 0 <= block < len(self.bytes.blocks_C)
        offset = f"byte {int(self.bytes.blocks_C[block])}" if inside else "its end"
        return DamagedTable(
            f"entry {entry} of {self.num_entries} cannot be found: {self.tokens.path} from {offset} on, or "
            f"{self.blocks.path} at byte {block * OFFSET_BYTES}, is damaged. Restore them from a backup of the table."
        )

    def are_cold(self, entry_N: np.ndarray) -> bool:
        """Whether the pages of these few entries say that many have to be read."""
        block_N = self._blocks_of(entry_N)
        return is_cold(self.blocks, block_N * OFFSET_BYTES) or is_cold(self.tokens, self._offsets_of(block_N))

    def bring(self, entry_N: np.ndarray) -> None:
        """Have the pages of entries in the page cache."""
        block_N = self._blocks_of(entry_N)
        bring(self.blocks, block_N * OFFSET_BYTES)
        bring(self.tokens, self._offsets_of(block_N), BLOCK_BYTES)

    def _bring_if_cold(self, entry_N: np.ndarray) -> None:
        if self.are_cold(sample(entry_N)):
            self.bring(entry_N)

    def _blocks_of(self, entry_N: np.ndarray) -> np.ndarray:
        return entry_N[(entry_N >= 0) & (entry_N < self.num_entries)] >> BLOCK_SHIFT

    def _offsets_of(self, block_N: np.ndarray) -> np.ndarray:
        offset_N = self.bytes.blocks_C[block_N].astype(np.int64)
        return offset_N[(offset_N >= 0) & (offset_N < self.tokens.size_bytes)]

    def touched(self, places: int) -> None:
        self.blocks.touched(places)
        self.tokens.touched(places)

    def check_lengths(self) -> None:
        """Walk through all entries.

        Raises:
            DamagedTable: one is not where it should be.
        """
        at = 0
        for first in range(0, self.num_entries, WALKED_ENTRIES):
            self.tokens.advise(np.array([at]), WALKED_BYTES)
            broken, at = walk_entries(first, min(first + WALKED_ENTRIES, self.num_entries), at, self.bytes)
            if broken >= 0:
                raise self.damaged(broken)
        if at != self.tokens.size_bytes:
            raise DamagedTable(
                f"{self.tokens.path} has {self.tokens.size_bytes} bytes; its {self.num_entries} tokens end at byte "
                f"{at}. Restore it from a backup of the table."
            )
