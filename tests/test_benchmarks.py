"""Each benchmark runs through at a tiny size, so that it cannot rot. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / name), "--no-result", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cold_gather(tmp_path: Path) -> None:
    tiny = ("--gib", "0.005", "--rounds", "1", "--batch", "512", "--disk-seconds", "1", "--folder", str(tmp_path))
    printed = run("bench_cold_gather.py", *tiny)
    assert "of the disk's rate" in printed
    assert "memmap MADV_RANDOM" in printed


def test_out_of_core(tmp_path: Path) -> None:
    tiny = ("--gib", "0.005", "--seconds", "1", "--batch", "256", "--cache-bytes", "2000000", "--journal-bytes",
            "3000000", "--disk-seconds", "1", "--folder", str(tmp_path))  # fmt: skip
    printed = run("bench_out_of_core.py", *tiny)
    assert "nn.Embedding over a MADV_RANDOM map" in printed
    assert "bigembed " in printed


def test_hit_rate(tmp_path: Path) -> None:
    tiny = ("--rows", "4096", "--batch", "128", "--steps", "20", "--page-steps", "6", "--page-file-bytes", "1000000",
            "--folder", str(tmp_path))  # fmt: skip
    printed = run("bench_hit_rate.py", *tiny)
    assert "minus exact LRU on stationary traces" in printed
    assert "row cache" in printed


def test_lookahead(tmp_path: Path) -> None:
    tiny = ("--gib", "0.005", "--steps", "4", "--warm-steps", "2", "--rounds", "1", "--batch", "256", "--cache-bytes",
            "2000000", "--disk-seconds", "1", "--folder", str(tmp_path))  # fmt: skip
    printed = run("bench_lookahead.py", *tiny)
    assert "zipf 1.05" in printed
    assert "ahead/larger" in printed


def test_convert(tmp_path: Path) -> None:
    tiny = ("--mib", "2", "--peer-mib", "1", "--large-mib", "3", "--rounds", "1", "--folder", str(tmp_path))
    printed = run("bench_convert.py", *tiny)
    assert "of its speed" in printed
    assert "of cat | wc -l + write" in printed
    assert "MiB above import" in printed


def test_vocab(tmp_path: Path) -> None:
    tiny = ("--tokens", "2000", "--batch", "1000", "--cold-batch", "300", "--rounds", "1", "--disk-seconds", "1",
            "--folder", str(tmp_path))  # fmt: skip
    printed = run("bench_vocab.py", *tiny)
    assert "of the dict" in printed
    assert "of the disk's rate" in printed


def test_results_name_command_commit_and_machine() -> None:
    for path in (BENCHMARKS / "results").glob("*.json"):
        assert {"command", "commit", "machine", "versions"} <= json.loads(path.read_text()).keys(), path.name
