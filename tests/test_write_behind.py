"""Frames written by another thread: in order, never lost, whatever the system refuses meanwhile."""

import contextlib
import os
import threading
import warnings

import numpy as np
import pytest

from bigembed import Table, errors, threads
from bigembed.storage import files, store

ROWS, DIM = 20_000, 4


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table whose every append is written behind."""
    monkeypatch.setattr(store, "BEHIND_BYTES", 1)
    made = Table.create(tmp_path / "t", ROWS, DIM, init="zeros")
    yield made
    files.before = None
    with contextlib.suppress(errors.PoisonedTable):
        made.rollback()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.close()


@pytest.fixture
def gate(monkeypatch):
    """Holds the writing thread before each frame until it is opened."""
    opened = threading.Event()
    real = threads.hand_behind

    def held(task):
        function = task._function

        def work(*given):
            opened.wait(20)
            return function(*given)

        task._function = work
        real(task)

    monkeypatch.setattr(threads, "hand_behind", held)
    yield opened
    opened.set()


def values(seed, count):
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def refuse(*operations):
    def before(operation, path):
        if operation in operations and "journal" in path:
            raise OSError(28, "No space left on device")

    files.before = before


def test_an_append_returns_before_its_rows_are_written(table, gate):
    rows = np.arange(10, 20)
    table.write(rows, values(0, 10))
    behind = table._store.journal.behind
    assert len(behind) == 1
    assert not behind.tasks[0].is_done
    assert table.read([9, 20]).max() == 0  # rows that are elsewhere wait for nothing
    gate.set()
    assert table.read(rows).tobytes() == values(0, 10).tobytes()
    assert len(behind) == 0


def test_a_third_frame_waits_for_the_first(table, gate):
    for seed in range(2):
        table.write([seed], values(seed, 1))
    third = threading.Thread(target=table.write, args=([2], values(2, 1)))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    assert len(table._store.journal.behind) == 2
    gate.set()
    third.join(20)
    assert table.read([0, 1, 2]).tobytes() == np.concatenate([values(seed, 1) for seed in range(3)]).tobytes()


def test_what_the_system_refuses_is_raised_later_and_nothing_is_lost(table):
    table.write([1], values(1, 1))
    table.commit()
    refuse("write")
    table.write([2], values(2, 1))
    table._store.journal.behind.tasks[0].wait()
    for _ in range(2):  # as often as it is tried
        with pytest.raises(errors.DiskFull, match="free some space and try again"):
            table.write([3], values(3, 1))
        with pytest.raises(errors.DiskFull):
            table.read([2])
        with pytest.raises(errors.DiskFull):
            table.commit()
        assert table.read([1]).tobytes() == values(1, 1).tobytes()
    files.before = None
    table.write([3], values(3, 1))
    table.commit("all of it")
    with Table.open(table.path, mode="r") as reader:
        assert reader.read([1, 2, 3]).tobytes() == np.concatenate([values(s, 1) for s in (1, 2, 3)]).tobytes()
        assert reader.verify().journal_records == 3


def test_a_frame_behind_a_refused_one_waits_its_turn(table, gate):
    table.write([1], values(1, 1))
    table.write([2], values(2, 1))
    refuse("write")
    gate.set()
    for task in table._store.journal.behind.tasks:
        task.wait()
    files.before = None
    table.commit()
    with Table.open(table.path, mode="r") as reader:
        assert reader.read([1, 2]).tobytes() == np.concatenate([values(1, 1), values(2, 1)]).tobytes()


def test_what_could_not_be_written_goes_with_a_rollback(table):
    table.write([1], values(1, 1))
    table.commit()
    refuse("write")
    table.write([1], values(2, 1))
    table._store.journal.behind.tasks[0].wait()
    files.before = None
    table.rollback()
    assert table.read([1]).tobytes() == values(1, 1).tobytes()


def test_rows_read_ahead_wait_for_their_frame(table, gate):
    rows = np.arange(5)
    table.write(rows, values(5, 5))
    read = table.read_ahead(rows)
    out = np.empty((5, DIM + 1), np.float32)
    task = threads.run_in_background(read.run, out)
    assert not task.is_done
    gate.set()
    task.wait()
    assert task.result.all()
    assert out[:, :DIM].tobytes() == values(5, 5).tobytes()


def test_a_fork_waits_and_the_child_reads(table):
    rows = np.arange(1000)
    table.write(rows, values(7, 1000))
    child = os.fork()
    if child == 0:
        os._exit(0 if table.read(rows).tobytes() == values(7, 1000).tobytes() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_stats_count_the_rows_that_wait(table, gate):
    before = table.stats()["staging"]["memory_bytes"]
    table.write(np.arange(100), values(0, 100))
    assert table.stats()["staging"]["memory_bytes"] >= before + 100 * (DIM + 1) * 4


def test_fuzz_against_the_array(table):
    rng = np.random.default_rng(11)
    whole, committed = np.zeros((ROWS, DIM), np.float32), np.zeros((ROWS, DIM), np.float32)
    refused = 0
    for step in range(400):
        rows = rng.choice(ROWS, rng.integers(1, 300), replace=False)
        kind = rng.integers(0, 8)
        files.before = None
        if kind == 0:
            refuse("write")
        try:
            if kind == 1:
                table.commit()
                committed = whole.copy()
            elif kind == 2 and rng.integers(4) == 0:
                table.rollback()
                whole = committed.copy()
            elif kind == 3:
                assert table.read(rows).tobytes() == whole[rows].tobytes(), step
            else:
                new = values(step, len(rows))
                table.write(rows, new)
                whole[rows] = new
        except errors.DiskFull:
            refused += 1
    files.before = None
    assert table.read(np.arange(ROWS)).tobytes() == whole.tobytes()
    assert refused > 5
    table.commit()
    with Table.open(table.path, mode="r") as reader:
        assert reader.read(np.arange(ROWS)).tobytes() == whole.tobytes()


def test_an_interruption_while_a_frame_is_handed_over_loses_nothing(table, monkeypatch):
    table.write([1], values(1, 1))
    table.commit()
    for when in ("before", "after"):
        real = threads.hand_behind

        def interrupted(task, real=real, when=when):
            if when == "after":
                real(task)
            raise KeyboardInterrupt

        monkeypatch.setattr(threads, "hand_behind", interrupted)
        with pytest.raises(KeyboardInterrupt):
            table.write([2], values(2, 1))
        monkeypatch.setattr(threads, "hand_behind", real)
        table.write([2], values(3, 1))
        table.commit()
        with Table.open(table.path, mode="r") as reader:
            assert reader.read([1, 2]).tobytes() == np.concatenate([values(1, 1), values(3, 1)]).tobytes()
            reader.verify()


def test_an_interruption_before_a_frame_is_noted_leaves_no_hole(table, monkeypatch):
    table.write([1], values(1, 1))
    behind = table._store.journal.behind
    with monkeypatch.context() as patch:
        patch.setattr(behind, "put", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            table.write([2], values(2, 1))
    table.write([3], values(3, 1))
    table.commit()
    with Table.open(table.path, mode="r") as reader:
        assert reader.read([1, 3]).tobytes() == np.concatenate([values(1, 1), values(3, 1)]).tobytes()


def test_without_another_thread_frames_are_written_by_whoever_needs_them(table, monkeypatch):
    def no_thread(task):
        error = RuntimeError("can't start new thread")
        task.cancel(error)
        raise error

    monkeypatch.setattr(threads, "hand_behind", no_thread)
    for seed in range(4):
        table.write([seed], values(seed, 1))
    assert table.read([3]).tobytes() == values(3, 1).tobytes()
    table.commit()
    with Table.open(table.path, mode="r") as reader:
        assert reader.read([0, 1, 2, 3]).tobytes() == np.concatenate([values(s, 1) for s in range(4)]).tobytes()


def test_a_thread_that_does_not_start_is_tried_again(monkeypatch):
    lane = threads._Background("test")
    start = threading.Thread.start

    def refuse_once(thread):
        monkeypatch.setattr(threading.Thread, "start", start)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse_once)
    first, second = threads.Task(int, ("1",)), threads.Task(int, ("2",))
    with pytest.raises(RuntimeError):
        lane.put(first)
    assert first.is_done
    lane.put(second)
    second.wait()
    assert second.result == 2


def test_a_table_that_its_own_writing_thread_collects_does_not_wait_for_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BEHIND_BYTES", 1)
    table = Table.create(tmp_path / "t", ROWS, DIM, init="zeros", is_temporary=True)
    closed = threads.write_behind(lambda: (table.write([1], values(1, 1)), table.close()))
    deadline = threading.Timer(20, closed.cancel, (TimeoutError(),))
    deadline.start()
    closed.wait()
    deadline.cancel()
    assert closed.error is None
    assert table.is_closed


def test_an_interrupted_sync_of_a_commit_poisons_so_that_no_generation_comes_twice(table, monkeypatch):
    table.write([1], values(1, 1))
    table.commit("one")
    file = table._store.journal._writer.file
    table.write([2], values(2, 1))
    count = 0

    def interrupt():
        nonlocal count
        count += 1
        if count == 2:  # that of the commit record
            raise KeyboardInterrupt

    monkeypatch.setattr(file, "sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        table.commit("two")
    monkeypatch.undo()
    with pytest.raises(errors.PoisonedTable):
        table.commit("two again")
    with Table.open(table.path, mode="r") as reader:
        assert [commit.note for commit in reader.generations()] == ["two"]
    with pytest.raises(errors.PoisonedTable):
        table.rollback()


def test_written_frames_hold_no_rows(table):
    table.write(np.arange(1000), values(0, 1000))
    behind = table._store.journal.behind
    for task in behind.tasks:
        task.wait()
    assert sum(frame.values_ME.nbytes for frame in behind._frames) == 0
