"""cache_bytes is a promise: training out of core takes that, a fixed part and the batch, and not a byte of the table.

Beyond what is resident when the code is loaded, peak memory stays within 1.1 * cache_bytes + FIXED_BYTES + BATCH_COPIES
times the bytes of a batch's output. It is trained in a memory cgroup with no more than that, where the kernel kills
whoever takes more: nn.Embedding, in the same place, is killed.
"""

import json
import signal
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
FIXED_BYTES = 96 << 20  # staging, rows on their way to the journal, a slice of a merge; and what malloc keeps of them
BATCH_COPIES = 16  # outputs, gradients, sums, rows fetched, the loss's own; about half is kept by malloc between steps

ROWS, DIM, BATCH, STEPS = 1_000_000, 64, 4096, 100
CACHE_BYTES = 64 << 20
ALLOWED_BYTES = int(1.1 * CACHE_BYTES) + FIXED_BYTES + BATCH_COPIES * BATCH * DIM * 4

CHILD = """
import json, sys
from pathlib import Path

import torch

import bigembed
from memory_training import load_code, resident, spread_ids, train

who, folder, group, allowed_bytes = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
rows, dim, batch, steps, cache_bytes = map(int, sys.argv[5:])
load_code(bigembed.optim.RowwiseAdagrad, dim, folder + "/warm")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident()
lines = (group / "memory.stat").read_text().splitlines()
own_bytes = int(dict(line.split() for line in lines)["total_rss"])
(group / "memory.limit_in_bytes").write_text(str(own_bytes + allowed_bytes))
print("limited", flush=True)
if who == "bigembed":
    emb = bigembed.Embedding(rows, dim, path=folder + "/table", cache_bytes=cache_bytes, seed=0)
    opt = bigembed.optim.RowwiseAdagrad(emb, lr=0.01)
else:
    emb = torch.nn.Embedding(rows, dim, sparse=True)
    opt = torch.optim.Adagrad(emb.parameters(), lr=0.01)
draw = spread_ids(rows, rows, batch, seed=0)
for _ in range(steps):
    train(emb, opt, draw())
result = {"beyond_bytes": resident()["peak"] - before["rss"]}
if who == "bigembed":
    emb.commit("done")
    result = {"beyond_bytes": resident()["peak"] - before["rss"], "stats": emb.stats()}
    emb.close()
print(json.dumps(result))
"""


def train_limited(who: str, folder: Path):
    """Run the child in a cgroup of its own: (exit status, lines printed)."""
    sys.path.insert(0, BENCHMARKS)
    try:
        from common import memory_cgroup, run_in
    finally:
        sys.path.remove(BENCHMARKS)
    with memory_cgroup(8 << 30, name=f"bigembed-test-{folder.parent.name}-{folder.name}") as group:
        if group is None:
            pytest.skip("memory cgroups (version 1) cannot be made here: that takes root and a mounted controller")
        numbers = [ALLOWED_BYTES, ROWS, DIM, BATCH, STEPS, CACHE_BYTES]
        path = f"import sys; sys.path.insert(0, {BENCHMARKS!r})\n"
        done = run_in(group, ["-c", path + CHILD, who, str(folder), str(group), *map(str, numbers)])
    return done.returncode, done.stdout.splitlines()


def test_training_out_of_core_stays_within_its_budget_where_more_would_be_killed(tmp_path):
    status, lines = train_limited("bigembed", tmp_path)
    assert status == 0, lines
    result = json.loads(lines[-1])
    cache, merge = result["stats"]["cache"], result["stats"]["merge"]
    assert cache["used_rows"] > 0.95 * cache["capacity_rows"], "the budget must be used for its limit to mean anything"
    assert cache["evictions"] > 0
    assert merge["merges"] + merge["running"] > 0
    assert CACHE_BYTES / 2 < result["beyond_bytes"] <= ALLOWED_BYTES


def test_the_same_table_in_memory_is_killed_there(tmp_path):
    status, lines = train_limited("nn.Embedding", tmp_path)
    assert lines == ["limited"], "it must die of the limit, not before"
    assert status == -signal.SIGKILL
