"""What a hostile user did once, and what must come of it."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

import bigembed
from bigembed import errors, optim, threads
from bigembed.errors import InvalidArgument, StaleGraph, StorageFailed
from bigembed.storage import files


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "t")


# -- rollback and gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [20_000, 1 << 26])
def test_a_gradient_of_rows_that_were_rolled_back_is_forgotten(path, cache_bytes):
    emb = bigembed.Embedding(10_000, 4, path=path, cache_bytes=cache_bytes)
    opt = optim.SGD(emb, lr=1.0)
    emb.weight[0:5000] = 5.0
    emb.commit("precious")
    emb.table.grow(20_000)
    emb(torch.tensor([2, 15_000])).sum().backward()
    emb.table.rollback()
    opt.step()
    assert torch.equal(emb.weight[2], torch.full((4,), 5.0))
    emb.commit("after")
    emb.close()
    with bigembed.Table.open(path, mode="r") as table:
        assert table.shape == (10_000, 4)
        assert (table.read(np.arange(5000)) == 5.0).all()


def test_a_backward_through_rolled_back_rows_is_refused(path):
    emb = bigembed.Embedding(100, 4, path=path, seed=0)
    optim.SGD(emb, lr=1.0)
    emb.commit()
    loss = emb(torch.arange(3)).sum()
    emb.table.rollback()
    with pytest.raises((StaleGraph, errors.NoOptimizer)):
        loss.backward()
    emb.close()


# -- temporary tables -------------------------------------------------------------------------------------------


def test_only_temporary_tables_skip_syncs(tmp_path):
    others = set(files._temporary_roots)
    with bigembed.Table.create(tmp_path / "data", 10, 2, is_temporary=True) as table:
        assert files._is_temporary(table.path + "/journal/x")
        assert not files._is_temporary(str(tmp_path / "data2" / "journal"))
    bigembed.Table.create(tmp_path / "kept", 10, 2).close()
    with pytest.raises(errors.TableExists):
        bigembed.Table.create(tmp_path / "kept", 10, 2, is_temporary=True)
    assert set(files._temporary_roots) <= others


def test_a_reader_cannot_be_temporary(path):
    with bigembed.Table.create(path, 10, 2):
        with pytest.raises(InvalidArgument, match="needs mode='r\\+'"):
            bigembed.Table.open(path, mode="r", is_temporary=True)
        assert os.path.exists(path)


# -- threads, fork, Ctrl-C --------------------------------------------------------------------------------------


def test_backwards_in_several_threads_lose_no_gradient(path):
    emb = bigembed.Embedding(400, 4, path=path, init="zeros")
    opt = optim.SGD(emb, lr=1.0)
    gate = threading.Barrier(4)

    def work(number):
        gate.wait()
        for turn in range(10):
            emb(torch.arange(10) + 10 * (4 * turn + number)).sum().backward()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    opt.step()
    assert torch.equal(emb.weight[:], torch.full((400, 4), -1.0))
    emb.table.commit()
    emb.close()


def test_a_child_forked_while_a_thread_trains_reads_right_rows(path):
    emb = bigembed.Embedding(5000, 4, path=path, seed=0, cache_bytes=40_000)
    expected = emb.weight[:].clone()
    opt = optim.SGD(emb, lr=0.0)
    stop = threading.Event()

    def train():
        while not stop.is_set():
            emb(torch.randint(0, 5000, (256,))).sum().backward()
            opt.step()
            opt.zero_grad()

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                with torch.no_grad():
                    right = np.array_equal(emb.table.read(np.arange(5000)), expected.numpy())
                os._exit(0 if right else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        trainer.join()
    emb.commit()
    emb.close()


INTERRUPTED = """
import os, signal, sys, threading, time, numpy as np
from bigembed import threads
from bigembed.storage.table import Table
threads.set_num_threads(3)
threads.GRAIN_ITEMS = 1
table = Table.create(sys.argv[1], 40_000, 8, seed=1)
want, rows, caught = table.read(np.arange(40_000)), np.arange(40_000), 0
def disturb():
    for _ in range(300):
        time.sleep(0.003)
        os.kill(os.getpid(), signal.SIGINT)
pest = threading.Thread(target=disturb, daemon=True)
pest.start()
while True:
    try:
        while pest.is_alive():
            table.read(rows)
        break
    except KeyboardInterrupt:
        caught += 1
signal.signal(signal.SIGINT, signal.SIG_IGN)
assert (table.read(rows) == want).all()
table.commit("after all that")
table.close()
print(caught)
"""


def test_ctrl_c_again_and_again_hangs_nothing(path):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, path], capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, -signal.SIGINT), done.stderr
    if done.returncode == 0:
        assert int(done.stdout) > 20


def test_a_run_that_began_before_the_number_of_threads_changed_is_finished():
    before = threads.get_num_threads()
    threads.set_num_threads(2)
    pool, done = threads._pool, []
    try:
        pool.run([threads.Task(done.append, (1,))], lambda: None)
        threads.set_num_threads(3)
        late = threading.Thread(target=lambda: pool.run([threads.Task(done.append, (2,))], lambda: None), daemon=True)
        late.start()
        late.join(30)
        assert not late.is_alive(), "it waits for workers that are gone"
        assert done == [1, 2]
    finally:
        threads.set_num_threads(before)


def test_the_workers_of_a_replaced_pool_stop():
    pool = threads._Pool(4)
    pool.run([threads.Task(int, ()) for _ in range(3)], lambda: None)
    workers = list(pool._workers)
    assert len(workers) == 3
    del pool
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()


# -- a full disk ------------------------------------------------------------------------------------------------


def test_a_step_that_could_not_be_stored_counts_once(path, monkeypatch):
    emb = bigembed.Embedding.open(bigembed.Table.create(path, 200, 4, init="zeros"), cache_rows=3)
    opt = optim.SGD(emb, lr=1.0)
    emb(torch.arange(50)).sum().backward()
    real, failures = emb.table.append_rows, [True]

    def full_once(rows_M, values_ME):
        if failures:
            failures.pop()
            raise StorageFailed(28, "no space")
        real(rows_M, values_ME)

    monkeypatch.setattr(emb.table, "append_rows", full_once)
    opt.step()
    opt.zero_grad()
    assert torch.equal(emb.weight[0:50], torch.full((50, 4), -1.0))
    emb.commit()
    monkeypatch.undo()
    emb.close()
    with bigembed.Table.open(path) as table:
        assert (table.read(np.arange(50)) == -1.0).all()


# -- limits -----------------------------------------------------------------------------------------------------


def test_steps_larger_than_the_limits_leave_one_epoch(path):
    with bigembed.Table.create(path, 10**6, 1, state_dim=0, journal_bytes=1 << 16, index_bytes=1 << 16) as table:
        rng = np.random.default_rng(0)
        for _ in range(6):
            table.write(rng.permutation(10**6)[:20_000], 1.0)
            assert table.stats()["index"]["rows"] <= 20_000
            assert table.stats()["journal"]["disk_bytes"] < 20_000 * (table.spec.record_bytes + 8) + (1 << 16)
        table.commit()


# -- other things -----------------------------------------------------------------------------------------------


def test_rules_change_freely_while_no_row_is_written(path):
    emb = bigembed.Embedding(100, 4, path=path)
    for rule in (optim.RowwiseAdagrad, optim.Adagrad, optim.Adam, optim.SGD):
        opt = rule(emb, lr=0.1)
    emb(torch.tensor([1])).sum().backward()
    opt.step()
    emb.commit()
    emb.close()


def test_torchs_default_dtype_and_device_change_nothing(path):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            emb = bigembed.Embedding(50, 4, path=path)
        assert emb.handle.dtype == torch.float32
        assert emb.handle.device.type == "cpu"
        emb.weight[3] = np.ones(4, np.float32)
        nn.init.normal_(emb.weight)
    finally:
        torch.set_default_dtype(torch.float32)
    emb.commit()
    emb.close()


@pytest.mark.parametrize("cache_bytes", [1 << 62, "1GB", 1e6])
def test_a_constructor_that_fails_leaves_nothing(path, cache_bytes):
    with pytest.raises(InvalidArgument, match="cache"):
        bigembed.Embedding(10**12, 64, path=path, cache_bytes=cache_bytes)
    assert not os.path.exists(path)


def test_overwriting_through_a_link_replaces_the_table(tmp_path):
    bigembed.Table.create(tmp_path / "real", 10, 2).close()
    os.symlink(tmp_path / "real", tmp_path / "link")
    bigembed.Table.create(tmp_path / "link", 20, 2, overwrite=True).close()
    assert os.path.islink(tmp_path / "link")
    with bigembed.Table.open(tmp_path / "real", mode="r") as table:
        assert table.shape == (20, 2)


@pytest.mark.parametrize("wrong", ["", 5, None])
def test_a_path_that_is_none(wrong):
    with pytest.raises(InvalidArgument, match="path must name a folder"):
        bigembed.Table.create(wrong, 10, 2)


@pytest.mark.filterwarnings("ignore")  # dynamo says that the lookup is a graph break, as it should be
def test_a_compiled_model_trains_as_the_eager_one():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(bigembed.Embedding(50, 4, seed=1), nn.Linear(4, 1))

    losses = []
    for wrap in (lambda one: one, lambda one: torch.compile(one, backend="eager")):
        one = model()
        opt, run = optim.SGD(one, lr=0.5), wrap(one)
        for _ in range(3):
            loss = run(torch.arange(10)).square().sum()
            loss.backward()
            opt.step()
            one.zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[1]
