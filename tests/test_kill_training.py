"""SIGKILL against a process that trains: the table is as of its last commit, whatever the moment, and goes on.

The child trains out of its cache with tiny limits, so commits by itself, merges and undo happen all the time. Batches
are a function of the step number and the step count travels with the commits, so a twin in memory knows every state.
"""

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

import bigembed

NUM_ROWS, DIM, SEED = 600, 4, 3
STEPS_A_COMMIT = 7
KILLS = int(os.environ.get("BIGEMBED_KILLS", "20"))


def open_for_training(path: str, **limits: int) -> tuple[bigembed.Embedding, torch.optim.Optimizer]:
    emb = bigembed.Embedding.open(path, **limits)
    return emb, bigembed.optim.Adagrad(emb, lr=0.5)


def train_step(emb: bigembed.Embedding, opt: torch.optim.Optimizer, step: int) -> None:
    ids = torch.from_numpy(np.random.default_rng([SEED, step]).integers(0, NUM_ROWS, 48))
    (emb(ids) * torch.arange(1, DIM + 1)).square().sum().backward()
    opt.step()
    opt.zero_grad()


def child(path: str, reports: Connection) -> None:
    """Train until killed; report each commit that returned as (generation, step)."""
    torch.set_num_threads(1)
    emb, opt = open_for_training(path, cache_rows=16, journal_bytes=16_000)
    step = int(emb.table.scalars.get("step", 0))
    while True:
        step += 1
        train_step(emb, opt, step)
        if step % STEPS_A_COMMIT == 0:
            reports.send((emb.commit(f"step {step}", payload=step), step))


class Twin:
    """The same training in memory: `state(step)` is the whole table after that many steps."""

    def __init__(self, path: str) -> None:
        with bigembed.Table.create(path, NUM_ROWS, DIM, seed=SEED) as table:
            table.commit()
        self._emb, self._opt = open_for_training(path)
        self._states = [self._whole()]

    def _whole(self) -> np.ndarray:
        return self._emb.table.read(np.arange(NUM_ROWS), with_state=True)

    def state(self, step: int) -> np.ndarray:
        while len(self._states) <= step:
            train_step(self._emb, self._opt, len(self._states))
            self._states.append(self._whole())
        return self._states[step]


def test_a_killed_training_run_is_at_its_last_commit_and_goes_on(tmp_path: Path) -> None:
    path = str(tmp_path / "table")
    with bigembed.Table.create(path, NUM_ROWS, DIM, seed=SEED) as table:
        table.commit("start", payload=0)
    twin = Twin(str(tmp_path / "twin"))
    chance = random.Random(SEED)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bigembed.nn.embedding", "bigembed.optim"])
    whole = np.arange(NUM_ROWS)
    auto_commits = 0
    for kill in range(KILLS):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(path, sending))
        process.start()
        sending.close()
        assert receiving.poll(60), "the child trains"
        time.sleep(chance.uniform(0.0, 0.25))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reported = (0, 0)
        try:
            while receiving.poll():
                reported = receiving.recv()
        except EOFError:
            pass

        with bigembed.Table.open(path) as table:
            table.verify()
            step = table.scalars["step"]
            assert table.generation >= reported[0], "a commit that returned is there"
            assert step >= reported[1]
            assert np.array_equal(table.read(whole, with_state=True), twin.state(step)), f"kill {kill}, step {step}"
            kept = table.generations()[0]
            auto_commits += not table.generations()[-1].explicit
            if kill % 2:  # P2, through whatever automatic commits and merges came after it
                table.rollback(kept.number)
                assert np.array_equal(table.read(whole, with_state=True), twin.state(kept.payload))
                assert table.scalars.get("step", 0) == kept.payload
                table.verify()
    assert auto_commits, "some kills came after a commit that the table made by itself"
