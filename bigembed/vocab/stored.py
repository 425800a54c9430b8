"""StoredVocabulary: the immutable files of a vocabulary: entry of a token, row of an entry, entry of a row."""

import numpy as np

from bigembed import threads
from bigembed.errors import DamagedTable
from bigembed.kernels import tokens as token_kernels
from bigembed.kernels.token_index import hash_rows
from bigembed.kernels.token_search import TokenIndex, find_rows, find_tokens
from bigembed.kernels.tokens import ABSENT
from bigembed.storage.readers import FAULT_BYTES, MappedFile
from bigembed.vocab.cold import SLOT_BYTES, bring, candidates, homes, is_cold, sample
from bigembed.vocab.format import VocabFacts
from bigembed.vocab.packed import PackedTokens, hashes
from bigembed.vocab.token_file import TokenFile

BUDGET_BYTES = 256 << 20  # of mapped pages, all files together
ROW_BYTES = 8


class StoredVocabulary:
    """The files that `facts` names, mapped, and checked for their sizes.

    Damage never gives a wrong entry: a token's bytes are compared with the entry's, a row with the entry's row.

    Raises:
        DamagedTable: a file is missing or has another size.
    """

    def __init__(self, folder: str, facts: VocabFacts) -> None:
        self.facts, self.folder = facts, folder
        self.num_entries = facts.num_entries
        self._check_kinds()
        paths = {kind: facts.path(folder, kind) for kind in facts.files}
        self.entries = TokenFile(paths["tokens"], paths["blocks"], facts.num_entries)
        self._index = MappedFile(paths["index"])
        self._rows = MappedFile(paths["rows"]) if "rows" in paths else None
        self._row_index = MappedFile(paths["entries"]) if "entries" in paths else None
        mapped = (self.entries.tokens, self.entries.blocks, self._index, self._rows, self._row_index)
        self.mapped = [file for file in mapped if file is not None]
        for kind, file in zip(paths, self.mapped, strict=True):
            if file.size_bytes != facts.files[kind].bytes:
                raise self._bad(kind, f"has {file.size_bytes} bytes; {facts.files[kind].bytes} were expected")
        self._tokens_by_hash = self._as_index("index", self._index, facts.num_homes)
        if self._rows is not None and self._row_index is not None:
            if self._rows.size_bytes != ROW_BYTES * self.num_entries:
                raise self._bad("rows", f"has {self._rows.size_bytes} bytes, not {ROW_BYTES} for each of the tokens")
            self._row_E = self._rows.bytes_B.view(np.int64)
            self._rows_by_hash = self._as_index("entries", self._row_index, facts.row_homes)

    def _check_kinds(self) -> None:
        kinds = list(self.facts.files)
        if kinds not in (["tokens", "blocks", "index"], ["tokens", "blocks", "index", "rows", "entries"]):
            raise DamagedTable(f"the vocabulary in {self.folder} cannot consist of {', '.join(kinds) or 'no files'}.")

    def _as_index(self, kind: str, file: MappedFile, num_homes: int) -> TokenIndex:
        if file.size_bytes % SLOT_BYTES or not 1 <= num_homes < file.size_bytes // SLOT_BYTES:
            raise self._bad(kind, f"has {file.size_bytes} bytes, which cannot be {num_homes} homes and more")
        seed = np.uint64(self.facts.seed)
        return TokenIndex(file.bytes_B.view(np.uint64), num_homes, seed, token_kernels.FINGERPRINT_MASK)

    def _bad(self, kind: str, problem: str) -> DamagedTable:
        return DamagedTable(f"{self.facts.path(self.folder, kind)} {problem}. Restore it from a backup of the table.")

    # -- looking up -----------------------------------------------------------------------------------------

    def find(self, tokens: PackedTokens) -> np.ndarray:
        """int64 (M,): the entry of each token, ABSENT for unknown ones.

        Raises:
            DamagedTable: a search met something that cannot be; names the file and the place.
        """
        tokens = tokens.sealed()
        self._bring_if_cold(tokens)
        entry_M = np.empty(len(tokens), np.int64)
        fits = sum(file.size_bytes for file in self.mapped) <= BUDGET_BYTES
        step = max(1, len(tokens) if fits else BUDGET_BYTES // (2 * FAULT_BYTES))
        for start in range(0, len(tokens), step):
            part = tokens.between(start, min(start + step, len(tokens)))
            self._find_slice(part, entry_M[start : start + len(part)])
            self.trim(BUDGET_BYTES)
        return entry_M

    def _find_slice(self, tokens: PackedTokens, entry_M: np.ndarray) -> None:
        args = (tokens.bytes_B, tokens.start_M1, self._tokens_by_hash, self.entries.bytes, entry_M)
        for m, _ in threads.run(find_tokens, len(tokens), *args, grain=512):
            if m >= 0:
                self._raise_damage("index", int(entry_M[m]))
        self._index.touched(len(tokens))
        self.entries.touched(len(tokens))

    def _bring_if_cold(self, tokens: PackedTokens) -> None:
        """Have the pages of many searches in the page cache; a few of them tell whether they are."""
        few = hashes(tokens.select(sample(np.arange(len(tokens)))), self.facts.seed)
        index = self._tokens_by_hash
        if is_cold(self._index, homes(index, few)) or self.entries.are_cold(candidates(index, few)):
            hash_M = hashes(tokens, self.facts.seed)
            bring(self._index, homes(index, hash_M))
            self.entries.bring(candidates(index, hash_M))

    def _raise_damage(self, kind: str, code: int) -> None:
        place = (-2 - code) >> 1
        if code % 2 == 0:
            raise self._bad(kind, f"is damaged: the slot at byte {place * SLOT_BYTES} names no entry that there is")
        raise self.entries.damaged(place)

    def rows_of(self, entry_N: np.ndarray) -> np.ndarray:
        """int64 (N,): the row of each entry; ABSENT stays."""
        if self._rows is None:
            return entry_N
        known = np.flatnonzero(entry_N != ABSENT)
        entry_K = entry_N[known]
        if is_cold(self._rows, sample(entry_K) * ROW_BYTES):
            bring(self._rows, entry_K * ROW_BYTES)
        self._rows.touched(len(known))
        row_N = np.full(len(entry_N), ABSENT, np.int64)
        row_N[known] = self._row_E[entry_K]
        return row_N

    def entries_of(self, row_N: np.ndarray) -> np.ndarray:
        """int64 (N,): the first entry of each row, ABSENT for a row without one."""
        if self._rows is None or self._row_index is None:
            return np.where((row_N >= 0) & (row_N < self.num_entries), row_N, ABSENT)
        hash_N, entry_N, index = np.empty(len(row_N), np.uint64), np.empty(len(row_N), np.int64), self._rows_by_hash
        threads.run(hash_rows, len(row_N), row_N, np.uint64(self.facts.seed), hash_N)
        if is_cold(self._row_index, homes(index, sample(hash_N))):
            bring(self._row_index, homes(index, hash_N))
            entry_N = candidates(index, hash_N)
            bring(self._rows, entry_N[(entry_N >= 0) & (entry_N < self.num_entries)] * ROW_BYTES)
        for n in threads.run(find_rows, len(row_N), row_N, hash_N, index, self._row_E, entry_N):
            if n >= 0:
                self._raise_damage("entries", int(entry_N[n]))
        self._row_index.touched(len(row_N))
        self._rows.touched(len(row_N))
        return entry_N

    @property
    def mapped_bytes(self) -> int:
        """How much of the files may count as this process's memory, at most."""
        return sum(file.mapped_bytes for file in self.mapped)

    def trim(self, budget_bytes: int = 0) -> None:
        """Let go of mapped pages if there may be more than `budget_bytes`; all of them by default."""
        if self.mapped_bytes > budget_bytes:
            for file in self.mapped:
                file.trim()
