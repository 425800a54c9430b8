"""Vocabulary: tokens looked up in one batch, beside a Python dict of the same tokens; memory of both; cold look-ups.

Sketch: a look-up touches a slot of the index (8 bytes of 11.4 for each token), a block (8 bytes of 0.5) and a few lines
of tokens: three cache misses, which a window of 128 tokens waits for together, where a dict waits for its three (slot,
key, value) one after the other. Packing a list of text reads every str object once, which the dict does too. Cold, a
token costs a page of the index and one of the tokens, so the bound is half of the disk's random 4-KiB reads.

    python benchmarks/bench_vocab.py [--tokens 1000000 10000000] [--folder .]
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import disk_random_reads, drop_page_cache, memory_bytes, write_result

from bigembed import Table
from bigembed.vocab.packed import PackedTokens, hashes
from bigembed.vocab.vocabulary import Vocabulary

PAGE_BYTES = 4096
SMALL_BATCH = 4096


def some_tokens(count: int) -> list[str]:
    """Distinct, of 2 to 9 characters, in no order."""
    return [f"w{i:d}" for i in np.random.default_rng(0).permutation(count).tolist()]


def seconds_of(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def dict_bytes(count: int) -> int:
    """What a dict of the tokens takes in a process of its own: table, keys and values."""
    code = (
        "import gc; from bench_vocab import some_tokens; from common import memory_bytes; some_tokens(10); "
        "before = memory_bytes()['anonymous']; "
        f"kept = {{token: row for row, token in enumerate(some_tokens({count}))}}; gc.collect(); "
        "print(memory_bytes()['anonymous'] - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    return int(done.stdout)


def measure_warm(vocab: Vocabulary, count: int, batch: int, rounds: int) -> dict[str, Any]:
    """Interleaved rounds of dict and vocabulary; memory of the vocabulary first, while there is no dict."""
    tokens = some_tokens(count)
    asked_rows = np.random.default_rng(1).permutation(count)[:batch]
    asked = [tokens[row] for row in asked_rows.tolist()]
    packed = PackedTokens.of(asked)
    vocab.rows(asked[:1000])  # compile
    vocab.trim()
    del tokens
    gc.collect()
    before = memory_bytes()
    assert (vocab.rows(asked) == asked_rows).all()
    after_large = memory_bytes()
    for start in range(0, batch, SMALL_BATCH):
        vocab.rows(asked[start : start + SMALL_BATCH])
    after_small = memory_bytes()
    dictionary = {token: row for row, token in enumerate(some_tokens(count))}
    same_objects = dict(zip(dictionary, dictionary, strict=True))
    asked_objects = [same_objects[token] for token in asked]  # the dict's own keys: it compares addresses only
    del same_objects
    gc.collect()
    ways: dict[str, Callable[[], Any]] = {
        "dict, its own key objects": lambda: [dictionary[token] for token in asked_objects],
        "dict, equal text": lambda: [dictionary[token] for token in asked],
        "bigembed, list of text": lambda: vocab.rows(asked),
        "bigembed, packed tokens": lambda: vocab.rows(packed),
    }
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            figures[name].append(batch / seconds_of(way))
    vocab.trim()  # or the page cache could not be dropped
    rates = {name: statistics.median(values) for name, values in figures.items()}
    memory = {
        "dict": dict_bytes(count),
        "bigembed, anonymous": max(0, after_small["anonymous"] - before["anonymous"]),
        "bigembed, mapped after this batch": max(0, after_large["file"] - before["file"]),
        f"bigembed, mapped after batches of {SMALL_BATCH}": max(0, after_small["file"] - before["file"]),
    }
    return {"tokens": count, "batch": batch, "tokens_per_second": rates, "all_rounds": figures, "memory_bytes": memory}


def measure_cold(path: str, count: int, batch: int, rounds: int, disk_seconds: int) -> dict[str, Any]:
    """Batches with an empty page cache, and the pages that they need, beside the disk's random reads."""
    rng = np.random.default_rng(2)
    tokens = some_tokens(count)
    figures: dict[str, list[float]] = {"disk reads/s, depth 64": [], "tokens/s": [], "pages/s": []}
    with Table.open(path, mode="r") as table:
        vocab = Vocabulary.open(table)
        folder = os.path.join(path, "vocab")
        paths = [os.path.join(folder, name) for name in ("index.1", "tokens.1")]
        for _ in range(rounds):
            figures["disk reads/s, depth 64"].append(disk_random_reads(paths, disk_seconds))
            asked_rows = rng.integers(0, count, batch)
            asked = [tokens[row] for row in asked_rows.tolist()]
            pages = pages_needed(vocab, asked, asked_rows)
            vocab.trim()
            drop_page_cache([*paths, os.path.join(folder, "blocks.1")])
            seconds = seconds_of(lambda asked=asked: vocab.rows(asked))
            figures["tokens/s"].append(batch / seconds)
            figures["pages/s"].append(pages / seconds)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    of_disk = medians["pages/s"] / medians["disk reads/s, depth 64"]
    return {"tokens": count, "batch": batch, **medians, "all_rounds": figures, "of_disk_rate": of_disk}


def pages_needed(vocab: Vocabulary, asked: list[str], rows: np.ndarray) -> int:
    """Distinct pages of the three files that the look-ups begin in."""
    stored = vocab._read().stored
    packed = PackedTokens.of(asked)
    high = hashes(packed, stored.facts.seed) >> np.uint64(32)
    homes = (high * np.uint64(stored.facts.num_homes)) >> np.uint64(32)
    blocks = rows // 16
    offsets = stored.entries.bytes.blocks_C[blocks]
    return sum(len(np.unique(offset // PAGE_BYTES)) for offset in (homes * np.uint64(8), blocks * 8, offsets))


def build(path: str, count: int) -> float:
    with Table.create(path, count, 1, state_dim=0) as table:
        tokens = some_tokens(count)
        return seconds_of(lambda: Vocabulary.create(table, tokens))


def report(warm: dict[str, Any], cold: dict[str, Any]) -> None:
    rates, memory = warm["tokens_per_second"], warm["memory_bytes"]
    for name, rate in rates.items():
        print(f"{name:28} {rate / 1e6:8.2f} M tokens/s  {rate / rates['dict, its own key objects']:5.2f} of the dict")
    for name, size in memory.items():
        print(f"{name:38} {size / 2**20:8.1f} MiB  {size / max(1, memory['dict']):6.3f} of the dict")
    print(
        f"cold: {cold['tokens/s']:,.0f} tokens/s, {cold['pages/s']:,.0f} pages/s; the disk reads "
        f"{cold['disk reads/s, depth 64']:,.0f} pages/s: {cold['of_disk_rate']:.2f} of the disk's rate"
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--batch", type=int, default=1_000_000)
    parser.add_argument("--cold-batch", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disk-seconds", type=int, default=2, help="for each measurement of the disk's own rate")
    parser.add_argument("--folder", default=".", help="where the vocabularies go; on the disk to measure")
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args(argv)
    results = []
    for count in options.tokens:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = os.path.join(folder, "table")
            built = build(path, count)
            print(f"{count:,} tokens, built in {built:.1f} s from a list of text")
            with Table.open(path, mode="r") as table:
                warm = measure_warm(Vocabulary.open(table), count, min(count, options.batch), options.rounds)
            cold = measure_cold(path, count, options.cold_batch, options.rounds, options.disk_seconds)
            report(warm, cold)
            results.append({"build_seconds": built, "warm": warm, "cold": cold})
    result = {"sizes": results}
    if not options.no_result:
        print(write_result("vocab", result))
    return result


if __name__ == "__main__":
    main()
