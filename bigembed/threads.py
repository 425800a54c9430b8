"""The library's own pool of threads: runs range kernels, survives fork, serves several callers at once.

Numba's parallel layers are not used: `workqueue` aborts the process when two threads enter it and `omp` kills
a forked child that launches a kernel. A range kernel here is `kernel(start, stop, *args)`, compiled with
`nogil=True`, that writes only the outputs of its own range, so results do not depend on the thread count.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from bigembed.errors import InvalidArgument

GRAIN_ITEMS = 2048  # below this many items a range is not worth a second thread (a dispatch costs ~20 us)
LIGHT_GRAIN = 1 << 15  # the same for a kernel that does next to nothing with an item


class Task:
    """A call handed to another thread. It keeps its arguments alive until it is done, whatever the caller does."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function, self._args = function, args
        self._begun = threading.Lock()  # taken, once, by whoever settles what becomes of it
        self._finished = threading.Lock()
        self._finished.acquire()
        self.is_done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def work(self) -> None:
        if not self._begun.acquire(blocking=False):
            return
        try:
            self.result = self._function(*self._args)
        except BaseException as error:
            self.error = error
        self._end()

    def cancel(self, error: BaseException) -> bool:
        """Be done, with this error and without having worked; False where the work has begun."""
        if not self._begun.acquire(blocking=False):
            return False
        self.fail(error)
        return True

    def fail(self, error: BaseException) -> None:
        """Be done with this error: in a forked child, where nobody works on it."""
        self.error = error
        self._end()

    def _end(self) -> None:
        self._args = ()
        self.is_done = True
        self._finished.release()

    def wait(self) -> None:
        """Return when the range is done; a Ctrl-C meanwhile is raised after that, not before."""
        interrupted: BaseException | None = None
        while not self.is_done:
            try:
                with self._finished:  # given back at once, for whoever else waits
                    pass
            except BaseException as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


class _Pool:
    """Lazily started workers on a queue; replaced whole after fork.

    Not concurrent.futures: a Ctrl-C inside its pure-Python locks can leave them taken for ever. Here the caller's
    thread only uses a C queue and a C lock.
    """

    def __init__(self, size_threads: int) -> None:
        self.size_threads = size_threads
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._workers: list[threading.Thread] = []
        self._unfinished: dict[int, list[Task]] = {}  # by calling thread; only a Ctrl-C leaves something here

    def run(self, tasks: list[Task], own_part: Callable[[], Any]) -> Any:
        """Run the tasks on the workers and `own_part` here; returns what it returned, when all are done."""
        caller = threading.get_ident()
        for task in self._unfinished.pop(caller, ()):
            task.wait()
        if not self._workers:
            self._start()
        submitted = self._unfinished[caller] = []
        try:
            for task in tasks:
                self._tasks.put(task)
                submitted.append(task)
            return own_part()
        finally:
            interrupted: BaseException | None = None
            for task in submitted:  # every one, whatever comes between: they work on memory of the caller's
                try:
                    task.wait()
                except BaseException as error:
                    interrupted = error
            self._unfinished.pop(caller, None)
            if interrupted is not None:
                raise interrupted

    def _start(self) -> None:
        with self._starting:
            while len(self._workers) < max(1, self.size_threads - 1):
                worker = threading.Thread(target=_work, args=(self._tasks,), name="bigembed", daemon=True)
                worker.start()
                self._workers.append(worker)

    def __del__(self) -> None:
        # Workers stop when nobody can hand them anything any more: a run that began before a change of the number of
        # threads still holds its pool.
        for _ in self._workers:
            self._tasks.put(None)


def _work(tasks: "SimpleQueue[Task | None]") -> None:
    while (task := tasks.get()) is not None:
        task.work()
        del task  # an idle worker keeps no arrays alive


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


_pool = _Pool(_cores())


class _Background:
    """One thread that works tasks off in the order they came, beside whatever the callers do."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: SimpleQueue[Task] = SimpleQueue()
        self._unfinished: deque[Task] = deque()
        self._mutex = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, task: Task) -> None:
        """Hand a task over. Where that fails, the task is done, with the error, unless it was begun."""
        try:
            with self._mutex:
                if self._thread is None:
                    thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                    thread.start()
                    self._thread = thread
                self._unfinished.append(task)
                self._tasks.put(task)
        except BaseException as error:  # no more threads, or Ctrl-C
            task.cancel(error)
            raise

    def _work(self) -> None:
        _local.is_background, _local.lane = True, self
        while True:
            task = self._tasks.get()
            task.work()
            with contextlib.suppress(ValueError):
                self._unfinished.remove(task)
            del task  # an idle thread keeps no arrays alive

    def drain(self) -> None:
        """Wait for the tasks there are."""
        for task in list(self._unfinished):
            task.wait()

    def fail_all(self) -> None:
        """In a forked child, which has no such thread: whoever waits for a task of the parent's gets an error."""
        for task in self._unfinished:
            if not task.is_done:
                task.fail(RuntimeError("the process was forked before this was done"))


_local = threading.local()
_background = _Background("bigembed background")
_behind = _Background("bigembed write-behind")


def run_in_background(function: Callable[..., Any], *args: Any) -> Task:
    """Call `function(*args)` in the background thread, after all that was handed to it before.

    Kernels that it calls run on that thread alone, so that the others stay free for the caller. A fork waits for it.
    """
    task = Task(function, args)
    _background.put(task)
    return task


def write_behind(function: Callable[..., Any], *args: Any) -> Task:
    """As `run_in_background`, in a thread of its own: a short write does not wait for a long read."""
    task = Task(function, args)
    hand_behind(task)
    return task


def hand_behind(task: Task) -> None:
    """`write_behind` of a task that the caller has noted already, so that no error or Ctrl-C loses it."""
    _behind.put(task)


def is_behind() -> bool:
    """Whether this is the thread that writes behind: it must not wait for what it should do itself."""
    return getattr(_local, "lane", None) is _behind


def _drain() -> None:
    _background.drain()
    _behind.drain()


def _fresh_threads_in_child() -> None:
    global _pool, _background, _behind
    for lane in (_background, _behind):
        lane.fail_all()
    _pool = _Pool(_pool.size_threads)
    _background, _behind = _Background(_background._name), _Background(_behind._name)


if hasattr(os, "register_at_fork"):
    # A child of a process that was in the middle of a task could inherit a lock that nobody will release.
    os.register_at_fork(before=_drain, after_in_child=_fresh_threads_in_child)


def get_num_threads() -> int:
    """The number of threads a kernel is spread over, the caller's included."""
    return _pool.size_threads


def set_num_threads(count: int) -> None:
    """Spread kernels over `count` threads. Results do not change, only speed does."""
    global _pool
    if count < 1:
        raise InvalidArgument(f"num_threads must be at least 1, not {count}.")
    _pool = _Pool(count)


def run(kernel: Callable[..., Any], count: int, *args: Any, grain: int = GRAIN_ITEMS) -> list[Any]:
    """Run `kernel(start, stop, *args)` over 0..count in as many ranges as there are threads.

    Returns what each range returned, in order of the ranges. Fewer than two grains run on the caller's thread, and so
    does whatever the background thread calls.
    """
    pool = _pool
    parts = max(1, min(pool.size_threads, count // grain))
    if parts == 1 or hasattr(_local, "is_background"):
        return [kernel(0, count, *args)]
    edges = [count * part // parts for part in range(parts + 1)]
    rest = [Task(kernel, (edges[part], edges[part + 1], *args)) for part in range(1, parts)]
    first = pool.run(rest, lambda: kernel(0, edges[1], *args))
    for task in rest:
        if task.error is not None:
            raise task.error
    return [first, *(task.result for task in rest)]


def run_whole(kernel: Callable[..., Any], owners: int, *args: Any) -> None:
    """Run `kernel(owner, owners, *args)` for each owner 0..owners-1 at once: for kernels split by ownership."""
    run(_each_owner, owners, kernel, owners, args, grain=1)


def _each_owner(start: int, stop: int, kernel: Callable[..., Any], owners: int, args: tuple[Any, ...]) -> None:
    for owner in range(start, stop):
        kernel(owner, owners, *args)
