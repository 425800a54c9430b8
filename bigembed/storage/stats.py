"""stats: what a table holds in memory and on disk, by part."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bigembed.storage.store import RecordStore

if TYPE_CHECKING:
    from bigembed.storage.open_table import CacheLayer


def table_stats(store: RecordStore, cache: "CacheLayer | None", uncommitted_rows: int) -> dict[str, Any]:
    """Plain numbers, bytes and rows, under one key for each part."""
    journal, undo, merge = store.journal, store.undo, store.merge
    return {
        "table": {
            "rows": store.spec.num_rows,
            "dim": store.spec.dim,
            "logical_bytes": store.spec.logical_bytes,
            "written_rows": int(store.superblock.written_C.sum()),
            "generation": journal.head.number,
        },
        "cache": cache.stats() if cache is not None else {},
        "index": {
            "rows": journal.rows,
            "memory_bytes": journal.index_bytes + (merge.memory_bytes if merge is not None else 0),
            "limit_bytes": store.limits.index_bytes,
        },
        "journal": {
            "disk_bytes": journal.disk_bytes,
            "limit_bytes": store.limits.journal_bytes,
            "segments": sum(len(epoch.sequences) for epoch in journal.epochs),
            "auto_commits": store.counters.auto_commits,
        },
        "undo": {"disk_bytes": undo.disk_bytes if undo else 0, "rows": undo.rows if undo else 0},
        "pending": {"uncommitted_rows": uncommitted_rows},
        "staging": {"memory_bytes": store.staging_bytes},
        "merge": {
            "running": merge is not None,
            "rows_left": merge.total_rows - merge.rows_done if merge is not None else 0,
            **{name: value for name, value in asdict(store.counters).items() if name != "auto_commits"},
        },
    }
