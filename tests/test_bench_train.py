"""The training benchmarks at a tiny size, that each side really trains, and the report. No time is asserted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_train  # noqa: E402
import bench_train_lookahead  # noqa: E402
import bench_train_out_of_core  # noqa: E402
import memory  # noqa: E402
import out_of_core  # noqa: E402
import report  # noqa: E402
import train_contenders  # noqa: E402
from common import bar  # noqa: E402

import bigembed  # noqa: E402

DIM = 8
COMMON = ("--disk-seconds", "1", "--dim", "8")


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / name), "--no-result", *arguments]
    # More threads than free cores would spin: tiny batches gain nothing by them.
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- tiny sizes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """What bench_train finds at a tiny size, all of its parts."""
    threads = torch.get_num_threads(), bigembed.get_num_threads()
    try:
        tiny = ["--rows", "3000", "--dim", "8", "--batches", "64,128", "--rounds", "1", "--no-result"]
        return bench_train.main([*tiny, "--threads", "1", "--block-ids", "256"])
    finally:
        torch.set_num_threads(threads[0])
        bigembed.set_num_threads(threads[1])


def test_training_in_memory(trained: dict[str, Any]) -> None:
    lines = trained["train"]
    found = {(line["rule"], line["ids"], line["batch"]) for line in lines}
    plain = {(rule, ids, batch) for rule in bench_train.RULES for ids in ("uniform", "zipf") for batch in (64, 128)}
    assert plain | {("Adam, dense", "uniform", 128), ("SGD, hashed", "zipf", 128)} <= found
    for line in lines + trained["forward"] + trained["bags"]:
        assert line["best_peer"] != line["ours"]
        assert line["times_faster"] == line["seconds"][line["best_peer"]] / line["seconds"][line["ours"]]
        assert (
            min(took for name, took in line["seconds"].items() if name != line["ours"])
            == (line["seconds"][line["best_peer"]])
        )
    assert {line["rule"] for line in trained["forward"]} == {"forward", "forward, hashed"}
    assert {line["rule"] for line in trained["bags"]} == {"SGD", "Adagrad"}
    assert trained["bars"] == []  # they are about other batches


def test_training_out_of_core(tmp_path: Path) -> None:
    tiny = ("--gib", "0.002", "--rules", "adagrad", "--ids", "uniform", "--ratios", "4", "--batch", "1024", "--seconds",
            "0.3", "--warm-seconds", "0.1", "--peer-seconds", "0.1", "--journal-bytes", "300000")  # fmt: skip
    printed = run("bench_train_out_of_core.py", *tiny, *COMMON, "--folder", str(tmp_path))
    assert re.search(r"[3-9]\d* merges", printed) or re.search(r"\d\d+ merges", printed), printed
    assert "too few merges" not in printed
    assert re.search(r"(pass|MISSED) +adagrad, uniform, table 4 x memory: times the mapped peer", printed)
    assert re.search(r"(pass|MISSED) +adagrad, uniform, table 4 x memory: of the disk's rate", printed)
    assert not list(tmp_path.iterdir())


def test_training_with_lookahead(tmp_path: Path) -> None:
    tiny = ("--gib", "0.002", "--batch", "128", "--steps", "6", "--warm-steps", "4", "--rounds", "1",
            "--memory-rounds", "1")  # fmt: skip
    printed = run("bench_train_lookahead.py", *tiny, *COMMON, "--folder", str(tmp_path))
    assert "computed for a disk of 1,000,000 reads/s" in printed
    assert re.search(r"(pass|MISSED) +table 8 x memory, zipf, Adagrad, lookahead", printed)
    assert "a merge came between" not in printed
    assert not list(tmp_path.iterdir())


def test_training_on_a_sparse_table(tmp_path: Path) -> None:
    tiny = ("--gib", "8", "--seconds", "0.2", "--batch", "2048", "--journal-bytes", "300000")
    printed = run("bench_train_sparse.py", *tiny, *COMMON, "--folder", str(tmp_path))
    assert "268,435,456 rows, uniform" in printed
    assert int(re.search(r"(\d+) merges", printed)[1]) > 0  # type: ignore[index]
    stopped = run("bench_train_sparse.py", *tiny, *COMMON, "--folder", str(tmp_path), "--min-free-bytes", str(1 << 60))
    assert "the disk was nearly full" in stopped
    assert not list(tmp_path.iterdir())


# -- each side does the work ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", bench_train.RULES)
def test_a_step_of_every_contender_is_the_rule(rule: str, tmp_path: Path) -> None:
    torch.sparse.check_sparse_tensor_invariants.disable()
    ids_N, gradient_ND = torch.tensor([5, 17, 5, 0]), torch.rand(4, DIM) + 0.5
    contenders = train_contenders.contenders_of(rule, 100, DIM, str(tmp_path))
    assert [one.is_ours for one in contenders] == [True] + [False] * (len(contenders) - 1)
    assert len(contenders) >= 2
    for one in contenders:
        with torch.no_grad():
            before_ND = one.forward(ids_N).clone()
        one.step((ids_N,), gradient_ND)
        with torch.no_grad():
            moved_ND = one.forward(ids_N) - before_ND
        sums_ND = gradient_ND.clone()
        sums_ND[0] = sums_ND[2] = gradient_ND[0] + gradient_ND[2]
        rowwise = rule == "RowwiseAdagrad" and "nn.Embedding" not in one.name
        root_ND = sums_ND.square().mean(1, keepdim=True).sqrt() if rowwise else sums_ND
        # Adam's first step and Adagrad's go by the gradient over its root; SparseAdam counted a step before.
        expected_ND = -train_contenders.LR * (sums_ND if rule == "SGD" else sums_ND / root_ND)
        if one.name == "nn.Embedding + SparseAdam":
            assert (moved_ND.sign() == expected_ND.sign()).all()
        else:
            torch.testing.assert_close(moved_ND, expected_ND, rtol=1e-4, atol=1e-6)
    contenders[0].module.close()


def test_bags_train_the_same_table(tmp_path: Path) -> None:
    contenders = train_contenders.contenders_of("SGD", 100, DIM, str(tmp_path))
    bags = train_contenders.bags_of(contenders)
    assert [one.name for one in bags] == ["bigembed.EmbeddingBag", "nn.EmbeddingBag + SGD"]
    for one, bag in zip(contenders, bags, strict=False):
        with torch.no_grad():
            before_D = one.forward(torch.tensor([3]))[0].clone()
        bag.step((torch.tensor([3, 4, 5]), torch.tensor([0, 2])), torch.ones(2, DIM))
        with torch.no_grad():
            moved_D = one.forward(torch.tensor([3]))[0] - before_D
        torch.testing.assert_close(moved_D, torch.full((DIM,), -train_contenders.LR))
    contenders[0].module.close()


def test_nothing_is_committed_while_every_row_changes(tmp_path: Path) -> None:
    ours = train_contenders.bigembed_table("Adam", 3000, DIM, str(tmp_path))
    for _ in range(3):
        ours.step((torch.arange(3000),), torch.ones(3000, DIM))
    stats = ours.module.stats()
    assert (stats["journal"]["auto_commits"], stats["cache"]["dirty_rows"]) == (0, 3000)
    assert stats["cache"]["misses"] == 3000  # each row once, when it was preloaded
    ours.module.close()


def task_of(folder: Path, rule: str) -> dict[str, Any]:
    return {"folder": str(folder), "rule": rule, "dim": DIM, "cache_bytes": 1 << 20, "journal_bytes": 1 << 20}


@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
def test_the_mapped_peer_equals_torch_in_memory(rule: str, tmp_path: Path) -> None:
    rows = 500
    out_of_core.build_flat(str(tmp_path), rule, rows, DIM)
    flat = [np.fromfile(path, np.float32).reshape(rows, DIM) for path in sorted(tmp_path.glob("flat.*"))]
    weight = torch.nn.Parameter(torch.from_numpy(flat[0].copy()))
    plain = torch.nn.Embedding(rows, DIM, sparse=True, _weight=weight.data)
    twin = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[rule](plain.parameters(), lr=out_of_core.LR)
    if rule == "adagrad":
        twin.state[plain.weight]["sum"].copy_(torch.from_numpy(flat[1]))
    mapped = out_of_core.open_mapped(task_of(tmp_path, rule))
    steps = [out_of_core.stepper(emb, opt, 64, DIM) for emb, opt in (mapped, (plain, twin))]
    for seed in range(5):
        ids_N = torch.randint(0, rows, (64,), generator=torch.Generator().manual_seed(seed))
        for step in steps:
            step(ids_N)
    assert torch.equal(mapped[0].weight, plain.weight)
    on_disk = torch.from_numpy(np.fromfile(tmp_path / "flat.0", np.float32).reshape(rows, DIM))
    assert torch.equal(on_disk, plain.weight)
    assert not torch.equal(on_disk, torch.from_numpy(flat[0]))


@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
def test_ours_out_of_core_has_every_row_written_and_trains(rule: str, tmp_path: Path) -> None:
    rows = 5000
    out_of_core.build_table(str(tmp_path), rule, rows, DIM)
    before = (tmp_path / "table/superblock").stat().st_mtime_ns
    out_of_core.build_table(str(tmp_path), rule, rows, DIM)  # is there already
    assert (tmp_path / "table/superblock").stat().st_mtime_ns == before
    emb, opt = out_of_core.open_bigembed(task_of(tmp_path, rule))
    stats = emb.stats()
    assert stats["table"]["written_rows"] == rows
    assert emb.table.spec.row_width == DIM * (1 + out_of_core.STATE_OF_RULE[rule])
    ids_N = torch.arange(64)
    first_ND = emb(ids_N).detach().clone()
    out_of_core.stepper(emb, opt, 64, DIM)(ids_N)
    assert (emb(ids_N) != first_ND).all()
    out_of_core.discard(emb)


# -- arithmetic -----------------------------------------------------------------------------------------------


def test_memory_of_a_table_leaves_room_for_the_process() -> None:
    gib = 1 << 30
    assert out_of_core.memory_of(8 * gib, 4) == {"limit_bytes": 2 * gib, "cache_bytes": gib}
    eighth = out_of_core.memory_of(8 * gib, 8)
    assert eighth == {"limit_bytes": gib, "cache_bytes": gib - out_of_core.PROCESS_BYTES}
    tiny = out_of_core.memory_of(1 << 20, 8)
    assert tiny == {"limit_bytes": out_of_core.LEAST_LIMIT_BYTES, "cache_bytes": 1 << 15}


def test_rows_of_a_table_count_its_state() -> None:
    assert out_of_core.rows_of(8, "sgd", 128) == 2 * out_of_core.rows_of(8, "adagrad", 128) == 1 << 24


def test_bars() -> None:
    assert bar("a", 2.0, 2.0)["passed"]
    assert not bar("a", 1.99, 2.0)["passed"]
    assert bar("a", 1.2, 1.2, "most")["passed"]
    assert not bar("a", float("nan"), 1.2, "most")["passed"]


def line_of(rule: str, batch: int, times: float, ours: str = "bigembed") -> dict[str, Any]:
    return {"rule": rule, "ids": "zipf", "batch": batch, "times_faster": times, "best_peer": "peer", "ours": ours}


def test_bars_of_training_in_memory() -> None:
    train = [line_of("Adagrad", 65_536, 3.9), line_of("Adam", 8_192, 2.5), line_of("RowwiseAdagrad", 256, 1.0)]
    train += [line_of("SGD", 65_536, 1.4), line_of("SGD", 8_192, 1.0), line_of("SGD", 256, 0.67)]
    train += [line_of("Adam, dense", 65_536, 9.0), line_of("SGD, hashed", 65_536, 9.0), line_of("SGD", 64, 9.0)]
    forward = [line_of("forward", 65_536, 0.99), line_of("forward, hashed", 65_536, 0.63, "bigembed, hashed")]
    found = bench_train.bars_of({"train": train, "forward": forward})
    assert [one["passed"] for one in found] == [False, True, True, False, True, True, False, True]


def case_of(ratio: float, ids: str, times: float, of_disk: float, merges: int) -> dict[str, Any]:
    ours = {"merges": merges, "ids_per_second": 1e4, "stall_seconds": 0.5}
    case = {"rule": "sgd", "ids": ids, "ratio": ratio, "times_faster": times, "of_disk": of_disk, "bigembed": ours}
    return {**case, "mapped": {"ids_per_second": 1e4 / times}}


def test_bars_of_training_out_of_core() -> None:
    cases = [case_of(2, "uniform", 9, 9, 9), case_of(4, "uniform", 2.3, 0.5, 3), case_of(4, "zipf", 9.0, 9.0, 2)]
    found = bench_train_out_of_core.bars_of(cases, min_merges=3)
    assert [one["passed"] for one in found] == [True, False, False]
    assert "too few merges" in found[2]["work"]


def test_verdict_on_lookahead() -> None:
    ahead = {"seconds": {"lookahead": 0.11}, "misses_per_step": {"lookahead": 5000.0}}
    in_memory = {"ours": "a", "best_peer": "b", "seconds": {"a": 0.01, "b": 0.02}}
    found = bench_train_lookahead.verdict(ahead, in_memory, rate=50_000.0)
    assert found["over_larger"] == pytest.approx(1.1)
    assert found["over_in_memory"] == pytest.approx(5.5)
    assert found["computed"]["500000"]["bound_over_in_memory"] == pytest.approx(0.5)  # cached work decides there
    assert found["computed"]["1000000"]["step_over_in_memory"] == pytest.approx(0.55)


# -- the report -----------------------------------------------------------------------------------------------

FACTS = {"command": "python benchmarks/x.py --a", "commit": "abc1234", "machine": "m", "time": "2026-01-01"}


def written(folder: Path, **results: dict[str, Any]) -> str:
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps({**FACTS, **result}))
    return report.write_report(folder).read_text()


def test_report_says_what_is_missing(tmp_path: Path) -> None:
    page = written(tmp_path)
    for name, command in report.COMMANDS.items():
        assert f"`{name}.json` is missing; `python benchmarks/{command}` makes it." in page
        assert (BENCHMARKS / command).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_report_of_training(tmp_path: Path, trained: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    bars = [bar("one work", 3.0, 2.5), bar("other work", 1.3, 1.2, "most")]
    cases = [case_of(4, "zipf", 2.5, 0.7, 3), {**case_of(8, "uniform", 2.0, 0.7, 3), "bigembed": {"failed": -9}}]
    cases[1]["times_faster"] = 0.0
    outside = {"gib": 8, "dim": 128, "batch": 16_384, "cases": cases, "bars": bars}
    page = written(tmp_path, train={**trained, "bars": bars}, train_out_of_core=outside, start={"open": 1})
    for name in ("train.png", "train_out_of_core.png"):
        assert (tmp_path / name).stat().st_size > 5000
        assert f"({name})" in page
    assert "| one work | 3.00 | at least 2.50 | pass |" in page
    assert "| other work | 1.30 | at most 1.20 | **missed** |" in page
    assert "Ended with an error: sgd, uniform, 8." in page
    assert "| sgd | zipf | 4 | 10,000 | 4,000 | 2.50 | 0.70 | 3 | 0.5 |" in page
    assert page.count("`python benchmarks/x.py --a`, commit abc1234") == 2
    assert "| [start.json](start.json) | `python benchmarks/x.py --a` | abc1234 |" in page
    rows = [line for line in page.splitlines() if line.startswith("| RowwiseAdagrad | zipf |")]
    assert len(rows) == 2


def test_report_of_gathers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    way = {"rows_per_second": 70_000.0, "of_limit": 0.97, "ids": 256, "is_ours": True}
    ways = {"Table.read": way, "np.memmap": {**way, "rows_per_second": 700.0, "of_limit": 0.01, "is_ours": False}}
    case = {"kind": "cold", "distribution": "uniform", "row_bytes": 512, "ids": 256, "ways": ways}
    case |= {"limit_per_second": 72_000.0, "limit_is": "random reads/s", "best_peer": "np.memmap"}
    page = written(tmp_path, gather={"cases": [case], "bars": [bar("cold", 0.97, 0.95)]})
    assert "| Table.read | 256 | 70,000 | 0.97 | 100.00 |" in page
    assert "| cold | 0.97 | at least 0.95 | pass |" in page
    assert (tmp_path / "gather.png").exists()
    assert "| cold |" in written(tmp_path, gather={"cases": [], "bars": [bar("cold", 0.97, 0.95)]})


def test_report_of_memory(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mib, parts = 1 << 20, dict.fromkeys(memory.PARTS, 1 << 20)
    ours = {"peak": 500 * mib, "steady": {"rss": 480 * mib, "anonymous": 400 * mib, "file": 80 * mib, "shared": 0}}
    ours |= {"imported": {"rss": 280 * mib}, "parts": parts, "page_cache_bytes": 0, "disk_bytes": 7 * mib}
    ours |= {"step_seconds": 0.025, "mean_step_seconds": 0.03, "unexplained_share": 0.06, "device_bytes": 0}
    peers = [{"peak": 400 * mib, "computed": False}, {"peak": 90_000 * mib, "computed": True}]
    lines = [{"rows": 10**6 * 10**n, "bigembed": ours, "peer": peer} for n, peer in enumerate(peers)]
    page = written(tmp_path, memory={"lines": lines, "cache_bytes": mib, "bars": memory.bars(lines)})
    assert "| 1,000,000 | 500 | 480 | 400 | 80 | 7 | 25.0 | 400 |" in page
    assert "| 90,000 (computed) |" in page
    assert "| 0.060 | at most 0.05 | **missed** |" in page
    assert "| step time from V = 1,000,000 to 10,000,000: times | 1.00 | at most 1.30 | pass |" in page
    assert (tmp_path / "memory.png").exists()


def test_report_of_lookahead_and_the_sparse_table(tmp_path: Path) -> None:
    ahead = {"seconds": {"lookahead": 0.11, "plain": 0.2}, "misses_per_step": {"lookahead": 5000.0}}
    in_memory = {
        "ours": "a",
        "best_peer": "nn.Embedding + Adagrad",
        "seconds": {"a": 0.01, "nn.Embedding + Adagrad": 0.02},
    }
    found = bench_train_lookahead.verdict(ahead, in_memory, rate=50_000.0)
    sparse = {"rows": 10, "ids_per_second": 40_000.0, "seconds": 300.0, "disk_was_full": True, "disk_bytes": 1 << 31,
              "stats": {"merge": {"merges": 5}}}  # fmt: skip
    page = written(tmp_path, train_lookahead={"ahead": ahead, **found, "bars": []}, train_sparse=sparse)
    assert "| a step with lookahead | 110.00 ms |" in page
    assert "| computed for a disk of 500,000 reads/s, times that | 0.55 |" in page
    assert "| seconds | 300 (the disk was full) |" in page
