"""Table against plain arrays under seeded random operations, and the same bytes whatever the circumstances.

P1: opened again, a table is as of its last commit. P2: the last explicit commit can be restored at any time.
P3: journal and index stay within their limits and one operation. All three are checked after every step.
"""

import os
import warnings

import naive
import numpy as np
import pytest

from bigembed import init, threads
from bigembed.spec import StateColumns
from bigembed.storage import create, store
from bigembed.storage.row_index import index_rows
from bigembed.storage.table import Table

SEEDS = range(int(os.environ.get("BIGEMBED_FUZZ_SEEDS", "12")))
STEPS = 60
NUM_ROWS, MOST_ROWS, DIM, MOST_WRITTEN = 10_000, 20_000, 3, 300
LIMITS = [{"journal_bytes": 20_000}, {"index_bytes": 30_000}, {"journal_bytes": 5_000, "index_bytes": 10_000}, {}]
STATES = [(), (StateColumns("sum", 1, 0.5),), (StateColumns("step", 1), StateColumns("moments", 2, 0.25))]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)


class Machine:
    """One table, its twin, and a reader beside it; every public operation, chosen by a seed."""

    def __init__(self, path, seed):
        self.rng = np.random.default_rng(seed)
        self.path, self.options = path, {**LIMITS[seed % 4], "reader": ["cold", "mapped"][seed // 4 % 2]}
        kinds = {"init": init.uniform(-1, 1) if seed % 3 else init.normal(), "seed": seed, "chunk_rows": 4096}
        self.table = Table.create(path, NUM_ROWS, DIM, state_dim=seed % 3, **kinds, **self.options)
        self.twin = naive.Table(self.table.spec, naive.fill_initial(self.table.spec, np.arange(MOST_ROWS)))
        self.reader = Table.open(path, mode="r", reader=self.options["reader"])
        self.hot = self.rng.integers(0, NUM_ROWS, 200)
        self.most_generation = 0

    def close(self):
        self.reader.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.table.close()

    # -- operations -----------------------------------------------------------------------------------------

    def rows(self, distinct=False):
        """Half hot, half anywhere, now and then a dense run."""
        count, num_rows = int(self.rng.integers(1, MOST_WRITTEN)), len(self.twin.now_VE)
        if self.rng.random() < 0.2:
            first = int(self.rng.integers(0, num_rows - count))
            return np.arange(first, first + count)
        anywhere = self.rng.integers(0, num_rows, count)
        rows = np.where(self.rng.random(count) < 0.5, self.rng.choice(self.hot, count), anywhere)
        return np.unique(rows) if distinct else rows

    def note_auto_commit(self, before):
        if self.table.generation != before:
            assert self.table.generation == before + 1
            assert self.table.generations()[-1].note == "auto"
            self.twin.commit(explicit=False)

    def do_write(self):
        rows = self.rows()
        values, before = self.rng.standard_normal((len(rows), DIM)).astype(np.float32), self.table.generation
        self.table.write(rows, values)
        self.note_auto_commit(before)
        self.twin.write(rows, values)

    def do_write_with_state(self):
        rows = self.rows(distinct=True)
        values = self.rng.standard_normal((len(rows), self.table.spec.row_width)).astype(np.float32)
        before = self.table.generation
        self.table.safe_point(len(rows))
        self.note_auto_commit(before)
        self.table.append_rows(rows, values)
        self.twin.write(rows, values)

    def do_commit(self):
        assert self.table.commit("by hand", {"step": 1}) == self.table.generation
        self.twin.commit()

    def do_merge(self):
        before = self.table.generation
        self.table.merge()
        self.note_auto_commit(before)

    def do_rollback(self):
        self.table.rollback()
        self.twin.rollback(to_retained=False)

    def do_rollback_to_retained(self):
        number, before = self.table.generations()[0].number, self.table.generation
        assert self.table.rollback(number) == (before + 1 if number != before else before)
        self.twin.rollback(to_retained=True)

    def do_grow(self):
        num_rows = min(MOST_ROWS, len(self.twin.now_VE) + int(self.rng.integers(1, 900)))
        self.table.grow(num_rows)
        self.twin.grow(num_rows)

    def do_publish(self):
        self.table.publish()
        self.twin.commit()
        assert self.table._store.is_plain

    def do_set_state(self):
        state = STATES[int(self.rng.integers(0, 3))]
        before = self.table.generation
        self.table.set_state(f"rule{self.rng.integers(0, 9)}", state, reset=True)
        if self.table.generation != before or not self.table.has_rows:
            self.twin.set_state(self.table.spec.state_initial)

    def do_reopen(self):
        if self.twin.has_changes:
            with pytest.warns(UserWarning, match="closed without a commit"):
                self.table.close()
        else:
            self.table.close()
        self.table = Table.open(self.path, **self.options)
        self.twin.rollback(to_retained=False)

    def do_verify(self):
        self.table.verify()
        self.reader.refresh()
        self.reader.verify()

    # -- invariants -----------------------------------------------------------------------------------------

    def check(self):
        table, twin = self.table, self.twin
        every = np.arange(len(twin.now_VE))
        assert table.shape == (len(every), DIM)
        np.testing.assert_array_equal(table.read(every, with_state=True), twin.now_VE)
        assert self.reader.refresh() == table.generation
        head = self.reader.read(np.arange(self.reader.shape[0]), with_state=True)
        np.testing.assert_array_equal(head, twin.head_VE)
        assert table.generation >= self.most_generation
        self.most_generation = table.generation
        self.check_limits()

    def check_limits(self):
        spec, limits = self.table.spec, self.table.limits
        operation = MOST_WRITTEN * (spec.record_bytes + 8) + 8_000  # one write; commits and headers
        folder = os.path.join(self.path, "journal")
        on_disk = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
        assert on_disk <= limits.journal_bytes + operation
        assert self.table.stats()["index"]["rows"] <= 2 * (index_rows(limits.index_bytes) + MOST_WRITTEN)


OPERATIONS = {
    "write": 30,
    "write_with_state": 10,
    "commit": 8,
    "merge": 8,
    "rollback": 3,
    "rollback_to_retained": 4,
    "grow": 4,
    "publish": 1,
    "set_state": 2,
    "reopen": 6,
    "verify": 3,
}


@pytest.mark.parametrize("seed", SEEDS)
def test_table_equals_its_twin_after_every_operation(tmp_path, monkeypatch, seed):
    if seed // 2 % 2:
        monkeypatch.setattr(store, "BEHIND_BYTES", 1)  # every append is written by another thread
    machine = Machine(str(tmp_path / "t"), seed)
    names, weights = list(OPERATIONS), np.array(list(OPERATIONS.values()), float)
    log = []
    try:
        for _ in range(STEPS):
            log.append(str(machine.rng.choice(names, p=weights / weights.sum())))
            getattr(machine, f"do_{log[-1]}")()
            machine.check()
        machine.do_rollback_to_retained()
        machine.check()
        machine.table.verify()
    except BaseException as error:
        error.add_note(f"after {log}")
        raise
    finally:
        machine.close()


# --- the same operations, the same bytes


def run_script(path, monkeypatch, num_threads=1, every_merge=False, reopen=False, **options):
    """A fixed sequence of writes, commits and growth; the bytes of the merged table."""
    threads_before = threads.get_num_threads()
    threads.set_num_threads(num_threads)
    rng = np.random.default_rng(7)
    with monkeypatch.context() as patch:  # the salt is in every check
        patch.setattr(create.secrets, "randbits", lambda bits: 12345)
        table = Table.create(path, NUM_ROWS, DIM, seed=1, chunk_rows=4096, **options)
    try:
        for step in range(12):
            rows = rng.integers(0, table.shape[0], [30, 6000][step % 2])
            table.write(rows, rng.standard_normal((len(rows), DIM)).astype(np.float32))
            if step == 6:
                table.grow(NUM_ROWS + 5000)
            table.commit()
            if every_merge:
                table.merge()
            if reopen:
                table.close()
                table = Table.open(path, **options)
        table.merge()
        values = table.read(np.arange(table.shape[0]), with_state=True)
    finally:
        table.close()
        threads.set_num_threads(threads_before)
    folder = os.path.join(path, "weight")
    chunks = {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}  # noqa: SIM115
    return chunks, values


VARIANTS = {
    "two threads": {"num_threads": 2},
    "five threads": {"num_threads": 5},
    "cold": {"reader": "cold"},
    "cold, five threads": {"reader": "cold", "num_threads": 5},
    "mapped": {"reader": "mapped"},
    "a merge after every commit": {"every_merge": True},
    "tiny journal": {"journal_bytes": 3000},
    "tiny index": {"index_bytes": 3000, "reader": "cold"},
    "huge journal": {"journal_bytes": 1 << 40},
    "reopened in the middle": {"reopen": True},
    "everything": {"reopen": True, "journal_bytes": 9000, "num_threads": 5, "every_merge": True, "reader": "cold"},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_same_operations_give_the_same_bytes(tmp_path, monkeypatch, variant):
    chunks, values = run_script(str(tmp_path / "plain"), monkeypatch)
    other_chunks, other_values = run_script(str(tmp_path / "other"), monkeypatch, **variant)
    np.testing.assert_array_equal(values.view(np.uint32), other_values.view(np.uint32))
    assert chunks == other_chunks
    assert len(chunks) == 5  # four chunk files and zarr.json


def test_index_memory_stays_within_its_limit_and_one_operation(tmp_path):
    limit, rng, most = 1 << 20, np.random.default_rng(0), 0
    with Table.create(tmp_path / "t", 10**7, 1, state_dim=0, init="zeros", index_bytes=limit) as table:
        for _ in range(150):
            table.write(rng.integers(0, 10**7, 1000), 1.0)
            most = max(most, table.stats()["index"]["memory_bytes"])
        assert table.stats()["merge"]["merges"] > 2
        table.commit()
    assert most <= limit + 1000 * 43
