"""Prefetch through a real table: no result changes, whatever is in flight; and lookahead over loaders."""

import os
import threading

import numpy as np
import pytest
import torch
from training import RULES, batches, rows_and_state, small_embedding, small_table, weights

import bigembed
from bigembed import threads
from bigembed.errors import InvalidArgument, InvalidIds, RowOutOfRange, TableClosed
from bigembed.storage import files


def staged(emb):
    return emb.stats()["prefetch"]


def wait_for_reads():
    threads.run_in_background(int).wait()


# --- ReadAhead


@pytest.fixture
def table(tmp_path):
    """A table with rows in the base, in the frozen and active journal, and never written."""
    with small_table(tmp_path, 9000, 3, chunk_rows=4096) as made:
        rng = np.random.default_rng(0)
        made.write(np.arange(0, 9000, 3), rng.standard_normal((3000, 3)).astype(np.float32))
        made.commit("base")
        made.merge()
        made.write(np.arange(0, 9000, 7), rng.standard_normal((1286, 3)).astype(np.float32))
        made.commit("journal")
        made.write(np.arange(5, 9000, 500), rng.standard_normal((18, 3)).astype(np.float32))
        yield made


def read(plan, table, rows_M):
    out_ME = np.empty((len(rows_M), table.spec.row_width), np.float32)
    return plan.run(out_ME), out_ME


def test_a_planned_read_equals_the_tables_own(table, monkeypatch):
    monkeypatch.setattr("bigembed.storage.read_ahead.SLICE_BYTES", 1000 * table.spec.record_bytes)
    rows_M = np.unique(np.random.default_rng(1).integers(0, 9000, 4000))
    sound_M, out_ME = read(table.read_ahead(rows_M), table, rows_M)
    assert sound_M.all()
    assert out_ME.tobytes() == table.read(rows_M, with_state=True).tobytes()


def test_a_planned_read_is_of_the_moment_it_was_planned_whatever_is_merged_since(table):
    rows_M = np.arange(0, 9000, 7)
    expected = table.read(rows_M, with_state=True)
    plan = table.read_ahead(rows_M)
    table.merge()  # removes the segments where the rows are
    table.merge()
    sound_M, out_ME = read(plan, table, rows_M)
    assert sound_M.all()
    assert out_ME.tobytes() == expected.tobytes()


def test_a_planned_read_reports_damage_and_missing_files_and_raises_nothing(table):
    rows_M = np.array([0, 1, 3, 6, 8997])
    table.merge()
    path = table._store.base.chunks.path(0)
    with open(path, "r+b") as file:
        file.seek(3 * table.spec.record_bytes)
        file.write(b"\xff\xff\xff\xff")
    sound_M, _ = read(table.read_ahead(rows_M), table, rows_M)
    assert sound_M.tolist() == [True, True, False, True, True]
    os.unlink(path)
    table._store.base.chunks.close()
    sound_M, _ = read(table.read_ahead(rows_M), table, rows_M)
    assert not sound_M[:4].any()


def test_a_lost_page_of_the_journal_is_no_row_that_was_never_written(table):
    rows_M = np.array([5])
    place = int(table._store.journal.find(rows_M)[0])
    file = table._store.journal._files[place >> 40]
    os.pwrite(file.fd, bytes(table.spec.record_bytes), place & ((1 << 40) - 1))
    sound_M, _ = read(table.read_ahead(rows_M), table, rows_M)
    assert not sound_M.any()


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_descriptors_are_given_back(table):
    before = open_descriptors()
    rows_M = np.arange(0, 9000, 7)
    read(table.read_ahead(rows_M), table, rows_M)
    cancelled = table.read_ahead(rows_M)
    cancelled.cancel()
    assert not read(cancelled, table, rows_M)[0].any()
    table.read_ahead(rows_M).close()
    assert open_descriptors() == before


# --- through a module


def test_a_prefetched_lookup_reads_nothing(tmp_path, monkeypatch):
    emb = small_embedding(tmp_path, 1000, cache_rows=64)
    emb.weight[:] = torch.randn(1000, 4)
    emb.commit()
    emb.table.merge()
    ids = torch.arange(0, 1000, 50)
    expected = weights(emb)[ids]
    emb.prefetch(ids)
    wait_for_reads()
    monkeypatch.setattr(emb.table, "fetch_rows", lambda *_: pytest.fail("it was read again"))
    assert torch.equal(emb(ids), expected)
    assert staged(emb)["taken"] == 20


def test_prefetch_changes_nothing_in_the_cache(tmp_path):
    emb = small_embedding(tmp_path, 1000, cache_rows=64)
    emb(torch.arange(100))
    index = emb.trainable.cache.index
    before = index.key.copy(), index.score.copy(), emb.stats()["cache"]
    emb.prefetch(torch.arange(50, 500))
    wait_for_reads()
    assert (index.key == before[0]).all()
    assert (index.score == before[1]).all()
    assert emb.stats()["cache"] == before[2]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cache_rows", [1, 64])
def test_a_row_updated_between_its_prefetch_and_its_use_is_seen_updated(tmp_path, rule, cache_rows):
    """Adjacent batches share most rows; while the next are in flight others are looked up unannounced, or written."""

    def train(depth):
        unannounced = iter(batches(15, 150, size=(20, 3), seed=1))
        emb = small_embedding(tmp_path, 150, seed=3, cache_rows=cache_rows)
        make, facts = RULES[rule]
        opt = make(emb, **facts)
        for ids in bigembed.lookahead(list(batches(15, 150, size=(50, 3))), {emb: lambda ids: ids}, depth=depth):
            emb(ids).sin().sum().backward()
            others = next(unannounced)
            emb(others[:10]).cos().sum().backward()
            emb.weight[others[10:, 0]] = torch.ones(10, 4)
            opt.step()
            opt.zero_grad()
        emb.trainable.caches.staging._check()
        return rows_and_state(emb).tobytes(), staged(emb)

    plain, _ = train(0)
    for depth in (1, 2, 4):
        trained, stats = train(depth)
        assert trained == plain
        assert stats["staged"] > 200
        assert stats["rewritten"] > 10, "no row was written while it was in flight"


def test_writes_through_the_table_reach_rows_in_flight(tmp_path):
    emb = small_embedding(tmp_path, 1000, cache_rows=64)
    emb.prefetch(torch.arange(100))
    emb.weight[torch.arange(40, 60)] = torch.ones(20, 4)
    assert torch.equal(emb(torch.arange(40, 60)), torch.ones(20, 4))


def test_rollback_growth_and_a_new_rule_forget_what_is_in_flight(tmp_path):
    emb = small_embedding(tmp_path, 1000, cache_rows=64)
    ids = torch.arange(100)
    for change in (
        lambda: emb.table.rollback(),
        lambda: emb.table.grow(emb.num_embeddings + 100),
        lambda: bigembed.optim.Adam(emb),
        lambda: emb.table.refresh(),
    ):
        emb.weight[ids] = torch.ones(100, 4)
        emb.prefetch(torch.arange(200))
        change()
        assert torch.equal(emb(torch.arange(200)), weights(emb)[:200])


def test_a_reader_prefetches_too(tmp_path):
    table = small_table(tmp_path, 1000, 4, is_temporary=False)
    table.write(np.arange(1000), np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32))
    table.commit()
    reader = bigembed.Embedding.open(table.path, mode="r", cache_rows=64)
    ids = torch.arange(0, 990, 9)
    reader.prefetch(ids)
    assert torch.equal(reader(ids), torch.from_numpy(table.read(ids.numpy())))
    reader.prefetch(ids + 1)
    table.write(np.arange(1000), np.zeros((1000, 4), np.float32))
    table.commit()
    reader.table.refresh()
    assert (reader(ids) == 0).all()
    reader.close()
    table.close()


def test_damage_is_raised_by_the_lookup_and_not_by_the_prefetch(tmp_path):
    emb = small_embedding(tmp_path, 1000, cache_rows=64)
    emb.weight[:] = torch.randn(1000, 4)
    emb.commit()
    emb.table.merge()
    with open(emb.table._store.base.chunks.path(0), "r+b") as file:
        file.seek(7 * emb.table.spec.record_bytes)
        file.write(b"\xff\xff\xff\xff")
    emb.prefetch(torch.arange(20))
    wait_for_reads()
    with pytest.raises(bigembed.errors.DamagedRow, match="row 7 is damaged"):
        emb(torch.arange(20))
    assert emb(torch.tensor([8])).shape == (1, 4)


def test_an_io_error_in_the_background_costs_nothing_but_the_read(tmp_path, monkeypatch):
    emb = small_embedding(tmp_path, 1000, cache_rows=64)
    emb.weight[:] = torch.randn(1000, 4)
    expected = weights(emb)

    def fail_in_background(name, path):
        if threading.current_thread().name == "bigembed background":
            raise OSError(5, "broken")

    monkeypatch.setattr(files, "before", fail_in_background)
    emb.prefetch(torch.arange(100))
    assert torch.equal(emb(torch.arange(100)), expected[:100])
    assert staged(emb)["taken"] == 0


def test_bad_ids_and_closed_tables_are_refused(tmp_path):
    emb = small_embedding(tmp_path, 1000)
    with pytest.raises(RowOutOfRange, match="1000"):
        emb.prefetch(torch.tensor([1000]))
    with pytest.raises(InvalidIds):
        emb.prefetch(torch.tensor([1.0]))
    emb.prefetch(torch.empty(0, dtype=torch.int64))
    emb.close()
    with pytest.raises(TableClosed):
        emb.prefetch(torch.tensor([1]))


def test_closing_with_rows_in_flight_is_no_trouble(tmp_path):
    for _ in range(20):
        emb = small_embedding(tmp_path, 1000, cache_rows=64)
        emb.prefetch(torch.arange(500))
        emb.close()
    wait_for_reads()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_goes_on_without_its_parents_thread(tmp_path):
    emb = small_embedding(tmp_path, 1000, cache_rows=64)
    expected = weights(emb)
    emb.prefetch(torch.arange(300))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            same = torch.equal(emb(torch.arange(300)), expected[:300])
            emb.prefetch(torch.arange(300, 600))
            same = same and torch.equal(emb(torch.arange(300, 600)), expected[300:600])
            code = 0 if same else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(emb(torch.arange(300)), expected[:300])


def test_a_task_that_a_fork_cut_off_fails_instead_of_waiting_for_ever():
    task = threads.Task(int, ())
    background = threads._Background("test")
    background._unfinished.append(task)
    background.fail_all()
    task.wait()
    assert "forked" in str(task.error)


def test_the_option_is_checked():
    with pytest.raises(InvalidArgument, match="prefetch_bytes must be at least 0, not -1"):
        bigembed.Embedding(10, 2, prefetch_bytes=-1)


def test_without_room_nothing_is_read_ahead(tmp_path):
    emb = bigembed.Embedding.open(small_table(tmp_path), cache_rows=3, prefetch_bytes=0)
    emb.prefetch(torch.arange(10))
    assert staged(emb)["refused"] == 10
    assert torch.equal(emb(torch.arange(10)), weights(emb)[:10])


# --- lookahead


class Recorder:
    """Stands in for a module: what was prefetched, and what came out, in order."""

    def __init__(self):
        self.events = []

    def prefetch(self, ids):
        self.events.append(("prefetch", int(ids)))


@pytest.mark.parametrize("depth", [0, 1, 2, 4, 100])
@pytest.mark.parametrize("count", [0, 1, 3, 10])
def test_lookahead_keeps_order_and_is_depth_batches_ahead(depth, count):
    module = Recorder()
    loader = [torch.tensor(n) for n in range(count)]
    ahead = bigembed.lookahead(loader, {module: lambda ids: ids}, depth=depth)
    assert len(ahead) == count
    for _ in range(2):  # it may be iterated again
        module.events.clear()
        for n, batch in enumerate(ahead):
            assert int(batch) == n
            assert ("prefetch", min(n + depth, count - 1)) in module.events or depth == 0
            assert ("prefetch", n + depth + 1) not in module.events
        assert module.events == ([("prefetch", n) for n in range(count)] if depth else [])


def test_lookahead_takes_several_modules_and_several_ids(tmp_path):
    first, second = (small_embedding(tmp_path, 1000, cache_rows=64) for _ in range(2))
    loader = [{"a": torch.tensor([n, 500 + n]), "b": (torch.tensor([n]), torch.tensor([[900]]))} for n in range(5)]
    for batch in bigembed.lookahead(iter(loader), {first: lambda b: b["a"], second: lambda b: b["b"]}):
        first(batch["a"])
        second(torch.cat([ids.reshape(-1) for ids in batch["b"]]))
    assert staged(first)["taken"] == 10
    assert staged(second)["taken"] == 6


def test_a_bad_batch_raises_when_it_is_its_turn(tmp_path):
    emb = small_embedding(tmp_path, 1000)
    loader = [torch.tensor([1]), torch.tensor([1000]), torch.tensor([2])]
    seen = []
    with pytest.raises(RowOutOfRange):
        for ids in bigembed.lookahead(loader, {emb: lambda ids: ids}):
            emb(ids)
            seen.append(int(ids))
    assert seen == [1]


@pytest.mark.parametrize(
    ("ids_of_batch", "depth", "message"),
    [
        ({torch.nn.Embedding(2, 2): len}, 2, "is no bigembed module"),
        ({Recorder(): 3}, 2, "int is no bigembed module with a function"),
        ({}, -1, "depth must be a whole number of batches, at least 0, not -1"),
        ({}, 1.5, "not 1.5"),
    ],
)
def test_lookahead_refuses_what_it_cannot_do(ids_of_batch, depth, message):
    with pytest.raises(InvalidArgument, match=message):
        bigembed.lookahead([], ids_of_batch, depth)
