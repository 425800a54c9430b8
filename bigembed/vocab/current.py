"""CurrentTokens: all tokens of one open table, those in the files and those added since, kept up to date."""

import os
import time
from typing import TYPE_CHECKING

import numpy as np

from bigembed.errors import DamagedTable, NoVocabulary
from bigembed.kernels.tokens import ABSENT
from bigembed.vocab.added import AddedTokens
from bigembed.vocab.format import FOLDER, NAME, VocabFacts, remove_leftovers
from bigembed.vocab.packed import PackedTokens
from bigembed.vocab.stored import StoredVocabulary
from bigembed.vocab.unknown import UnknownPolicy, policy_from_json

if TYPE_CHECKING:
    from bigembed.storage.table import Table

OPEN_ROUNDS = 100  # of a reader, while a writer replaces the files


class CurrentTokens:
    """What all Vocabulary objects on a table share. It does not hold the table, which holds it.

    Attributes:
        stored: the files. added: the log's tokens that are not in them. policy: for unknown tokens.
    """

    stored: StoredVocabulary
    added: AddedTokens
    policy: UnknownPolicy

    def __init__(self, table: "Table") -> None:
        self.folder = os.path.join(table.path, FOLDER)
        self._version: tuple[int, int | None] | None = None
        self.catch_up(table)
        if table.may_write:
            remove_leftovers(self.folder, self.stored.facts)

    def catch_up(self, table: "Table") -> None:
        """Load what a rollback, a refresh or a writer changed; the caller holds the table's mutex.

        Raises:
            NoVocabulary: there is none.
        """
        log = table.token_log
        # The writer's log ends with its V; a reader's may go on, with what is not committed or not seen yet.
        limit = None if log.is_writer else table.spec.num_rows
        version = (log.version, limit)
        if self._version == version:
            return
        bytes_B, start_K1, row_K = log.entries(limit)
        self._open_files()  # after the log: what was folded into the files before the log was read is in them
        fresh = int(np.searchsorted(row_K, self.stored.facts.folded_rows))
        self.added = AddedTokens(self.stored.facts.seed)
        self.added.append(PackedTokens(bytes_B, start_K1).checked().between(fresh, len(row_K)), row_K[fresh:])
        self._version = version

    def forget(self) -> None:
        """Load everything anew at the next `catch_up`."""
        self._version = None

    def _open_files(self) -> None:
        for left in reversed(range(OPEN_ROUNDS)):
            facts = VocabFacts.read(self.folder)
            if facts is None:
                raise NoVocabulary(
                    f"{os.path.dirname(self.folder)} has no vocabulary. Use row numbers, or make one with "
                    "Vocabulary.create(table, tokens)."
                )
            if "stored" in self.__dict__ and facts == self.stored.facts:
                return
            try:
                stored = StoredVocabulary(self.folder, facts)
            except (FileNotFoundError, DamagedTable) as error:
                if VocabFacts.read(self.folder) == facts or left == 0:  # no writer replaced them meanwhile
                    raise _explained(error) from error
                time.sleep(0.001)
            else:
                self.policy = policy_from_json(facts.unknown, os.path.join(self.folder, NAME))
                self.stored = stored
                return

    # -- reading --------------------------------------------------------------------------------------------

    def find(self, tokens: PackedTokens, num_rows: int) -> np.ndarray:
        """int64 (M,): the row of each token, ABSENT for unknown ones and for those whose row is not below num_rows."""
        stored, added = self.stored, self.added  # another thread may replace them meanwhile
        row_M = stored.rows_of(stored.find(tokens))
        if len(added):
            unknown = np.flatnonzero(row_M == ABSENT)
            row_M[unknown] = added.find(tokens if len(unknown) == len(tokens) else tokens.select(unknown))
        row_M[row_M >= num_rows] = ABSENT
        return row_M

    def tokens_of(self, row_N: np.ndarray) -> tuple[PackedTokens, np.ndarray]:
        """The token of each row, and whether it has one (bool); an empty one where not."""
        stored, added = self.stored, self.added
        entry_N, at_N = stored.entries_of(row_N), added.positions_of(row_N)
        found = stored.entries.packed(entry_N)
        is_added_N = (entry_N == ABSENT) & (at_N != ABSENT)
        if not is_added_N.any():
            return found, entry_N != ABSENT
        both = PackedTokens.joined([found, added.packed.select(at_N[is_added_N])])
        place_N = np.arange(len(row_N))
        place_N[is_added_N] = len(row_N) + np.arange(len(both) - len(row_N))
        return both.select(place_N), is_added_N | (entry_N != ABSENT)

    @property
    def num_entries(self) -> int:
        """Entries in the files and in the log."""
        return self.stored.num_entries + len(self.added)

    def entries(self, start: int, stop: int) -> tuple[PackedTokens, np.ndarray]:
        """Entries start to stop - 1, of the files and then of the log, and the row of each."""
        stored, added = self.stored, self.added
        edge = stored.num_entries
        entry_N = np.arange(min(start, edge), min(stop, edge))
        first, last = max(0, start - edge), max(0, stop - edge)
        both = [stored.entries.packed(entry_N), added.packed.between(first, last)]
        return PackedTokens.joined(both), np.concatenate([stored.rows_of(entry_N), added.rows[first:last]])


def _explained(error: FileNotFoundError | DamagedTable) -> DamagedTable:
    if isinstance(error, DamagedTable):
        return error
    return DamagedTable(f"{error.filename} is missing. Restore it from a backup of the table.")
