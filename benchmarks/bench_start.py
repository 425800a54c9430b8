"""How long until the first batch: import, create, open at 10^3 to 10^9 rows, the first step with and without kernels.

Sketch: a table is created by a few small files, whatever its size, and opened by reading the superblock (24 bytes a
chunk: 48 KiB for 10^9 rows of 64), the folder's names, and the journal. Of a journal of 1 GiB, four million records of
264 bytes, only the rows' numbers are read (32 MiB, with a checksum: 10 ms) and put into the index, 1.5 million
different ones: at 50 ns a record, 0.2 s. Kernels are compiled once (tens of seconds for those of a step) and then
loaded from NUMBA_CACHE_DIR.

Every import and every opening is in an interpreter of its own, and the median of --rounds of them counts.

    python benchmarks/bench_start.py [--rows 1e3 1e6 1e9] [--journal-mib 1024] [--folder .]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import bar, print_bars, write_result

DIM = 64
MIB = 1 << 20

IMPORT = """
import time
start = time.perf_counter()
import torch
torch_done = time.perf_counter()
import bigembed
bigembed.Embedding, bigembed.optim
done = time.perf_counter()
found = {"torch": torch_done - start, "bigembed": done - torch_done}
"""

CREATE = """
import sys, time
import bigembed
bigembed.Embedding
path, rows, dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
start = time.perf_counter()
emb = bigembed.Embedding(rows, dim, path=path, seed=0)
found = {"create": time.perf_counter() - start}
start = time.perf_counter()
emb.close()
found["close"] = time.perf_counter() - start
"""

OPEN = """
import sys, time
import bigembed
bigembed.Embedding
start = time.perf_counter()
emb = bigembed.Embedding.open(sys.argv[1])
found = {"open": time.perf_counter() - start, "journal_rows": emb.stats()["index"]["rows"]}
emb.close()
start = time.perf_counter()
emb = bigembed.Embedding.open(sys.argv[1])
found["open_again"] = time.perf_counter() - start
emb.close()
"""

FILL = """
import sys
import numpy as np
import bigembed
path, rows, journal_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
count = min(1 << 16, rows)
with bigembed.Table.open(path, journal_bytes=64 * journal_bytes, index_bytes=1 << 32) as table:
    many = max(1, journal_bytes // (table.spec.record_bytes * count))
    different = min(many, rows // count, 24)  # as many rows as the default index_bytes lets two epochs have
    apart = rows // (different * count)
    values = np.ones((count, table.shape[1]), np.float32)
    for n in range(many):
        table.write((np.arange(count) * different + n % different) * apart, values)
    table.commit("full")
    found = {"bytes": table.stats()["journal"]["disk_bytes"], "rows": table.stats()["index"]["rows"]}
"""

FIRST_BATCH = """
import sys, time
import torch
import bigembed
emb, rows = bigembed.Embedding.open(sys.argv[1]), int(sys.argv[2])
bigembed.optim
ids = torch.arange(8192) * (rows // 8192)
start = time.perf_counter()
out = emb(ids)
forward = time.perf_counter()
opt = bigembed.optim.RowwiseAdagrad(emb, lr=0.1)
attached = time.perf_counter()
out.square().sum().backward()
opt.step()
done = time.perf_counter()
emb(ids)
found = {"forward": forward - start, "optimizer": attached - forward, "step": done - attached, "all": done - start}
emb.table.rollback()
emb.close()
"""


def run(program: str, *arguments: Any, kernels: str | None = None) -> dict[str, Any]:
    """What a program of its own found, in an interpreter of its own."""
    whole = "import json, warnings\n" + program + "\nprint(json.dumps(found))"
    environment = {**os.environ, "NUMBA_CACHE_DIR": kernels} if kernels else dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", whole, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"a run failed with status {done.returncode}; see above.")
    return json.loads(done.stdout.splitlines()[-1])


def medians(program: str, rounds: int, *arguments: Any, kernels: str | None = None) -> dict[str, float]:
    """The median of each figure, over runs of their own."""
    found = [run(program, *arguments, kernels=kernels) for _ in range(rounds)]
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def open_sizes(options: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """Creating and opening tables without a journal."""
    lines = []
    for rows in options.rows:
        path = f"{folder}/table-{rows}"
        line = {"rows": rows, **run(CREATE, path, rows, DIM)}
        lines.append({**line, **medians(OPEN, options.rounds, path)})
    return lines


def open_with_journal(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Opening the largest table with a full journal, which the page cache holds, as after a restart of training."""
    path, rows = f"{folder}/table-{max(options.rows)}", max(options.rows)
    journal = run(FILL, path, rows, int(options.journal_mib * MIB))
    return {"rows": rows, "journal": journal, **medians(OPEN, options.rounds, path)}


def first_batch(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The first step without any compiled kernel, and with all of them."""
    rows = max(options.rows)
    path, kernels = f"{folder}/first", f"{folder}/kernels"
    run(CREATE, path, rows, DIM)
    cold = run(FIRST_BATCH, path, rows, kernels=kernels)
    return {"cold": cold, "warm": medians(FIRST_BATCH, options.rounds, path, rows, kernels=kernels)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=lambda text: int(float(text)), nargs="+", default=[10**k for k in range(3, 10)])
    parser.add_argument("--journal-mib", type=float, default=1024.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=".", help="where the tables go")
    parser.add_argument("--skip-cold", action="store_true", help="do not compile the kernels anew")
    parser.add_argument("--no-result", action="store_true", help="print only")
    return parser


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What has to be reached; opening at the largest size measured, in milliseconds."""
    largest = max(result["sizes"], key=lambda line: line["rows"])
    full = result["with_journal"]
    mib = full["journal"]["bytes"] / MIB
    found = [
        bar("import beyond torch, s", result["import"]["bigembed"], 0.5, "most"),
        bar(f"open of {largest['rows']:.0e} rows, no journal, ms", 1e3 * largest["open"], 30, "most"),
    ]
    what = f"open of {full['rows']:.0e} rows, {mib:,.0f} MiB of journal, ms"
    return [*found, bar(what, 1e3 * full["open"], 300, "most")]


def show(result: dict[str, Any]) -> None:
    print(f"import: torch {result['import']['torch']:.2f} s, bigembed beyond it {result['import']['bigembed']:.2f} s")
    print(f"{'rows':>8} {'create':>9} {'open':>9} {'again':>9} ms")
    for line in result["sizes"]:
        cells = [f"{1e3 * line[name]:9.1f}" for name in ("create", "open", "open_again")]
        print(f"{line['rows']:8.0e} {' '.join(cells)}")
    full = result["with_journal"]
    print(f"with {full['journal']['bytes'] / MIB:,.0f} MiB of journal, {full['journal']['rows']:,} rows in it: "
          f"{1e3 * full['open']:.0f} ms, again {1e3 * full['open_again']:.0f} ms")  # fmt: skip
    for name, found in result["first_batch"].items():
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in found.items())
        print(f"first batch, {name} kernel cache: {parts}")
    print_bars(result["bars"])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result: dict[str, Any] = {"import": medians(IMPORT, options.rounds)}
        result["sizes"] = open_sizes(options, folder)
        result["with_journal"] = open_with_journal(options, folder)
        result["first_batch"] = {} if options.skip_cold else first_batch(options, folder)
    result["bars"] = bars(result)
    show(result)
    if not options.no_result:
        print(write_result("start", result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
