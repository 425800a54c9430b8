"""Table: a (V, D) matrix of rows on disk that can be read, written, committed and rolled back. NumPy in and out."""

import json
import os
from typing import Any, Literal

from bigembed.errors import InvalidArgument, NotRestorable, StateMismatch, TableMissing
from bigembed.init import InitialValues
from bigembed.spec import StateColumns
from bigembed.storage import rewrite, upkeep
from bigembed.storage.aside import put_back
from bigembed.storage.create import absolute_path, checked_integer, create_table
from bigembed.storage.open_table import DEFAULT_INDEX_BYTES, DEFAULT_JOURNAL_BYTES, checked_limits
from bigembed.storage.stats import table_stats
from bigembed.storage.superblock import Commit
from bigembed.storage.table_rows import TableRows
from bigembed.storage.upkeep import Progress
from bigembed.storage.verify import VerifyReport, verify_store


class Table(TableRows):
    """A (V, D) float32 matrix on disk. Make one with `Table.create` or `Table.open`, best in a `with` block.

    Uncommitted changes are seen by this Table and by nobody else; `commit` makes them durable. Methods may be
    called from several threads. A forked child may read; its writes raise.

    Example:
        >>> import tempfile, numpy as np
        >>> path = tempfile.mkdtemp() + "/t"
        >>> with Table.create(path, num_rows=1_000_000, dim=4, init="zeros") as table:
        ...     table.write([5, 7], np.ones((2, 4), np.float32))
        ...     generation = table.commit("two rows")
        >>> with Table.open(path, mode="r") as table:
        ...     table.read([5, 6])
        array([[1., 1., 1., 1.],
               [0., 0., 0., 0.]], dtype=float32)
    """

    # -- making and opening ---------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        num_rows: int,
        dim: int,
        *,
        dtype: str = "float32",
        state_dim: int = 1,
        init: InitialValues | str | None = None,
        seed: int = 0,
        chunk_rows: int | None = None,
        padding_idx: int | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> "Table":
        """Make a new table and open it for writing: milliseconds and a few kilobytes, whatever its size.

        Args:
            path: a folder that does not exist yet.
            num_rows: V. dim: D.
            dtype: "float32".
            state_dim: float32 columns kept free in each record for an optimizer (1: row-wise Adagrad).
            init: what a row holds before it is written: "normal" (default), "uniform", "zeros" or bigembed.init's.
            seed: decides the initial values together with the row number.
            chunk_rows: rows of a chunk file, a power of two >= 4096; by default files of 64 to 128 MiB.
            padding_idx: a row that starts as zeros.
            overwrite: replace a table (never anything else) that stands at the path.
            options: as for `open`.

        Raises:
            TableExists: something stands at the path. InvalidArgument: a size or dtype that cannot be. StorageFailed:
            nothing was made, unless the message says that the table stands.
        """
        where = absolute_path(path, overwrite)
        checked_limits(**options)
        facts: dict[str, Any] = {
            "num_rows": num_rows,
            "dim": dim,
            "dtype": dtype,
            "state_dim": state_dim,
            "init": init,
            "seed": seed,
        }
        create_table(where, overwrite, chunk_rows=chunk_rows, padding_idx=padding_idx, **facts)
        return cls.open(where, mode="r+", **options)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Literal["r", "r+"] = "r+",
        *,
        journal_bytes: int = DEFAULT_JOURNAL_BYTES,
        index_bytes: int = DEFAULT_INDEX_BYTES,
        reader: Literal["auto", "cold", "mapped"] = "auto",
        is_temporary: bool = False,
    ) -> "Table":
        """Open a table at its last commit.

        Args:
            path: the table's folder.
            mode: "r" to read beside a writer, "r+" to be the one writer.
            journal_bytes: the journal's limit on disk; the table commits (note "auto") and merges to keep it.
            index_bytes: the limit of the journal's index in memory, kept in the same way.
            reader: how the base is read; "auto" maps bases up to 256 MiB and reads larger ones with advice.
            is_temporary: remove the folder when the table is closed.

        Raises:
            TableMissing, NotATable, NewerFormat: there is no table that this library reads.
            TableLocked: another writer has it; names the holder. DamagedTable: a file is missing or damaged.
        """
        if mode not in ("r", "r+"):
            raise InvalidArgument(f"mode={mode!r} is unknown; use 'r' to read or 'r+' to write.")
        limits = checked_limits(
            journal_bytes=journal_bytes, index_bytes=index_bytes, reader=reader, is_temporary=is_temporary, mode=mode
        )
        where = absolute_path(path)
        put_back(where)
        if not os.path.lexists(where):
            raise TableMissing(f"{where} does not exist. Create a table with Table.create(path, num_rows, dim).")
        if not os.path.exists(os.path.join(where, "superblock")) and not rewrite.is_rewriting(where):
            from bigembed.storage import zarr_format

            zarr_format.read_metadata(where)  # says what is there instead of a table
        return cls(where, mode, limits, reader, is_temporary)

    # -- commits --------------------------------------------------------------------------------------------

    def commit(self, note: str = "", payload: Any = None) -> int:
        """Make everything written so far durable; returns the new generation's number.

        After a crash the table is as of its last commit. Costs the bytes of the changed rows, and two syncs.

        Args:
            note: a few words, listed by `generations`.
            payload: anything JSON can hold (an epoch, a data position), given back by `generations`.
        """
        try:
            json.dumps(payload, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"payload must be what JSON can hold: {error}.") from error
        with self.mutex:
            self.check_writable()
            number = self._commit(str(note), payload, explicit=True).number
            if self._store.epoch_fill(0) >= 1.0:
                upkeep.make_room(self._store)
            return number

    def generations(self) -> list[Commit]:
        """The commits that `rollback` can restore, oldest first: the last explicit one, and the last."""
        with self.mutex:
            self._check_open()
            journal = self._store.journal
            both = [journal.retained] if journal.retained.number != journal.head.number else []
            return [*both, journal.head]

    def rollback(self, generation: int | None = None) -> int:
        """Go back to a generation, or drop what is uncommitted (None); returns the generation the table is at.

        Going back to an earlier one is itself a commit, with a new number. Rows, optimizer scalars and V are as
        they were. Caches and pending gradients are forgotten.

        Raises:
            NotRestorable: the generation is not one of `generations()`.
        """
        with self.mutex:
            self.check_writable()
            restorable = {commit.number: commit for commit in self.generations()}
            target = self.generation if generation is None else generation
            if target not in restorable:
                raise NotRestorable(f"generation {target} cannot be restored; {self.path} keeps {sorted(restorable)}.")
            self._drop_uncommitted()
            if target != self.generation:
                old, head = restorable[target], self._store.journal.head
                note = f"rollback to {target}"
                # Whose rows it has, through any number of rollbacks: who kept that generation's number can come back.
                # With its time: a twin made by copying the folder has other rows under that number, of another time.
                origin = target if old.rollback_to is None else old.parent
                commit = Commit(
                    head.number + 1,
                    origin,
                    old.num_rows,
                    note,
                    old.time,
                    True,
                    old.scalars,
                    old.payload,
                    target,
                )
                upkeep.rollback(self._store, commit)
                self._store.close()
                self._store.load()
            self.scalars = dict(self._store.journal.head.scalars)
            self.rollbacks += 1
            self._tell_reshaped()
            return self.generation

    def _drop_uncommitted(self) -> None:
        if self._cache is not None:
            self._cache.drop()
        self._store.close()
        self._store.load()
        self._uncommitted_rows = 0

    # -- upkeep ---------------------------------------------------------------------------------------------

    def merge(self, progress: Progress | None = None) -> None:
        """Fold the committed journal into the base now. Changes appended since the last commit are committed first."""
        with self.mutex:
            self.check_writable()
            if self._store.journal.has_uncommitted:
                self._commit("auto", None, explicit=False)
            upkeep.finish_merges(self._store, progress)
            upkeep.begin_merge(self._store)
            upkeep.finish_merges(self._store, progress)

    def publish(self, note: str = "publish", progress: Progress | None = None) -> int:
        """Commit, merge, and write out every row, so that any Zarr reader sees exactly this table.

        The attribute `plain` is true until the next write. Costs V records of disk.
        """
        with self.mutex:
            generation = self.commit(note)
            upkeep.finish_merges(self._store)
            upkeep.publish(self._store, progress)
            return generation

    def refresh(self) -> int:
        """Move a reader to the last commit there is; returns its generation. A writer is always there."""
        with self.mutex:
            self._check_open()
            if self.mode == "r":
                if self._cache is not None:
                    self._cache.drop()
                self._store.close()
                self._store.load()
                self._tell_reshaped()
            return self.generation

    def grow(self, num_rows: int) -> None:
        """Append rows, at their initial values, until there are `num_rows`; durable with the next commit.

        Raises:
            InvalidArgument: fewer rows than there are.
        """
        with self.mutex:
            self.check_writable()
            num_rows = checked_integer("num_rows", num_rows)
            if num_rows < self.spec.num_rows:
                raise InvalidArgument(f"cannot grow to {num_rows} rows: the table has {self.spec.num_rows} already.")
            if self._cache is not None:
                self._cache.write_back()
            self._store.set_num_rows(num_rows)
            self._uncommitted_rows += 1
            self._tell_reshaped()

    def set_init(self, init: InitialValues, padding_idx: int | None = None) -> None:
        """Change the initial distribution of a table that has no written rows; durable at once, costs nothing.

        Raises:
            InvalidArgument: rows were written already.
        """
        with self.mutex:
            self.check_writable()
            if self.has_rows:
                raise InvalidArgument("rows were written already; write the values you want instead.")
            self._store.replace_spec(init=init, padding_idx=padding_idx)
            self._tell_reshaped()

    def set_state(
        self,
        owner: str | None,
        state: tuple[StateColumns, ...],
        *,
        reset: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Give the records the state columns of an optimizer rule, all rows at the initial state.

        Free when the record already has room of that shape and no row was written; otherwise the rows ever written
        are rewritten (crash-safe; one read and one write of them), as a new explicit generation.

        Args:
            owner: the rule's name. state: its columns.
            reset: give up state that another rule, or the same one, has gathered.

        Raises:
            StateMismatch: another rule's state is in the records and `reset` is not given.
        """
        with self.mutex:
            self.check_writable()
            spec = self.spec
            if spec.owner == owner and spec.state == state and not reset:
                return
            if spec.owner is not None and not reset and self.has_rows:
                raise StateMismatch(
                    f"the records of {self.path} hold the state of {spec.owner}, not of {owner}. Use "
                    f"bigembed.optim's {spec.owner}, or give that state up with reset_state=True."
                )
            new = spec.with_state(owner, state)
            unchanged = new.state_dim == spec.state_dim and new.state_initial == spec.state_initial
            if unchanged and (spec.owner is None or not self.has_rows):
                self._store.replace_spec(owner=owner, state=state)
                self.scalars = {}
                return
            if self._uncommitted_rows or (self._cache is not None and self._cache.dirty_rows):
                self._commit(f"before state columns for {owner}", None, explicit=True)
            if self._cache is not None:
                self._cache.drop()
            rewrite.rewrite_state(self._store, new, progress)
            self.scalars = {}
            self._tell_reshaped()

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read everything and compare it with every check and sum; see `VerifyReport`.

        Raises:
            DamagedTable, DamagedRow: the first damage found, with file and row.
        """
        with self.mutex:
            self._check_open()
            if self.may_write:
                upkeep.finish_merges(self._store)
            return verify_store(self._store, progress)

    def stats(self) -> dict[str, Any]:
        """Counters and sizes by part: cache, index, journal, undo, pending, staging, merge, table."""
        with self.mutex:
            self._check_open()
            return table_stats(self._store, self._cache, self._uncommitted_rows)
