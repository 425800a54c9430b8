"""The gather benchmark, the machine's limits and the Zipf sampler: they run, and what they rest on is right."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = (
    "--gib", "0.005", "--side-gib", "0.003", "--copy-gib", "0.001", "--row-bytes", "256", "512", "--ids", "16",
    "--many-ids", "300", "--rounds", "1", "--cap-seconds", "0.01", "--disk-seconds", "1", "--cached-rows", "5000",
    "--cached-rounds", "1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that spin for each other are slow on a busy machine
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- Zipf ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 7, 16, 17, 1000, 1023, 1024, 1025, 100_003])
def test_ranks_are_scattered_by_a_permutation(num_rows: int) -> None:
    from zipf import Scatter

    rows_V = Scatter(num_rows).rows_of(np.arange(num_rows))
    assert rows_V.dtype == np.int64
    np.testing.assert_array_equal(np.sort(rows_V), np.arange(num_rows))
    np.testing.assert_array_equal(rows_V, Scatter(num_rows).rows_of(np.arange(num_rows)))


@pytest.mark.parametrize("num_rows", [10**9, (1 << 48) - 1])
def test_the_first_ranks_of_many_rows_lie_far_apart(num_rows: int) -> None:
    from zipf import Scatter

    rows_U = np.sort(Scatter(num_rows).rows_of(np.arange(4096)))
    assert 0 <= rows_U[0] < rows_U[-1] < num_rows
    assert (np.diff(rows_U) > 0).all()
    share_B = np.bincount(rows_U * 16 // num_rows, minlength=16) if num_rows < 1 << 40 else np.full(16, 256)
    assert (np.abs(share_B - 256) < 5 * 16).all(), share_B  # 5 standard deviations of 256 in each sixteenth


@pytest.mark.parametrize("exponent", [0, 0.5, 0.999999, 1, 1.05, 1.2, 2])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 200])
def test_ranks_have_the_exact_distribution(num_rows: int, exponent: float) -> None:
    """Chi-squared against the twin that holds all V ranks, at one fixed seed; 5 standard deviations."""
    from traces import BoundedZipf
    from zipf import Zipf

    count = 300_000
    ranks_N = Zipf(num_rows, exponent, seed=3).sample_ranks(count)
    assert ranks_N.min() >= 1
    assert ranks_N.max() <= num_rows
    expected_V = count * np.diff(BoundedZipf(exponent, num_rows).mass_V, prepend=0.0)
    found_V = np.bincount(ranks_N, minlength=num_rows + 1)[1:]
    squared = float(((found_V - expected_V) ** 2 / expected_V).sum())
    assert squared <= num_rows - 1 + 5 * np.sqrt(2 * num_rows)


def test_the_share_of_the_top_is_the_twins_and_what_is_drawn() -> None:
    from traces import BoundedZipf
    from zipf import Scatter, Zipf, harmonic, mass_of_top

    num_rows = 300_000
    for exponent in (0.0, 0.8, 1.0, 1.05, 1.2):
        twin = BoundedZipf(exponent, num_rows).top_mass(1 / 8)
        assert mass_of_top(num_rows, exponent, 1 / 8) == pytest.approx(twin, rel=1e-12)
        slow = float((np.arange(1, num_rows + 1, dtype=np.float64) ** -exponent).sum())
        assert harmonic(num_rows, exponent) == pytest.approx(slow, rel=1e-13)
    hot = np.zeros(num_rows, np.bool_)
    hot[Scatter(num_rows).rows_of(np.arange(num_rows // 8))] = True
    share = hot[Zipf(num_rows, 1.05, seed=1).sample(100_000)].mean()
    assert abs(share - mass_of_top(num_rows, 1.05, 1 / 8)) < 0.005  # 5 standard deviations
    assert mass_of_top(8_000_000, 1.05, 1 / 8) == pytest.approx(0.914, abs=0.001)


def test_ids_are_those_of_the_seed_and_hot_rows_those_of_all_seeds() -> None:
    from zipf import Zipf

    one, same, other = (Zipf(10**9, 1.05, seed).sample(20_000) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert np.bincount(np.unique_inverse(one)[1]).max() > 500
    hottest = [np.unique(ids, return_counts=True) for ids in (one, other)]
    assert len({int(rows[np.argmax(counts)]) for rows, counts in hottest}) == 1
    assert len(Zipf(10, 1.0).sample(0)) == 0


@pytest.mark.parametrize("given", [(0, 1.0), (1 << 49, 1.0), (5, -1.0), (5, float("nan")), (5, float("inf"))])
def test_sizes_and_exponents_that_cannot_be(given: tuple[int, float]) -> None:
    from zipf import Zipf

    with pytest.raises(ValueError, match="must be"):
        Zipf(*given)


def test_a_steep_distribution_is_nearly_one_rank() -> None:
    from zipf import Zipf

    assert (Zipf(1 << 48, 200.0).sample_ranks(1000) == 1).all()


# -- limits -------------------------------------------------------------------------------------------------


def test_limits_run_and_are_written(tmp_path: Path) -> None:
    printed = run("limits.py", "--no-result", "--folder", str(tmp_path), "--gib", "0.004", "--table-gib", "0.001",
                  "--disk-seconds", "1", "--repeats", "1")  # fmt: skip
    for what in ("memcpy", "random rows in RAM", "random 4-KiB reads/s", "random 4-KiB writes/s", "sequential write"):
        assert what in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("pattern", ["read", "write", "randread", "randwrite"])
def test_the_disk_is_measured_without_fio_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, is_direct: bool
) -> None:
    import limits

    path = limits.make_file(str(tmp_path / "file"), 1 << 20)
    if not is_direct:
        monkeypatch.setattr(limits, "can_be_direct", lambda folder: False)
    assert limits._threaded([path], pattern, 4096, 3, 0.05) > 0
    assert (tmp_path / "file").stat().st_size == 1 << 20


def test_all_rates_of_the_disk_without_fio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import limits

    monkeypatch.setattr(limits.shutil, "which", lambda name: None)
    rates = limits.disk_limits(str(tmp_path), 1 << 20, 0.05, depths=(1, 4))  # type: ignore[arg-type]
    assert rates.pop("way") == "threads of Python"
    assert rates.pop("random_reads_per_second").keys() == {"1", "4"}
    assert all(rate > 0 for rate in rates.values())
    assert list(tmp_path.iterdir()) == []


def test_rows_are_copied_in_the_order_asked_for() -> None:
    import limits

    table_VW = np.arange(40, dtype=np.int64).reshape(10, 4)
    rows_N, out_NW = np.array([7, 0, 7, 3]), np.zeros((4, 4), np.int64)
    for threads in (1, 2):
        out_NW[:] = 0
        split = limits.in_threads(4, threads)
        split(lambda start, stop: limits._copy_rows(start, stop, table_VW, rows_N, out_NW))
        np.testing.assert_array_equal(out_NW, table_VW[rows_N])


# -- gather -------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    from gather_ways import Stored

    built = Stored(str(tmp_path), 128, 9000, 3000, chunk_rows=4096)
    built.build()
    return built


def test_every_way_gives_the_tables_rows(stored: Any) -> None:
    """More than one chunk file, ids in any order that repeat, first and last rows."""
    from gather_ways import cold_ways, warm_ways

    from bigembed import Table

    rng = np.random.default_rng(0)
    with Table.open(stored.path, "r") as table:
        assert table.spec.num_chunks > 1
        ways = {way.name: way for way in (*cold_ways(stored), *warm_ways(stored))}
        assert {"Table.read", "tensorstore", "zarr-python", "h5py", "np.memmap"} <= ways.keys()
        for way in ways.values():
            ids_N = np.concatenate([[way.num_rows - 1, 0, 5, 5], rng.integers(0, way.num_rows, 100)])
            with way.open() as gather:
                for given_N in (ids_N, ids_N[:1], ids_N):
                    np.testing.assert_array_equal(np.asarray(gather(given_N)), table.read(given_N), err_msg=way.name)


def test_what_is_kept_is_used_again_and_what_was_cut_short_is_not(stored: Any, tmp_path: Path) -> None:
    before = {path: Path(path).stat().st_mtime_ns for path in stored.files}
    (tmp_path / "zarr-128-3000").rename(tmp_path / "zarr-128-3000.part")
    (tmp_path / "hdf5-128-3000").rename(tmp_path / "hdf5-128-3000.part")
    stored.build()
    after = {path: Path(path).stat().st_mtime_ns for path in stored.files}
    assert before.keys() == after.keys()
    kept = [path for path in before if "zarr-" not in path and "hdf5-" not in path]
    assert kept
    assert all(before[path] == after[path] for path in kept)
    assert not list(tmp_path.glob("*.part"))


def test_a_way_that_gives_other_rows_is_an_error(stored: Any) -> None:
    import contextlib

    from gather_rates import draws, rates
    from gather_ways import Way

    wrong = Way("wrong", stored.num_rows, lambda: contextlib.nullcontext(lambda ids_N: np.zeros((len(ids_N), 32))))
    with pytest.raises(AssertionError, match="wrong gives other rows"):
        rates([wrong], stored, draws("uniform"), 10, is_cold=False, rounds=1, cap_seconds=1, limit=lambda: 1.0)


def test_slow_ways_get_fewer_ids() -> None:
    from gather_rates import _ids_within

    tried: list[int] = []

    def run(ids: int) -> float:
        tried.append(ids)
        return ids / 1000

    assert _ids_within(100.0, 5000, run) == 5000
    tried.clear()
    assert _ids_within(0.5, 5000, run) == 500
    assert tried == [64, 512]  # no time was lost on more
    assert _ids_within(1e-9, 5000, run) == 1
    assert _ids_within(1.0, 3, run) == 3


def test_bars_compare_the_figures_with_their_limits() -> None:
    from gather_bars import bars
    from gather_ways import MAPPED, UNCHECKED

    def case(kind: str, row_bytes: int, rates: dict[str, float], peers: tuple[str, ...] = (), **facts: Any) -> Any:
        ways = {
            name: {
                "rows_per_second": rate,
                "is_ours": name not in peers,
                "is_single_call": not name.startswith("pread"),
            }
            for name, rate in rates.items()
        }
        return {"kind": kind, "row_bytes": row_bytes, "ids": 100, "distribution": "uniform", "ways": ways, **facts}

    cold = {"Table.read": 96.0, "pread, 32 threads": 90.0, "np.memmap": 30.0, "h5py": 33.0}
    warm = {"index_select(out=), in RAM": 100.0, UNCHECKED: 90.0, MAPPED: 51.0}
    cached = {"nn.Embedding": 100.0, "Embedding, all fits": 101.0, "Embedding, through the hash": 60.0}
    found = bars(
        [
            case("cold", 512, cold, ("pread, 32 threads", "np.memmap", "h5py"), limit_per_second=100.0),
            case("cold", 64, cold, limit_per_second=100.0),
            case("warm", 256, warm),
            case("cached", 256, cached, mode="training"),
            {**case("warm", 256, warm), "ids": 7},
        ],
        100,
    )
    figures = {bar["work"].split(", ", 2)[-1]: (round(bar["figure"], 3), bar["passed"]) for bar in found}
    assert figures == {
        "uniform, of the disk's rate at depth 64": (0.96, True),
        "uniform, times the best single call (h5py)": (2.909, False),
        "uniform, times pread, 32 threads": (1.067, True),
        "time by index_select's, without checks": (1.111, False),
        "time by index_select's, with checks": (1.961, True),
        "uniform, training, time by nn.Embedding's, everything fits": (0.99, True),
        "uniform, training, time by nn.Embedding's, through the hash": (1.667, False),
    }


def test_quick_and_the_default_name_the_same_options() -> None:
    import bench_gather

    assert bench_gather.QUICK.keys() == bench_gather.SIZES.keys()
    quick, default = bench_gather._parsed(["--quick", "--rounds", "7"]), bench_gather._parsed([])
    assert (quick.rounds, default.rounds, quick.gib, default.gib) == (7, 3, 1.0, 8.0)


def test_the_gather_benchmark_runs(tmp_path: Path) -> None:
    printed = run("bench_gather.py", "--no-result", "--folder", str(tmp_path), *TINY)
    for kind in ("cold", "warm", "cached, training", "cached, no_grad"):
        assert f"\n{kind}, " in printed, printed
    for what in ("uniform", "zipf 1.05", "pread, 32 threads", "tensorstore", "of the limit"):
        assert what in printed
    assert printed.count("pass  ") + printed.count("MISSED") == 3 + 4 + 8
    assert list(tmp_path.iterdir()) == []


def test_results_can_be_written_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_gather
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    tiny = [*TINY, "--folder", str(tmp_path), "--parts", "cached", "--row-bytes", "256"]
    result = bench_gather.main(tiny)
    written = json.loads((tmp_path / "results" / "gather.json").read_text())
    assert written["cases"] == json.loads(json.dumps(result["cases"]))
    assert {"command", "commit", "machine", "bars", "zipf_mass_of_top_eighth"} <= written.keys()
