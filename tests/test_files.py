"""files: clear errors, whole reads and writes, old or new and never half."""

import errno
import os

import pytest

from bigembed import errors
from bigembed.storage import files


@pytest.fixture
def strike():
    """Make the n-th operation from now on fail."""

    def at(n, code=errno.EIO):
        count = iter(range(1, 1 << 30))

        def before(operation, path):
            if next(count) == n:
                raise OSError(code, os.strerror(code))

        files.before = before

    yield at
    files.before = None


def test_replacing_a_file_is_old_or_new_at_every_fault_and_a_retry_leaves_nothing_over(tmp_path, strike):
    path = str(tmp_path / "file")
    for n in range(1, 100):
        files.before = None
        files.write_atomically(path, b"old")
        strike(n)
        try:
            files.write_atomically(path, b"new!")
        except errors.StorageFailed:
            assert files.read_bytes(path) in (b"old", b"new!")
        else:
            break
        files.before = None
        files.write_atomically(path, b"new!")
        assert os.listdir(tmp_path) == ["file"]
    files.before = None
    assert n == 6  # open, write, sync, rename, sync directory
    assert files.read_bytes(path) == b"new!"


def test_a_full_disk_is_its_own_error_and_says_what_to_do(tmp_path, strike):
    strike(2, errno.ENOSPC)
    with pytest.raises(
        errors.DiskFull, match=r"write of .*file\.new failed: No space left .*free some space"
    ) as caught:
        files.write_atomically(str(tmp_path / "file"), b"new")
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value.__cause__, OSError)


def test_reads_end_where_the_file_ends(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    file = files.File(str(tmp_path / "file"), files.READ)
    buffer = bytearray(6)
    assert file.pread(100, 7) == b"789"
    assert file.pread_into(buffer, 6) == 4
    assert bytes(buffer) == b"6789\0\0"
    file.close()
    file.close()


def test_short_writes_and_reads_are_continued(tmp_path, monkeypatch):
    pwrite, pread = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, view[:3], offset))
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: pread(fd, min(count, 4), offset))
    file = files.File(str(tmp_path / "file"), files.WRITE)
    file.pwrite(b"0123456789", 2)
    assert file.pread(100, 0) == b"\0\x000123456789"
    file.close()


def test_a_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.read_bytes(str(tmp_path / "none"))
    files.unlink(str(tmp_path / "none"))


def test_a_file_larger_than_expected_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 11)
    with pytest.raises(errors.StorageFailed, match="has 11 bytes, expected at most 10"):
        files.read_bytes(str(tmp_path / "file"), limit_bytes=10)


def test_removing_a_tree_never_follows_a_link(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("tree", "link", "none"):
        files.remove_tree(str(tmp_path / name))
    assert os.listdir(tmp_path) == ["kept"]
    assert (tmp_path / "kept" / "file").read_text() == "kept"


def test_disk_bytes_counts_blocks_and_not_sizes(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "full").write_bytes(b"x" * 8192)
    assert files.disk_bytes(str(tmp_path / "sparse")) < 65536
    assert 8192 <= files.disk_bytes(str(tmp_path)) < 131_072
