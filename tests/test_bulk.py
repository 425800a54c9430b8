"""Bulk writing: the table is exactly the rows that were given, appears only when whole, and leaves nothing behind."""

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import naive_bulk
import numpy as np
import pytest
import stranger
import zarr
from test_crash import CHANGES, SYNCS, Disk, PowerLoss, StopAt

from bigembed import errors, init
from bigembed.kernels.records import check_keys
from bigembed.kernels.sealing import clear_unwritten, seal_next
from bigembed.spec import StateColumns, TableSpec
from bigembed.storage import aside, bulk, chunk_writer, files
from bigembed.storage.bulk import BulkTable
from bigembed.storage.table import Table

D = 3
STATE = (StateColumns("sum", 1, 0.5), StateColumns("moment", 2, -1.0))
FACTS = {"state": STATE, "init": "uniform", "seed": 6, "chunk_rows": 4096, "padding_idx": 4}


@pytest.fixture(autouse=True)
def no_faults_left():
    yield
    files.before = None


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: many small changes wait for a disk."""
    where = "/dev/shm"
    if not os.access(where, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


@pytest.fixture
def no_waiting(monkeypatch):
    for name in ("fsync", "fdatasync"):  # what is synced is counted here, not waited for
        monkeypatch.setattr(os, name, lambda fd: None)


def bits(values):
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def random_values(rng, count, width):
    """Any bits at all: NaNs with payloads, infinities, -0, subnormals."""
    return rng.integers(0, 1 << 32, (count, width), dtype=np.uint64).astype(np.uint32).view(np.float32)


def all_rows(path):
    with Table.open(path, mode="r") as table:
        return table.read(np.arange(table.shape[0]), with_state=True)


def check_sound(path):
    with Table.open(path) as table:
        table.verify()
    _, weight_VD, state_VK, _ = stranger.read_table(path)
    np.testing.assert_array_equal(bits(np.hstack([weight_VD, state_VK])), bits(all_rows(path)))


def is_plain(path):
    return json.loads((path / "zarr.json").read_text())["attributes"]["bigembed"]["plain"]


# --- kernels


@pytest.mark.parametrize(("width", "tail"), [(1, 0), (3, 2), (17, 1)])
def test_kernels_equal_their_slow_twins(width, tail):
    rng = np.random.default_rng(width)
    spec = TableSpec(10, width, state=(StateColumns("s", tail),) if tail else (), salt=int(rng.integers(1 << 63)))
    words_MX = rng.integers(0, 1 << 32, (50, width), dtype=np.uint64).astype(np.uint32)
    tail_T = rng.integers(0, 1 << 32, tail, dtype=np.uint64).astype(np.uint32)
    fast_MW, slow_MW = (np.full((50, spec.record_words), 7, np.uint32) for _ in range(2))
    seal_next(0, 20, 1 << 40, words_MX, tail_T, check_keys(spec), fast_MW)
    seal_next(20, 50, 1 << 40, words_MX, tail_T, check_keys(spec), fast_MW)
    naive_bulk.seal_next(1 << 40, words_MX, tail_T, check_keys(spec), slow_MW)
    np.testing.assert_array_equal(fast_MW, slow_MW)
    written_M = rng.random(50) < 0.5
    clear_unwritten(0, 50, written_M, fast_MW)
    naive_bulk.clear_unwritten(written_M, slow_MW)
    np.testing.assert_array_equal(fast_MW, slow_MW)


# --- the rows


@pytest.mark.parametrize("seed", range(12))
def test_a_bulk_table_is_exactly_what_was_given(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    if seed % 2:
        monkeypatch.setattr(bulk, "BUFFER_BYTES", int(rng.integers(1, 60_000)))
        monkeypatch.setattr(bulk, "GAP_BYTES", int(rng.integers(0, 60_000)))
        monkeypatch.setattr(chunk_writer, "UNSYNCED_FILES", 1)
    num_rows = None if seed % 3 else 20_000
    twin, path = naive_bulk.Rows(), tmp_path / "t"
    with BulkTable(path, D, num_rows=num_rows, **FACTS) as made:
        width = made.spec.row_width
        initial = np.array(made.spec.state_initial, np.float32)
        while made.next_row < 12_000:
            count = int(rng.choice([0, 1, 5, 700, 4096, 5000]))
            kind = rng.integers(4)
            if kind == 0:
                values = random_values(rng, count, D)
                made.append(values)
                twin.append(np.hstack([values, np.broadcast_to(initial, (count, len(initial)))]))
                values[:] = 0  # it is the caller's again
            elif kind == 1:
                values = random_values(rng, count, width)
                made.append_rows(values)
                twin.append(values)
            elif kind == 2:
                values, written = random_values(rng, count, 2 * width)[:, ::2], rng.random(count) < rng.random()
                made.append_rows(values, written)
                twin.append(values, written)
            else:
                made.skip(count)
                twin.skip(count, width)
        more = int(rng.choice([0, 1, 9000]))
        made.finish(None if num_rows else made.next_row + more)
    with Table.open(path) as table:
        want = twin.values(table.spec)
        assert len(want) == num_rows or len(want) == sum(map(len, twin.parts)) + more
        np.testing.assert_array_equal(bits(table.read(np.arange(len(want)), with_state=True)), bits(want))
        assert table.stats()["table"]["written_rows"] == np.concatenate(twin.written).sum()
    check_sound(path)
    assert os.listdir(tmp_path) == ["t"]


def test_it_is_the_table_that_create_and_write_make(tmp_path):
    values = np.random.default_rng(0).standard_normal((9000, D)).astype(np.float32)
    with BulkTable(tmp_path / "a", D, num_rows=9000, **FACTS) as made:
        made.append(values)
        made.finish(note="all at once")
    with Table.create(tmp_path / "b", 9000, D, init="uniform", seed=6, state_dim=0) as table:
        table.set_state("rule", STATE)
        table.write(np.arange(9000), values)
        table.commit()
    np.testing.assert_array_equal(bits(all_rows(tmp_path / "a")), bits(all_rows(tmp_path / "b")))


def test_any_zarr_reader_sees_a_table_whose_rows_were_all_written(tmp_path):
    values = np.random.default_rng(0).standard_normal((5000, D)).astype(np.float32)
    for name, count, num_rows in (("all", 5000, None), ("fewer", 4999, 5000)):
        with BulkTable(tmp_path / name, D, chunk_rows=4096) as made:
            made.append(values[:count])
            made.finish(num_rows)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "all" / "weight", mode="r")[:], values)
    check_sound(tmp_path / "all")
    check_sound(tmp_path / "fewer")
    assert is_plain(tmp_path / "all") is True
    assert is_plain(tmp_path / "fewer") is False
    with Table.open(tmp_path / "all") as table:
        table.write([1], 0.0)
        table.commit()
    assert is_plain(tmp_path / "all") is False


def test_facts_and_the_first_generation_are_what_was_said(tmp_path):
    scalars, payload = {"rule": "Adam", "step": 3, "lr": float("nan")}, {"epoch": [1, 2]}
    with BulkTable(
        tmp_path / "t", D, owner="Adam", attributes={"source": "x", "n": 1}, **{**FACTS, "init": init.normal(0, 2)}
    ) as made:
        assert made.spec.num_rows == 5  # padding_idx is a row of it
        made.append(np.zeros((7, D), np.float32))
        assert made.spec.num_rows == made.next_row == 7
        made.finish(10, "converted", scalars=scalars, payload=payload, attributes={"n": 2, "sha256": "ab"})
    with Table.open(tmp_path / "t") as table:
        spec, (birth,) = table.spec, table.generations()
        assert (spec.num_rows, spec.owner, spec.state, spec.padding_idx) == (10, "Adam", STATE, 4)
        assert (spec.init, spec.seed, spec.chunk_rows) == (init.normal(0, 2), 6, 4096)
        assert spec.attributes == {"source": "x", "n": 2, "sha256": "ab"}
        assert (birth.number, birth.note, birth.payload, birth.explicit) == (0, "converted", payload, True)
        assert repr(birth.scalars) == repr(table.scalars) == repr(scalars)
        table.write([9], 3.0)
        assert table.commit() == 1
        table.merge()
        table.write([8], 3.0)
        table.rollback(1)
        assert table.read([9]).tolist() == [[3.0] * D]
        assert table.read([6]).tolist() == [[0.0] * D]
        table.verify()


def test_rows_that_are_skipped_cost_nothing(tmp_path):
    with BulkTable(tmp_path / "t", 64, num_rows=10**9, chunk_rows=4096) as made:
        made.append(np.ones((1, 64), np.float32))
        made.skip(4094)
        made.append(np.ones((1, 64), np.float32))
        made.skip(10**9 - 4096 - 1)
        made.append(np.ones((1, 64), np.float32))
        made.finish()
    assert sorted(os.listdir(tmp_path / "t" / "weight")) == ["c.0.0", "c.244140.0", "zarr.json"]
    assert files.disk_bytes(str(tmp_path / "t" / "weight" / "c.0.0")) < 100_000  # 1 MB without its hole
    with Table.open(tmp_path / "t") as table:
        assert table.stats()["table"]["written_rows"] == 3
        assert table.read([0, 4095, 10**9 - 1]).min() == 1


def test_sparse_rows_are_written_with_their_pages_alone(tmp_path):
    with BulkTable(tmp_path / "t", 255, num_rows=4096, chunk_rows=4096) as made:
        written = np.zeros(4096, bool)
        written[[5, 1000, 1001, 4000]] = True
        made.append_rows(np.ones((4096, 255), np.float32), written)
        made.finish()
    assert files.disk_bytes(str(tmp_path / "t" / "weight" / "c.0.0")) <= 6 * 4096
    with Table.open(tmp_path / "t") as table:
        assert table.verify().written_rows == 4


def test_an_empty_table_with_rows_and_one_without(tmp_path):
    with BulkTable(tmp_path / "t", D, seed=3) as made:
        made.finish(100)
    with Table.open(tmp_path / "t") as table, Table.create(tmp_path / "u", 100, D, seed=3) as other:
        np.testing.assert_array_equal(table.read(np.arange(100)), other.read(np.arange(100)))
    with BulkTable(tmp_path / "v", D) as made, pytest.raises(errors.InvalidArgument, match="num_rows must be between"):
        made.finish()
    assert sorted(os.listdir(tmp_path)) == ["t", "u"]


# --- what cannot be


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"dim": 0}, "dim 0"),
        ({"dim": 2.5}, "dim must be an integer"),
        ({"num_rows": 0}, "num_rows must be between"),
        ({"num_rows": "x"}, "num_rows must be an integer"),
        ({"chunk_rows": 5000}, "power of two"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"num_rows": 10, "padding_idx": 10}, "padding_idx 10 is not a row"),
        ({"init": "xavier"}, "init='xavier' is unknown"),
        ({"attributes": {"salt": 1}}, "attributes hold salt, which"),
        ({"attributes": {"plain": True}}, "attributes hold plain, which"),
        ({"attributes": {"x": object()}}, "attributes must be what JSON can hold"),
        ({"path": ""}, "path must name a folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path, facts, message):
    with pytest.raises(errors.InvalidArgument, match=message):
        BulkTable(**{"path": tmp_path / "t", "dim": D, **facts})
    assert os.listdir(tmp_path) == []


def test_wrong_rows_are_refused_and_the_others_go_on(tmp_path):
    good = np.ones((4, D), np.float32)
    with BulkTable(tmp_path / "t", D, num_rows=10, state=STATE) as made:
        made.append(good)
        for wrong, message in [
            (good.astype(np.float64), r"values are float64 \(4, 3\); float32 \(M, 3\) was expected"),
            (good.astype(">f4"), "values are >f4"),
            (good[:, :2], r"float32 \(4, 2\); float32 \(M, 3\)"),
            (good[0], r"\(3,\)"),
            (np.ones((7, D), np.float32), "7 more rows were given after 4, but the table gets 10 rows"),
        ]:
            with pytest.raises(errors.InvalidArgument, match=message):
                made.append(wrong)
        with pytest.raises(errors.InvalidArgument, match=r"float32 \(M, 6\)"):
            made.append_rows(good)
        with pytest.raises(errors.InvalidArgument, match=r"written_M is int64 \(1,\); bool \(1,\)"):
            made.append_rows(np.ones((1, 6), np.float32), np.array([1]))
        for count, message in [(7, "7 more rows"), (-1, "-1 more rows"), (1.5, "count must be an integer")]:
            with pytest.raises(errors.InvalidArgument, match=message):
                made.skip(count)
        for facts, message in [
            ({"num_rows": 3}, "num_rows=3 is less than the 4 rows"),
            ({"num_rows": 4.5}, "num_rows must be an integer"),
            ({"payload": {1, 2}}, "payload must be what JSON can hold"),
            ({"attributes": {"seed": 2}}, "attributes hold seed"),
        ]:
            with pytest.raises(errors.InvalidArgument, match=message):
                made.finish(**facts)
        made.finish(6)
    assert all_rows(tmp_path / "t").shape == (6, 6)


def test_after_the_end_nothing_more_can_be_done(tmp_path):
    values = np.ones((4, D), np.float32)
    for end in ("finish", "abandon"):
        made = BulkTable(tmp_path / end, D)
        made.append(values)
        getattr(made, end)()
        made.abandon()
        for call in (lambda m=made: m.append(values), lambda m=made: m.skip(1), made.finish):
            with pytest.raises(errors.TableClosed, match="was finished or given up"):
                call()
    assert os.listdir(tmp_path) == ["finish"]


# --- it appears whole or not at all


def fill(path, seed=0, rows=9000, **facts):
    with BulkTable(path, D, **{**FACTS, **facts}) as made:
        made.append(np.random.default_rng(seed).standard_normal((rows, D)).astype(np.float32))
        made.skip(3000)
        made.append(np.ones((5, D), np.float32))
        made.finish()


def test_nothing_is_at_the_path_before_the_end_and_nothing_after_giving_up(tmp_path):
    path = tmp_path / "t"

    def nothing():
        raise KeyboardInterrupt

    for leave in (lambda: None, nothing, lambda: 1 / 0):
        try:
            with BulkTable(path, D) as made:
                made.append(np.ones((9000, D), np.float32))
                assert not path.exists()
                assert len(os.listdir(tmp_path)) == 1
                leave()
        except (KeyboardInterrupt, ZeroDivisionError):
            pass
        assert os.listdir(tmp_path) == []
    BulkTable(path, D).append(np.ones((9000, D), np.float32))  # dropped without a word
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_a_program_that_ends_without_finishing_leaves_nothing(tmp_path):
    code = "import sys, numpy as np; from bigembed.storage.bulk import BulkTable; made = BulkTable(sys.argv[1], 3);"
    code += "made.append(np.ones((9000, 3), np.float32)); made._pass_on()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "t")], check=True)
    assert os.listdir(tmp_path) == []


ENDLESS = """
import sys, numpy as np
from bigembed.storage.bulk import BulkTable
values = np.ones((5000, 3), np.float32)
with BulkTable(sys.argv[1], 3, chunk_rows=4096) as made:
    print("ready", flush=True)
    while True:
        made.append(values)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_ctrl_c_leaves_nothing(tmp_path, seconds):
    command = [sys.executable, "-c", ENDLESS, str(tmp_path / "t")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as builder:
        assert builder.stdout.readline() == "ready\n"
        time.sleep(seconds)
        assert len(os.listdir(tmp_path)) == 1
        builder.send_signal(signal.SIGINT)
        assert builder.communicate(timeout=60)[1].endswith("KeyboardInterrupt\n")
    assert os.listdir(tmp_path) == []


def test_what_came_to_stand_at_the_path_meanwhile_is_not_touched(tmp_path):
    for make in (lambda path: path.mkdir(), lambda path: Table.create(path, 5, 1).close()):
        path = tmp_path / "t"
        with BulkTable(path, D) as made:
            made.append(np.ones((10, D), np.float32))
            make(path)
            with pytest.raises(errors.TableExists, match="was made by somebody else meanwhile"):
                made.finish()
        assert os.listdir(tmp_path) == ["t"]
        files.remove_tree(str(path))


def test_a_table_to_overwrite_stays_until_the_end_and_nobody_else_writes_it(tmp_path):
    path = tmp_path / "t"
    Table.create(path, 5, 1, init="zeros").close()
    with pytest.raises(errors.TableExists, match="pass overwrite=True"):
        BulkTable(path, D)
    with Table.open(path), pytest.raises(errors.TableLocked):
        BulkTable(path, D, overwrite=True)
    os.symlink(path, tmp_path / "link")
    for end in ("abandon", "finish"):
        with BulkTable(tmp_path / "link", D, overwrite=True) as made:
            made.append(np.ones((10, D), np.float32))
            assert all_rows(path).shape == (5, 2)
            with pytest.raises(errors.TableLocked, match=f"open for writing by process {os.getpid()}"):
                Table.open(path)
            getattr(made, end)()
        with Table.open(path) as table:
            assert table.shape == ((5, 1) if end == "abandon" else (10, D))
    assert sorted(os.listdir(tmp_path)) == ["link", "t"]
    assert os.path.islink(tmp_path / "link")


def test_a_forked_child_leaves_the_parents_work_alone(tmp_path):
    made = BulkTable(tmp_path / "t", D)
    made.append(np.ones((9000, D), np.float32))
    pid = os.fork()
    if pid == 0:
        made.abandon()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    made.append(np.ones((9000, D), np.float32))
    made.finish()
    check_sound(tmp_path / "t")


def test_a_forked_child_cannot_write_or_finish_its_parents_table(tmp_path):
    with BulkTable(tmp_path / "t", D) as made:
        made.append(np.ones((3, D), np.float32))
        pid = os.fork()
        if pid == 0:
            calls = [lambda: made.append(np.zeros((2, D), np.float32)), lambda: made.skip(1), made.finish]
            for call in calls:
                try:
                    call()
                except errors.ForkedTable as error:
                    if f"is being written by process {os.getppid()}; this forked child ({os.getpid()})" in str(error):
                        continue
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        made.append(np.full((4, D), 7, np.float32))
        made.finish()
    assert all_rows(tmp_path / "t")[:, 0].tolist() == [1] * 3 + [7] * 4


def test_a_child_forked_in_the_middle_of_a_write_ends(tmp_path):
    made = BulkTable(tmp_path / "t", D)
    made.append(np.ones((9000, D), np.float32))
    held, may_end = threading.Event(), threading.Event()

    def hold():  # as the thread that writes chunks does
        with made._chunks._mutex:
            held.set()
            may_end.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        made.abandon()
        os._exit(0 if made._chunks.is_closed else 1)
    status = os.waitpid(pid, 0)[1]
    may_end.set()
    thread.join()
    assert status == 0
    made.finish()
    check_sound(tmp_path / "t")


@pytest.mark.parametrize("make", ["create", "bulk", "overwrite"])
def test_what_fails_after_the_rename_is_said_and_the_table_stands(tmp_path, make):
    path = tmp_path / "t"
    if make == "overwrite":
        Table.create(path, 5, 1).close()

    def fail(operation, at):
        name = os.path.basename(at) if make == "overwrite" else at
        if (operation, name) in (("sync directory", str(tmp_path)), ("rmdir", "replaced")):
            raise OSError(errno.EIO, "injected")

    but = "the table that it replaced is still inside" if make == "overwrite" else "its name may not survive"
    with pytest.raises(errors.StorageFailed, match=f"t is whole and at its place, but {but}.* injected") as caught:
        if make == "create":
            files.before = fail
            Table.create(path, 10, D)
        else:
            with BulkTable(path, D, overwrite=make == "overwrite") as made:
                made.append(np.ones((10, D), np.float32))
                files.before = fail
                made.finish()
    files.before = None
    assert caught.value.errno == errno.EIO
    assert os.listdir(tmp_path) == ["t"]
    with Table.open(path) as table:  # and nobody holds its lock
        assert table.shape == (10, D)
    assert not os.path.exists(path / "replaced")


class Strike:
    """Raises OSError at the n-th operation, whichever thread does it."""

    def __init__(self, n, code):
        self.n, self.code, self.count, self.mutex = n, code, 0, threading.Lock()

    def __call__(self, operation, path):
        with self.mutex:
            self.count += 1
            if self.count == self.n:
                raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_io_error_at_any_operation_leaves_the_old_or_the_new(memory, no_waiting, monkeypatch, overwrite):
    monkeypatch.setattr(bulk, "BUFFER_BYTES", 100_000)
    monkeypatch.setattr(chunk_writer, "UNSYNCED_FILES", 1)
    for n in range(1, 1000):
        path = str(memory / "t")
        if overwrite:
            files.before = None
            Table.create(path, 50, 1, overwrite=True).close()
        files.before = strike = Strike(n, errno.EIO if n % 2 else errno.ENOSPC)
        try:
            fill(path, overwrite=overwrite)
            is_made = True
        except errors.BigembedError:
            is_made = False
        files.before = None
        if is_made or (os.path.exists(path) and not overwrite):
            with Table.open(path) as table:
                assert table.shape == (12_005, D)
                assert table.verify().written_rows == 9005
            files.remove_tree(path)
        elif overwrite:
            with Table.open(path) as table:
                assert table.shape in ((50, 1), (12_005, D))
        assert os.listdir(memory) == (["t"] if overwrite and not is_made else [])
        if strike.count < n:
            break
    assert n > 40


class NothingAfter(StopAt):
    """Ends it all at the n-th operation of a kind: there is no later one either."""

    def __call__(self, operation, path):
        super().__call__(operation, path)
        if self.count >= self.n:
            raise PowerLoss


@pytest.mark.parametrize("kinds", [SYNCS, CHANGES])
def test_a_power_loss_at_any_operation_leaves_nothing_or_a_whole_table(memory, no_waiting, monkeypatch, kinds):
    monkeypatch.setattr(bulk, "BUFFER_BYTES", 100_000)
    disk, whole = Disk(monkeypatch), 0
    for n in range(1, 1000):
        folder = memory / str(n)
        folder.mkdir()
        path = str(folder / "t")
        files.before = NothingAfter(n, kinds)
        try:
            fill(path)
            is_made = True
        except PowerLoss:
            is_made = False
        files.before = None
        disk.lose_power(str(folder), np.random.default_rng(n))
        assert os.path.exists(path) or not is_made
        if os.path.exists(path):
            check_sound(path)
            whole += 1
        Table.create(path, 5, 1, overwrite=True).close()
        if kinds == SYNCS and n > 1:  # from the first one on, the lock says that the folder was one to be made in
            assert os.listdir(folder) == ["t"]
        if is_made:
            break
    assert n > 12
    assert whole > 1


# --- killed


def killed_at(n, work):
    """Whether a forked child that is killed ahead of its n-th operation was killed; its work is done otherwise."""
    pid = os.fork()
    if pid == 0:
        count = iter(range(1, 1 << 30))

        def before(operation, path):
            if next(count) == n:
                os.kill(os.getpid(), signal.SIGKILL)

        files.before = before
        try:
            work()
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("work", ["create", "bulk"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_next_one_starts_clean_after_a_kill_at_any_operation(memory, no_waiting, work, overwrite):
    path, parts, missing = str(memory / "t"), 0, 0

    def make(overwrite=overwrite):
        if work == "bulk":
            fill(path, overwrite=overwrite)
        else:
            Table.create(path, 60, D, overwrite=overwrite).close()

    for n in range(1, 1000):
        if overwrite:
            Table.create(path, 50, 1, overwrite=True).close()
        was_killed = killed_at(n, make)
        parts += len(os.listdir(memory)) > overwrite
        if overwrite:
            if not os.path.exists(path):  # the old one had left its place already
                missing += 1
                if work == "create":
                    with pytest.raises(errors.TableExists):
                        make(overwrite=False)
            with Table.open(path, "r") as table:
                assert table.shape in ((50, 1), (60, D), (12_005, D))
        elif os.path.exists(path):
            with Table.open(path) as table:
                table.verify()
            files.remove_tree(path)
        Table.create(path, 5, 1, overwrite=overwrite).close()
        assert os.listdir(memory) == ["t"]
        if not overwrite:
            files.remove_tree(path)
        if not was_killed:
            break
    assert n > 30
    assert parts > 20
    assert missing > 0 or not overwrite


BUILD = """
import sys, numpy as np
from bigembed.storage.bulk import BulkTable
with BulkTable(sys.argv[1], 3) as made:
    made.append(np.ones((9000, 3), np.float32))
    print("ready", flush=True)
    sys.stdin.read()
    made.append(np.ones((9000, 3), np.float32))
    made.finish()
"""


def test_a_live_one_is_not_harmed(tmp_path):
    path = str(tmp_path / "t")
    command = [sys.executable, "-c", BUILD, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout.readline() == "ready\n"
        with BulkTable(path, 1):
            assert len(os.listdir(tmp_path)) == 2
        with pytest.raises(errors.TableMissing):
            Table.open(path)
        assert len(os.listdir(tmp_path)) == 1
        builder.stdin.close()
        assert builder.wait(60) == 0
    with Table.open(path) as table:
        assert table.verify().written_rows == 18_000
    assert os.listdir(tmp_path) == ["t"]


def test_folders_that_only_look_like_leftovers_stay(tmp_path):
    Table.create(tmp_path / "t.new-00000000", 5, 1).close()
    (tmp_path / "t.new-11111111").mkdir()
    (tmp_path / "t.new-11111111" / "data").write_text("mine")
    (tmp_path / "t.new-22222222").write_text("a file")
    (tmp_path / "t.new-3333333").mkdir()
    (tmp_path / "xt.new-44444444").mkdir()
    (tmp_path / "else").mkdir()
    os.symlink(tmp_path / "else", tmp_path / "t.new-55555555")
    os.mkdir(tmp_path / "t.new-66666666")
    (tmp_path / "t.new-66666666" / "lock").write_text("")
    before = sorted(os.listdir(tmp_path))
    Table.create(tmp_path / "t", 5, 1).close()
    before.remove("t.new-66666666")  # a lock and nothing else: that is one
    assert sorted(os.listdir(tmp_path)) == sorted(["t", *before])
    assert (tmp_path / "t.new-11111111" / "data").read_text() == "mine"
    Table.open(tmp_path / "t.new-00000000").close()


def test_a_builder_whose_folder_is_taken_for_a_dead_ones_starts_over_with_another_name(tmp_path, monkeypatch):
    import fcntl

    path, flock, rivals = str(tmp_path / "t"), fcntl.flock, []

    def rival_first(fd, flags):
        if len(rivals) < 2 and flags & fcntl.LOCK_EX:
            rivals.append(fd)
            monkeypatch.setattr(fcntl, "flock", flock)
            if len(rivals) == 1:
                aside._remove_dead(path)  # comes between the builder's open and its flock
                monkeypatch.setattr(fcntl, "flock", rival_first)
            else:
                rivals.extend(lock for _, lock in aside._dead(path))  # and one that is not through yet
        flock(fd, flags)

    monkeypatch.setattr(fcntl, "flock", rival_first)
    names = iter(["aaaaaaaa", "bbbbbbbb", "cccccccc"])
    monkeypatch.setattr(aside.secrets, "token_hex", lambda count: next(names))
    with BulkTable(path, D) as made:
        assert made.folder == path + ".new-cccccccc"
        made.append(np.ones((5, D), np.float32))
        made.finish()
    assert len(rivals) == 3
    rivals[2].release()
    check_sound(path)
    assert os.listdir(tmp_path) == ["t"]


# --- memory


MEASURE = """
import resource, sys, numpy as np
from bigembed.storage.bulk import BulkTable
values = np.ones((4096, 64), np.float32)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
with BulkTable(sys.argv[1], 64) as made:
    made.append(values); made._pass_on()
    start = peak()
    for _ in range(400): made.append(values)
    made.finish()
print(peak() - start)
"""


def test_memory_does_not_grow_with_the_table(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "t")], capture_output=True, text=True)
    assert int(done.stdout) < 60, done.stderr  # MiB, for a table of 400 MiB


def test_a_small_table_of_unknown_size_has_a_small_file(tmp_path):
    with BulkTable(tmp_path / "t", 4) as bulk:
        for _ in range(3):
            bulk.append(np.ones((2000, 4), np.float32))
        bulk.finish()
    with Table.open(tmp_path / "t") as table:
        assert table.spec.chunk_rows == 8192
        assert os.path.getsize(tmp_path / "t" / "weight" / "c.0.0") == table.spec.chunk_bytes
        assert table.verify().written_rows == 6000
        assert (table.read(np.arange(6000)) == 1).all()
        table.grow(20_000)
        table.write([19_999], np.full((1, 4), 2, np.float32))
        table.commit()
        table.merge()
        assert table.verify().written_rows == 6001
    with BulkTable(tmp_path / "chosen", 4, chunk_rows=16_384) as bulk:
        bulk.append(np.ones((10, 4), np.float32))
        bulk.finish()
    with Table.open(tmp_path / "chosen", mode="r") as table:
        assert table.spec.chunk_rows == 16_384
