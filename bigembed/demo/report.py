"""What a demo run found out, and how it is printed."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigembed.demo.options import DemoOptions

if TYPE_CHECKING:  # torch is not needed to print
    from bigembed.demo.model import Loss
    from bigembed.demo.tokens import Corpus


@dataclass(frozen=True)
class Losses:
    """Held-out loss of the model with the table, and of the same dense model without it."""

    with_table: "Loss"
    without: "Loss"


@dataclass(frozen=True)
class Training:
    """How far training came.

    The seconds, of both models and of each, and the tokens and ids that go with them leave out the first step: it
    compiles kernels.
    """

    steps: int
    timed_tokens: int
    timed_ids: int
    seconds: float
    seconds_with_table: float
    seconds_without: float
    was_stopped: bool


@dataclass(frozen=True)
class Result:
    """A demo run.

    cache: hits, misses and evictions of training, in unique rows of a batch.
    peak_bytes: resident memory at its highest. imported_bytes: what it was before the text was read.
    reopened: the loss of the model with the table, after its table was closed, opened again and verified.
    path: where the table stays, or None.
    """

    options: DemoOptions
    corpus: "Corpus"
    logical_bytes: int
    disk_bytes: int
    peak_bytes: int
    imported_bytes: int
    cache: dict[str, int]
    training: Training
    before: Losses
    after: Losses
    generation: int
    verified_records: int
    reopened: "Loss"
    path: str | None

    @property
    def is_same(self) -> bool:
        """Whether the reopened table gives the loss of before, to the last bit."""
        return self.reopened.nats == self.after.with_table.nats


def report(result: Result) -> str:
    """The aligned table that ends a demo run."""
    end = [f"generation {result.generation} verified: {result.verified_records:,} records, every checksum right"]
    if result.path is not None:
        end.append(f"the table stays at {result.path}; look at it with: bigembed info {result.path}")
    return "\n".join([aligned(_facts(result)), "", aligned(_losses(result)), "", *end])


def _facts(result: Result) -> list[tuple[str, str]]:
    options, corpus, training, cache = result.options, result.corpus, result.training, result.cache
    tokens, ids = training.timed_tokens, training.timed_ids
    text = f"{corpus.num_files:,} files, {in_bytes(corpus.num_bytes)}"
    sides = f"{len(corpus.train):,} {options.tokens} to train on, {len(corpus.held_out):,} held out"
    table = f"{options.rows:,} rows x {options.dim} float32, {in_bytes(result.logical_bytes)} of weights"
    own_bytes = in_bytes(result.peak_bytes - result.imported_bytes)
    steps = f"{training.steps:,} steps of {options.batch:,} tokens in {training.seconds:.1f} s, both models in turn"
    with_table = (
        f"{_rate(tokens, training.seconds_with_table)} tokens/s, {_rate(ids, training.seconds_with_table)} ids/s"
    )
    looked_up = cache["hits"] + cache["misses"]
    return [
        ("text", f"{text}: {sides}"),
        ("table", table),
        ("disk used", in_bytes(result.disk_bytes)),
        ("peak memory", f"{in_bytes(result.peak_bytes)}, of it {own_bytes} beyond importing torch and bigembed"),
        ("training", steps + (", stopped by Ctrl-C" if training.was_stopped else "")),
        ("speed", f"{with_table} with the table; {_rate(tokens, training.seconds_without)} tokens/s without"),
        (
            "cache hits",
            f"{cache['hits'] / max(1, looked_up):.1%} of {looked_up:,} rows; {cache['evictions']:,} evicted",
        ),
    ]


def _losses(result: Result) -> list[tuple[str, str, str]]:
    same = "the same to the last bit" if result.is_same else "NOT the same: the table has lost something"
    return [
        ("held-out loss per token", "with the table", "without it"),
        ("  at the start", _loss(result.before.with_table), _loss(result.before.without)),
        ("  at the end", _loss(result.after.with_table), _loss(result.after.without)),
        ("  closed, opened again", _loss(result.reopened), same),
    ]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells in columns, two spaces apart; the last column is not padded."""
    columns = max(len(line) for line in lines) - 1
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(columns)]
    return "\n".join(
        "  ".join([*(f"{cell:{width}}" for cell, width in zip(line, widths, strict=False)), *line[columns:]]).rstrip()
        for line in lines
    )


def in_bytes(count: int) -> str:
    """A size to three digits in powers of ten: 51200000000 -> 51.2 GB."""
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if abs(size) < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.3g} {unit}"


def memory_bytes(which: str) -> int:
    """Resident memory of this process: its peak ("VmHWM") or now ("VmRSS"); where /proc is missing, the peak."""
    try:
        with open("/proc/self/status") as status:
            lines = dict(line.split(":", 1) for line in status)
        return int(lines[which].split()[0]) * 1024
    except (OSError, KeyError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _loss(loss: "Loss") -> str:
    return f"{loss.nats:.4f} nats, {loss.bits:.4f} bits"


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds if seconds > 0 else 0:,.0f}"
