"""Crashes of every kind give exactly the last commit (P1), from which the last explicit one can be restored (P2).

An I/O error at the n-th operation, a power loss at the n-th operation, and SIGKILL at random moments; for every n
until the script runs through. After each, the table opens, verifies, and nothing is left over.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import kill_child
import naive
import numpy as np
import pytest

from bigembed.errors import BigembedError, PoisonedTable
from bigembed.spec import StateColumns
from bigembed.storage import base, files
from bigembed.storage.table import Table

KILLS = int(os.environ.get("BIGEMBED_KILLS", "40"))
V, D, MOST = 9_000, 2, 14_000
STATE = (StateColumns("sum", 1, 0.5), StateColumns("moment", 1))


def initial_values(spec, known=[]):  # noqa: B006 - computed once: they depend on the seed alone
    if not known:
        known.append(naive.fill_initial(spec, np.arange(MOST)))
    return known[0]


def quiet_close(table):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        table.close()


@pytest.fixture(autouse=True)
def no_faults_left(monkeypatch):
    for name in ("fsync", "fdatasync"):  # what is synced is counted here, not waited for
        monkeypatch.setattr(os, name, lambda fd: None)
    yield
    files.before = None


class Script:
    """Steps on a table and its twin; keeps what may be on disk if the step under way fails."""

    def __init__(self, path, steps, **options):
        self.path, self.steps, self.options = path, steps, options
        self.table = self.twin = None
        self.durable = [(None, None)]  # (head, retained) that a table opened now may be at

    def run(self):
        self.step("create")
        for step, *args in self.steps:
            self.step(step, *args)

    def step(self, name, *args):
        before = self.durable[-1]
        if name == "create":
            self.durable = [before, "created"]
            self.table = Table.create(self.path, V, D, init="uniform", seed=3, chunk_rows=4096, **self.options)
            self.twin = naive.Table(self.table.spec, initial_values(self.table.spec))
        else:
            now_ve = self.twin.now_VE.copy()
            self.plan(name, *args)
            self.seen_now = [now_ve, self.twin.now_VE, before[0], self.twin.head_VE]
            self.durable = [before, (self.twin.head_VE.copy(), self.twin.retained_VE.copy())]
            getattr(self.table, name)(*args)
        self.durable = [(self.twin.head_VE.copy(), self.twin.retained_VE.copy())]

    def plan(self, name, *args):
        """Do the step on the twin first: a step that fails may still have become durable."""
        if name == "write":
            self.twin.write(args[0], np.broadcast_to(np.asarray(args[1], np.float32), (len(args[0]), D)))
        elif name in ("commit", "publish"):
            self.twin.commit()
        elif name == "merge":
            if self.twin.has_changes:
                self.twin.commit(explicit=False)
        elif name == "rollback":
            self.twin.rollback(to_retained=bool(args))
        elif name == "grow":
            self.twin.grow(*args)
        elif name == "set_state":
            self.twin.set_state([0.5, 0.0])


def the_script(path, with_publish=True, **options):
    rng = np.random.default_rng(5)

    def write(count, value, most=V):
        return "write", np.unique(rng.integers(0, most, count)), value

    steps = [
        write(40, 1.0),
        ("commit", "one"),
        write(30, 2.0),
        ("merge",),
        write(2000, 3.0),
        ("merge",),
        write(5, 4.0),
        ("rollback", 1),
        write(50, 5.0),
        ("grow", 12_500),
        write(20, 5.5, 12_500),
        ("merge",),
        ("commit", "two"),
        write(30, 6.0, 12_500),
        ("merge",),
        ("commit", "three"),
        ("set_state", "rule", STATE),
        write(30, 7.0, 12_500),
        ("commit", "four"),
    ]
    if with_publish:
        steps += [("publish",), write(3, 8.0, 12_500), ("commit", "five")]
    return Script(path, steps, **options)


def matches(values, allowed):
    return any(want is not None and values.shape == want.shape and (values == want).all() for want in allowed)


def check_reopened(script, extra=None):
    """Open what a crash left: an allowed state, sound, nothing left over, and the explicit commit restorable."""
    if not os.path.exists(script.path):
        assert any(state == (None, None) for state in script.durable if isinstance(state, tuple) and state[0] is None)
        return
    table = Table.open(script.path, **script.options)
    try:
        if "created" in script.durable:
            fresh = naive.Table(table.spec, initial_values(table.spec))
            states = [(fresh.head_VE, fresh.head_VE)]
        else:
            states = script.durable
        seen = table.read(np.arange(table.shape[0]), with_state=True)
        assert matches(seen, [head for head, _ in states] if extra is None else [extra])
        table.verify()
        check_nothing_left_over(table)
        table.rollback(table.generations()[0].number)
        if extra is None:
            seen = table.read(np.arange(table.shape[0]), with_state=True)
            assert matches(seen, [retained for _, retained in states])
        table.verify()
        check_nothing_left_over(table)
        table.write([1], 11.0)
        table.commit("goes on")
    finally:
        quiet_close(table)


def check_nothing_left_over(table):
    names = [os.path.join(folder, name) for folder, _, found in os.walk(table.path) for name in found]
    store = table._store
    known = {file.path for file in (*store.journal.files, *store.undo.files)}
    strangers = {name for name in names if os.path.basename(os.path.dirname(name)) in ("journal", "undo")} - known
    assert not strangers
    assert not [name for name in names if name.endswith(".new")]
    assert set(os.listdir(table.path)) <= {"zarr.json", "weight", "superblock", "journal", "undo", "lock"}
    assert os.listdir(os.path.dirname(table.path)) == [os.path.basename(table.path)]


# --- an I/O error at every operation


class FailAt:
    """Raises OSError at the n-th operation that changes something (or that looks), once, or from then on."""

    def __init__(self, n, code, lasting=False, looks=False):
        self.n, self.code, self.lasting, self.looks, self.count = n, code, lasting, looks, 0

    @property
    def has_struck(self):
        return self.count >= self.n

    def __call__(self, operation, path):
        if (operation in ("read", "open")) != self.looks:
            return
        self.count += 1
        if self.count == self.n or (self.lasting and self.count > self.n and operation not in ("unlink", "rmdir")):
            raise OSError(self.code, os.strerror(self.code))


def run_with_fault(path, fault, **options):
    """(the script as it stopped, whether there was no operation to fail any more)."""
    script = the_script(path, **options)
    files.before = fault
    try:
        script.run()
    except BigembedError as error:
        assert isinstance(error.__cause__, OSError) or isinstance(error, PoisonedTable)  # noqa: PT017
        return script, False
    finally:
        files.before = None
    return script, not fault.has_struck


@pytest.mark.parametrize(
    ("stride", "fault"),
    [(1, {"code": errno.EIO}), (5, {"code": errno.EIO, "looks": True}), (1, {"code": errno.ENOSPC, "lasting": True})],
    ids=["EIO at a change", "EIO at a look", "ENOSPC from then on"],
)
def test_an_io_error_at_any_operation_leaves_the_table_old_or_new(tmp_path, stride, fault):
    for n in range(1, 10_000, stride):
        folder = tmp_path / str(n)
        folder.mkdir()
        script, ran_through = run_with_fault(str(folder / "t"), FailAt(n, **fault), reader="cold")
        try:
            abandon(script.table)
            check_reopened(script)
        except BaseException as error:
            error.add_note(f"fault at operation {n}")
            raise
        shutil.rmtree(folder)
        if ran_through:
            break
    assert n > 150


def test_after_an_io_error_the_same_table_goes_on_or_says_it_cannot(tmp_path):
    poisoned = 0
    for n in range(1, 10_000, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        script, ran_through = run_with_fault(str(folder / "t"), FailAt(n, errno.EIO))
        if script.table is not None and not ran_through:
            try:
                poisoned += not goes_on(script)
            except BaseException as error:
                error.add_note(f"fault at operation {n}")
                raise
        shutil.rmtree(folder)
        if ran_through:
            break
    assert n > 150
    assert poisoned > 10


def goes_on(script):
    """Write and commit after the error; what was committed is what is found. False for a poisoned table."""
    table, seen = script.table, None
    try:
        assert matches(table.read(np.arange(table.shape[0]), with_state=True), script.seen_now)
        table.write([7], 99.0)
        table.commit("after the error")
        seen = table.read(np.arange(table.shape[0]), with_state=True)
    except PoisonedTable:
        for call in (table.commit, table.merge, table.rollback, lambda: table.read([0]), lambda: table.write([0], 1)):
            with pytest.raises(PoisonedTable, match="open"):
                call()
    quiet_close(table)
    check_reopened(script, extra=seen)
    return seen is not None


# --- power loss at every operation


class PowerLoss(BaseException):
    pass


class Disk:
    """Knows the content of each file as of its last sync; after a power loss each sector is as of then, or later."""

    SECTOR = 512

    def __init__(self, monkeypatch):
        self.synced = {}  # inode -> bytes
        init, sync, sync_all = files.File.__init__, files.File.sync, files.File.sync_all
        disk = self

        def opened(file, path, flags):
            init(file, path, flags)
            if file.size_bytes() == 0:
                disk.synced[os.fstat(file.fd).st_ino] = b""

        def synced(how):
            def call(file):
                how(file)
                disk.synced[os.fstat(file.fd).st_ino] = file.pread(file.size_bytes(), 0)

            return call

        monkeypatch.setattr(files.File, "__init__", opened)
        monkeypatch.setattr(files.File, "sync", synced(sync))
        monkeypatch.setattr(files.File, "sync_all", synced(sync_all))
        monkeypatch.setattr(base, "write_records", self.write_records)

    @staticmethod
    def write_records(file, offset_m, records_mw):
        """One operation for each record, so that a loss may come between any two."""
        for offset, record in zip(offset_m.tolist(), records_mw, strict=True):
            file.pwrite(record, offset)

    def lose_power(self, path, rng):
        """Make every file what a power loss may leave."""
        for folder, _, names in os.walk(path):
            for name in names:
                whole = os.path.join(folder, name)
                now, then = open(whole, "rb").read(), self.synced.get(os.stat(whole).st_ino)  # noqa: SIM115
                if then is not None and now != then:
                    with open(whole, "wb") as file:
                        file.write(self.mixed(now, then, rng))

    def mixed(self, now, then, rng):
        size = len(now) if len(now) <= len(then) or rng.random() < 0.7 else int(rng.integers(len(then), len(now)))
        starts = range(0, size, self.SECTOR)
        changed = [at for at in starts if now[at : at + self.SECTOR] != then[at : at + self.SECTOR]]
        if rng.random() < 0.5:  # the disk took any of the changed sectors, or the last few and not those before
            kept = {at for at in changed if rng.random() < 0.5}
        else:
            kept = set(changed[int(rng.integers(0, len(changed) + 1)) :])
        parts = []
        for at in starts:
            stop = min(size, at + self.SECTOR)
            source = now if at in kept else then
            parts.append(source[at:stop].ljust(stop - at, b"\0"))
        return b"".join(parts)


class StopAt:
    """Ends it all ahead of the n-th operation of a kind; ahead of a sync most is unsynced."""

    def __init__(self, n, kinds):
        self.n, self.kinds, self.count = n, kinds, 0

    def __call__(self, operation, path):
        if operation not in self.kinds:
            return
        self.count += 1
        if self.count == self.n:
            raise PowerLoss


CHANGES = ("write", "rename", "unlink", "truncate", "mkdir", "rmdir")
SYNCS = ("sync", "sync directory")


def run_until(script, n, kinds):
    """Whether the script ran through before its n-th operation of a kind."""
    files.before = StopAt(n, kinds)
    try:
        script.run()
    except PowerLoss:
        return False
    finally:
        files.before = None
    return True


def abandon(table):
    """What the end of a process does: descriptors are closed and the lock goes."""
    if table is not None:
        table._finalizer()


@pytest.mark.parametrize(("kinds", "stride"), [(SYNCS, 1), (CHANGES, 3)], ids=["ahead of syncs", "ahead of changes"])
def test_a_power_loss_at_any_operation_gives_the_last_commit(tmp_path, monkeypatch, kinds, stride):
    disk = Disk(monkeypatch)
    for n in range(1, 100_000, stride):
        folder = tmp_path / str(n)
        folder.mkdir()
        script = the_script(str(folder / "t"), with_publish=False)
        ran_through = run_until(script, n, kinds)
        abandon(script.table)
        disk.lose_power(script.path, np.random.default_rng(n))
        if os.path.exists(script.path) and script.table is None:
            shutil.rmtree(folder)  # stopped inside create or the first open: nothing was promised
            continue
        try:
            check_reopened(script)
        except BaseException as error:
            error.add_note(f"power lost at operation {n}")
            raise
        shutil.rmtree(folder)
        if ran_through:
            break
    assert n > 100


def test_what_a_killed_process_left_unsynced_is_made_durable_before_it_is_built_upon(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    for n in range(1, 100_000):
        folder = tmp_path / str(n)
        folder.mkdir()
        script = the_script(str(folder / "t"), with_publish=False)
        ran_through = run_until(script, n, SYNCS)  # killed: what was written stays, synced or not
        abandon(script.table)
        if script.table is not None:
            table = Table.open(script.path)
            table.write([7], 99.0)
            table.commit("after the kill")
            seen = table.read(np.arange(table.shape[0]), with_state=True)
            abandon(table)
            disk.lose_power(script.path, np.random.default_rng(n))
            try:
                check_reopened(script, extra=seen)
            except BaseException as error:
                error.add_note(f"killed at operation {n}, then power lost")
                raise
        shutil.rmtree(folder)
        if ran_through:
            break
    assert n > 100


# --- SIGKILL


class Nursery:
    """A process that has everything imported, and forks a child for each life."""

    def __init__(self):
        command = [sys.executable, kill_child.__file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, path, seed):
        """The pid of a child that works on the table at `path`, and has done its first step."""
        self.process.stdin.write(f"{seed} {path}\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline().removeprefix("pid "))
        self.first = self.process.stdout.readline()
        return pid

    def reports(self):
        """Every (step, generation) that the dead child reported."""
        found = [tuple(map(int, self.first.split()))]
        for line in self.process.stdout:
            if line.startswith("dead"):
                assert line.split()[1] == str(-signal.SIGKILL), line
                return found
            found.append(tuple(map(int, line.split())))
        raise AssertionError("the nursery died")

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(60) == 0
        self.process.stdout.close()


def replay(twin, generation, seed, reports):
    """{generation: (head, retained)} of every generation that the child may have made durable."""
    states = {generation: (twin.head_VE.copy(), twin.retained_VE.copy())}
    steps = kill_child.steps(seed)
    for _, after in [*reports, (len(reports), None)]:
        name, args = next(steps)
        attempted = after is None
        if name == "write":
            if attempted or after > generation:
                twin.commit(explicit=False)
            rows, values = kill_child.rows_and_values(args, len(twin.now_VE))
        elif name == "merge":
            if attempted or after > generation:
                twin.commit(explicit=False)
        elif name == "commit":
            twin.commit()
        elif name == "rollback":
            twin.rollback(to_retained=True)
        elif name == "grow":
            twin.grow(min(kill_child.MOST_ROWS, len(twin.now_VE) + args))
        number = generation + 1 if attempted else after
        if number > generation:
            states[number] = (twin.head_VE.copy(), twin.retained_VE.copy())
        if name == "write" and not attempted:
            twin.write(rows, values)
        generation = number
    return states


def test_a_killed_process_leaves_exactly_its_last_commit(tmp_path):
    rng, path, nursery = np.random.default_rng(11), str(tmp_path / "t"), Nursery()
    with Table.create(path, kill_child.NUM_ROWS, kill_child.DIM, init="uniform", chunk_rows=4096) as table:
        twin, generation = naive.Table(table.spec, naive.fill_initial(table.spec, np.arange(kill_child.MOST_ROWS))), 0
    try:
        for kill in range(KILLS):
            pid = nursery.start(path, kill)
            time.sleep(float(rng.uniform(0.001, 0.08)))
            os.kill(pid, signal.SIGKILL)
            states = replay(twin, generation, kill, nursery.reports())
            table = Table.open(path)
            head, retained = states[table.generation]
            np.testing.assert_array_equal(table.read(np.arange(table.shape[0]), with_state=True), head)
            table.verify()
            twin.head_VE, twin.retained_VE, twin.now_VE = head, retained, head.copy()
            if kill % 2:
                table.rollback(table.generations()[0].number)
                np.testing.assert_array_equal(table.read(np.arange(table.shape[0]), with_state=True), retained)
                table.verify()
                twin.rollback(to_retained=True)
            check_nothing_left_over(table)
            generation = table.generation
            table.close()
    finally:
        nursery.close()
    assert generation > KILLS
