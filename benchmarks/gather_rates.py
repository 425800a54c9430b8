"""Interleaved rates of several ways to gather, each round beside the limit; slow ways get fewer ids."""

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import drop_page_cache
from gather_ways import Gather, Stored, Way
from zipf import Zipf

from bigembed import Table

EXPONENT = 1.05
FIRST_IDS = 64
Draw = Callable[[int, int], np.ndarray]


def draws(distribution: str, seed: int = 0) -> Draw:
    """A function (num_rows, count) -> ids: "uniform", else Zipf. Each call gives the next ones."""
    if distribution == "uniform":
        rng = np.random.default_rng(seed)
        return lambda num_rows, count: rng.integers(0, num_rows, count)
    samplers: dict[int, Zipf] = {}
    return lambda num_rows, count: samplers.setdefault(num_rows, Zipf(num_rows, EXPONENT, seed)).sample(count)


def rates(
    ways: list[Way],
    stored: Stored,
    draw: Draw,
    count: int,
    *,
    is_cold: bool,
    rounds: int,
    cap_seconds: float,
    limit: Callable[[], float],
) -> dict[str, Any]:
    """Rows per second of each way, medians of interleaved rounds, and of the limit, measured once a round.

    Args:
        count: ids of one gather; a peer that is slow gets as many as it does in `cap_seconds`.
        is_cold: every gather starts with nothing of the files in memory, and its way is opened for it alone. Else all
            ways stay open, and each has run before it counts.
    """
    with contextlib.ExitStack() as stack:
        opened = {} if is_cold else {way.name: stack.enter_context(way.open()) for way in ways}

        def gather_of(way: Way) -> contextlib.AbstractContextManager[Gather]:
            return way.open() if is_cold else contextlib.nullcontext(opened[way.name])

        def run(way: Way, ids: int) -> float:
            with gather_of(way) as gather:
                return _seconds(way, gather, draw, ids, drop=stored if is_cold else None)

        ids_of = {}
        for way in ways:
            with gather_of(way) as gather:
                _check(way, gather, stored, draw)
            within = count if way.is_ours else _ids_within(cap_seconds, count, lambda ids, way=way: run(way, ids))
            ids_of[way.name] = within
        figures: dict[str, list[float]] = {way.name: [] for way in ways}
        limits = []
        for _ in range(rounds):
            limits.append(limit())
            for way in ways:
                figures[way.name].append(ids_of[way.name] / run(way, ids_of[way.name]))
        opened.clear()
    return _case(stored, count, ways, ids_of, figures, limits)


def _seconds(way: Way, gather: Gather, draw: Draw, count: int, drop: Stored | None = None) -> float:
    ids_N = draw(way.num_rows, count)
    gather(ids_N[:16])  # what is compiled, allocated or opened at first is not counted
    if drop is not None:
        drop_page_cache(drop.files)
        ids_N = draw(way.num_rows, count)
    start = time.perf_counter()
    out = gather(ids_N)
    seconds = time.perf_counter() - start
    del out  # giving the memory back is not counted
    return seconds


def _check(way: Way, gather: Gather, stored: Stored, draw: Draw) -> None:
    """A way that gives other rows than the table is no way."""
    ids_N = draw(way.num_rows, 64)
    with Table.open(stored.path, "r", reader="cold") as table:
        expected_ND = table.read(ids_N)
    if not np.array_equal(np.asarray(gather(ids_N)), expected_ND):
        raise AssertionError(f"{way.name} gives other rows than the table does")


def _ids_within(seconds: float, count: int, run: Callable[[int], float]) -> int:
    """About how many ids, at most `count`, run in that time: found by trying more and more of them."""
    tried = min(count, FIRST_IDS)
    while (took := run(tried)) < seconds / 4 and tried < count:
        tried = min(count, tried * 8)
    return max(1, min(count, int(tried * seconds / took)))


def _case(
    stored: Stored,
    count: int,
    ways: list[Way],
    ids_of: dict[str, int],
    figures: dict[str, list[float]],
    limits: list[float],
) -> dict[str, Any]:
    limit = statistics.median(limits)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    peers = [way.name for way in ways if not way.is_ours]
    return {
        "row_bytes": stored.row_bytes,
        "num_rows": stored.num_rows,
        "ids": count,
        "limit_per_second": limit,
        "limit_rounds": limits,
        "best_peer": max(peers, key=medians.__getitem__),
        "ways": {
            way.name: {
                "rows_per_second": medians[way.name],
                "of_limit": medians[way.name] / limit,
                "ids": ids_of[way.name],
                "num_rows": way.num_rows,
                "is_ours": way.is_ours,
                "is_single_call": way.is_single_call,
                "rounds": figures[way.name],
            }
            for way in ways
        },
    }
