"""The library's own pool of threads: runs range kernels, survives fork, serves several callers at once.

Numba's parallel layers are not used: `workqueue` aborts the process when two threads enter it and `omp` kills
a forked child that launches a kernel. A range kernel here is `kernel(start, stop, *args)`, compiled with
`nogil=True`, that writes only the outputs of its own range, so results do not depend on the thread count.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bigembed.errors import InvalidArgument

GRAIN_ITEMS = 2048  # below this many items a range is not worth a second thread (a dispatch costs ~20 us)


class _Pool:
    """A lazily made executor and its size; replaced whole after fork."""

    def __init__(self, size_threads: int) -> None:
        self.size_threads = size_threads
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(max(1, self.size_threads - 1), "bigembed")
            return self._executor.submit(function, *args)

    def shutdown(self) -> None:
        with self._lock:
            if self._executor is not None:
                self._executor.shutdown(wait=False)
                self._executor = None


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


_pool = _Pool(_cores())


def _fresh_pool_in_child() -> None:
    global _pool
    _pool = _Pool(_pool.size_threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fresh_pool_in_child)


def get_num_threads() -> int:
    """The number of threads a kernel is spread over, the caller's included."""
    return _pool.size_threads


def set_num_threads(count: int) -> None:
    """Spread kernels over `count` threads. Results do not change, only speed does."""
    global _pool
    if count < 1:
        raise InvalidArgument(f"num_threads must be at least 1, not {count}.")
    old, _pool = _pool, _Pool(count)
    old.shutdown()


def run(kernel: Callable[..., Any], count: int, *args: Any, grain: int = GRAIN_ITEMS) -> list[Any]:
    """Run `kernel(start, stop, *args)` over 0..count in as many ranges as there are threads.

    Returns what each range returned, in order of the ranges. Fewer than two grains run on the caller's thread.
    """
    pool = _pool
    parts = max(1, min(pool.size_threads, count // grain))
    if parts == 1:
        return [kernel(0, count, *args)]
    edges = [count * part // parts for part in range(parts + 1)]
    rest = [pool.submit(kernel, edges[part], edges[part + 1], *args) for part in range(1, parts)]
    try:
        first = kernel(0, edges[1], *args)
    finally:
        done = [future.exception() for future in rest]  # never leave a range running on arrays the caller frees
    for error in done:
        if error is not None:
            raise error
    return [first, *(future.result() for future in rest)]


def run_whole(kernel: Callable[..., Any], owners: int, *args: Any) -> None:
    """Run `kernel(owner, owners, *args)` for each owner 0..owners-1 at once: for kernels split by ownership."""
    run(_each_owner, owners, kernel, owners, args, grain=1)


def _each_owner(start: int, stop: int, kernel: Callable[..., Any], owners: int, args: tuple[Any, ...]) -> None:
    for owner in range(start, stop):
        kernel(owner, owners, *args)
