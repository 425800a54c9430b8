"""How a vocabulary grows: new tokens get new rows of the table, and later a place in the immutable files."""

from contextlib import suppress

import numpy as np

from bigembed.errors import BigembedError
from bigembed.kernels.tokens import ABSENT
from bigembed.storage.table import Table
from bigembed.vocab.added import first_of_each
from bigembed.vocab.builder import VocabBuilder, check_lengths
from bigembed.vocab.current import CurrentTokens
from bigembed.vocab.format import remove_leftovers
from bigembed.vocab.packed import PackedTokens

COMPACT_TOKENS, COMPACT_FRACTION = 1_000_000, 0.25  # added ones, past both of which they are folded into the files
SLICE_ENTRIES = 1 << 16


def add_tokens(table: Table, current: CurrentTokens, tokens: PackedTokens) -> np.ndarray:
    """int64 (M,): the row of each token, new rows for new tokens; the caller holds the table's mutex.

    The log comes first: an entry whose row is not below V does not count, so an error or a crash between the two adds
    nothing.
    """
    check_lengths(tokens)
    num_rows = table.spec.num_rows
    row_M = current.find(tokens, num_rows)
    new = np.flatnonzero(row_M == ABSENT)
    if not len(new):
        return row_M
    unknown = tokens.select(new)
    first_M = first_of_each(unknown, current.stored.facts.seed)
    is_first_M = first_M == np.arange(len(new))
    fresh = unknown.select(np.flatnonzero(is_first_M))
    fresh_row_M = num_rows + np.cumsum(is_first_M) - 1
    log = table.token_log
    try:
        log.append(fresh.bytes_B, fresh.start_M1, num_rows)
        table.grow(num_rows + len(fresh))
        current.added.append(fresh, fresh_row_M[is_first_M])
    except BaseException:
        current.forget()
        if table.spec.num_rows == num_rows:
            with suppress(BigembedError):  # the log then refuses to be written, and says so
                log.trim(num_rows)
        raise
    row_M[new] = fresh_row_M[first_M]
    return row_M


def is_compaction_due(table: Table, current: CurrentTokens) -> bool:
    """Whether so many added tokens can be folded into the files that it pays."""
    least = max(COMPACT_TOKENS, COMPACT_FRACTION * current.stored.num_entries)
    return len(current.added) >= least and _foldable(table, current) >= least


def _foldable(table: Table, current: CurrentTokens) -> int:
    """Added tokens that no rollback can take back."""
    return int(np.searchsorted(current.added.rows, table.generations()[0].num_rows))


def compact(table: Table, current: CurrentTokens) -> None:
    """Write the files anew with the added tokens of the retained generation; the caller holds the table's mutex.

    vocab.json, replaced last, decides which files count; its `folded_rows` says which tokens of the log to skip, which
    are dropped from it afterwards.
    """
    count, stored = _foldable(table, current), current.stored
    if not count:
        return
    limit, facts = table.generations()[0].num_rows, stored.facts
    with VocabBuilder(current.folder, sequence=facts.sequence + 1, folded_rows=limit) as builder:
        for start in range(0, stored.num_entries + count, SLICE_ENTRIES):
            builder.append(*current.entries(start, min(start + SLICE_ENTRIES, stored.num_entries + count)))
            stored.trim()
        current.forget()  # whether or not the last step fails
        builder.finish(current.policy, facts.subwords)
    table.token_log.drop_below(limit)
    current.catch_up(table)
    remove_leftovers(current.folder, current.stored.facts)
