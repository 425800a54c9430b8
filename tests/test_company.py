"""Tables in company: one writer, many readers, forked children, several threads."""

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from bigembed import errors
from bigembed.storage.table import Table

V, D = 10_000, 2


@pytest.fixture
def table(tmp_path):
    with Table.create(tmp_path / "t", V, D, init="zeros", chunk_rows=4096) as made:
        yield made
        if made.may_write:
            made.rollback()


def in_child(work):
    """The exit status of a forked child that runs `work` and ends as a Python program does not: at once."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_python(code, *args):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)


TRY_TO_WRITE = """
import sys
from bigembed.storage.table import Table
Table.open(sys.argv[1]).close()
"""
HOLD = """
import os, sys
from bigembed.storage.table import Table
table = Table.open(sys.argv[1])
table.write([1], 5.0)
table.commit()
table.write([2], 6.0)
print("ready", flush=True)
os.kill(os.getpid(), 9) if sys.argv[2] == "die" else sys.stdin.read()
"""


# --- one writer


def test_a_second_writer_is_refused_and_told_who_holds_the_table(table):
    with pytest.raises(errors.TableLocked, match=f"open for writing by process {os.getpid()} on .*mode='r'"):
        Table.open(table.path)
    other = run_python(TRY_TO_WRITE, table.path)
    assert f"TableLocked: {table.path} is open for writing by process {os.getpid()}" in other.stderr
    table.close()
    assert run_python(TRY_TO_WRITE, table.path).returncode == 0


def test_the_lock_of_a_dead_writer_is_taken_over_at_its_last_commit(table):
    table.close()
    assert run_python(HOLD, table.path, "die").returncode == -9
    with Table.open(table.path) as again:
        assert again.read([1, 2])[:, 0].tolist() == [5, 0]


def test_a_writer_elsewhere_is_named_and_readers_come_in(table):
    table.close()
    command = [sys.executable, "-c", HOLD, table.path, "stay"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(errors.TableLocked, match=f"process {holder.pid} on"):
            Table.open(table.path)
        with Table.open(table.path, mode="r") as reader:
            assert reader.read([1, 2])[:, 0].tolist() == [5, 0]
        holder.stdin.close()
    Table.open(table.path).close()


def test_a_lock_on_a_table_that_was_replaced_meanwhile_does_not_count(table, monkeypatch):
    table.close()
    import fcntl

    flock = fcntl.flock

    def replaced_first(fd, flags):
        monkeypatch.undo()
        Table.create(table.path, 5, 1, overwrite=True).close()
        flock(fd, flags)

    monkeypatch.setattr(fcntl, "flock", replaced_first)
    with pytest.raises(errors.TableLocked, match="was replaced while it was opened"):
        Table.open(table.path)
    Table.open(table.path).close()


# --- readers


READ_ALWAYS = """
import sys, numpy as np
from bigembed import errors
from bigembed.storage.table import Table
rng, last, rounds = np.random.default_rng(int(sys.argv[2])), 0, 0
with Table.open(sys.argv[1], mode="r", reader=sys.argv[3]) as table:
    print("ready", flush=True)
    while last < 40:
        rows = np.unique(rng.integers(0, table.shape[0], 300))
        if rounds % 3 == 0:
            at = table.refresh()
            assert at >= last
            last = at
            # Every commit writes these rows: each must be as of the one we are at, or a later one that was merged.
            assert table.read([0, 4095, 9999]).min() >= (table.generations()[-1].payload or 0), "an older commit"
        values = table.read(rows)
        assert (values[:, 0] == values[:, 1]).all(), "half a row"
        assert values.min() >= 0
        rounds += 1
print(rounds)
"""


@pytest.mark.parametrize("reader", ["cold", "mapped"])
def test_readers_in_other_processes_see_whole_rows_of_their_commit_or_later_ones(tmp_path, reader):
    path, rng = str(tmp_path / "t"), np.random.default_rng(0)
    with Table.create(path, V, D, init="zeros", chunk_rows=4096, journal_bytes=200_000) as table:
        commands = [[sys.executable, "-c", READ_ALWAYS, path, str(seed), reader] for seed in range(2)]
        readers = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
        assert all(process.stdout.readline() == "ready\n" for process in readers)
        for number in range(1, 200):
            rows = np.unique(np.append(rng.integers(0, V, 600), [0, 4095, 9999]))
            table.write(rows, float(number))
            table.commit(payload=number)
            if number % 3 == 0:
                table.merge()
            if number >= 40 and all(process.poll() is not None for process in readers):
                break
        for process in readers:
            out, error = process.communicate(timeout=60)
            assert process.returncode == 0, error
            assert int(out) > 0


def test_a_reader_sees_each_row_as_of_a_commit_at_or_after_its_open(table):
    table.write([1, 5000], 1.0)
    table.commit()
    with Table.open(table.path, mode="r") as reader:
        table.write([1, 5000, 9000], 2.0)
        table.commit()
        table.merge()
        assert set(reader.read([1, 5000])[:, 0].tolist()) <= {1.0, 2.0}
        table.rollback()
        reader.refresh()
        assert reader.read([1, 5000, 9000])[:, 0].tolist() == [2, 2, 2]


def test_a_reader_outlives_a_change_of_the_record(table):
    table.write([1, 9000], 1.0)
    table.commit()
    table.merge()
    with Table.open(table.path, mode="r", reader="cold") as reader:
        table.set_state("none", ())
        try:
            assert reader.read([1])[:, 0].tolist() == [1.0]
        except errors.StateMismatch as error:
            assert "Call refresh()" in str(error)  # noqa: PT017
        reader.refresh()
        assert reader.read([1, 9000])[:, 0].tolist() == [1, 1]
        assert reader.spec.state_dim == 0


def test_a_reader_that_comes_during_a_rollback_is_told_and_gets_in_later(table, monkeypatch):
    table.write([1], 1.0)
    table.commit()
    table.write([1], 2.0)
    table.merge()
    from bigembed.storage import upkeep

    with Table.open(table.path, mode="r") as reader:
        monkeypatch.setattr(upkeep, "finish_rollback", lambda store, commit: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            table.rollback(1)
        monkeypatch.undo()
        for look in (reader.refresh, lambda: reader.read([1]), lambda: Table.open(table.path, mode="r")):
            with pytest.raises(errors.DamagedTable, match="a rollback to generation 1 is under way"):
                look()
        with pytest.raises(errors.PoisonedTable, match="Close the table and open it again"):
            table.write([1], 3.0)
        table.close()
        Table.open(table.path).close()
        assert reader.read([1]).tolist() == [[1, 1]]


# --- fork


def test_a_forked_child_reads_but_never_writes(table):
    table.write([1], 1.0)
    table.commit()
    table.write([2], 2.0)

    def work():
        assert table.read([1, 2])[:, 0].tolist() == [1, 2]
        for call in (lambda: table.write([1], 9.0), table.commit, table.merge, table.rollback, table.publish):
            with pytest.raises(errors.ForkedTable, match=f"belongs to process {os.getppid()}; this forked child"):
                call()
        table.close()

    assert in_child(work) == 0
    table.write([3], 3.0)
    table.commit()
    assert table.read([1, 2, 3])[:, 0].tolist() == [1, 2, 3]
    table.verify()


@pytest.mark.parametrize("ending", ["close", "collect", "exit"])
def test_whatever_the_child_does_the_parent_keeps_lock_and_files(tmp_path, ending):
    path = str(tmp_path / "t")
    held = [Table.create(path, V, D, init="zeros", is_temporary=True)]

    def work():
        if ending == "close":
            held[0].close()
        elif ending == "collect":
            held.clear()
            gc.collect()

    assert in_child(work) == 0
    assert "TableLocked" in run_python(TRY_TO_WRITE, path).stderr
    held[0].write([1], 1.0)
    held[0].commit()
    held[0].close()
    assert not os.path.exists(path)


def test_the_lock_goes_with_the_parent_though_a_child_lives_on(table):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        table.close()
        with Table.open(table.path) as again:
            again.write([1], 1.0)
            again.rollback()
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(pid, 0)


def test_a_childs_reads_find_rows_that_the_parent_moved(table):
    """A DataLoader worker keeps reading while the parent trains, commits and merges."""
    rows = np.arange(0, V, 3)
    table.write(rows, 1.0)
    table.commit()
    to_child, to_parent = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.write(to_parent[1], b"r")
            for _ in range(20):
                os.read(to_child[0], 1)
                values = table.read(rows)
                assert (values[:, 0] == values[:, 1]).all()
                assert values.min() >= 1
                os.write(to_parent[1], b"r")
            status = 0
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
            os.write(to_parent[1], b"r" * 99)
        finally:
            os._exit(status)
    os.read(to_parent[0], 1)
    for number in range(20):
        table.write(rows, number + 2.0)
        table.commit()
        table.merge()
        os.write(to_child[1], b"g")
        os.read(to_parent[0], 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for fd in (*to_child, *to_parent):
        os.close(fd)


# --- threads


def test_several_threads_may_use_one_table(tmp_path):
    """Each thread owns the rows of its residue and sees its own last write; merges and growth go on beside."""
    failures = []
    with Table.create(tmp_path / "t", V, D, init="zeros", chunk_rows=4096, journal_bytes=60_000) as table:

        def own_rows(owner):
            rng = np.random.default_rng(owner)
            rows = np.arange(owner, V, 4)
            try:
                for step in range(1, 25):
                    some = rng.choice(rows, 100, replace=False)
                    table.write(some, float(step * 4 + owner))
                    if not (table.read(some) == step * 4 + owner).all():
                        failures.append((owner, step))
                    if step % 8 == owner:
                        table.merge()
                    if step == 12 and owner == 1:
                        table.grow(V + 500)
                    table.read(rng.integers(0, V, 50))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=own_rows, args=(owner,)) for owner in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        table.commit()
        table.verify()
        values = table.read(np.arange(V))[:, 0].astype(int)
        written = np.flatnonzero(values)
        assert (values[written] % 4 == written % 4).all()
