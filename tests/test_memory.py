"""The memory limit as control groups state it, and pages that a table larger than memory gives back."""

import os

import numpy as np
import pytest
from test_readers import resident_pages
from training import small_table

from bigembed.storage import memory
from bigembed.storage.memory import UNLIMITED_BYTES, memory_limit_bytes


@pytest.fixture
def groups(tmp_path):
    """Make files under a root as the kernel would show them; returns the limit read from them."""

    def limit(listed, **files):
        (tmp_path / "cgroup").write_text(listed)
        for name, text in files.items():
            path = (
                tmp_path
                / "root"
                / name.replace("__", "/").replace("_max", ".max").replace("_in_bytes", ".limit_in_bytes")
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return memory_limit_bytes(str(tmp_path / "cgroup"), str(tmp_path / "root"))

    return limit


MACHINE = memory_limit_bytes("/nowhere", "/nowhere")


def test_without_groups_it_is_the_machines_memory():
    assert MACHINE == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < UNLIMITED_BYTES


def test_version_2_counts_every_group_above(groups):
    assert groups("0::/a/b\n", a__b__memory_max="max\n", a__memory_max="1000000\n") == 1_000_000


def test_version_2_seen_from_inside_a_container(groups):
    assert groups("0::/\n", memory_max="2000000\n") == 2_000_000


def test_version_1(groups):
    assert groups("4:cpu,memory:/job\n0::/\n", memory__job__memory_in_bytes="3000000\n") == 3_000_000


def test_what_cannot_be_read_is_no_limit(groups):
    assert groups("nonsense\n") == MACHINE
    assert groups("0::/a\n", a__memory_max="max\n") == MACHINE


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
@pytest.mark.parametrize("limit_bytes", [1 << 40, 1000])
def test_a_table_larger_than_memory_leaves_no_pages_behind(tmp_path, monkeypatch, limit_bytes):
    monkeypatch.setattr("bigembed.storage.base.memory_limit_bytes", lambda: limit_bytes)
    table = small_table(tmp_path, 8192, 31, is_temporary=False)
    table.write(np.arange(8192), np.ones((8192, 31), np.float32))
    table.commit()
    table.merge()
    table.refresh()
    path = table.path
    table.close()
    table = type(table).open(path)
    chunk = table._store.base.chunks.path(0)
    rows_M = np.arange(0, 8192, 3)
    plan = table.read_ahead(rows_M)
    sound_M = plan.run(np.empty((len(rows_M), table.spec.row_width), np.float32))
    assert sound_M.all()
    resident = resident_pages(chunk)
    if limit_bytes == 1000:
        assert resident.mean() < 0.1, "the table's folder must be on a disk, not in memory"
    else:
        assert resident.mean() > 0.5
    table.close()


def test_the_default_looks_at_this_process():
    assert 0 < memory.memory_limit_bytes() <= MACHINE
