"""What the killed child of test_crash.py does: operations that are a function of a seed, each reported when done.

Run as a program it reads "seed path" lines, forks a child for each, and says when the child is dead.
"""

import os
import sys
import tempfile

import numpy as np

NUM_ROWS, MOST_ROWS, DIM = 9_000, 20_000, 2
LIMITS = {"journal_bytes": 30_000, "index_bytes": 60_000}


def steps(seed):
    """Endless (operation, argument)."""
    rng = np.random.default_rng(seed)
    while True:
        name = str(rng.choice(["write", "commit", "merge", "rollback", "grow"], p=[0.7, 0.14, 0.08, 0.04, 0.04]))
        yield name, int(rng.integers(1, 1 << 30)) if name == "write" else int(rng.integers(1, 50))


def rows_and_values(seed, num_rows):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, num_rows, rng.integers(1, 200))
    return rows, rng.standard_normal((len(rows), DIM)).astype(np.float32)


def live(path, seed, report_fd):
    """Work until killed; a line "step generation" for each step that returned."""
    from bigembed.storage.table import Table

    table = Table.open(path, **LIMITS)
    for at, (name, arg) in enumerate(steps(seed)):
        if name == "write":
            table.write(*rows_and_values(arg, table.shape[0]))
        elif name == "commit":
            table.commit()
        elif name == "merge":
            table.merge()
        elif name == "rollback":
            table.rollback(table.generations()[0].number)
        else:
            table.grow(min(MOST_ROWS, table.shape[0] + arg))
        os.write(report_fd, f"{at} {table.generation}\n".encode())


def main():
    from bigembed.storage.table import Table

    with tempfile.TemporaryDirectory() as folder:  # every kernel is loaded before the first life
        for reader in ("cold", "mapped"):
            with Table.create(f"{folder}/{reader}", NUM_ROWS, DIM, init="uniform", reader=reader) as table:
                table.write(*rows_and_values(0, NUM_ROWS))
                table.commit()
                table.merge()
                table.verify()
    for line in sys.stdin:
        seed, path = line.split(maxsplit=1)
        pid = os.fork()
        if pid == 0:
            live(path.strip(), int(seed), 1)
        os.write(1, f"pid {pid}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(1, f"dead {status}\n".encode())


if __name__ == "__main__":
    main()
