"""TokenLog: the append-only file `vocab/added` of tokens that got rows after the vocabulary was built.

An entry counts exactly if its row is below V: so the commit that adds rows adds their tokens, and one that takes rows
back takes their tokens. The writer cuts off what does not count before V can grow again.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from bigembed.errors import (
    DamagedTable,
    ForkedTable,
    InvalidArgument,
    PoisonedTable,
    ReadOnlyTable,
    TableClosed,
)
from bigembed.storage import files
from bigembed.storage.token_frames import (
    HEADER_BYTES,
    NAME,
    LogFile,
    TokenFrame,
    Tokens,
    parts_of,
    write_log,
)

VOCAB = "vocab"
PAUSES = 0.001, 0.02  # seconds that a reader gives the writer; the second lasts for the write of a frame

_T = TypeVar("_T")


class TokenLog:
    """The tokens of rows that were added to a table; `Table.token_log` is the one to use.

    Tokens are appended first, then the table grows, then it commits, all under the table's mutex. Of the writer,
    `entries` has uncommitted tokens too. A reader sees the file as it is now; it is loaded when first asked for.

    Args:
        table_path: the table's folder. num_rows: V of the table's head. is_writer: the caller holds the writer's lock.

    Raises:
        DamagedTable: the header is damaged, or something before an entry that counts is.
    """

    def __init__(self, table_path: str, num_rows: int, is_writer: bool) -> None:
        self._folder = os.path.join(table_path, VOCAB)
        self._may_write, self._pid = is_writer, os.getpid()
        self._mutex = threading.RLock()
        self._log: LogFile | None = None
        self._frames: list[TokenFrame] = []
        self._seen: tuple[int, ...] = ()
        self._version = 0
        self.reload(num_rows)

    @property
    def path(self) -> str:
        return os.path.join(self._folder, NAME)

    @property
    def version(self) -> int:
        """Changes whenever entries other than those that this object appended changed."""
        with self._mutex:
            self._check_loaded()
            return self._version

    @property
    def is_writer(self) -> bool:
        return self._may_write and self._pid == os.getpid()

    # -- loading --------------------------------------------------------------------------------------------

    def reload(self, num_rows: int) -> None:
        """Look at the file anew (after a rollback, a refresh, a new vocabulary); the writer trims it to V rows."""
        with self._mutex:
            self.close()
            self._num_rows = self._counted_rows = num_rows  # counted: tokens of rows from here on may be appended
            self._is_closed = self._is_loaded = self._is_poisoned = self._has_unsynced = False
            if self.is_writer:
                self._is_poisoned = True  # until all of this is done
                self._load()
                self._make_durable()
                self._cut(num_rows)
                self._is_poisoned = False
                self._note_changes()

    def _make_durable(self) -> None:
        """What we found may be in the page cache only, if a process died before its sync: build on nothing less."""
        if self._log is not None:
            self._log.file.sync_all()
        if os.path.isdir(self._folder):
            files.sync_directory(self._folder)

    def _check_loaded(self) -> None:
        if self._is_closed:
            raise TableClosed(f"{os.path.dirname(self._folder)} was closed. Open it again with Table.open.")
        if not self._is_loaded:
            self._patiently(self._load)
            self._note_changes()

    def _patiently(self, work: Callable[[], _T]) -> _T:
        """Do what may meet a writer at work: a reader tries again with the file as it is then."""
        for pause in (*PAUSES, None):
            try:
                return work()
            except (DamagedTable, FileNotFoundError):
                if self.is_writer or pause is None:
                    raise
                self._is_loaded = False
                time.sleep(pause)
        raise AssertionError

    def _load(self) -> None:
        self._close_file()
        if os.path.exists(self.path):
            self._log = LogFile(self.path, os.O_RDWR if self.is_writer else files.READ)
            self._log.read_header()
            self._frames = list(self._log.frames())
            beyond = self._log.counted_frame_beyond(self._end, self._num_rows)
            if beyond == self._end:
                raise DamagedTable(f"{self.path}: the tokens at byte {beyond} are damaged. Restore it from a backup.")
            if beyond >= 0:
                raise DamagedTable(
                    f"{self.path} is damaged between byte {self._end} and the tokens at byte {beyond}. Restore it "
                    "from a backup."
                )
        self._is_loaded = True

    def _note_changes(self, are_ours: bool = False) -> None:
        salt = self._log.salt if self._log is not None else 0
        seen = (salt, self._chain, len(self._frames)) if self._frames else ()
        if seen != self._seen and not are_ours:
            self._version += 1
        self._seen = seen

    @property
    def _end(self) -> int:
        return self._frames[-1].end if self._frames else HEADER_BYTES

    @property
    def _chain(self) -> int:
        assert self._log is not None
        return self._frames[-1].chain if self._frames else self._log.chain

    # -- reading --------------------------------------------------------------------------------------------

    def entries(self, num_rows: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(bytes_B, start_M1, rows_M) of the tokens of rows below num_rows, rows ascending; None: all there are.

        Token m is `bytes_B[start_M1[m] : start_M1[m + 1]]`, of row rows_M[m].
        """
        with self._mutex:
            self._check_loaded()
            parts = self._patiently(lambda: list(self.parts(num_rows)))
        if not parts:
            return np.empty(0, np.uint8), np.zeros(1, np.int64), np.empty(0, np.int64)
        counts = [len(start_M1) - 1 for _, start_M1, _ in parts]
        length_M = np.concatenate([np.diff(start_M1) for _, start_M1, _ in parts])
        rows_M = np.concatenate([first + np.arange(n) for (_, _, first), n in zip(parts, counts, strict=True)])
        return np.concatenate([part[0] for part in parts]), np.concatenate([[0], np.cumsum(length_M)]), rows_M

    def parts(self, num_rows: int | None = None) -> Iterator[Tokens]:
        """The same, (bytes_B, start_M1, first row) of some consecutive rows at a time.

        Raises:
            DamagedTable: a frame is not what it was, because of damage or (to a reader) of a writer at work.
        """
        self._check_loaded()
        for frame in list(self._frames):
            if num_rows is not None and frame.first_row >= num_rows:
                return
            found = self._log.read_frame(frame.offset, None) if self._log is not None else None
            if found is None or found[0] != frame:
                raise DamagedTable(f"{self.path}: the tokens at byte {frame.offset} are damaged. Restore the file.")
            _, bytes_B, start_M1 = found
            if num_rows is not None and frame.end_row > num_rows:
                start_M1 = start_M1[: num_rows - frame.first_row + 1]
                bytes_B = bytes_B[: start_M1[-1]]
            yield bytes_B, start_M1, frame.first_row

    # -- writing --------------------------------------------------------------------------------------------

    def append(self, bytes_B: np.ndarray, start_M1: np.ndarray, first_row: int) -> None:
        """Append the tokens of rows first_row, first_row + 1, ...; they count when a commit has brought V past them.

        Either all of them are appended or none.

        Args:
            bytes_B: uint8. start_M1: int64, ascending; token m is `bytes_B[start_M1[m] : start_M1[m + 1]]`.
            first_row: not below V of the last commit, and after all rows appended before.
        """
        with self._mutex:
            self._check_writable()
            least = max(self._counted_rows, self._frames[-1].end_row if self._frames else 0)
            if first_row < least:
                raise InvalidArgument(f"tokens of rows from {first_row} on were given; row {least} is the first free.")
            if len(start_M1) < 2:
                return
            if self._log is None:
                self._make()
            assert self._log is not None
            kept = len(self._frames)
            self._has_unsynced = True
            try:
                for part in parts_of((bytes_B, start_M1, int(first_row))):
                    self._frames.append(self._log.write_frame(self._end, part, self._chain))
            except BaseException:
                self._take_back(kept)
                raise
            self._note_changes(are_ours=True)

    def _make(self) -> None:
        if not os.path.isdir(self._folder):
            files.make_directory(self._folder)
            files.sync_directory(os.path.dirname(self._folder))
        write_log(self._folder, ())
        self._load()

    def _take_back(self, kept: int) -> None:
        """Forget frames of an append that failed; if they stay in the file, they must never count."""
        del self._frames[kept:]
        assert self._log is not None
        self._is_poisoned = True
        self._log.file.truncate(self._end)
        self._is_poisoned = False

    def sync(self, num_rows: int) -> None:
        """What was appended is durable; now a commit may bring V to num_rows.

        Raises:
            StorageFailed: and PoisonedTable ever after, until `reload`.
        """
        with self._mutex:
            if self._has_unsynced or self._is_poisoned:
                self._check_writable()
            if self._has_unsynced:
                assert self._log is not None
                self._is_poisoned = True
                self._log.file.sync_all()
                self._is_poisoned = self._has_unsynced = False
            self._counted_rows = num_rows

    def trim(self, num_rows: int) -> None:
        """Forget the tokens of rows from num_rows on, durably."""
        with self._mutex:
            self._check_writable()
            self._cut(num_rows)
            self._counted_rows = min(self._counted_rows, num_rows)
            self._note_changes()

    def drop_below(self, row: int) -> None:
        """Forget the tokens of rows below `row`, which the vocabulary's files hold now; durable, all or none."""
        with self._mutex:
            self._check_writable()
            if self._frames and self._frames[0].first_row < row:
                self._is_poisoned = True
                write_log(self._folder, self._parts_from(row))
                self._load()
                self._is_poisoned = False
                self._note_changes()

    def _parts_from(self, row: int) -> Iterator[Tokens]:
        for bytes_B, start_M1, first_row in self.parts():
            past = min(max(0, row - first_row), len(start_M1) - 1)
            if past < len(start_M1) - 1:
                yield bytes_B, start_M1[past:], first_row + past

    def _cut(self, num_rows: int) -> None:
        """Cut off entries of rows from num_rows on and whatever else is behind the others, for good."""
        if self._log is None:
            return
        kept = sum(frame.end_row <= num_rows for frame in self._frames)
        self._is_poisoned = True
        if kept < len(self._frames) and self._frames[kept].first_row < num_rows:
            write_log(self._folder, self.parts(num_rows))
            self._load()
        else:
            del self._frames[kept:]
            if self._log.file.size_bytes() > self._end:
                self._log.file.truncate(self._end)
                self._log.file.sync_all()
        self._is_poisoned = False

    def _check_writable(self) -> None:
        self._check_loaded()
        if not self._may_write:
            raise ReadOnlyTable(f"{self.path} belongs to a table open with mode='r'. Open it with mode='r+'.")
        if not self.is_writer:
            raise ForkedTable(f"{self.path} belongs to process {self._pid}; this forked child may only read it.")
        if self._is_poisoned:
            raise PoisonedTable(
                f"{self.path}: writing it failed, so what is on disk is unknown. Roll the table back to its last "
                "commit, or close it and open it again."
            )

    # -- the end --------------------------------------------------------------------------------------------

    def _close_file(self) -> None:
        log, self._log, self._frames = self._log, None, []
        if log is not None:
            log.file.close()

    def after_fork_in_child(self) -> None:
        """Whoever held the mutex does not exist here, and may have been in the middle of loading: load anew."""
        self._mutex = threading.RLock()
        self._is_loaded = False

    def close(self) -> None:
        """Close the file; `reload` opens it again."""
        with self._mutex:
            self._close_file()
            self._is_closed = True
