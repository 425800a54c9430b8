"""A demo run, from text to report: train, commit, close, open again, verify, compare."""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from types import FrameType
from typing import Any

from tqdm import tqdm

from bigembed import Embedding, init
from bigembed.demo.model import Learner
from bigembed.demo.ngrams import ORDERS, make_batch, random_positions, spread_positions
from bigembed.demo.options import DemoOptions
from bigembed.demo.report import Losses, Result, Training, memory_bytes
from bigembed.demo.tokens import Corpus, load_corpus
from bigembed.errors import InvalidArgument, TableExists
from bigembed.storage import files

HELD_OUT_POSITIONS = 1 << 16


def run_demo(options: DemoOptions) -> Result:
    """Train the n-gram memory that `options` describe. Whatever it raises, it leaves nothing behind.

    Raises:
        TableExists: something stands at `options.path`. InvalidArgument: no usable text, or sizes that cannot be.
        KeyboardInterrupt: a second Ctrl-C in training, or any outside it.
    """
    imported_bytes = memory_bytes("VmRSS")
    check_path(options.path)
    corpus = load_corpus(options.text, options.tokens, options.seed)
    with Place(options.path) as place:
        table = Embedding(
            options.rows,
            options.dim,
            path=place.path,
            cache_bytes=options.cache_bytes,
            init=init.zeros(),
            seed=options.seed,
        )
        with table.table:
            learners = [Learner(corpus.num_classes, emb, options.seed) for emb in (table, None)]
            before = _held_out_losses(learners, corpus)
            cache_before = dict(table.stats()["cache"])
            training = train(learners, corpus, options)
            cache = {name: count - cache_before[name] for name, count in table.stats()["cache"].items()}
            after = _held_out_losses(learners, corpus)
            payload = {"steps": training.steps, "tokens": options.tokens, "held_out_nats": after.with_table.nats}
            generation = table.commit("bigembed demo", payload)
            place.keep = options.keep or options.path is not None
            disk_bytes = files.disk_bytes(place.path)
            table.close()
        learners[0].table = reopened = Embedding.open(place.path, cache_bytes=options.cache_bytes)
        with reopened.table:
            verified = reopened.table.verify()
            loss = _held_out_losses(learners[:1], corpus).with_table
            return Result(
                options=options,
                corpus=corpus,
                logical_bytes=reopened.table.spec.logical_bytes,
                disk_bytes=disk_bytes,
                peak_bytes=memory_bytes("VmHWM"),
                imported_bytes=imported_bytes,
                cache=cache,
                training=training,
                before=before,
                after=after,
                generation=generation,
                verified_records=verified.written_rows + verified.journal_records,
                reopened=loss,
                path=place.path if place.keep else None,
            )


def train(learners: list[Learner], corpus: Corpus, options: DemoOptions) -> Training:
    """Give both learners the same batches, until the steps or the seconds are used up or Ctrl-C asks to stop."""
    total = options.steps if options.steps is not None else options.seconds
    shape = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f}" + (" steps" if options.steps is not None else " s")
    step = 0
    with (
        StopOnInterrupt() as stop,
        tqdm(desc="training", total=total, bar_format=shape + "{postfix}", file=sys.stderr, disable=None) as bar,
    ):
        started = time.perf_counter()
        for positions in random_positions(corpus.train, options.batch, options.seed):
            batch = make_batch(corpus, corpus.train, positions, options.rows)
            nats = [learner.step(batch) for learner in learners]
            step += 1
            if step == 1:  # kernels were compiled: the clock starts after that
                started = time.perf_counter()
                for learner in learners:
                    learner.seconds = 0.0
            seconds = time.perf_counter() - started
            done = step if options.steps is not None else min(seconds, total)
            bar.set_postfix_str(f"nats {nats[0]:.3f}, without the table {nats[1]:.3f}", refresh=False)
            bar.update(done - bar.n)
            if done >= total or stop.is_asked:
                break
    tokens = (step - 1) * options.batch
    ids = tokens * len(ORDERS)
    return Training(step, tokens, ids, seconds, learners[0].seconds, learners[1].seconds, stop.is_asked)


def check_path(path: str | None) -> None:
    """Raise now what making a table at `path` would raise after the text was read."""
    if path is None:
        return
    where = os.path.abspath(path)
    if os.path.lexists(where):
        raise TableExists(f"{where} exists. Give --path a name that is free, or remove what is there.")
    if not os.path.isdir(os.path.dirname(where)):
        raise InvalidArgument(f"{os.path.dirname(where)} is not a folder. Make it first, or give --path another name.")


def _held_out_losses(learners: list[Learner], corpus: Corpus) -> Losses:
    """Of the first learner and the last."""
    positions = spread_positions(corpus.held_out, HELD_OUT_POSITIONS)
    losses = [learner.held_out_loss(corpus, corpus.held_out, positions) for learner in learners]
    return Losses(losses[0], losses[-1])


class Place:
    """Where the table is made: `path`, or a new temporary folder. Removed on leaving, unless `keep` was set."""

    def __init__(self, path: str | None) -> None:
        self.keep = False
        self._removed = os.path.abspath(path) if path is not None else tempfile.mkdtemp(prefix="bigembed-demo-")
        self.path = self._removed if path is not None else os.path.join(self._removed, "ngrams.bigembed")

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.keep:
            shutil.rmtree(self._removed, ignore_errors=True)


class StopOnInterrupt:
    """While it lasts, the first Ctrl-C only sets `is_asked`; the second raises KeyboardInterrupt as usual."""

    def __init__(self) -> None:
        self.is_asked = False
        self._in_charge = threading.current_thread() is threading.main_thread()  # only there signals can be handled

    def __enter__(self) -> "StopOnInterrupt":
        if self._in_charge:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._in_charge:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
