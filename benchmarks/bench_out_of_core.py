"""Training out of core: an 8 GiB table in a memory cgroup of 2 GiB, uniform ids, SGD, journal on.

Sketch: uniform ids over a table four times the memory miss the cache about 5 times in 6 to 9 in 10, so a step of
16,384 ids costs about 14,000 random reads: 0.17 s at 84,000 reads/s, 100,000 ids/s at best. Each merged row costs its
share of reading and writing the base once in order, and its journal record: with 8 GiB at 1.7 GB/s read and 0.4 GB/s
written, 25 s for every merge of a few million rows. The peer is nn.Embedding over the same bytes, mapped.

    python benchmarks/bench_out_of_core.py [--gib 8] [--memory-gib 2] [--folder .]
"""

import argparse
import glob
import json
import os
import sys
import tempfile
import time

import numpy as np
from common import disk_random_reads, drop_page_cache, memory_bytes, memory_cgroup, run_in, write_result

DIM = 128


def build(folder: str, rows: int) -> None:
    """The table, every row written, and a flat file of the same weights for the peer."""
    from bigembed import Table, init

    if not os.path.exists(f"{folder}/table"):
        with Table.create(f"{folder}/table", rows, DIM, state_dim=0, init=init.uniform(-1, 1), seed=1) as table:
            table.publish()
    if os.path.exists(f"{folder}/flat"):
        return
    block = np.random.default_rng(0).standard_normal((1 << 16, DIM), dtype=np.float32)
    with open(f"{folder}/flat", "wb") as file:
        for first in range(0, rows, len(block)):
            file.write(block[: rows - first])
        os.fsync(file.fileno())


def train_bigembed(options: argparse.Namespace) -> dict[str, object]:
    """Steps until the time is over and at least `min_merges` merges are done."""
    import torch

    import bigembed

    emb = bigembed.Embedding.open(
        f"{options.folder}/table", cache_bytes=options.cache_bytes, journal_bytes=options.journal_bytes
    )
    opt = bigembed.optim.SGD(emb, lr=0.01)
    step = _stepper(emb, opt, options)
    step()  # compile
    steps, start = 0, time.perf_counter()
    curve = []
    while True:
        step()
        steps += 1
        seconds = time.perf_counter() - start
        if steps % 50 == 0:
            merges = emb.table.stats()["merge"]
            curve.append((round(seconds, 1), steps * options.batch, merges["merges"], merges["rows_left"]))
            is_done = seconds > options.seconds and merges["merges"] >= options.min_merges
            if is_done or seconds > 8 * options.seconds:
                break
    stats = emb.stats()
    emb.commit("done")
    total = time.perf_counter() - start
    del torch
    result = {
        "steps": steps,
        "seconds": seconds,
        "ids_per_second": steps * options.batch / seconds,
        "seconds_with_final_commit": total,
        "stats": stats,
        "memory": memory_bytes(),
        "curve": curve,
    }
    emb.close()
    return result


def train_mapped(options: argparse.Namespace) -> dict[str, object]:
    """nn.Embedding(sparse=True) whose weight is a shared map of the flat file, with MADV_RANDOM or plain."""
    import mmap

    import torch

    mapped = np.memmap(f"{options.folder}/flat", np.float32, "r+").reshape(-1, DIM)
    if options.peer == "random":
        mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    emb = torch.nn.Embedding.from_pretrained(torch.from_numpy(mapped), freeze=False, sparse=True)
    opt = torch.optim.SGD(emb.parameters(), lr=0.01)
    step = _stepper(emb, opt, options)
    steps, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < options.seconds:
        step()
        steps += 1
    seconds = time.perf_counter() - start
    return {"steps": steps, "seconds": seconds, "ids_per_second": steps * options.batch / seconds}


def _stepper(emb, opt, options):
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = emb.num_embeddings

    def step() -> None:
        ids = torch.randint(0, rows, (options.batch,), generator=generator)
        loss = emb(ids).square().sum()
        loss.backward()
        opt.step()
        opt.zero_grad()

    return step


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--memory-gib", type=float, default=2.0)
    parser.add_argument("--cache-bytes", type=int, default=1 << 30)
    parser.add_argument("--journal-bytes", type=int, default=4 << 30)
    parser.add_argument("--batch", type=int, default=16_384)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--min-merges", type=int, default=2)
    parser.add_argument("--folder", default=".", help="where the tables go; on the disk to measure")
    parser.add_argument("--keep", default=None, help="build here, or use what was built here")
    parser.add_argument("--disk-seconds", type=int, default=4, help="for each measurement of the disk's own rate")
    parser.add_argument("--no-result", action="store_true", help="print only")
    parser.add_argument("--peer", choices=["none", "random", "plain"], default="none", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def _run_child(options: argparse.Namespace, peer: str, seconds: float, folder: str) -> dict[str, object]:
    """One trainer, alone in a fresh cgroup with an empty page cache."""
    drop_page_cache([*glob.glob(f"{folder}/table/weight/c.*"), f"{folder}/flat"])
    arguments = [
        __file__, "--child", "--peer", peer, "--folder", folder, "--batch", str(options.batch), "--seconds",
        str(seconds), "--cache-bytes", str(options.cache_bytes), "--journal-bytes", str(options.journal_bytes),
        "--min-merges", str(options.min_merges),
    ]  # fmt: skip
    with memory_cgroup(int(options.memory_gib * (1 << 30))) as group:
        done = run_in(group, arguments)
        if done.returncode:
            return {"failed": done.returncode}
        return {"limited": group is not None, **json.loads(done.stdout.splitlines()[-1])}


def main(argv: list[str] | None = None) -> dict[str, object]:
    options = _parser().parse_args(argv)
    if options.child:
        result = train_bigembed(options) if options.peer == "none" else train_mapped(options)
        print(json.dumps(result))
        return result
    rows = int(options.gib * (1 << 30)) // (4 * DIM)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = options.keep or temporary
        os.makedirs(folder, exist_ok=True)
        build(folder, rows)
        paths = sorted(glob.glob(f"{folder}/table/weight/c.*"))
        reads = [disk_random_reads(paths, options.disk_seconds)]
        ours = _run_child(options, "none", options.seconds, folder)
        reads.append(disk_random_reads(paths, options.disk_seconds))
        peer = _run_child(options, "random", min(60.0, options.seconds), folder)
        reads.append(disk_random_reads(paths, options.disk_seconds))
        result = {
            "rows": rows,
            "batch": options.batch,
            "disk_reads_per_second": reads,
            "bigembed": ours,
            "mapped": peer,
        }
        result["memory_limit_bytes"] = int(options.memory_gib * (1 << 30))
    print(f"disk, random 4-KiB reads at depth 64, before, between, after: {', '.join(f'{r:,.0f}' for r in reads)} /s")
    for name, run in (("bigembed", ours), ("nn.Embedding over a MADV_RANDOM map", peer)):
        print(f"{name:38} {run.get('ids_per_second', 0):10,.0f} ids/s")
    if not options.no_result:
        print(write_result("out_of_core", result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
