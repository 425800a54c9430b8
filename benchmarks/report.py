"""Draws the figures of the results and writes results/README.md: memory, gathers and training, each with its bars.

Every table says which command made it, on which commit. A result that is not there is said to be missing, with the
command that makes it.

    python benchmarks/report.py [--results benchmarks/results]
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common import RESULTS, bar
from report_figures import draw_gather, draw_memory, draw_out_of_core, draw_train, main_cold_case

MIB = 1 << 20
COMMANDS = {
    "memory": "memory.py",
    "gather": "bench_gather.py",
    "train": "bench_train.py",
    "train_out_of_core": "bench_train_out_of_core.py",
    "train_lookahead": "bench_train_lookahead.py",
    "train_sparse": "bench_train_sparse.py",
}
Result = dict[str, Any]


def table(heads: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def origin(result: Result) -> str:
    """Where the numbers below come from."""
    return f"`{result['command']}`, commit {result['commit']}, {result['time']}, {result['machine']}.\n"


def bars_table(bars: list[Result]) -> str:
    rows = (
        (one["work"], _short(one["figure"]), f"at {one['sense']} {one['bar']:.2f}", verdict(one["passed"]))
        for one in bars
    )
    return table(["bar", "measured", "must be", ""], rows)


def _short(figure: float) -> str:
    return f"{figure:.2f}" if figure >= 0.1 else f"{figure:.3f}"


def verdict(passed: bool) -> str:
    return "pass" if passed else "**missed**"


def memory_section(result: Result, folder: Path) -> str:
    draw_memory(result, folder / "memory.png")
    rows = []
    for line in result["lines"]:
        ours, peer = line["bigembed"], line["peer"]
        steady = ours["steady"]
        sizes = (ours["peak"], steady["rss"], steady["anonymous"], steady["file"], ours["disk_bytes"])
        rows.append([
            f"{line['rows']:,}", *(f"{size / MIB:,.0f}" for size in sizes), f"{1e3 * ours['step_seconds']:.1f}",
            f"{peer['peak'] / MIB:,.0f}{' (computed)' if peer['computed'] else ''}",
        ])  # fmt: skip
    heads = ["rows", "peak", "steady", "anonymous", "file-backed", "disk", "ms a step", "nn.Embedding, peak"]
    found = result["bars"]
    bars = [bar("share of the memory beyond imports that nobody explains", found["unexplained_share"], 0.05, "most")]
    if "peak_growth" in found:
        first, last = found["rows"]
        span = f"from V = {first:,} to {last:,}"
        bars += [bar(f"peak memory {span}: growth", found["peak_growth"], 0.05, "most")]
        bars += [bar(f"step time {span}: times", found["step_growth"], 1.3, "most")]
    return f"![memory](memory.png)\n\nMiB. {origin(result)}\n{table(heads, rows)}\n{bars_table(bars)}"


def gather_section(result: Result, folder: Path) -> str:
    case = main_cold_case(result)
    text = origin(result)
    if case is not None:
        draw_gather(case, folder / "gather.png")
        best = case["ways"][case["best_peer"]]["rows_per_second"]
        rows = [
            (name, f"{way['ids']:,}", f"{way['rows_per_second']:,.0f}", f"{way['of_limit']:.2f}",
             f"{way['rows_per_second'] / best:.2f}")
            for name, way in case["ways"].items()
        ]  # fmt: skip
        text = (
            f"![cold gather](gather.png)\n\n{case['ids']:,} {case['distribution']} rows of {case['row_bytes']} bytes, "
            f"cold; limit {case['limit_per_second']:,.0f} ({case['limit_is']}). {text}\n"
            + table(["way", "ids", "rows/s", "of the limit", "of the best peer"], rows)
        )
    return f"{text}\n{bars_table(result['bars'])}"


def train_section(result: Result, folder: Path) -> str:
    draw_train(result, folder / "train.png")
    rows = [
        (line["rule"], line["ids"], f"{line['batch']:,}", f"{1e3 * line['seconds'][line['ours']]:.3f}",
         ", ".join(f"{name} {1e3 * took:.3f}" for name, took in line["seconds"].items() if name != line["ours"]),
         f"{line['times_faster']:.2f}")
        for key in ("train", "forward", "bags") for line in ({**one, "rule": _named(one, key)} for one in result[key])
    ]  # fmt: skip
    facts = f"V = {result['rows']:,}, D = {result['dim']}, {result['threads']} threads, every row cached, milliseconds."
    heads = ["work", "ids", "batch", "bigembed", "peers", "times faster than the best"]
    return f"![training](train.png)\n\n{facts} {origin(result)}\n{table(heads, rows)}\n{bars_table(result['bars'])}"


def _named(line: Result, key: str) -> str:
    return f"{line['rule']}, bags of {line['bag_ids']}" if key == "bags" else line["rule"]


def out_of_core_section(result: Result, folder: Path) -> str:
    ran = [case for case in result["cases"] if case["times_faster"] is not None and "failed" not in case["bigembed"]]
    draw_out_of_core(ran, folder / "train_out_of_core.png")
    rows = [
        (case["rule"], case["ids"], f"{case['ratio']:g}", f"{case['bigembed']['ids_per_second']:,.0f}",
         f"{case['mapped']['ids_per_second']:,.0f}", f"{case['times_faster']:.2f}", f"{case['of_disk']:.2f}",
         case["bigembed"]["merges"], f"{case['bigembed']['stall_seconds']:.1f}")
        for case in ran
    ]  # fmt: skip
    heads = ["rule", "ids", "table : memory", "ids/s", "mapped nn.Embedding, ids/s", "times faster",
             "distinct rows/s of the disk's rate", "merges", "s of stalls"]  # fmt: skip
    failed = [f"{c['rule']}, {c['ids']}, {c['ratio']:g}" for c in result["cases"] if c not in ran]
    text = f"Ended with an error: {'; '.join(failed)}.\n\n" if failed else ""
    facts = f"A table of {result['gib']:g} GiB, D = {result['dim']}, batches of {result['batch']:,} ids."
    return (
        f"![training out of core](train_out_of_core.png)\n\n{facts} {origin(result)}\n{text}{table(heads, rows)}\n"
        f"{bars_table(result['bars'])}"
    )


def lookahead_section(result: Result, folder: Path) -> str:
    rows = [
        ("a step with lookahead", f"{1e3 * result['step_seconds']:.2f} ms"),
        ("without", f"{1e3 * result['ahead']['seconds']['plain']:.2f} ms"),
        (f"{result['missed_rows']:,.0f} missed rows at the disk's rate", f"{1e3 * result['reads_seconds']:.2f} ms"),
        ("a step with every row cached", f"{1e3 * result['cached_seconds']:.2f} ms"),
        (f"{result['in_memory_peer']}, wholly in memory", f"{1e3 * result['in_memory_peer_seconds']:.2f} ms"),
        ("ours out of core, times that", f"{result['over_in_memory']:.2f}"),
    ]
    for reads, computed in result["computed"].items():
        rows.append(
            (f"computed for a disk of {int(reads):,} reads/s, times that", f"{computed['step_over_in_memory']:.2f}")
        )
    return f"{origin(result)}\n{table(['what', ''], rows)}\n{bars_table(result['bars'])}"


def sparse_section(result: Result, folder: Path) -> str:
    rows = [
        ("rows", f"{result['rows']:,}"),
        ("ids/s, sustained", f"{result['ids_per_second']:,.0f}"),
        ("seconds", f"{result['seconds']:.0f}{' (the disk was full)' if result['disk_was_full'] else ''}"),
        ("merges", result["stats"]["merge"]["merges"]),
        ("disk, GiB", f"{result['disk_bytes'] / (1 << 30):.1f}"),
    ]
    return f"{origin(result)}\n{table(['what', ''], rows)}"


SECTIONS: list[tuple[str, str, Callable[[Result, Path], str]]] = [
    ("memory", "Memory against the number of rows", memory_section),
    ("gather", "Cold gather beside its limit", gather_section),
    ("train", "Training with every row cached", train_section),
    ("train_out_of_core", "Training out of core", out_of_core_section),
    ("train_lookahead", "Training out of core with lookahead", lookahead_section),
    ("train_sparse", "A sparse table of 264 GB, sustained", sparse_section),
]


def write_report(folder: Path) -> Path:
    """folder/README.md and its figures, from what results there are."""
    parts = ["# Results\n", "Written by `python benchmarks/report.py` from the files in this folder.\n"]
    for name, title, section in SECTIONS:
        path = folder / f"{name}.json"
        parts.append(f"## {title}\n")
        if path.exists():
            parts.append(section(json.loads(path.read_text()), folder))
        else:
            parts.append(f"`{name}.json` is missing; `python benchmarks/{COMMANDS[name]}` makes it.\n")
    others = [path for path in sorted(folder.glob("*.json")) if path.stem not in COMMANDS]
    if others:
        facts = [(path, json.loads(path.read_text())) for path in others]
        rows = [(f"[{path.name}]({path.name})", f"`{one['command']}`", one["commit"]) for path, one in facts]
        parts += ["## Other results\n", table(["file", "command", "commit"], rows)]
    page = folder / "README.md"
    page.write_text("\n".join(parts))
    return page


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    page = write_report(parser.parse_args(argv).results)
    print(page)
    return page


if __name__ == "__main__":
    main()
