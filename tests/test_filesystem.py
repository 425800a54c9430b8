"""A network filesystem is warned about, a local one is not."""

import warnings

import pytest

from bigembed import Table
from bigembed.storage import filesystem

LINES = """\
22 1 254:0 / / rw,relatime - ext4 /dev/a rw
23 22 0:44 / {remote} rw,relatime shared:1 - nfs4 server:/export rw
24 22 0:45 / {remote}/near rw,relatime - xfs /dev/b rw
"""


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    file = tmp_path / "mountinfo"
    file.write_text(LINES.format(remote=tmp_path / "remote"))
    monkeypatch.setattr(filesystem, "MOUNTS", str(file))


def test_the_longest_mount_point_decides(tmp_path, mounts):
    assert filesystem.filesystem_of(str(tmp_path)) == "ext4"
    assert filesystem.filesystem_of(str(tmp_path / "remote")) == "nfs4"
    assert filesystem.filesystem_of(str(tmp_path / "remote" / "deep" / "table")) == "nfs4"
    assert filesystem.filesystem_of(str(tmp_path / "remote" / "near" / "table")) == "xfs"
    assert filesystem.filesystem_of(str(tmp_path / "remoter")) == "ext4"


def test_a_system_without_the_list_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(filesystem, "MOUNTS", str(tmp_path / "none"))
    assert filesystem.filesystem_of("/") == ""


def test_writing_over_a_network_warns_and_reading_does_not(tmp_path, mounts):
    with pytest.warns(UserWarning, match="network filesystem \\(nfs4\\)"):
        Table.create(tmp_path / "remote" / "t", 10, 1).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Table.open(tmp_path / "remote" / "t", mode="r").close()
        Table.create(tmp_path / "t", 10, 1).close()
