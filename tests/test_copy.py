"""Copies: a new table equal to exactly one commit of another, whatever its writer does meanwhile."""

import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import stranger

from bigembed import errors, init
from bigembed.spec import StateColumns
from bigembed.storage import copy as copy_module
from bigembed.storage import files
from bigembed.storage.copy import copy_table
from bigembed.storage.table import Table

V, D = 20_000, 3
STATE = (StateColumns("sum", 1, 0.5), StateColumns("moment", 2, -1.0))


@pytest.fixture
def table(tmp_path):
    made = Table.create(tmp_path / "s", V, D, init="uniform", seed=5, padding_idx=9, chunk_rows=4096)
    made.set_state("Rule", STATE)
    yield made
    if made.may_write:
        made.rollback()
        made.close()


def bits(values):
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def write(table, seed, count=3000, most=None):
    """Random rows of any bits, weight and state."""
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(most or table.shape[0], count, replace=False)).astype(np.int64)
    values = rng.integers(0, 1 << 32, (count, table.spec.row_width), dtype=np.uint64).astype(np.uint32)
    table.append_rows(rows, values.view(np.float32))


def add_tokens(table, tokens):
    start_M1 = np.cumsum([0, *map(len, tokens)])
    table.token_log.append(np.frombuffer(b"".join(tokens), np.uint8), start_M1, table.shape[0])
    table.grow(table.shape[0] + len(tokens))


def written(path):
    with Table.open(path) as table:
        table.merge()
        table.verify()
        return table.stats()["table"]["written_rows"]


def assert_equal(source, target):
    """Every fact, row and bit; the same rows are never-written."""
    with Table.open(source, "r") as one, Table.open(target) as other:
        facts = [
            (t.shape, t.spec.state, t.spec.owner, t.spec.init, t.spec.seed, t.spec.padding_idx, t.spec.attributes)
            for t in (one, other)
        ]
        assert facts[0] == facts[1]
        assert one.spec.salt != other.spec.salt
        assert one.scalars == other.scalars
        (commit,), head = other.generations(), one.generations()[-1]
        assert (commit.number, commit.payload) == (0, head.payload)
        assert commit.note == f"copy of generation {head.number}"
        for first in range(0, one.shape[0], 1 << 16):
            rows = np.arange(first, min(one.shape[0], first + (1 << 16)))
            np.testing.assert_array_equal(
                bits(one.read(rows, with_state=True)), bits(other.read(rows, with_state=True))
            )
        assert one.token_log.entries(one.shape[0])[1:][1].tolist() == other.token_log.entries()[2].tolist()
        for a, b in zip(one.token_log.entries(one.shape[0]), other.token_log.entries(), strict=True):
            np.testing.assert_array_equal(a, b)
        other.verify()
    stranger.read_table(target)


# --- what is copied


def test_a_copy_is_the_last_commit_and_nothing_uncommitted(table, tmp_path):
    steps = [
        lambda: None,
        lambda: (write(table, 1), setattr(table, "scalars", {"rule": "Rule", "step": 3}), table.commit(payload=[7])),
        lambda: (write(table, 2), table._commit("auto", None, explicit=False)),
        lambda: table.merge(),
        lambda: (write(table, 3), table.commit()),
        lambda: (add_tokens(table, [b"new", b"", b"er"]), write(table, 4), table.commit()),
        lambda: (table.grow(30_000), table.commit()),
        lambda: (add_tokens(table, [b"lost"]), write(table, 5), table._commit("auto", None, explicit=False)),
        lambda: table.merge(),
        lambda: table.rollback(table.generations()[0].number),
        lambda: table.set_state("Other", STATE[:1], reset=True),
        lambda: table.publish(),
    ]
    for n, step in enumerate(steps):
        step()
        write(table, 100, count=10)  # never committed: not copied
        table.token_log.append(np.frombuffer(b"no", np.uint8), np.array([0, 2]), table.shape[0])
        copy_table(table.path, tmp_path / str(n))
        assert_equal(table.path, tmp_path / str(n))
        table.rollback()
    assert sorted(os.listdir(tmp_path)) == sorted(["s", *map(str, range(len(steps)))])


def test_never_written_rows_stay_so_in_a_copy(table, tmp_path):
    write(table, 1, count=300)
    table.commit()
    table.merge()
    write(table, 2, count=300)
    table.commit()
    copy_table(table.path, tmp_path / "t")
    assert written(tmp_path / "t") == written_rows(table) < 601
    table.close()
    copy_table(tmp_path / "t", tmp_path / "u")
    assert written(tmp_path / "u") == written(tmp_path / "t")


def written_rows(table):
    table.merge()
    return table.stats()["table"]["written_rows"]


def test_a_copy_of_a_published_table_is_exact_for_any_zarr_reader(table, tmp_path):
    import zarr

    table.publish()
    copy_table(table.path, tmp_path / "t")
    seen = zarr.open_array(tmp_path / "t" / "weight", mode="r")[:]
    np.testing.assert_array_equal(bits(seen), bits(table.read(np.arange(V))))


def test_an_enormous_table_with_few_rows_is_copied_at_once(tmp_path):
    with Table.create(tmp_path / "s", 10**10, 64, init=init.normal(0, 2), seed=3) as table:
        rng = np.random.default_rng(0)
        table.write(rng.integers(0, 10**10, 50), rng.standard_normal((50, 64)).astype(np.float32))
        table.commit()
        table.merge()
        table.write([5, 10**10 - 1], 7.0)
        table.commit()
        start = time.monotonic()
        seen = []
        copy_table(table.path, tmp_path / "t", progress=lambda done, total: seen.append((done, total)))
        with Table.open(tmp_path / "t", "r") as copied:
            rows = np.concatenate([rng.integers(0, 10**10, 100), [5, 10**10 - 1]])
            np.testing.assert_array_equal(bits(copied.read(rows)), bits(table.read(rows)))
        assert seen[-1] == (10**10, 10**10)
        assert seen == sorted(seen)
        assert time.monotonic() - start < 60  # reading all of the holes would take hours
    assert files.disk_bytes(str(tmp_path / "t")) < 4 * files.disk_bytes(str(tmp_path / "s"))


def test_holes_do_not_hide_rows_and_gaps_are_joined():
    starts, stops = np.array([50, 0, 7, 20, 100, 21]), np.array([51, 5, 9, 40, 200, 30])
    assert copy_module._joined(starts, stops, 0) == [(0, 5), (7, 9), (20, 40), (50, 51), (100, 200)]
    assert copy_module._joined(starts, stops, 2) == [(0, 9), (20, 40), (50, 51), (100, 200)]
    assert copy_module._joined(starts, stops, 11) == [(0, 51), (100, 200)]
    assert copy_module._joined(starts[:0], stops[:0], 2) == []


def test_data_and_holes_of_a_file(tmp_path, monkeypatch):
    file = files.File(str(tmp_path / "sparse"), files.WRITE)
    assert file.data_after(0) is None
    file.truncate(10 << 20)
    assert file.data_after(0) is None
    file.pwrite(b"x", (5 << 20) + 7)
    start, stop = file.data_after(0)
    assert start <= (5 << 20) + 7 < stop <= (6 << 20)
    assert file.data_after((5 << 20) + 7) == ((5 << 20) + 7, stop)
    assert file.data_after(stop) is None
    assert file.data_after(10 << 20) is None
    monkeypatch.delattr(os, "SEEK_DATA")
    assert file.data_after(3) == (3, 10 << 20)
    assert file.data_after(10 << 20) is None
    file.close()


def test_a_merge_that_broke_off_does_not_hinder_a_copy(table, tmp_path):
    from bigembed.storage import upkeep

    write(table, 1, count=V)
    table.commit()
    table.merge()
    write(table, 2, count=10_000)
    table.commit()
    upkeep.begin_merge(table._store)
    upkeep.advance_merge(table._store, 1)
    table._finalizer()
    copy_table(table.path, tmp_path / "t")
    np.testing.assert_array_equal(values_of(tmp_path / "t"), values_of(table.path))


@pytest.mark.parametrize("seed", range(4))
def test_small_pieces_give_the_same_copy(table, tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(copy_module, "SCAN_BYTES", int(rng.integers(1, 3000)))
    monkeypatch.setattr(copy_module, "GAP_BYTES", int(rng.integers(0, 3000)))
    write(table, seed, count=int(rng.integers(1, 60)))
    table.commit()
    table.merge()
    write(table, seed + 10, count=int(rng.integers(1, 60)))
    table.commit()
    copy_table(table.path, tmp_path / "t")
    assert_equal(table.path, tmp_path / "t")
    assert written(tmp_path / "t") == written_rows(table)


def test_the_vocabulary_comes_along(table, tmp_path):
    folder = os.path.join(table.path, "vocab")
    os.mkdir(folder)
    for name, content in {"vocab.json": b"{}", "tokens": os.urandom(100_000), "empty": b"", "index.new": b"x"}.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    add_tokens(table, [b"a", b"b"])
    table.commit()
    add_tokens(table, [b"uncommitted"])
    copy_table(table.path, tmp_path / "t")
    assert sorted(os.listdir(tmp_path / "t" / "vocab")) == ["added", "empty", "tokens", "vocab.json"]
    for name in ("vocab.json", "tokens", "empty"):
        assert (tmp_path / "t" / "vocab" / name).read_bytes() == (tmp_path / "s" / "vocab" / name).read_bytes()
    assert_equal(table.path, tmp_path / "t")


def test_a_vocabulary_that_is_replaced_meanwhile_is_copied_again(table, tmp_path, monkeypatch):
    folder, copied = os.path.join(table.path, "vocab"), []
    os.mkdir(folder)
    for name in ("a", "z"):
        with open(os.path.join(folder, name), "w") as file:
            file.write("old")
    copy_file = copy_module._copy_file

    def replaced_in_between(source, target):
        copy_file(source, target)
        copied.append(target)
        if len(copied) == 1:
            os.mkdir(folder + "2")
            for name in ("a", "z"):
                with open(os.path.join(folder + "2", name), "w") as file:
                    file.write("newer")
            shutil.rmtree(folder)
            os.rename(folder + "2", folder)

    monkeypatch.setattr(copy_module, "_copy_file", replaced_in_between)
    copy_table(table.path, tmp_path / "t")
    assert [(tmp_path / "t" / "vocab" / name).read_text() for name in ("a", "z")] == ["newer", "newer"]
    assert len(copied) == 4


# --- what cannot be


def test_what_cannot_be_copied_is_said_and_nothing_is_made(table, tmp_path):
    with pytest.raises(errors.TableMissing):
        copy_table(tmp_path / "none", tmp_path / "t")
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.NotATable):
        copy_table(tmp_path / "file", tmp_path / "t")
    with pytest.raises(errors.TableExists, match="pass overwrite=True"):
        copy_table(table.path, tmp_path / "file")
    os.symlink(table.path, tmp_path / "link")
    for overwrite in (False, True):
        with pytest.raises(errors.InvalidArgument, match="cannot be copied onto itself"):
            copy_table(table.path, tmp_path / "link", overwrite=overwrite)
    inside = os.listdir(table.path)
    Table.create(tmp_path / "s" / "vocab" / "inner", 5, 1).close()
    for overwrite in (False, True):
        for source, target in [
            (table.path, tmp_path / "s" / "copy"),
            (table.path, tmp_path / "link" / "weight" / "copy"),
            (tmp_path / "s" / "vocab" / "inner", table.path),
            (tmp_path / "link" / "vocab" / "inner", tmp_path / "link"),
        ]:
            with pytest.raises(errors.InvalidArgument, match=r"cannot be copied to .* is inside .*s. Choose another"):
                copy_table(source, target, overwrite=overwrite)
    shutil.rmtree(tmp_path / "s" / "vocab")
    assert os.listdir(table.path) == inside
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "s"]


def test_a_name_that_only_begins_alike_is_no_folder_inside(table, tmp_path):
    write(table, 1)
    table.commit()
    copy_table(table.path, tmp_path / "s2")
    assert_equal(table.path, tmp_path / "s2")


def test_a_copy_may_replace_a_table(table, tmp_path):
    Table.create(tmp_path / "t", 5, 1).close()
    write(table, 1)
    table.commit()
    copy_table(table.path, tmp_path / "t", overwrite=True)
    assert_equal(table.path, tmp_path / "t")
    assert sorted(os.listdir(tmp_path)) == ["s", "t"]


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("where", ["base", "journal", "zeroed page", "missing chunk", "superblock"])
def test_damage_is_found_and_not_copied(table, tmp_path, where):
    write(table, 1, count=V)
    table.commit()
    table.merge()
    if where == "journal":
        write(table, 2, count=500)
        table.commit()
    table.close()
    if where == "base":
        flip(tmp_path / "s" / "weight" / "c.1.0", 4096)
    elif where == "journal":
        (name,) = os.listdir(tmp_path / "s" / "journal")
        flip(tmp_path / "s" / "journal" / name, 12_000)
    elif where == "zeroed page":
        with open(tmp_path / "s" / "weight" / "c.1.0", "r+b") as file:
            file.write(bytes(table.spec.record_bytes))
    elif where == "missing chunk":
        os.unlink(tmp_path / "s" / "weight" / "c.2.0")
    else:
        flip(tmp_path / "s" / "superblock", 100)
    with pytest.raises(errors.DamagedTable):
        copy_table(tmp_path / "s", tmp_path / "t")
    assert os.listdir(tmp_path) == ["s"]


def test_a_full_disk_ends_a_copy_and_leaves_nothing(table, tmp_path):
    write(table, 1, count=V)
    table.commit()

    def before(operation, path):
        if operation == "write" and "/t.new-" in path and "/c." in path:
            raise OSError(28, "No space left on device")

    files.before = before
    try:
        with pytest.raises(errors.DiskFull):
            copy_table(table.path, tmp_path / "t")
    finally:
        files.before = None
    assert os.listdir(tmp_path) == ["s"]


# --- beside a writer


class Meanwhile:
    """Does something to the source when the first rows of a try were read, so many times."""

    def __init__(self, tries, work, times=1):
        self.tries, self.work, self.times = tries, work, times
        self.seen = 0

    def __call__(self, done, total):
        if self.seen < min(len(self.tries), self.times):
            self.seen = len(self.tries)
            self.work()


@pytest.fixture
def pieces(monkeypatch):
    """Many pieces, so that something can happen between them; looks are as frequent."""
    monkeypatch.setattr(copy_module, "SCAN_BYTES", 40_000)
    monkeypatch.setattr(copy_module, "LOOK_SECONDS", 0.0)


@pytest.fixture
def tries(monkeypatch):
    """How many times a copy was begun."""
    begun, copy = [], copy_module._copy
    monkeypatch.setattr(copy_module, "_copy", lambda *args: begun.append(args) or copy(*args))
    return begun


def values_of(path):
    with Table.open(path, "r") as table:
        return bits(table.read(np.arange(table.shape[0]), with_state=True))


def test_commits_beside_a_copy_are_not_in_it(table, tmp_path, pieces, tries):
    write(table, 1, count=V)
    table.commit()
    table.merge()
    write(table, 2)
    table.commit(payload="here")
    want = values_of(table.path)

    def work():
        for seed in range(3, 6):
            write(table, seed)
            add_tokens(table, [b"x"])
            table.commit()

    meanwhile = Meanwhile(tries, work)
    copy_table(table.path, tmp_path / "t", progress=meanwhile)
    assert len(tries) == 1
    np.testing.assert_array_equal(values_of(tmp_path / "t"), want)
    with Table.open(tmp_path / "t") as copied:
        assert copied.generations()[0].payload == "here"
        assert len(copied.token_log.entries()[2]) == 0


def test_a_merge_of_the_copied_commits_does_no_harm(table, tmp_path, pieces, tries):
    write(table, 1, count=V)
    table.commit()
    table.merge()
    write(table, 2, count=10_000)
    table.commit(payload="here")
    want = values_of(table.path)
    meanwhile = Meanwhile(tries, table.merge)
    copy_table(table.path, tmp_path / "t", progress=meanwhile)
    assert len(tries) == 1
    np.testing.assert_array_equal(values_of(tmp_path / "t"), want)


def newer_merge(table, seed):
    def work():
        write(table, seed, count=10_000)
        table.commit(payload=seed)
        table.merge()

    return work


@pytest.mark.parametrize(
    "kind", ["merge", "rollback", "publish", "state", "begun merge", "same state anew", "replaced", "facts"]
)
def test_when_the_base_moves_on_the_copy_starts_over_and_is_the_newer_commit(table, tmp_path, pieces, tries, kind):
    write(table, 1, count=V)
    table.commit()
    table.merge()
    write(table, 2)
    table._commit("auto", None, explicit=False)

    def replaced():
        table.close()
        Table.create(table.path, V, D, seed=1, chunk_rows=4096, overwrite=True).close()

    def begun():
        from bigembed.storage import upkeep

        write(table, 3, count=10_000)
        table.commit()
        upkeep.begin_merge(table._store)
        upkeep.advance_merge(table._store, 1)

    work = {
        "merge": newer_merge(table, 3),
        "rollback": lambda: table.rollback(table.generations()[0].number),
        "publish": lambda: (write(table, 3), table.publish()),
        "state": lambda: table.set_state("Other", STATE[:1], reset=True),
        "same state anew": lambda: table.set_state("Other", STATE, reset=True),
        "begun merge": begun,
        "replaced": replaced,
        "facts": lambda: table._store.replace_spec(seed=77),
    }[kind]
    meanwhile = Meanwhile(tries, work)
    copy_table(table.path, tmp_path / "t", progress=meanwhile)
    assert len(tries) == 2
    np.testing.assert_array_equal(values_of(tmp_path / "t"), values_of(table.path))
    with Table.open(tmp_path / "t") as copied, Table.open(table.path, "r") as source:
        assert (copied.spec.owner, copied.spec.seed) == (source.spec.owner, source.spec.seed)


def test_a_source_that_never_rests_is_refused(table, tmp_path, pieces, tries):
    write(table, 1, count=V)
    table.commit()
    table.merge()
    seeds = iter(range(2, 100))
    meanwhile = Meanwhile(tries, lambda: newer_merge(table, next(seeds))(), times=1000)
    with pytest.raises(errors.TableLocked, match=r"was changed by its writer each of the 5 times .* while nobody"):
        copy_table(table.path, tmp_path / "t", progress=meanwhile)
    assert len(tries) == copy_module.ROUNDS
    assert os.listdir(tmp_path) == ["s"]


WRITE = """
import sys, numpy as np
from bigembed.storage.table import Table
rows = np.arange(0, 20_000, 7)
with Table.open(sys.argv[1]) as table:
    print("ready", flush=True)
    for number in range(1, 100_000):
        table.write(rows, float(number))
        table.commit(payload=number)
        if number % 40 == 0:
            table.merge()
"""


def test_copies_beside_a_busy_writer_are_each_one_commit(tmp_path):
    path = str(tmp_path / "s")
    with Table.create(path, V, 8, init="zeros", chunk_rows=4096) as table:
        table.write(np.arange(V), -1.0)
        table.commit()
        table.merge()
    made = refused = 0
    with subprocess.Popen([sys.executable, "-c", WRITE, path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "ready\n"
        while made + refused < 15:
            try:
                copy_table(path, tmp_path / "t", overwrite=True)
                made += 1
            except errors.TableLocked as error:
                assert "was changed by its writer" in str(error)  # noqa: PT017
                refused += 1
                continue
            with Table.open(tmp_path / "t", "r") as copied:
                found = np.unique(copied.read(np.arange(0, V, 7)))
                payload = copied.generations()[0].payload
                assert found.tolist() == [payload if payload is not None else -1.0]
                assert np.unique(copied.read(np.arange(1, V, 7))).tolist() == [-1.0]
        assert writer.poll() is None
        writer.kill()
    assert made > 5


def test_two_copies_at_once(table, tmp_path):
    write(table, 1, count=V)
    table.commit()
    threads = [threading.Thread(target=copy_table, args=(table.path, tmp_path / str(n))) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(3):
        assert_equal(table.path, tmp_path / str(n))


MEASURE = """
import resource, sys
from bigembed.storage.copy import copy_table
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
copy_table(sys.argv[1], sys.argv[3])
start = peak()
copy_table(sys.argv[2], sys.argv[3] + "2")
print(peak() - start)
"""


def test_memory_does_not_grow_with_the_table(tmp_path):
    from bigembed.storage.bulk import BulkTable

    for name, blocks in (("small", 20), ("large", 160)):
        with BulkTable(tmp_path / name, 64) as made:
            for _ in range(blocks):
                made.append(np.ones((8192, 64), np.float32))
            made.finish()
    paths = [str(tmp_path / name) for name in ("small", "large", "t")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True)
    assert int(done.stdout) < 30, done.stderr  # MiB more, for 280 MiB more
