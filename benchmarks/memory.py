"""Where the memory of a training run is, for tables of 10^5 to 10^9 rows, beside nn.Embedding.

Sketch: the cache, its index and the journal's index are cache_bytes and nothing more; what a batch takes (its output,
gradient and sums, 4 * D bytes a row each, and records on their way) does not depend on V either. So resident memory is
what torch and the kernels' code take, plus cache_bytes, plus a multiple of the batch; only tables smaller than the
cache take less. nn.Embedding takes 4 * D * V bytes, and as much again for each state column of its optimizer. The rows
of a step are spread evenly over the table, as many distinct ones for every V, so steps differ by what depends on V: how
far apart the records are on disk, and how many files a merge opens.

Each V runs in a process of its own (`memory_training.py` says how the parts are told apart). nn.Embedding runs where it
fits --peer-gib and is computed where it does not, marked *.

    python benchmarks/memory.py [--rows 1e5 1e6 1e7 1e8 1e9] [--rule rowwise_adagrad] [--cache-mib 128] [--folder .]
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, write_result
from memory_training import OURS, peer_bytes

MIB = 1 << 20
PARTS = ("cache", "index", "staging", "pending", "kept", "code", "unexplained")
FIRST_FLAT_ROWS = 1e6  # from here on no table fits the cache


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=lambda text: int(float(text)), nargs="+", default=[10**k for k in range(5, 10)])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rule", choices=sorted(OURS), default="rowwise_adagrad")
    parser.add_argument("--cache-mib", type=float, default=128.0)
    parser.add_argument("--batch", type=int, default=16_384, help="distinct rows of a step")
    parser.add_argument("--distinct-rows", type=int, default=500_000, help="of all steps together")
    parser.add_argument("--steps", type=int, default=100, help="timed; every row is trained once before")
    parser.add_argument("--rounds", type=int, default=3, help="all V in turn, so often")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer-gib", type=float, default=2.0, help="nn.Embedding runs where it needs at most this")
    parser.add_argument("--folder", default=".", help="where the tables go")
    parser.add_argument("--no-result", action="store_true", help="print only")
    return parser


def _run_child(options: argparse.Namespace, rows: int, peer: bool) -> dict[str, Any]:
    """One training run in a process of its own; {"failed": its exit status} where it ended badly."""
    plan = {name: getattr(options, name) for name in ("dim", "rule", "batch", "distinct_rows", "steps", "device")}
    plan.update(rows=rows, peer=peer, folder=options.folder, cache_bytes=int(options.cache_mib * MIB))
    program = str(Path(__file__).with_name("memory_training.py"))
    done = subprocess.run([sys.executable, program, json.dumps(plan)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def _run_ours(options: argparse.Namespace, rows: int) -> dict[str, Any]:
    run = _run_child(options, rows, peer=False)
    if "failed" in run:
        raise SystemExit(f"training {rows:,} rows failed with status {run['failed']}; see above.")
    return run


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each V: the run of the last round, with the largest peak and the median step time of all."""
    rounds = []
    for number in range(options.rounds):
        rounds.append([_run_ours(options, rows) for rows in options.rows])
        print(f"round {number + 1} of {options.rounds} is done", flush=True)
    lines = []
    for at, rows in enumerate(options.rows):
        runs = [line[at] for line in rounds]
        peaks, seconds = [run["peak"] for run in runs], [run["step_seconds"] for run in runs]
        merged = {**runs[-1], "peak": max(peaks), "peaks": peaks, "step_seconds": statistics.median(seconds)}
        lines.append({"rows": rows, "bigembed": merged, "peer": _peer(options, rows, runs[-1])})
    return lines


def _peer(options: argparse.Namespace, rows: int, ours: dict[str, Any]) -> dict[str, Any]:
    """nn.Embedding's peak: of a run, or computed from what our process took before it had a table."""
    needed = peer_bytes(rows, options.dim, options.rule)
    if needed <= options.peer_gib * (1 << 30):
        run = _run_child(options, rows, peer=True)
        if "failed" not in run:
            return {**run, "computed": False}
    return {"peak": ours["imported"]["rss"] + needed, "computed": True}


def bars(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What must be flat: peak memory and step time against V, and how much of the memory nobody explains."""
    large = [line for line in lines if line["rows"] >= FIRST_FLAT_ROWS]
    found: dict[str, Any] = {
        "unexplained_share": max(abs(line["bigembed"]["unexplained_share"]) for line in lines),
    }
    if len(large) > 1:
        peaks = [line["bigembed"]["peak"] for line in large]
        first, last = large[0]["bigembed"], large[-1]["bigembed"]
        found["rows"] = [large[0]["rows"], large[-1]["rows"]]
        found["peak_growth"] = max(peaks) / min(peaks) - 1
        found["step_growth"] = last["step_seconds"] / first["step_seconds"]
        found["mean_step_growth"] = last["mean_step_seconds"] / first["mean_step_seconds"]
    return found


def show(lines: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """The table, in MiB, and the bars."""
    names = ("rows", "peak", "steady", "anon", "file", "shared", "import", *PARTS, "pages", "disk", "step ms", "peer")
    print(" ".join(f"{name:>11}" for name in names))
    for line in lines:
        ours, peer = line["bigembed"], line["peer"]
        steady = ours["steady"]
        sizes = [ours["peak"], steady["rss"], steady["anonymous"], steady["file"], steady["shared"]]
        sizes += [ours["imported"]["rss"], *(ours["parts"][part] for part in PARTS)]
        sizes += [ours["page_cache_bytes"], ours["disk_bytes"]]
        cells = [f"{line['rows']:.0e}", *(f"{size / MIB:,.1f}" for size in sizes)]
        cells += [f"{ours['step_seconds'] * 1e3:.1f}", f"{peer['peak'] / MIB:,.0f}{'*' if peer['computed'] else ''}"]
        print(" ".join(f"{cell:>11}" for cell in cells))
    print("MiB; pages: of the table's files in the page cache; peer: nn.Embedding's peak, * computed")
    if device := [line["bigembed"]["device_bytes"] / MIB for line in lines if line["bigembed"]["device_bytes"]]:
        print(f"device memory, peak: {', '.join(f'{mib:,.0f}' for mib in device)} MiB")
    print(f"unexplained, of the resident memory beyond imports: at most {found['unexplained_share']:.1%} (bar: 5 %)")
    if "rows" in found:
        first, last = found["rows"]
        print(f"from {first:.0e} to {last:.0e} rows, same number of distinct rows:")
        print(f"  peak resident memory, file-backed included, within {found['peak_growth']:.1%} (bar: 5 %)")
        print(f"  median step time x {found['step_growth']:.2f} (bar: 1.3), mean x {found['mean_step_growth']:.2f}")


def plot(lines: list[dict[str, Any]], budget_bytes: int, path: Path) -> None:
    """Resident memory against V, and its parts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    rows = [line["rows"] for line in lines]
    left.loglog(rows, [line["bigembed"]["peak"] / MIB for line in lines], "o-", label="bigembed")
    peers = [line["peer"]["peak"] / MIB for line in lines]
    left.loglog(rows, peers, "--", color="tab:red", linewidth=1)
    for is_computed, face, label in ((False, "tab:red", "nn.Embedding"), (True, "none", "nn.Embedding, computed")):
        at = [n for n, line in enumerate(lines) if line["peer"]["computed"] == is_computed]
        where = [rows[n] for n in at], [peers[n] for n in at]
        left.loglog(*where, "s", color="tab:red", markerfacecolor=face, label=label)
    left.axhline(budget_bytes / MIB, color="gray", linewidth=0.8, linestyle=":", label="cache_bytes")
    left.set(xlabel="rows", ylabel="peak resident memory, MiB")
    left.legend()
    bottom, labels = [0.0] * len(lines), [f"{count:.0e}" for count in rows]
    for part in ("imported", "code", "cache", "index", "staging", "pending", "kept", "unexplained"):
        sizes = [
            (line["bigembed"]["imported"]["rss"] if part == "imported" else line["bigembed"]["parts"][part]) / MIB
            for line in lines
        ]
        right.bar(labels, [max(0.0, size) for size in sizes], bottom=bottom, label=part)
        bottom = [low + max(0.0, size) for low, size in zip(bottom, sizes, strict=True)]
    right.set(xlabel="rows", ylabel="steady resident memory, MiB")
    right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(argv)
    lines = measure(options)
    found = bars(lines)
    show(lines, found)
    result = {
        "rule": options.rule,
        "dim": options.dim,
        "cache_bytes": int(options.cache_mib * MIB),
        "batch": options.batch,
        "distinct_rows": options.distinct_rows,
        "steps": options.steps,
        "bars": found,
        "lines": lines,
    }
    if not options.no_result:
        print(write_result("memory", result))
        plot(lines, result["cache_bytes"], RESULTS / "memory.png")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
