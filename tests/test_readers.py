"""The two readers of the base: one contract, exact twins."""

import ctypes
import mmap
import os
import time

import numpy as np
import pytest

from bigembed import errors, threads
from bigembed.spec import TableSpec
from bigembed.storage import chunks, files, record_io
from bigembed.storage.chunks import ChunkFiles
from bigembed.storage.readers import ColdReader, MappedReader

SPEC = TableSpec(4096 * 7, 4)
READERS = {
    "cold": ColdReader,
    "mapped": lambda found: MappedReader(found, 1 << 30),
    "mapped, trimmed at once": lambda found: MappedReader(found, 1),
}


@pytest.fixture(params=READERS.values(), ids=READERS)
def make_reader(request):
    return request.param


def chunk_bytes(chunk, spec=SPEC):
    shape = (spec.chunk_rows, spec.record_words)
    return np.random.default_rng(chunk).integers(0, 1 << 32, shape, np.uint32)


def chunk_files(folder, present, spec=SPEC):
    os.makedirs(folder / "weight", exist_ok=True)
    for chunk in present:
        chunk_bytes(chunk, spec).tofile(folder / "weight" / f"c.{chunk}.0")
    return ChunkFiles(str(folder), spec)


def read(reader, rows, spec=SPEC):
    chunk_m = rows // spec.chunk_rows
    out = np.full((len(rows), spec.record_words), 0xAAAAAAAA, np.uint32)
    reader.read(chunk_m, rows % spec.chunk_rows * spec.record_bytes, out)
    return out


def want(rows, present, spec=SPEC):
    out = np.zeros((len(rows), spec.record_words), np.uint32)
    for m, row in enumerate(rows):
        chunk, within = divmod(int(row), spec.chunk_rows)
        if chunk in present:
            out[m] = chunk_bytes(chunk, spec)[within]
    return out


PATTERNS = {
    "sparse": np.arange(0, SPEC.num_rows, 997),
    "dense": np.arange(4000, 9000, 7),
    "runs": np.concatenate([np.arange(10, 90), np.arange(4090, 4103), np.arange(20_000, 20_050)]),
    "one": np.array([SPEC.num_rows - 1]),
    "none": np.empty(0, np.int64),
    "repeated": np.array([5, 5, 5, 6, 6, 5000]),
}


class TestContract:
    @pytest.mark.parametrize("rows", PATTERNS.values(), ids=PATTERNS)
    @pytest.mark.parametrize("present", [range(7), [1, 4, 6], []], ids=["all", "some", "no"])
    def test_every_record_comes_and_absent_chunks_are_zeros(self, tmp_path, make_reader, rows, present):
        found = chunk_files(tmp_path, present)
        reader = make_reader(found)
        for _ in range(2):
            np.testing.assert_array_equal(read(reader, rows), want(rows, present))
        reader.close()
        found.close()

    def test_any_thread_count_reads_the_same(self, tmp_path, make_reader, monkeypatch):
        monkeypatch.setattr(threads.run, "__kwdefaults__", {"grain": 16})
        monkeypatch.setattr("bigembed.storage.record_io.WINDOW_RECORDS", 16)
        found, rows, before = chunk_files(tmp_path, range(7)), PATTERNS["sparse"], threads.get_num_threads()
        try:
            for count in (1, 2, 5):
                threads.set_num_threads(count)
                np.testing.assert_array_equal(read(make_reader(found), rows), want(rows, range(7)))
        finally:
            threads.set_num_threads(before)
            found.close()

    def test_more_chunks_than_may_be_open(self, tmp_path, make_reader, monkeypatch):
        monkeypatch.setattr(chunks, "MAX_OPEN_FILES", 3)
        monkeypatch.setattr("bigembed.storage.readers.MAX_OPEN_FILES", 3)
        found = chunk_files(tmp_path, [0, 1, 2, 4, 5, 6])
        reader, rows = make_reader(found), PATTERNS["sparse"]
        for _ in range(2):
            np.testing.assert_array_equal(read(reader, rows), want(rows, [0, 1, 2, 4, 5, 6]))
        assert len(found._open) <= 3
        reader.close()
        found.close()

    def test_a_file_that_ends_early_is_an_error(self, tmp_path, make_reader):
        found = chunk_files(tmp_path, range(2))
        os.truncate(found.path(1), SPEC.chunk_bytes - 10)
        with pytest.raises(errors.StorageFailed, match=r"c\.1\.0"):
            read(make_reader(found), np.array([3, 2 * SPEC.chunk_rows - 1]))
        found.close()

    def test_a_system_error_names_the_file(self, tmp_path, make_reader):
        found = chunk_files(tmp_path, range(2))

        def refuse(operation, path):
            raise OSError(5, "Input/output error")

        try:
            files.before = refuse
            with pytest.raises(errors.StorageFailed, match=r"c\.0\.0 failed: Input/output error"):
                read(make_reader(found), np.array([3]))
        finally:
            files.before = None
            found.close()

    def test_what_is_written_beside_the_reader_is_seen(self, tmp_path, make_reader):
        found = chunk_files(tmp_path, range(1))
        reader, row = make_reader(found), np.array([17])
        read(reader, row)
        file = found.for_writing(0)
        record_io.write_records(file, row * SPEC.record_bytes, np.full((1, SPEC.record_words), 5, np.uint32))
        file.close()
        assert (read(reader, row) == 5).all()
        found.close()


def test_the_window_advises_no_address_outside_the_runs(tmp_path, monkeypatch):
    """More runs than a window, so that reads and advice overlap."""
    monkeypatch.setattr(record_io, "WINDOW_RECORDS", 5)
    found, rows = chunk_files(tmp_path, range(7)), np.arange(0, SPEC.num_rows, 131)
    np.testing.assert_array_equal(read(ColdReader(found), rows), want(rows, range(7)))
    found.close()


def test_write_records_writes_each_in_its_place_and_nothing_else(tmp_path):
    found = chunk_files(tmp_path, [0])
    rows = np.array([0, 1, 2, 50, 52, 4095])
    records = np.random.default_rng(9).integers(0, 1 << 32, (6, SPEC.record_words), np.uint32)
    file = found.for_writing(0)
    record_io.write_records(file, rows * SPEC.record_bytes, records)
    file.close()
    expected = chunk_bytes(0)
    expected[rows] = records
    np.testing.assert_array_equal(np.fromfile(found.path(0), np.uint32).reshape(expected.shape), expected)
    found.close()


def test_a_new_chunk_file_has_its_whole_size_and_no_bytes(tmp_path):
    found = chunk_files(tmp_path, [])
    found.for_writing(3).close()
    assert os.listdir(found.folder) == ["c.3.0"]
    assert os.stat(found.path(3)).st_size == SPEC.chunk_bytes
    assert files.disk_bytes(found.path(3)) == 0
    assert found.present == {3}


def resident_pages(path):
    """bool per page of a file: whether the page cache holds it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=2) as whole:
        pages = np.zeros(len(whole) // record_io.PAGE_BYTES, np.uint8)
        address = ctypes.addressof(ctypes.c_char.from_buffer(whole))
        assert (
            libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(whole)), ctypes.c_void_p(pages.ctypes.data)) == 0
        )
    return (pages & 1).astype(bool)


def test_advice_brings_the_pages_of_the_records_and_no_others(tmp_path):
    """Advice that goes to the wrong place returns success too, so what counts is its effect on the page cache."""
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(32 << 20))
    file = files.File(str(path), files.READ)
    os.fsync(file.fd)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert resident_pages(path).sum() < 100, "the file's folder must be on a disk, not in memory"
    offsets = np.random.default_rng(1).choice(8000, 200, replace=False) * np.int64(4096) + 3900
    for offset in offsets:
        record_io._advise(file.fd, offset, np.int64(516))  # crosses into the next page
    wanted = np.union1d(offsets // 4096, offsets // 4096 + 1)
    deadline = time.monotonic() + 20
    while not resident_pages(path)[wanted].all() and time.monotonic() < deadline:
        time.sleep(0.01)
    resident = resident_pages(path)
    assert resident[wanted].all(), "advised pages came"
    assert resident.sum() < 2 * len(wanted) + 100, "and not megabytes around them"
    file.close()
