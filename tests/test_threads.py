"""The pool: the same results for any thread count, several callers at once, errors passed on, alive after fork."""

import os
import threading

import numba as nb
import numpy as np
import pytest

from bigembed import errors, threads


@pytest.fixture(autouse=True)
def restored_count():
    before = threads.get_num_threads()
    yield
    threads.set_num_threads(before)


@nb.njit(nogil=True)
def square(start, stop, values_M, out_M):
    for m in range(start, stop):
        out_M[m] = values_M[m] ** 2
    return stop - start


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 10_001])
def test_every_item_is_done_once(count, size):
    threads.set_num_threads(count)
    values, out = np.arange(size, dtype=np.int64), np.full(size, -1, np.int64)
    assert sum(threads.run(square, size, values, out)) == size
    np.testing.assert_array_equal(out, values**2)


def test_results_come_in_order_of_the_ranges():
    threads.set_num_threads(4)
    assert threads.run(lambda start, stop: (start, stop), 10, grain=1) == [(0, 2), (2, 5), (5, 7), (7, 10)]


def test_small_batches_run_on_the_callers_thread():
    threads.set_num_threads(5)
    names = threads.run(lambda start, stop: threading.current_thread(), 4000)
    assert names == [threading.current_thread()]


@pytest.mark.parametrize("failing", [0, 3])
def test_an_error_is_raised_after_every_range_has_ended(failing):
    threads.set_num_threads(4)
    done = []

    def kernel(start, stop):
        if start == failing * 10:
            raise ValueError("range")
        threading.Event().wait(0.02)
        done.append(start)

    with pytest.raises(ValueError, match="range"):
        threads.run(kernel, 40, grain=1)
    assert len(done) == 3


def test_run_whole_runs_every_owner():
    threads.set_num_threads(3)
    seen = set()
    threads.run_whole(lambda owner, owners: seen.add((owner, owners)), 7)
    assert seen == {(owner, 7) for owner in range(7)}


def test_several_threads_may_call_at_once_while_the_count_changes():
    failures = []

    def caller(seed):
        values = np.arange(20_000, dtype=np.int64) + seed
        for _ in range(30):
            out = np.empty_like(values)
            threads.run(square, len(values), values, out)
            if not (out == values**2).all():
                failures.append(seed)

    callers = [threading.Thread(target=caller, args=(seed,)) for seed in range(4)]
    for thread in callers:
        thread.start()
    for count in (1, 3, 2, 5):
        threads.set_num_threads(count)
    for thread in callers:
        thread.join()
    assert not failures


def test_a_forked_child_has_a_pool_of_its_own():
    threads.set_num_threads(3)
    values = np.arange(20_000, dtype=np.int64)
    threads.run(square, len(values), values, np.empty_like(values))
    pid = os.fork()
    if pid == 0:
        out = np.empty_like(values)
        threads.run(square, len(values), values, out)
        os._exit(0 if (out == values**2).all() and threads.get_num_threads() == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_less_than_one_thread_is_refused():
    with pytest.raises(errors.InvalidArgument, match="num_threads must be at least 1, not 0"):
        threads.set_num_threads(0)
