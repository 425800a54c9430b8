"""MappedFile: a file's bytes; which of its pages are in the page cache, asked for, and in this process."""

import os
import time

import numpy as np
import pytest

from bigembed import errors
from bigembed.storage import files
from bigembed.storage.readers import FAULT_BYTES, MappedFile
from bigembed.storage.record_io import PAGE_BYTES

SIZE = 16 << 20


@pytest.fixture
def cold(tmp_path):
    """A file whose pages are not in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    forget(path)
    return path


def forget(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def resident_kib(path):
    """What of a mapped file is in this process's memory."""
    with open("/proc/self/smaps") as maps:
        lines = maps.read().splitlines()
    total, inside = 0, False
    for line in lines:
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_bytes_are_those_of_the_file_and_may_not_be_written(cold):
    mapped = MappedFile(str(cold))
    assert mapped.bytes_B.tobytes() == cold.read_bytes()
    assert mapped.size_bytes == SIZE
    with pytest.raises(ValueError, match="read-only"):
        mapped.bytes_B[0] = 1


def test_an_empty_file_is_no_bytes(tmp_path):
    (tmp_path / "empty").touch()
    mapped = MappedFile(str(tmp_path / "empty"))
    assert len(mapped.bytes_B) == mapped.size_bytes == mapped.mapped_bytes == 0
    mapped.trim()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        MappedFile(str(tmp_path / "none"))


def test_a_fault_names_the_file(cold):
    def fail(operation, path):
        if operation == "map":
            raise OSError(12, "Cannot allocate memory")

    files.before = fail
    try:
        with pytest.raises(errors.StorageFailed, match=f"map of {cold} failed: Cannot allocate memory"):
            MappedFile(str(cold))
    finally:
        files.before = None


def test_cold_pages_are_told_and_come_when_asked_for(cold):
    mapped = MappedFile(str(cold))
    places = np.arange(0, SIZE, SIZE // 32) + 100
    if not mapped.is_cold(places):
        pytest.skip("this filesystem cannot tell, or keeps pages in memory")
    mapped.advise(places)
    deadline = time.monotonic() + 20
    while mapped.is_cold(places) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not mapped.is_cold(places)
    assert mapped.is_cold(places + SIZE // 64), "pages between them did not come"


def test_trim_gives_the_pages_back(cold):
    mapped = MappedFile(str(cold))
    mapped.bytes_B[::PAGE_BYTES].sum()
    mapped.touched(SIZE // PAGE_BYTES)
    assert resident_kib(cold) >= SIZE >> 10
    assert mapped.mapped_bytes == SIZE
    mapped.trim()
    assert resident_kib(cold) == 0
    assert mapped.mapped_bytes == 0
    mapped.touched(3)
    assert mapped.mapped_bytes == 3 * FAULT_BYTES


def test_the_descriptor_goes_with_the_object(cold):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        MappedFile(str(cold))
    assert len(os.listdir("/proc/self/fd")) <= before + 1
