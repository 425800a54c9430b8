"""benchmarks/memory.py and bench_start.py run through at tiny sizes, and what they measure with is right."""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigembed import Table

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_start  # noqa: E402
import memory  # noqa: E402
import memory_training  # noqa: E402
import page_cache  # noqa: E402

sys.path.remove(str(BENCHMARKS))


def plan(folder, **changes):
    tiny = {"rows": 20_000, "dim": 8, "rule": "adam", "cache_bytes": 500_000, "distinct_rows": 15_000, "batch": 2_000}
    return {**tiny, "steps": 6, "device": "cpu", "folder": str(folder), "peer": False, **changes}


def run(name, *arguments):
    done = subprocess.run([sys.executable, str(BENCHMARKS / name), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_memory_prints_every_part_and_the_bars(tmp_path):
    tiny = "--dim 8 --cache-mib 1 --batch 500 --distinct-rows 2000 --steps 4 --rounds 1 --peer-gib 0.001 --no-result"
    printed = run("memory.py", *tiny.split(), "--rows", "1e6", "2e6", "--folder", str(tmp_path))
    for name in ("peak", "anon", "shared", *memory.PARTS, "pages", "disk", "step ms", "peer"):
        assert name in printed.splitlines()[1], name
    assert printed.count("*\n") == 2, "neither fits --peer-gib"
    for bar in ("unexplained", "peak resident memory", "median step time"):
        assert bar in printed
    assert list(tmp_path.iterdir()) == []


def test_parts_add_up_to_the_resident_memory(tmp_path):
    result = json.loads(run("memory_training.py", json.dumps(plan(tmp_path))))
    beyond = result["steady"]["rss"] - result["imported"]["rss"]
    assert sum(result["parts"].values()) == beyond
    assert result["unexplained_share"] == result["parts"]["unexplained"] / beyond
    assert abs(result["unexplained_share"]) < 0.05
    assert 0 < result["parts"]["cache"] <= 500_000 + 4096
    assert result["stats"]["cache"]["evictions"] > 0, "out of core, or nothing is shown"
    assert result["peak"] >= result["steady"]["rss"] - (1 << 20)  # the kernel's counters lag a little
    assert result["disk_bytes"] > 0


def test_the_peer_trains_the_same_rows(tmp_path):
    result = json.loads(run("memory_training.py", json.dumps(plan(tmp_path, peer=True))))
    assert result["peak"] > result["imported"]["rss"]
    assert result["step_seconds"] > 0


def test_every_rule_has_its_peer():
    assert memory_training.PEERS.keys() == memory_training.OURS.keys()
    assert memory_training.peer_bytes(1000, 8, "sgd") == 32_000
    assert memory_training.peer_bytes(1000, 8, "adam") == 96_000


@pytest.mark.parametrize("rows", [10, 1000, 10**9])
def test_spread_ids_are_distinct_rows_of_the_table_and_the_same_draws_for_every_size(rows):
    draw = memory_training.spread_ids(rows, distinct=100, batch=50, seed=3)
    count = min(rows, 100)
    for _ in range(3):
        ids = draw().numpy()
        assert len(np.unique(ids)) == len(ids) == min(50, count)
        assert (ids >= 0).all()
        assert (ids < rows).all()
        assert (ids % (rows // count) == 0).all()
    same = memory_training.spread_ids(10**6, distinct=100, batch=50, seed=3)
    if rows >= 100:
        again = memory_training.spread_ids(rows, distinct=100, batch=50, seed=3)
        np.testing.assert_array_equal(again().numpy() // (rows // 100), same().numpy() // 10**4)


def test_bars_compare_the_tables_that_do_not_fit_the_cache():
    def line(rows, peak, seconds, share):
        ours = {"peak": peak, "step_seconds": seconds, "mean_step_seconds": seconds, "unexplained_share": share}
        return {"rows": rows, "bigembed": ours}

    lines = [line(10**5, 100, 9.0, -0.04), line(10**6, 200, 1.0, 0.01), line(10**7, 210, 5.0, 0.02)]
    found = memory.bars([*lines, line(10**9, 205, 1.25, 0.03)])
    assert found["rows"] == [10**6, 10**9]
    assert found["peak_growth"] == pytest.approx(0.05)
    assert found["step_growth"] == 1.25
    assert found["unexplained_share"] == 0.04
    assert "rows" not in memory.bars(lines[:2])


def test_resident_bytes_are_those_that_were_touched():
    array = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)
    assert page_cache.resident_bytes(array) == 0
    array = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)
    whole = np.ndarray(1 << 20, np.uint8, buffer=mmap.mmap(-1, 1 << 20))
    whole[5 * 4096] = 1
    whole[9 * 4096 : 11 * 4096] = 1
    assert page_cache.resident_bytes(whole) == 3 * 4096
    assert page_cache.resident_bytes(whole[9 * 4096 + 1 : 9 * 4096 + 2]) == 4096
    assert page_cache.resident_bytes(np.empty(0)) == 0


@pytest.mark.parametrize("counted", ["by cachestat", "by mincore"])
def test_file_cache_bytes_are_the_pages_in_the_page_cache(tmp_path, monkeypatch, counted):
    if counted == "by mincore":
        monkeypatch.setattr(page_cache, "_cachestat_bytes", lambda path: None)
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 20))
    assert page_cache.file_cache_bytes([str(path)]) == 1 << 20
    (tmp_path / "empty").touch()
    assert page_cache.file_cache_bytes([str(tmp_path / "empty")]) == 0
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert page_cache.file_cache_bytes([str(path)]) < 1 << 20, "the folder must be on a disk, not in memory"


def test_start_prints_every_phase(tmp_path):
    tiny = ("--rows", "1e3", "--journal-mib", "1", "--rounds", "1", "--skip-cold", "--no-result", "--folder")
    printed = run("bench_start.py", *tiny, str(tmp_path))
    assert "bigembed beyond it" in printed
    assert "MiB of journal, 1,000 rows in it" in printed
    assert printed.count("at most") == 3
    assert list(tmp_path.iterdir()) == []


def test_first_batch_leaves_the_table_as_it_was(tmp_path):
    path = str(tmp_path / "table")
    Table.create(path, 100_000, bench_start.DIM).close()
    found = bench_start.run(bench_start.FIRST_BATCH, path, 100_000)
    assert {"forward", "optimizer", "step", "all"} == found.keys()
    with Table.open(path) as table:
        assert not table.has_rows


def test_a_run_that_fails_is_said_to_have_failed():
    with pytest.raises(SystemExit, match="status 1"):
        bench_start.run("raise SystemExit(1)")


def test_plot_draws_measured_and_computed(tmp_path):
    pytest.importorskip("matplotlib")
    ours = {"peak": 1 << 28, "imported": {"rss": 1 << 27}, "parts": dict.fromkeys(memory.PARTS, 1 << 20)}
    lines = [
        {"rows": rows, "bigembed": ours, "peer": {"peak": 256 * rows, "computed": rows > 10**6}}
        for rows in (10**5, 10**6, 10**7)
    ]
    memory.plot(lines, 1 << 27, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
