"""Every error the library raises on purpose; each is also the builtin that a torch user would catch.

A message says what was given, what was possible, and what to do.
"""


class BigembedError(Exception):
    """The root: `except BigembedError` catches everything below."""


class InvalidArgument(BigembedError, ValueError):
    """An argument has the wrong value, shape or dtype."""


class InvalidIds(BigembedError, RuntimeError):
    """Ids are not an integer tensor (torch raises RuntimeError for this too)."""


class RowOutOfRange(BigembedError, IndexError):
    """An id is negative or not below the number of rows."""


class TableExists(BigembedError, FileExistsError):
    """A table, or a file made from one, was to be created where something already stands."""


class TableMissing(BigembedError, FileNotFoundError):
    """There is nothing at the path, or no folder to create something in."""


class NotATable(BigembedError, ValueError):
    """The path holds something else, or metadata that contradicts itself."""


class NewerFormat(NotATable):
    """The table was written by a later format version than this library knows."""


class DamagedTable(BigembedError, RuntimeError):
    """A file of the table is missing, has the wrong size or fails its checksum."""


class DamagedRow(DamagedTable):
    """A record fails its check: the bytes on disk are not what was written."""


class TableLocked(BigembedError, RuntimeError):
    """Another process, or another Table in this one, has the table open for writing."""


class TableMoved(BigembedError, RuntimeError):
    """A writer committed to the table while something read the whole of it as of one commit."""


class TableClosed(BigembedError, RuntimeError):
    """The table was used after close()."""


class ReadOnlyTable(BigembedError, RuntimeError):
    """A write to a table opened with mode="r"."""


class ForkedTable(ReadOnlyTable):
    """A write in a forked child: the table belongs to the process that opened it."""


class PoisonedTable(BigembedError, RuntimeError):
    """A sync of the journal failed; nothing counts as clean until the table is opened again."""


class StorageFailed(BigembedError, OSError):
    """The operating system refused a read or a write (its error is the cause)."""


class DiskFull(StorageFailed):
    """There is no space left for what had to be written; the last commit is intact."""


class NotRestorable(BigembedError, ValueError):
    """A rollback to a generation that the table no longer keeps."""


class NoOptimizer(BigembedError, RuntimeError):
    """A backward pass reached a table that no bigembed optimizer is attached to."""


class StaleGraph(BigembedError, RuntimeError):
    """A backward pass through rows that were rolled back, or moved to another device, since the forward."""


class StateMismatch(BigembedError, ValueError):
    """The optimizer does not fit the state that the table's records hold."""


class UnsupportedPlatform(BigembedError, RuntimeError):
    """The operating system lacks what a table needs (file locks, positioned reads)."""


class BadSource(BigembedError, ValueError):
    """A file to convert is not what its format asks for; names the file, the line or byte, and what was expected."""


class UnknownFormat(BigembedError, ValueError):
    """A file to convert is of no format that is known, or the named format does not exist."""


class MissingLibrary(BigembedError, ImportError):
    """A format needs a library that is not installed; says how to install it."""


class NoVocabulary(BigembedError, ValueError):
    """Tokens were used on a table that has no vocabulary."""


class UnknownToken(BigembedError, KeyError):
    """A token is not in the vocabulary, and nothing was said about what should stand for it."""

    __str__ = Exception.__str__  # KeyError would show the message as a quoted literal
