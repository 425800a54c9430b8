"""nearest: the rows of a table that are most similar to some queries, found exactly by one pass in bounded memory.

A float32 matrix product finds the rows of a block that could be among the nearest, with a margin for its rounding; for
these the cosine is computed in float64. So the answer is that of a slow exact search, whatever library multiplies.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bigembed import threads
from bigembed.errors import InvalidArgument
from bigembed.kernels.cosine import cosine, unit_rows
from bigembed.storage.rows import checked_rows
from bigembed.storage.table import Table
from bigembed.vocab.vectors import composes_words, word_vectors
from bigembed.vocab.vocabulary import Vocabulary

BLOCK_BYTES = 8 << 20  # of rows read at once; about four times this is in use
GRAIN_NUMBERS = 1 << 15  # below this many a second thread is not worth it
NO_ROW = -1

Progress = Callable[[int, int], None]  # (rows looked at, rows of the table)


def nearest(
    table: Table,
    queries_QD: Any,
    count: int = 10,
    *,
    exclude_rows: Sequence[int] | np.ndarray | None = None,
    vocabulary: Vocabulary | None = None,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` rows with the largest cosine similarity to each query, by an exact search of the whole table.

    Reads the newest values, uncommitted ones too. Rows of zeros, and rows that hold NaN or infinity, are never found.

    Args:
        table: an open table.
        queries_QD: float32 (Q, D).
        count: how many to find.
        exclude_rows: rows never to find, such as the queries' own.
        vocabulary: the table's; of one that composes words of subwords (fastText) the words' vectors are compared, and
            only the rows of words are found.
        progress: called with the rows looked at so far, and the table's number of rows.

    Returns:
        rows_QC (int64) and similarity_QC (float32, the exact cosine rounded once), the most similar first; equal
        similarities in order of their rows. C is less than `count` where fewer rows can be found.

    Raises:
        InvalidArgument: wrong shape or dtype, count below 1, or a query of zeros or with NaN or infinity.
        RowOutOfRange: a row to exclude is not there. DamagedRow: a row cannot be read.

    Example:
        >>> import tempfile, numpy as np
        >>> from bigembed.storage.table import Table
        >>> with Table.create(tempfile.mkdtemp() + "/t", num_rows=3, dim=2, init="zeros", is_temporary=True) as table:
        ...     table.write([0, 1, 2], np.array([[1, 0], [0, 1], [1, 1]], np.float32))
        ...     rows, similarity = nearest(table, np.array([[2, 1]], np.float32), count=2)
        >>> rows.tolist(), similarity.round(3).tolist()
        ([[2, 0]], [[0.9490000009536743, 0.8939999938011169]])
    """
    num_rows, dim = table.shape
    queries_QD = _checked_queries(queries_QD, dim)
    if isinstance(count, bool) or not hasattr(count, "__index__") or count < 1:
        raise InvalidArgument(f"count must be an integer of at least 1, not {count!r}.")
    excluded_X = np.unique(checked_rows([] if exclude_rows is None else exclude_rows, num_rows))
    search = _Search(queries_QD, min(int(count), num_rows))
    seen, total = 0, num_rows
    blocks = _rows(table)
    if vocabulary is not None and composes_words(vocabulary):
        blocks, total = ((row_M, vectors) for _, row_M, vectors in word_vectors(table, vocabulary)), len(vocabulary)
    for row_M, values_MD in blocks:
        search.look_at(row_M, values_MD, np.flatnonzero(np.isin(row_M, excluded_X)))
        seen += len(row_M)
        if progress is not None:
            progress(seen, total)
    return search.result()


def _rows(table: Table) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, their weights), all of them in order."""
    num_rows, dim = table.shape
    step = max(1, BLOCK_BYTES // (4 * dim))
    for start in range(0, num_rows, step):
        row_M = np.arange(start, min(start + step, num_rows))
        yield row_M, table.read(row_M)


def _checked_queries(queries_QD: Any, dim: int) -> np.ndarray:
    given = np.asarray(queries_QD)
    if given.ndim != 2 or given.shape[1] != dim or given.dtype.kind not in "fiu":
        raise InvalidArgument(
            f"queries are {given.dtype} of shape {given.shape}; numbers of shape (Q, {dim}) are needed. For a single "
            "query add a first dimension: query[None]."
        )
    queries = np.ascontiguousarray(given, np.float32)
    usable_Q = np.empty(len(queries), bool)
    unit_rows(0, len(queries), queries, np.empty_like(queries), usable_Q)
    if not usable_Q.all():
        position = int(np.flatnonzero(~usable_Q)[0])
        raise InvalidArgument(
            f"query {position} is all zeros, or holds NaN or infinity, so it has no direction. Leave it out."
        )
    return queries


class _Search:
    """The best rows so far, of each query."""

    def __init__(self, queries_QD: np.ndarray, count: int) -> None:
        queries, dim = queries_QD.shape
        self._queries_QD = queries_QD
        self._unit_QD = np.empty_like(queries_QD)
        unit_rows(0, queries, queries_QD, self._unit_QD, np.empty(queries, bool))
        self._row_QC = np.full((queries, count), NO_ROW, np.int64)
        self._similarity_QC = np.full((queries, count), -np.inf, np.float32)
        # A float32 product of vectors of unit length is this close to the exact cosine rounded to float32, by the usual
        # bound of D roundings (Higham, "Accuracy and Stability of Numerical Algorithms", 3.1), twice over.
        self._margin = (dim + 8) * 2.0**-23
        self._grain = max(1, GRAIN_NUMBERS // dim)
        self._unit_MD = np.empty((0, dim), np.float32)

    def look_at(self, row_M: np.ndarray, values_MD: np.ndarray, excluded_X: np.ndarray) -> None:
        """Take these rows into account, but for some positions."""
        rows = len(values_MD)
        if len(self._unit_MD) < rows:
            self._unit_MD = np.empty_like(values_MD)
        unit_MD, usable_M = self._unit_MD[:rows], np.empty(rows, bool)
        threads.run(unit_rows, rows, values_MD, unit_MD, usable_M, grain=self._grain)
        usable_M[excluded_X] = False
        unusable_X = np.flatnonzero(~usable_M)
        step = max(1, BLOCK_BYTES // (4 * rows))
        for q in range(0, len(self._unit_QD), step):
            about_QM = self._unit_QD[q : q + step] @ unit_MD.T
            about_QM[:, unusable_X] = -np.inf
            for query, about_M in enumerate(about_QM, q):
                self._merge(query, row_M, values_MD, about_M)

    def _merge(self, q: int, row_M: np.ndarray, values_MD: np.ndarray, about_M: np.ndarray) -> None:
        """Rows whose approximate similarity could be good enough take their place by the exact one."""
        count = self._row_QC.shape[1]
        index_K = np.flatnonzero(about_M >= max(self._similarity_QC[q, -1] - self._margin, -2.0))
        if len(index_K) > count:  # in a first block nearly all are; those far below its own best need no exact look
            about_K = about_M[index_K]
            least = np.partition(about_K, -count)[-count] - 2 * self._margin
            index_K = index_K[about_K >= least]
        if len(index_K) == 0:
            return
        exact_K = np.empty(len(index_K), np.float32)
        threads.run(cosine, len(index_K), values_MD, index_K, self._queries_QD[q], exact_K, grain=self._grain)
        similarity = np.concatenate([self._similarity_QC[q], exact_K])
        row = np.concatenate([self._row_QC[q], row_M[index_K]])
        best_C = np.lexsort((row, -similarity))[:count]
        self._similarity_QC[q], self._row_QC[q] = similarity[best_C], row[best_C]

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """As `nearest` gives it. What can be found does not depend on the query, so no row of the result is shorter."""
        found = int(np.count_nonzero(self._row_QC[:1] != NO_ROW)) if len(self._row_QC) else self._row_QC.shape[1]
        return self._row_QC[:, :found].copy(), self._similarity_QC[:, :found].copy()
