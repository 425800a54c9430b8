"""Segments, journal and undo: torn tails end at the last whole commit, damage before one is an error."""

import os
import shutil

import numpy as np
import pytest

from bigembed import errors
from bigembed.spec import TableSpec
from bigembed.storage import files
from bigembed.storage.segments import COMMIT, JOURNAL, UNDO, SegmentReader, SegmentWriter, list_segments
from bigembed.storage.superblock import Commit
from bigembed.storage.table import Table
from bigembed.storage.undo import Undo

SPEC = TableSpec(1000, 2, salt=77)


def records(rows):
    return np.arange(len(rows) * SPEC.record_words, dtype=np.uint32).reshape(len(rows), -1) + 1


def write_segment(folder, sequence=1, kind=JOURNAL):
    writer = SegmentWriter(str(folder), kind, sequence, 5, SPEC)
    writer.append_rows(np.array([3, 9]), records([3, 9]), 123)
    writer.append_nulls(np.array([4]))
    writer.append_commit(Commit(6, 5, 1000, "note", 1.5, True, {"step": 3}, {"epoch": [1, None]}))
    writer.file.close()
    return writer.file.path


def frames(folder, sequence=1, kind=JOURNAL):
    reader = SegmentReader(str(folder), kind, sequence, SPEC)
    try:
        return list(reader.frames()), reader.valid_frame_beyond(COMMIT)
    finally:
        reader.close()


def test_frames_come_back_as_they_were_written(tmp_path):
    path = write_segment(tmp_path)
    (rows, nulls, commit), beyond = frames(tmp_path)
    assert (rows.rows_M.tolist(), rows.check_sum, nulls.rows_M.tolist(), beyond) == ([3, 9], 123, [4], -1)
    assert commit.commit == Commit(6, 5, 1000, "note", 1.5, True, {"step": 3}, {"epoch": [1, None]})
    stored = np.frombuffer(files.read_bytes(path), np.uint32, 6, rows.records_offset)
    np.testing.assert_array_equal(stored.reshape(2, 3), records([3, 9]))


def test_records_first_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.randbits", lambda bits: 5)
    for name, first in (("a", False), ("b", True)):
        (tmp_path / name).mkdir()
        writer = SegmentWriter(str(tmp_path / name), UNDO, 1, 5, SPEC)
        writer.append_rows(np.array([3]), records([3]), 7, records_first=first)
        writer.file.close()
    assert files.read_bytes(str(tmp_path / "a" / f"{1:016d}")) == files.read_bytes(str(tmp_path / "b" / f"{1:016d}"))


def test_a_segment_cut_anywhere_keeps_its_whole_frames(tmp_path):
    path = write_segment(tmp_path)
    whole, _ = frames(tmp_path)
    content = files.read_bytes(path)
    for size in range(len(content)):
        with open(path, "wb") as file:
            file.write(content[:size])
        kept, beyond = frames(tmp_path)
        unpadded = [frame.end - 8 for frame in whole]
        assert beyond == -1
        assert [frame.end for frame in kept] == [frame.end for frame in whole][: len(kept)]
        assert len(kept) <= sum(size > end for end in unpadded)
        assert len(kept) >= sum(size >= frame.end for frame in whole)


def test_a_byte_flipped_anywhere_before_the_commit_is_seen(tmp_path):
    path = write_segment(tmp_path)
    content = files.read_bytes(path)
    whole, _ = frames(tmp_path)
    in_records = range(whole[0].records_offset, whole[0].records_offset + 2 * SPEC.record_bytes)
    padding = range(whole[0].end - 8, whole[0].end)
    for at in range(whole[2].offset):
        with open(path, "wb") as file:
            file.write(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
        kept, beyond = frames(tmp_path)
        if at in in_records or at in padding or 60 <= at < 64:
            continue  # under the records' own checks, or padding that nobody reads
        assert len(kept) < 3, at
        assert beyond == whole[2].offset, at


def test_frames_of_another_segment_never_pass(tmp_path):
    (tmp_path / "other").mkdir()
    path, other = write_segment(tmp_path), write_segment(tmp_path / "other")
    content, stranger = files.read_bytes(path), files.read_bytes(other)
    whole, _ = frames(tmp_path)
    with open(path, "wb") as file:
        file.write(content[: whole[0].end] + stranger[whole[0].end :])
    assert [len(frames(tmp_path)[0]), frames(tmp_path)[1]] == [1, -1]


def test_a_segment_of_another_table_or_kind_or_version_is_refused(tmp_path):
    path = write_segment(tmp_path)
    for spec, kind in ((TableSpec(1000, 2, salt=78), JOURNAL), (TableSpec(1000, 3, salt=77), JOURNAL), (SPEC, UNDO)):
        with pytest.raises(errors.DamagedTable, match="does not belong to this table"):
            SegmentReader(str(tmp_path), kind, 1, spec)
    os.rename(path, tmp_path / f"{2:016d}")
    with pytest.raises(errors.DamagedTable, match="does not belong"):
        SegmentReader(str(tmp_path), JOURNAL, 2, SPEC)


# --- undo


def sealed(rows, seed=0):
    from bigembed.kernels.records import check_keys, seal

    values = np.random.default_rng(seed).standard_normal((len(rows), SPEC.row_width)).astype(np.float32)
    out = np.empty((len(rows), SPEC.record_words), np.uint32)
    seal(0, len(rows), rows, values, check_keys(SPEC), out)
    return out, check_keys(SPEC)


def test_undo_gives_back_what_it_kept_after_a_reopen_too(tmp_path):
    undo, rows = Undo(str(tmp_path), SPEC, 4), np.arange(0, 900, 3)
    kept, keys = sealed(rows)
    kept[::4] = 0
    for part in range(3):
        undo.save(rows[part::3], kept[part::3])
        undo.end_segment()
    undo.close()
    for generation, found in ((4, 300), (5, 0)):
        again = Undo(str(tmp_path), SPEC, generation)
        assert again.rows == found
        assert again.contains(np.arange(900)).sum() == found
        again.close()
    again = Undo(str(tmp_path), SPEC, 4)
    np.testing.assert_array_equal(again.rows_between(10, 50), np.arange(12, 51, 3))
    np.testing.assert_array_equal(again.read(rows[20:90], keys), kept[20:90])
    np.testing.assert_array_equal(again.read(rows[7:8], keys), kept[7:8])
    assert again.verify(keys) == 300
    again.start_anew(6)
    assert os.listdir(tmp_path) == []
    again.close()


def test_rows_whose_save_failed_do_not_count_as_kept(tmp_path):
    rows = np.arange(10)
    kept, _ = sealed(rows)
    kept[::2] = 0
    operations = []
    for n in range(1, 100):
        undo = Undo(str(tmp_path), SPEC, 4)
        calls = iter(range(1, 100))

        def strike(operation, path, calls=calls, n=n):
            operations.append(operation)
            if next(calls) == n:
                raise OSError(5, "Input/output error")

        files.before = strike
        try:
            undo.save(rows, kept)
        except errors.StorageFailed:
            assert not undo.contains(rows).any()
        else:
            break
        finally:
            files.before = None
            undo.close()
            for name in os.listdir(tmp_path):
                os.unlink(tmp_path / name)
    assert n > 6
    assert operations[-n + 1 :][-5:] == ["write", "write", "sync", "write", "sync"]  # nulls, records, ., head, .


def test_a_damaged_old_record_is_an_error_and_never_data(tmp_path):
    undo, rows = Undo(str(tmp_path), SPEC, 4), np.arange(5)
    kept, keys = sealed(rows)
    undo.save(rows, kept)
    part = undo._parts[0]
    with open(part.file.path, "r+b") as file:
        file.seek(part.records_offset + 14)
        file.write(b"\xff")
    with pytest.raises(errors.DamagedTable, match="generation 4 cannot be restored"):
        undo.read(rows, keys)
    undo.close()


# --- the journal of a table


@pytest.fixture
def table_path(tmp_path):
    """A table whose journal holds three commits, the last in the last frames of its second segment."""
    path = str(tmp_path / "t")
    for number in range(2):
        with Table.open(path) if number else Table.create(path, 9000, 2, init="zeros", chunk_rows=4096) as table:
            table.write([1, 2, 3], float(number + 1))
            table.commit("one")
            if number:
                table.write([2, 4000, 8999], 9.0)
                table.commit("two")
    return path


def last_segment(path):
    folder = os.path.join(path, "journal")
    return os.path.join(folder, f"{list_segments(folder)[-1]:016d}")


def first_column(path):
    with Table.open(path, mode="r") as table:
        return table.generation, table.read([1, 2, 3, 4000])[:, 0].tolist()


def test_a_journal_cut_at_every_byte_opens_at_its_last_whole_commit(table_path, tmp_path):
    segment = last_segment(table_path)
    content = files.read_bytes(segment)
    seen = set()
    for size in range(len(content)):
        with open(segment, "r+b") as file:
            file.truncate(size)
        generation, values = first_column(table_path)
        assert values == {1: [1, 1, 1, 0], 2: [2, 2, 2, 0], 3: [2, 9, 2, 9]}[generation]
        seen.add(generation)
        with open(segment, "wb") as file:
            file.write(content)
    assert seen == {1, 2} or seen == {1, 2, 3}  # the commit frame's padding may be missing
    assert first_column(table_path)[0] == 3


def test_after_a_torn_tail_the_table_goes_on_and_the_old_tail_never_comes_back(table_path):
    segment = last_segment(table_path)
    content = files.read_bytes(segment)
    os.truncate(segment, len(content) - 40)
    with Table.open(table_path) as table:
        assert table.generation == 2
        table.write([1], 7.0)
        table.commit()
        assert table.read([1, 2])[:, 0].tolist() == [7, 2]
        table.verify()
    assert first_column(table_path) == (3, [7, 2, 2, 0])


def test_a_byte_flipped_before_the_last_commit_is_damage(table_path):
    segment = last_segment(table_path)
    content = files.read_bytes(segment)
    for at in range(80, len(content) - 400, 5):
        with open(segment, "wb") as file:
            file.write(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        try:
            with Table.open(table_path, mode="r") as table:
                table.verify()
        except errors.DamagedTable as error:
            assert "journal" in str(error)  # noqa: PT017
        else:
            reader_sees = first_column(table_path)
            assert reader_sees == (3, [2, 9, 2, 9]), at  # a byte of padding


def test_a_missing_segment_in_the_middle_is_damage(table_path):
    folder = os.path.join(table_path, "journal")
    assert len(list_segments(folder)) == 2
    os.unlink(os.path.join(folder, f"{list_segments(folder)[0]:016d}"))
    for mode in ("r", "r+"):
        with pytest.raises(errors.DamagedTable, match=r"the segment before .* is missing"):
            Table.open(table_path, mode=mode)


def test_a_segment_brought_back_after_its_merge_is_ignored_and_removed(table_path, tmp_path):
    old = tmp_path / "old-journal"
    shutil.copytree(os.path.join(table_path, "journal"), old)
    with Table.open(table_path) as table:
        table.merge()
        table.write([1], 8.0)
        table.commit()
        table.merge()
    shutil.copytree(old, os.path.join(table_path, "journal"), dirs_exist_ok=True)
    with Table.open(table_path) as table:
        assert table.read([1, 2])[:, 0].tolist() == [8, 9]
        assert os.listdir(os.path.join(table_path, "journal")) == []
