"""What the gather benchmark prints of a case, and the bars that its figures are held against."""

from typing import Any

from common import bar
from gather_cached import HASH, IDENTITY, TORCH
from gather_ways import COLD, INDEX_SELECT, MAPPED, PREADS, UNCHECKED

WARM_ROW_BYTES = (256, 512)


def lines_of(case: dict[str, Any]) -> list[str]:
    """A heading with the limit, then each way: rate, share of the limit, ratio to the best peer, fewer ids if so."""
    best = case["ways"][case["best_peer"]]["rows_per_second"]
    mode = f", {case['mode']}, {case['misses']:,} misses" if "mode" in case else ""
    lines = [
        f"\n{case['kind']}{mode}, {case['ids']:,} ids, {case['distribution']}, rows of {case['row_bytes']} bytes, "
        f"V = {case['num_rows']:,}; limit {case['limit_per_second']:,.0f} ({case['limit_is']})"
    ]
    for name, way in case["ways"].items():
        note = "" if way["ids"] == case["ids"] else f"  with {way['ids']:,} ids"
        lines.append(
            f"  {name:32} {way['rows_per_second']:14,.0f} rows/s {way['of_limit']:6.2f} of the limit "
            f"{way['rows_per_second'] / best:6.2f} of the best peer{note}"
        )
    return lines


def bars(cases: list[dict[str, Any]], many_ids: int) -> list[dict[str, Any]]:
    """Each bar that these cases can speak of: the figure, what it must be, and whether it is."""
    found = []
    for case in cases:
        if case["ids"] == many_ids:
            found += {"cold": _cold, "warm": _warm, "cached": _cached}[case["kind"]](case)
    return found


def _rate(case: dict[str, Any], name: str) -> float:
    return case["ways"][name]["rows_per_second"]


def _cold(case: dict[str, Any]) -> list[dict[str, Any]]:
    if case["row_bytes"] != 512 or case["distribution"] != "uniform":
        return []
    ours, work = _rate(case, COLD), "cold, 512-byte rows, uniform"
    single = {name: way for name, way in case["ways"].items() if not way["is_ours"] and way["is_single_call"]}
    best = max(single, key=lambda name: single[name]["rows_per_second"])
    return [
        bar(f"{work}, of the disk's rate at depth 64", ours / case["limit_per_second"], 0.95),
        bar(f"{work}, times the best single call ({best})", ours / _rate(case, best), 3.0),
        bar(f"{work}, times {PREADS}", ours / _rate(case, PREADS), 1.0),
    ]


def _warm(case: dict[str, Any]) -> list[dict[str, Any]]:
    if case["row_bytes"] not in WARM_ROW_BYTES or case["distribution"] != "uniform":
        return []
    floor, work = _rate(case, INDEX_SELECT), f"warm, D = {case['row_bytes'] // 4}, time by index_select's"
    return [
        bar(f"{work}, without checks", floor / _rate(case, UNCHECKED), 1.0, "most"),
        bar(f"{work}, with checks", floor / _rate(case, MAPPED), 2.0, "most"),
    ]


def _cached(case: dict[str, Any]) -> list[dict[str, Any]]:
    if case["row_bytes"] != 256:
        return []
    floor = _rate(case, TORCH)
    work = f"cached, D = 64, {case['distribution']}, {case['mode']}, time by nn.Embedding's"
    return [
        bar(f"{work}, everything fits", floor / _rate(case, IDENTITY), 1.0, "most"),
        bar(f"{work}, through the hash", floor / _rate(case, HASH), 1.6, "most"),
    ]
