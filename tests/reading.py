"""What the tests of file readers share: a source read whole, and the memory that a child process needs to read one."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from bigembed.convert.source import Source

CHILD = """
import importlib, sys
from bigembed.convert.source import ReadOptions
import bigembed.convert.{reader} as reader
{imports}
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
with open(sys.argv[1], "rb") if not {is_folder} else open("/dev/null", "rb") as file:
    head = file.read(4096)
options = ReadOptions()
with reader.open_source(sys.argv[1], reader.recognise(head, sys.argv[1]), options) as source:
    total = sum(float(block.values_MD[0, 0]) for block in source.blocks())
    total += sum(len(rows) for _, rows in source.more_tokens())
print((peak() - before) >> 10, before >> 10, source.num_rows)
"""


def read_all(source: Source) -> tuple[np.ndarray, list[bytes | None]]:
    """Every row, copied, and every row's token; the source is closed."""
    with source:
        values, tokens = [], []
        for block in source.blocks():
            assert block.values_MD.dtype == np.float32
            assert block.values_MD.flags.c_contiguous
            assert block.values_MD.shape[1] == source.dim
            values.append(block.values_MD.copy())
            listed = [None] * len(block.values_MD) if block.tokens is None else block.tokens.to_list()
            assert len(listed) == len(block.values_MD)
            tokens += listed
        for packed, row_M in source.more_tokens():
            assert len(packed) == len(row_M)
            assert row_M.dtype == np.int64
            for token, row in zip(packed.to_list(), row_M.tolist(), strict=True):
                tokens[row] = tokens[row] or token
    whole = np.concatenate(values)
    assert source.num_rows in (None, len(whole))
    assert source.total_bytes in (None, source.done_bytes)
    assert source.has_tokens == any(token is not None for token in tokens)
    return whole, tokens


def peak_mib_above_import(reader: str, path: Path, imports: str = "") -> int:
    """MiB of resident memory at its highest, beyond what a process has that imported the reader and its library."""
    code = CHILD.format(reader=reader, imports=imports, is_folder=path.is_dir())
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[0])
