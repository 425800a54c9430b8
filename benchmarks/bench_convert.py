"""Converting files to tables, beside what copies or reads them today.

Sketch. A table of float32 has the bytes of its source plus two words a row, so a conversion of .npy or safetensors can
at best be a copy: one read from the page cache and one write to the disk (0.4 GB/s sustained here, more in a burst),
with seal and SHA-256 beside it on two cores. Text has 2.2 bytes for each byte of the table; two threads parse it while
the table is written: the floor is `cat | wc -l` (every byte read once) plus the write of the table.

Each figure is a median over rounds that take turns; every conversion runs in a process of its own, after a small one
that loads the compiled kernels (`first_seconds`, about a second once a process). gensim reads into memory and writes
nothing; it gets a smaller file of the same kind (`--peer-mib`), so rates are compared.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import write_result

DIM = 300
POOL_ROWS = 4096

CONVERT = """
import json, sys
from bigembed.convert.converter import convert
from pathlib import Path
def peak():
    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) * 1024
before = peak()
small = convert(sys.argv[4], sys.argv[2] + '.small', format=sys.argv[3])
report = convert(sys.argv[1], sys.argv[2], format=sys.argv[3])
found = {'seconds': report.seconds, 'first_seconds': small.seconds, 'rows': report.rows}
found['read_seconds'] = convert(sys.argv[1], sys.argv[2], format=sys.argv[3], dry_run=True).seconds
print(json.dumps({**found, 'above_import_bytes': peak() - before}))
"""

GENSIM = """
import sys, time
from gensim.models import KeyedVectors
began = time.perf_counter()
kind = sys.argv[2]
KeyedVectors.load_word2vec_format(sys.argv[1], binary=kind == 'word2vec-binary', no_header=kind == 'glove')
print(time.perf_counter() - began)
"""


# -- files ------------------------------------------------------------------------------------------------------


def make_npy(path: Path, size_bytes: int) -> None:
    rows = size_bytes // (4 * DIM)
    made = np.lib.format.open_memmap(path, "w+", np.float32, (rows, DIM))
    pool = np.random.default_rng(0).standard_normal((POOL_ROWS, DIM), np.float32)
    for first in range(0, rows, POOL_ROWS):
        made[first : first + POOL_ROWS] = pool[: rows - first]
    made.flush()


def make_safetensors(path: Path, size_bytes: int) -> None:
    rows = size_bytes // (4 * DIM)
    facts = {"embedding.weight": {"dtype": "F32", "shape": [rows, DIM], "data_offsets": [0, rows * DIM * 4]}}
    header = json.dumps(facts).encode()
    header += b" " * (-len(header) % 8)
    pool = np.random.default_rng(0).standard_normal((POOL_ROWS, DIM), np.float32)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for first in range(0, rows, POOL_ROWS):
            file.write(pool[: rows - first].tobytes())


def make_glove(path: Path, size_bytes: int) -> None:
    """Numbers as GloVe writes them: up to six decimals."""
    pool = np.random.default_rng(0).standard_normal((POOL_ROWS, DIM), np.float32) * 0.4
    lines = [b" " + " ".join(f"{value:.5g}" for value in row).encode() + b"\n" for row in pool]
    row = 0
    with path.open("wb") as file:
        while file.tell() < size_bytes:
            file.write(b"".join(b"word%d" % (row + i) + line for i, line in enumerate(lines)))
            row += POOL_ROWS


def make_word2vec(path: Path, size_bytes: int) -> None:
    rows = size_bytes // (4 * DIM + 12)
    pool = np.random.default_rng(0).standard_normal((POOL_ROWS, DIM), np.float32)
    vectors = [row.tobytes() + b"\n" for row in pool]
    with path.open("wb") as file:
        file.write(f"{rows} {DIM}\n".encode())
        for first in range(0, rows, POOL_ROWS):
            block = vectors[: rows - first]
            file.write(b"".join(b"word%d " % (first + i) + vector for i, vector in enumerate(block)))


MAKERS: dict[str, Callable[[Path, int], None]] = {
    "npy": make_npy,
    "safetensors": make_safetensors,
    "glove": make_glove,
    "word2vec-binary": make_word2vec,
}
NAMES = {"npy": "rows.npy", "safetensors": "rows.safetensors", "glove": "rows.txt", "word2vec-binary": "rows.bin"}


def source(folder: Path, kind: str, mib: float) -> Path:
    path = folder / f"{mib:g}-{NAMES[kind]}"
    if not path.exists():
        MAKERS[kind](path, int(mib * (1 << 20)))
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return path


# -- what is timed ----------------------------------------------------------------------------------------------


def child(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def converted(path: Path, kind: str) -> dict[str, Any]:
    target = path.with_suffix(".bigembed")
    small = source(path.parent, kind, 0.5)
    found = json.loads(child(CONVERT, str(path), str(target), kind, str(small)))
    found["table_bytes"] = sum(file.stat().st_size for file in target.rglob("c.*"))
    shutil.rmtree(target)
    shutil.rmtree(f"{target}.small")
    return found


def copied(path: Path) -> float:
    """Seconds of a plain copy, synced: what a converter can at best be."""
    target = path.with_suffix(".copy")
    began = time.perf_counter()
    with path.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, 16 << 20)
        writing.flush()
        os.fsync(writing.fileno())
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def lines_counted(path: Path) -> float:
    began = time.perf_counter()
    subprocess.run(f"cat {path} | wc -l", shell=True, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def written(folder: Path, size_bytes: int) -> float:
    """Seconds to write and sync so many bytes from memory."""
    block = np.random.default_rng(0).bytes(16 << 20)
    target = folder / "written"
    began = time.perf_counter()
    with target.open("wb", buffering=0) as file:
        for _ in range(-(-size_bytes // len(block))):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def warm(path: Path) -> None:
    """Bring the source into the page cache, so that reading it is the same for all."""
    subprocess.run(["cat", str(path)], check=True, stdout=subprocess.DEVNULL)


# -- runs -------------------------------------------------------------------------------------------------------


def against_copy(folder: Path, kind: str, mib: float, rounds: int) -> dict[str, Any]:
    path, runs = source(folder, kind, mib), []
    for _ in range(rounds):
        warm(path)
        runs.append((converted(path, kind), copied(path)))
    ours = statistics.median(run["seconds"] for run, _ in runs)
    copy = statistics.median(seconds for _, seconds in runs)
    print(f"{kind:16} {mib:g} MiB: convert {ours:.2f} s, plain copy {copy:.2f} s: {copy / ours:.2f} of its speed")
    return {"mib": mib, "convert_seconds": ours, "copy_seconds": copy, "of_copy": copy / ours, "runs": runs}


def against_gensim(folder: Path, kind: str, mib: float, peer_mib: float, rounds: int) -> dict[str, Any]:
    path, small, runs = source(folder, kind, mib), source(folder, kind, peer_mib), []
    for _ in range(rounds):
        warm(path)
        made = converted(path, kind)
        floor = {"lines": lines_counted(path), "write": written(folder, made["table_bytes"])}
        runs.append({**made, **floor, "gensim": float(child(GENSIM, str(small), kind)) if has_gensim() else None})
    ours = statistics.median(path.stat().st_size / run["seconds"] for run in runs)
    floor_seconds = statistics.median(run["lines"] + run["write"] for run in runs)
    seconds = statistics.median(run["seconds"] for run in runs)
    result = {"mib": mib, "bytes_per_second": ours, "seconds": seconds, "floor_seconds": floor_seconds, "runs": runs}
    line = f"{kind:16} {mib:g} MiB: convert {ours / 1e6:.0f} MB/s, {seconds / floor_seconds:.2f} of cat | wc -l + write"
    if has_gensim():
        peer = statistics.median(small.stat().st_size / run["gensim"] for run in runs)
        read = statistics.median(path.stat().st_size / run["read_seconds"] for run in runs)
        result |= {"gensim_bytes_per_second": peer, "of_gensim": ours / peer, "reading_of_gensim": read / peer}
        line += f"; gensim {peer / 1e6:.1f} MB/s on {peer_mib:g} MiB: {ours / peer:.1f} times"
        line += f", {read / peer:.1f} times where, as there, nothing is written ({read / 1e6:.0f} MB/s)"
    print(line)
    return result


def memory(folder: Path, kind: str, sizes_mib: list[float]) -> dict[str, Any]:
    found = {}
    for mib in sizes_mib:
        path = source(folder, kind, mib)
        found[f"{mib:g}"] = converted(path, kind)["above_import_bytes"]
        print(f"{kind:16} {mib:g} MiB: peak memory {found[f'{mib:g}'] / (1 << 20):.0f} MiB above import")
        if mib == max(sizes_mib):
            path.unlink()
    return found


def has_gensim() -> bool:
    return subprocess.run([sys.executable, "-c", "import gensim"], capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=1024, help="of a source")
    parser.add_argument("--peer-mib", type=float, default=100, help="of the source that gensim reads")
    parser.add_argument("--large-mib", type=float, default=8192, help="of the source whose peak memory is measured too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where files are made (default: a temporary folder)")
    parser.add_argument("--no-result", action="store_true", help="do not write benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        result: dict[str, Any] = {}
        for kind in ("npy", "safetensors"):
            result[kind] = against_copy(folder, kind, args.mib, args.rounds)
        for kind in ("glove", "word2vec-binary"):
            result[kind] = against_gensim(folder, kind, args.mib, args.peer_mib, args.rounds)
        result["peak_memory_bytes"] = {
            kind: memory(folder, kind, [args.mib, args.large_mib]) for kind in ("npy", "glove")
        }
        if not args.no_result:
            print("written to", write_result("convert", result))


if __name__ == "__main__":
    main()
