"""One writer per table and process: opening a table that this process has open for writing gives that Table."""

import os
from typing import Any, Literal

from bigembed.storage.lifetime import open_tables
from bigembed.storage.table import Table


def open_shared(path: str, mode: Literal["r", "r+"], **options: Any) -> Table:
    """The Table this process has open at `path` in that mode, or a new one."""
    where = os.path.realpath(path)
    for table in open_tables():
        is_ours = table.mode == mode and table.pid == os.getpid()
        if is_ours and isinstance(table, Table) and os.path.realpath(table.path) == where:
            return table
    return Table.open(path, mode, **options)
