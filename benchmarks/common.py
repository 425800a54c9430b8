"""What the benchmarks share: the disk's own rate, a cold page cache, a memory limit, and where results go."""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
CGROUP = Path("/sys/fs/cgroup/memory")


def drop_page_cache(paths: list[str]) -> None:
    """Forget the files' pages: by advice, and for all files where we are root."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def disk_random_reads(paths: list[str], seconds: int = 4, depth: int = 64) -> float:
    """Random 4-KiB reads per second past the page cache: fio with libaio, or `depth` threads of pread without it."""
    if shutil.which("fio"):
        command = [
            "fio", "--name=r", f"--directory={os.path.dirname(paths[0])}",
            f"--filename={':'.join(map(os.path.basename, paths))}", "--rw=randread", "--bs=4k", f"--iodepth={depth}",
            "--ioengine=libaio", "--direct=1", f"--runtime={seconds}", "--time_based", "--readonly",
            "--output-format=json", "--norandommap", "--file_service_type=random",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(json.loads(done.stdout)["jobs"][0]["read"]["iops"])
    return _threaded_reads(paths, seconds, depth)


def _threaded_reads(paths: list[str], seconds: int, depth: int) -> float:
    import mmap

    fds = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
    pages = os.stat(paths[0]).st_size // 4096
    end = time.perf_counter() + seconds

    def read(seed: int) -> int:
        rng, buffer, count = np.random.default_rng(seed), mmap.mmap(-1, 4096), 0
        while time.perf_counter() < end:
            os.preadv(fds[int(rng.integers(len(fds)))], [buffer], int(rng.integers(pages)) * 4096)
            count += 1
        return count

    with ThreadPoolExecutor(depth) as pool:
        total = sum(pool.map(read, range(depth)))
    for fd in fds:
        os.close(fd)
    return total / seconds


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int, name: str = "bigembed-bench") -> Iterator[Path | None]:
    """A memory cgroup (v1) with this limit, page cache included; None where we may not make one."""
    group = CGROUP / name
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def run_in(group: Path | None, arguments: list[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run this Python with arguments, inside the cgroup."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.run(
        [sys.executable, *arguments], preexec_fn=enter, text=True, stdout=subprocess.PIPE, timeout=timeout
    )


def memory_bytes() -> dict[str, int]:
    """Resident memory of this process: anonymous, file-backed, shared, and the peak of all."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    names = {"anonymous": "RssAnon", "file": "RssFile", "shared": "RssShmem", "peak": "VmHWM"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items()}


def bar(work: str, figure: float, limit: float, sense: str = "least") -> dict[str, Any]:
    """A figure beside the bar that it has to reach: at least `limit`, or at most (sense "most")."""
    passed = figure >= limit if sense == "least" else figure <= limit
    return {"work": work, "figure": figure, "sense": sense, "bar": limit, "passed": bool(passed)}


def print_bars(bars: list[dict[str, Any]]) -> None:
    """One line a bar, passed or missed."""
    for one in bars:
        verdict = "pass" if one["passed"] else "MISSED"
        print(f"{verdict:6} {one['work']}: {one['figure']:.2f}, at {one['sense']} {one['bar']:.2f}", flush=True)


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Keep a result as JSON, with command, commit and machine."""
    import torch

    import bigembed

    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    arguments = ["FOLDER" if os.path.isabs(argument) else argument for argument in sys.argv[1:]]
    facts = {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], Path(__file__).parent.parent), *arguments]),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "versions": {"bigembed": bigembed.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "time": time.strftime("%Y-%m-%d"),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**facts, **result}, indent=2) + "\n")
    return path
