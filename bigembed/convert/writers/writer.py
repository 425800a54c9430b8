"""Writer: the contract of every format that a table can be exported to."""

import os
from dataclasses import dataclass

import numpy as np

from bigembed.convert.writers.aside import Aside, Output
from bigembed.convert.writers.narrow import DTYPES, narrowed
from bigembed.convert.writers.vocab_text import VOCAB_SUFFIX, vocab_lines
from bigembed.errors import InvalidArgument
from bigembed.vocab.packed import PackedTokens


@dataclass(frozen=True)
class WriteOptions:
    """What a user may say about a target.

    Args:
        dtype: "float32"; "float16" and "bfloat16" where the format has them, rounded to the nearest, ties to even.
        overwrite: replace a file that stands at the target (or a folder of parts, where parts are written).
        tensor: the tensor's name, in formats that give it one; None for the format's own.
        part_bytes: the most bytes of one file (safetensors); the target is then a folder. None for one file.
        has_tokens: each row comes with a token. Formats without tokens write them beside, see vocab_text.
    """

    dtype: str = "float32"
    overwrite: bool = False
    tensor: str | None = None
    part_bytes: int | None = None
    has_tokens: bool = False


class Writer:
    """Writes rows in order to one target, which appears only when it is whole.

    Everything is written aside, synced, and moved to its name by `finish`. An error in any call, leaving the context
    by an exception (Ctrl-C too), or `abandon` removes all of it. A format overrides `_begin`, `_append` and `_end`.

    Args:
        target: the path to write. A symbolic link is followed.
        num_rows: how many rows will come, at least 1. dim: their columns.
        options: see WriteOptions.

    Raises:
        InvalidArgument: the format lacks what the options ask for. TableExists: something stands at the target.
        TableMissing: the folder of the target does not exist. StorageFailed, DiskFull.

    Example:
        >>> import tempfile, numpy as np
        >>> from bigembed.convert.writers.npy import NpyWriter
        >>> path = tempfile.mkdtemp() + "/rows.npy"
        >>> with NpyWriter(path, num_rows=2, dim=3) as writer:
        ...     writer.append(np.ones((2, 3), np.float32))
        >>> np.load(path).shape
        (2, 3)
    """

    format: str
    dtypes: tuple[str, ...] = DTYPES
    carries_tokens = False  # else they go into a file beside
    default_tensor: str | None = None  # the name of the tensor; None where tensors have no names
    has_parts = False

    def __init__(self, target: str | os.PathLike[str], num_rows: int, dim: int, options: WriteOptions | None = None):
        self.options = options or WriteOptions()
        self._check_options(num_rows, dim)
        self.target = os.path.realpath(os.fspath(target))
        self.num_rows, self.dim = num_rows, dim
        self.rows = 0
        self.overflowed = 0  # finite values that became infinite in a narrower type
        self.files: list[str] = []
        self._is_over = False
        self._vocab: Output | None = None
        self._aside = Aside(self.options.overwrite)
        try:
            self._begin()
            if self.options.has_tokens and not self.carries_tokens:
                self._vocab = self._file(self.target + VOCAB_SUFFIX)
            else:
                self._aside.gone(self.target + VOCAB_SUFFIX)
        except BaseException:
            self.abandon()
            raise

    def _check_options(self, num_rows: int, dim: int) -> None:
        options = self.options
        if num_rows < 1 or dim < 1:
            raise InvalidArgument(f"{num_rows} rows of {dim} columns: at least one of each is needed.")
        if options.dtype not in self.dtypes:
            known = ", ".join(map(repr, self.dtypes))
            raise InvalidArgument(f"dtype {options.dtype!r} cannot be written as {self.format}; use {known}.")
        if options.tensor is not None and self.default_tensor is None:
            raise InvalidArgument(
                f"tensor={options.tensor!r}: {self.format} files hold no named tensors. Leave it out."
            )
        if options.part_bytes is not None and not self.has_parts:
            raise InvalidArgument(f"part_bytes={options.part_bytes}: only safetensors files are written in parts.")
        if self.carries_tokens and not options.has_tokens:
            raise InvalidArgument(f"{self.format} files hold a token with each row. Pass has_tokens=True and tokens.")
        if not _is_utf8(self.tensor):
            raise InvalidArgument(f"tensor={options.tensor!r} is not text that can be written as UTF-8.")

    @property
    def tensor(self) -> str:
        """The tensor's name; empty where it has none."""
        return self.options.tensor if self.options.tensor is not None else self.default_tensor or ""

    def append(self, values_MD: np.ndarray, tokens: PackedTokens | None = None) -> None:
        """Write the next M rows.

        Args:
            values_MD: float32.
            tokens: M tokens, exactly where the options say so.

        Raises:
            InvalidArgument: they are not what was announced, or a token is one that this format cannot hold.
            StorageFailed, DiskFull. After any error the writer is over and nothing is left of it.
        """
        try:
            self._check_rows(values_MD, tokens)
            if len(values_MD):
                self._append(np.ascontiguousarray(values_MD), tokens)
                if self._vocab is not None and tokens is not None:
                    self._vocab.write(vocab_lines(tokens))
            self.rows += len(values_MD)
        except BaseException:
            self.abandon()
            raise

    def _check_rows(self, values_MD: np.ndarray, tokens: PackedTokens | None) -> None:
        if self._is_over:
            raise InvalidArgument(f"{self.target}: the writer is finished or was abandoned. Make a new one.")
        if values_MD.dtype != np.float32 or values_MD.ndim != 2 or values_MD.shape[1] != self.dim:
            raise InvalidArgument(
                f"values are {values_MD.dtype} of shape {values_MD.shape}; float32 of shape (M, {self.dim}) is needed."
            )
        if self.rows + len(values_MD) > self.num_rows:
            raise InvalidArgument(
                f"{self.rows + len(values_MD)} rows were given, {self.num_rows} were announced for {self.target}."
            )
        given = None if tokens is None else len(tokens)
        if given != (len(values_MD) if self.options.has_tokens else None):
            raise InvalidArgument(
                f"{len(values_MD)} rows came with {'no' if given is None else given} tokens, and "
                f"has_tokens={self.options.has_tokens} was announced."
            )

    def finish(self) -> None:
        """Let the target appear, durable and whole; safe to repeat.

        Raises:
            InvalidArgument: fewer rows came than were announced. TableExists: something appeared there meanwhile.
            StorageFailed, DiskFull. After any error nothing is left.
        """
        if self._is_over:
            return
        try:
            if self.rows != self.num_rows:
                raise InvalidArgument(f"{self.rows} rows were given, {self.num_rows} were announced for {self.target}.")
            self._end()
            self._aside.publish()
            self._is_over = True
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Remove whatever was written; safe to repeat, does nothing after `finish`."""
        self._is_over = True
        self._aside.abandon()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()

    # -- for the formats ------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Open the target with `_file` and write what comes before the rows."""
        raise NotImplementedError

    def _append(self, values_MD: np.ndarray, tokens: PackedTokens | None) -> None:
        """Write rows, at least one."""
        raise NotImplementedError

    def _end(self) -> None:
        """Write what comes after the rows."""

    def _file(self, target: str) -> Output:
        """A file aside that will stand at `target`."""
        self.files.append(target)
        return self._aside.file(target)

    def _narrowed(self, values_MD: np.ndarray) -> np.ndarray:
        """The rows as the type that is written; counts what overflows."""
        narrow_MD, overflowed = narrowed(values_MD, self.options.dtype)
        self.overflowed += overflowed
        return narrow_MD

    def _refused(self, m: int, tokens: PackedTokens, why: str) -> InvalidArgument:
        """The error for a token that the format cannot hold."""
        token = tokens[m]
        shown = repr(token[:100]) + ("..." if len(token) > 100 else "")
        return InvalidArgument(
            f"row {self.rows + m} has the token {shown}, which cannot be written as {self.format}: {why}. Use a format "
            "that keeps tokens apart, such as safetensors or npy (tokens are written beside it)."
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
