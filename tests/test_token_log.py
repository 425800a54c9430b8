"""The log of added tokens: an entry counts exactly if its row is below V, whatever happens in between."""

import contextlib
import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from pathlib import Path

import naive_tokens
import numpy as np
import pytest
from test_crash import CHANGES, SYNCS, Disk, FailAt, PowerLoss, StopAt, abandon, quiet_close

from bigembed import errors
from bigembed.storage import files, token_frames, token_log
from bigembed.storage.table import Table
from bigembed.storage.token_frames import FRAME_BYTES, HEADER_BYTES, write_log
from bigembed.storage.token_log import TokenLog

V, D = 100, 2


@pytest.fixture(autouse=True)
def no_faults_left(monkeypatch):
    for name in ("fsync", "fdatasync"):  # what is synced is counted here, not waited for
        monkeypatch.setattr(os, name, lambda fd: None)
    yield
    files.before = None


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: replacing a file waits for a disk."""
    where = "/dev/shm"
    if not os.access(where, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


@pytest.fixture
def table(tmp_path):
    with Table.create(tmp_path / "t", V, D, init="zeros") as made:
        yield made
        if made.may_write:
            made.rollback()


def packed(tokens):
    start_M1 = np.zeros(len(tokens) + 1, np.int64)
    start_M1[1:] = np.cumsum([len(token) for token in tokens])
    return np.frombuffer(b"".join(tokens), np.uint8), start_M1


def listed(entries):
    """[(row, token)]"""
    bytes_B, start_M1, rows_M = entries
    assert (bytes_B.dtype, start_M1.dtype, rows_M.dtype) == (np.uint8, np.int64, np.int64)
    text = bytes_B.tobytes()
    assert start_M1[0] == 0
    assert start_M1[-1] == len(text)
    return [(int(row), text[a:b]) for row, a, b in zip(rows_M, start_M1, start_M1[1:], strict=False)]


def add(table, tokens, first_row=None):
    """New tokens with new rows, as a vocabulary adds them; not committed."""
    first_row = table.shape[0] if first_row is None else first_row
    table.token_log.append(*packed(tokens), first_row)
    table.grow(first_row + len(tokens))


def seen(table):
    return listed(table.token_log.entries(table.shape[0]))


def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- what it says


def test_a_table_without_added_tokens_has_no_file_and_no_entries(table):
    log = table.token_log
    assert listed(log.entries(V)) == listed(log.entries()) == []
    log.append(*packed([]), V)
    table.commit()
    assert not os.path.exists(log.path)
    assert not os.path.exists(os.path.dirname(log.path))


def test_tokens_come_and_go_with_the_rows_of_their_commit(table):
    add(table, [b"one", b"", b"t\0w\no"])
    assert seen(table) == [(100, b"one"), (101, b""), (102, b"t\0w\no")]
    with Table.open(table.path, "r") as reader:
        assert seen(reader) == []
        table.commit()
        assert seen(reader) == []
        reader.refresh()
        assert seen(reader) == seen(table)
    add(table, [b"lost"])
    table.rollback()
    assert table.shape[0] == 103
    assert [token for _, token in seen(table)] == [b"one", b"", b"t\0w\no"]
    add(table, [b"\xff\xfe"])
    two = table.commit()
    table.merge()
    table._commit("auto", None, explicit=False)
    add(table, [b"three"])
    table._commit("auto", None, explicit=False)
    assert len(seen(table)) == 5
    table.rollback(two)
    assert [token for _, token in seen(table)] == [b"one", b"", b"t\0w\no", b"\xff\xfe"]
    table.close()
    for mode in ("r", "r+"):
        with Table.open(table.path, mode) as again:
            assert [token for _, token in seen(again)] == [b"one", b"", b"t\0w\no", b"\xff\xfe"]
            assert listed(again.token_log.entries(102)) == [(100, b"one"), (101, b"")]


def test_tokens_may_be_taken_out_of_the_middle_of_an_array(table):
    bytes_B, start_M1 = packed([b"no", b"yes", b"and", b"no"])
    table.token_log.append(bytes_B, start_M1[1:4], 105)
    assert listed(table.token_log.entries()) == [(105, b"yes"), (106, b"and")]


@pytest.mark.parametrize("part_bytes", [1, 50, 1000])
def test_many_tokens_are_parted_and_one_token_may_be_larger_than_a_part(table, monkeypatch, part_bytes):
    monkeypatch.setattr(token_frames, "PART_BYTES", part_bytes)
    rng = np.random.default_rng(0)
    tokens = [rng.bytes(int(size)) for size in [*rng.integers(0, 40, 200), 5000, 0, 3]]
    add(table, tokens)
    table.commit()
    with Table.open(table.path, "r") as reader:
        assert [token for _, token in seen(reader)] == tokens
        assert len(reader.token_log._frames) > 4


def test_only_the_first_commit_that_reaches_a_row_counts_its_token(table):
    table.token_log.append(*packed([b"a", b"b", b"c"]), V)
    table.grow(V + 2)
    table.commit()  # in the middle of what was appended
    assert [token for _, token in seen(table)] == [b"a", b"b"]
    abandon(table)
    with Table.open(table.path) as again:
        assert listed(again.token_log.entries()) == [(100, b"a"), (101, b"b")]
        again.grow(V + 3)
        again.commit()
        assert len(seen(again)) == 2
    with Table.open(table.path) as again:
        assert len(seen(again)) == 2


def test_what_was_trimmed_never_comes_back(table):
    table.token_log.append(*packed([b"a", b"b"]), V)
    table.token_log.append(*packed([b"c"]), V + 2)
    table.token_log.trim(V + 1)
    assert listed(table.token_log.entries()) == [(100, b"a")]
    table.token_log.trim(V)
    table.grow(V + 9)
    table.commit()
    assert seen(table) == []
    add(table, [b"new"])
    table.commit()
    with Table.open(table.path, "r") as reader:
        assert seen(reader) == [(109, b"new")]


def test_version_changes_with_entries_that_this_log_did_not_append(table):
    log = table.token_log
    versions = [log.version]

    def moved():
        versions.append(log.version)
        return versions[-1] != versions[-2]

    add(table, [b"a"])
    assert not moved()
    table.commit()
    table.merge()
    assert not moved()
    table.rollback()  # to the same
    assert not moved()
    add(table, [b"b"])
    table.rollback()
    assert moved()
    assert table.token_log is log
    with Table.open(table.path, "r") as reader:
        first = reader.token_log.version
        reader.refresh()
        assert reader.token_log.version == first
        add(table, [b"c"])
        table.commit()
        assert reader.token_log.version == first
        reader.refresh()
        assert reader.token_log.version != first
        first = reader.token_log.version
        number = table.generation
        add(table, [b"d"])
        table._commit("auto", None, explicit=False)
        table.rollback(number)
        add(table, [b"e"])
        table.commit()
        reader.refresh()
        assert reader.token_log.version != first
        assert seen(reader) == [(100, b"a"), (101, b"c"), (102, b"e")]


def test_another_log_written_whole_takes_the_place_of_the_old_one(table):
    add(table, [b"a", b"b", b"c"])
    table.commit()
    log, version = table.token_log, table.token_log.version
    write_log(os.path.dirname(log.path), [(*packed([b"b"]), 101), (*packed([b"c"]), 102)])
    log.reload(table.shape[0])
    assert log.version != version
    assert seen(table) == [(101, b"b"), (102, b"c")]
    add(table, [b"d"])
    table.commit()
    assert [token for _, token in seen(table)] == [b"b", b"c", b"d"]
    assert os.listdir(os.path.dirname(log.path)) == ["added"]


# --- who may write


def test_who_may_not_write_is_told_why(table):
    with pytest.raises(errors.InvalidArgument, match=r"rows from 99 on were given; row 100 is the first free"):
        table.token_log.append(*packed([b"x"]), 99)
    add(table, [b"x"])
    with pytest.raises(errors.InvalidArgument, match="row 101 is the first free"):
        table.token_log.append(*packed([b"y"]), 100)
    table.grow(110)
    table.commit()
    with pytest.raises(errors.InvalidArgument, match="row 110 is the first free"):
        table.token_log.append(*packed([b"y"]), 105)  # the rows were committed without tokens
    with Table.open(table.path, "r") as reader:
        for call in (lambda: reader.token_log.append(*packed([b"x"]), 110), lambda: reader.token_log.trim(1)):
            with pytest.raises(errors.ReadOnlyTable, match="Open it with mode='r\\+'"):
                call()
        log = reader.token_log
    with pytest.raises(errors.TableClosed, match="was closed"):
        log.entries()


def test_a_forked_child_reads_and_does_not_write(table):
    add(table, [b"x"])

    def work():
        assert seen(table) == [(100, b"x")]
        with pytest.raises(errors.ForkedTable, match="belongs to process"):
            table.token_log.append(*packed([b"y"]), 101)
        with pytest.raises(errors.ForkedTable):
            table.token_log.trim(0)

    assert in_child(work) == 0
    add(table, [b"z"])
    table.commit()
    assert [token for _, token in seen(table)] == [b"x", b"z"]


def test_a_child_forked_while_another_thread_reads_the_log_reads_it_too(table):
    add(table, [b"x"])
    log, held, may_end = table.token_log, threading.Event(), threading.Event()

    def hold():
        with log._mutex:
            held.set()
            may_end.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)

    def work():
        signal.alarm(20)
        assert seen(table) == [(100, b"x")]

    try:
        assert in_child(work) == 0
    finally:
        may_end.set()
        thread.join()


# --- damage


def content_of(tokens_by_frame, folder):
    os.makedirs(folder, exist_ok=True)
    row, parts = V, []
    for tokens in tokens_by_frame:
        parts.append((*packed(tokens), row))
        row += len(tokens)
    write_log(str(folder), parts)
    with open(folder / "added", "rb") as file:
        return file.read(), row


FRAMES = [[b"one", b"two"], [b"three"], [b"", b"five", b"six"]]


HEAD_BYTES = 24  # kind, zero, salt and first row of a frame


def frame_starts(tmp_path):
    log = token_frames.LogFile(str(tmp_path / "vocab" / "added"), os.O_RDONLY)
    log.read_header()
    starts = [frame.offset for frame in log.frames()]
    log.file.close()
    return starts


def reader_of(tmp_path, content, num_rows):
    (tmp_path / "vocab" / "added").write_bytes(content)
    return TokenLog(str(tmp_path), num_rows, is_writer=False)


def test_cut_off_anywhere_what_is_whole_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(token_log, "PAUSES", ())
    content, end_row = content_of(FRAMES, tmp_path / "vocab")
    whole = listed(reader_of(tmp_path, content, end_row).entries())
    assert [token for _, token in whole] == [b"one", b"two", b"three", b"", b"five", b"six"]
    counts, starts = set(), frame_starts(tmp_path)
    for size in range(HEADER_BYTES, len(content)):
        log = reader_of(tmp_path, content[:size], end_row)
        last = max(start for start in starts if start <= size)
        if size - last >= HEAD_BYTES:  # the head says that the tokens counted
            with pytest.raises(errors.DamagedTable, match=f"the tokens at byte {last} are damaged"):
                log.entries()
            log.close()
            log = reader_of(tmp_path, content[:size], V)
        found = listed(log.entries())
        assert found == whole[: len(found)]
        counts.add(len(found))
        log.close()
    assert counts == {0, 2, 3}
    for size in range(HEADER_BYTES):
        with pytest.raises(errors.DamagedTable, match="vocab/added has a damaged header"):
            reader_of(tmp_path, content[:size], end_row).entries()


def test_every_flipped_bit_is_found_or_harmless(tmp_path, monkeypatch):
    monkeypatch.setattr(token_log, "PAUSES", ())
    content, end_row = content_of(FRAMES, tmp_path / "vocab")
    whole = listed(reader_of(tmp_path, content, end_row).entries())
    found, last = 0, frame_starts(tmp_path)[-1]
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << (at % 8)
        log = reader_of(tmp_path, bytes(flipped), end_row)
        try:
            entries = listed(log.entries())
        except (errors.DamagedTable, errors.NewerFormat):
            found += 1
        else:
            assert entries == whole[: len(entries)]
            # Such a head of the last frame looks like a torn tail; a filling zero between two frames means nothing.
            assert len(entries) == (3 if last <= at < last + HEAD_BYTES else 6)
        log.close()
    assert found > 150


def test_an_invalid_frame_before_tokens_that_count_is_damage_and_before_others_a_torn_tail(tmp_path):
    content, end_row = content_of(FRAMES, tmp_path / "vocab")
    between = f"damaged between byte {HEADER_BYTES} and the tokens at byte"
    here = f"the tokens at byte {HEADER_BYTES} are damaged"
    for at, num_rows, match in [(0, V + 3, between), (FRAME_BYTES, V + 3, here), (FRAME_BYTES, V + 1, here)]:
        damaged = bytearray(content)
        damaged[HEADER_BYTES + at] ^= 1
        (tmp_path / "vocab" / "added").write_bytes(damaged)
        for is_writer in (True, False):
            with pytest.raises(errors.DamagedTable, match=match):
                TokenLog(str(tmp_path), num_rows, is_writer).entries()
        assert (tmp_path / "vocab" / "added").read_bytes() == damaged
    for at, num_rows in [(FRAME_BYTES, V), (0, V), (0, V + 2)]:  # no later frame counts: it may be on disk before
        damaged = bytearray(content)
        damaged[HEADER_BYTES + at] ^= 1
        (tmp_path / "vocab" / "added").write_bytes(damaged)
        log = TokenLog(str(tmp_path), num_rows, is_writer=True)
        assert listed(log.entries()) == []
        log.close()
        assert os.path.getsize(tmp_path / "vocab" / "added") == HEADER_BYTES
    with pytest.raises(errors.NewerFormat, match="upgrade bigembed"):
        reader_of(tmp_path, content[:8] + struct.pack("<I", 2) + content[12:], end_row).entries()


def test_a_damaged_byte_in_the_last_frame_takes_no_token_away(table):
    add(table, [b"committed", b"too"])
    table.commit()
    table.close()
    path = os.path.join(table.path, "vocab", "added")
    content = bytearray(Path(path).read_bytes())
    content[content.index(b"committed")] ^= 1
    Path(path).write_bytes(content)
    for _ in range(2):
        with pytest.raises(errors.DamagedTable, match=f"vocab/added: the tokens at byte {HEADER_BYTES} are damaged"):
            Table.open(table.path)
    assert Path(path).read_bytes() == content
    with Table.open(table.path, "r") as reader:
        for look in (reader.verify, reader.token_log.entries):
            with pytest.raises(errors.DamagedTable, match=f"the tokens at byte {HEADER_BYTES} are damaged"):
                look()


def test_what_is_found_is_synced_before_more_rows_can_come(tmp_path):
    content, end_row = content_of(FRAMES, tmp_path / "vocab")
    done = []
    for num_rows in (end_row, end_row - 1, V):  # nothing to cut, the file replaced, the file truncated
        (tmp_path / "vocab" / "added").write_bytes(content)
        files.before = lambda operation, path: done.append((operation, os.path.relpath(path, tmp_path)))
        log = TokenLog(str(tmp_path), num_rows, is_writer=True)
        synced = [item for item in done if item[0].startswith("sync")]
        assert synced[:2] == [("sync", "vocab/added"), ("sync directory", "vocab")]
        changes = [item for item in done if item[0] in ("truncate", "write", "rename")]
        assert not changes or done.index(changes[0]) > done.index(synced[1])
        done.clear()
        log.reload(num_rows)
        assert [item for item in done if "sync" in item[0]] == [("sync", "vocab/added"), ("sync directory", "vocab")]
        done.clear()
        log.close()


@pytest.mark.parametrize("kind", ["sync", "sync directory"])
def test_a_reload_whose_sync_failed_lets_nothing_be_committed(tmp_path, kind):
    _, end_row = content_of(FRAMES, tmp_path / "vocab")
    log = TokenLog(str(tmp_path), end_row, is_writer=True)

    def fail(operation, path):
        if operation == kind:
            raise OSError(errno.EIO, "injected")

    files.before = fail
    with pytest.raises(errors.StorageFailed):
        log.reload(end_row)
    files.before = None
    for call in (lambda: log.append(*packed([b"x"]), end_row), lambda: log.sync(end_row + 1), lambda: log.trim(V)):
        with pytest.raises(errors.PoisonedTable):
            call()
    log.reload(end_row)
    log.append(*packed([b"x"]), end_row)
    log.sync(end_row + 1)
    log.close()


@pytest.mark.parametrize("field", [3, 4, 5])
@pytest.mark.parametrize("value", [(1 << 64) - 1, 1 << 62, 1 << 40, 0])
def test_a_header_of_a_frame_that_cannot_be_allocates_nothing(tmp_path, field, value):
    content, end_row = content_of(FRAMES, tmp_path / "vocab")
    fields = list(token_frames._FRAME.unpack_from(content, HEADER_BYTES))
    fields[field] = value
    head = token_frames._FRAME.pack(*fields)
    body = content[HEADER_BYTES + FRAME_BYTES :]
    crcs = struct.pack("<II", zlib.crc32(body, zlib.crc32(head)), 0)
    log = reader_of(tmp_path, content[:HEADER_BYTES] + head + crcs + body, V)
    if fields[3] < V:
        with pytest.raises(errors.DamagedTable, match=f"the tokens at byte {HEADER_BYTES} are damaged"):
            log.entries()
    else:
        assert listed(log.entries(end_row)) == []


def test_frames_of_another_log_behind_the_end_do_not_count(tmp_path):
    content, end_row = content_of(FRAMES, tmp_path / "vocab")
    first, _ = content_of(FRAMES[:1], tmp_path / "vocab")
    log = reader_of(tmp_path, first + content[len(first) :], end_row)
    assert [token for _, token in listed(log.entries())] == [b"one", b"two"]


# --- a reader beside the writer


WRITE = """
import sys, numpy as np
from bigembed.storage.table import Table
table = Table.open(sys.argv[1])
rng = np.random.default_rng(0)
print("ready", flush=True)
for step in range(200):
    first, count = table.shape[0], int(rng.integers(1, 5))
    tokens = b"".join(b"%06d" % (first + m) for m in range(count))
    table.token_log.append(np.frombuffer(tokens, np.uint8), np.arange(count + 1) * 6, first)
    table.grow(first + count)
    if step % 7 == 3:
        table.rollback()
    elif step % 11 == 5:
        kept = table.generations()[0].number
        table._commit("auto", None, explicit=False)
        table.rollback(kept)
    else:
        table.commit()
table.close()
"""


def test_readers_beside_a_writer_see_each_rows_token(memory):
    path = str(memory / "t")
    Table.create(path, V, D, init="zeros").close()
    with subprocess.Popen([sys.executable, "-c", WRITE, path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "ready\n"
        rounds = 0
        with Table.open(path, "r") as reader:
            while writer.poll() is None or rounds == 0:
                try:
                    reader.refresh()
                except errors.DamagedTable as error:
                    assert "a rollback to generation" in str(error)  # noqa: PT017
                    continue
                for row, token in seen(reader):
                    assert token == b"%06d" % row
                rounds += 1
            reader.refresh()
            assert len(seen(reader)) == reader.shape[0] - V > 100
        assert writer.returncode == 0
    assert rounds > 5


# --- fuzz against the twin


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_equals_the_twin(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    if seed % 2:
        monkeypatch.setattr(token_frames, "PART_BYTES", 40)
    table, twin = Table.create(tmp_path / "t", V, D, init="zeros"), naive_tokens.TokenLog(V)
    for _ in range(150):
        kind = rng.integers(8)
        if kind <= 1:
            tokens = [rng.bytes(int(size)) for size in rng.integers(0, 20, rng.integers(1, 6))]
            first = max(twin.rows_now, *(row + 1 for row, _ in twin.now), 0) if twin.now else twin.rows_now
            table.token_log.append(*packed(tokens), first)
            twin.append(tokens, first)
        elif kind == 2:
            rows = twin.rows_now + int(rng.integers(0, 8))
            table.grow(rows)
            twin.grow(rows)
        elif kind == 3:
            explicit = bool(rng.integers(2))
            table._commit("auto", None, explicit=explicit)
            twin.commit(explicit)
        elif kind == 4:
            table.rollback()
            twin.drop()
        elif kind == 5 and rng.random() < 0.5:
            table.rollback(table.generations()[0].number)
            twin.rollback() if len(table.generations()) == 1 else twin.drop()
        elif kind == 6:
            quiet_close(table)
            table = Table.open(tmp_path / "t")
            twin.drop()
        elif kind == 7 and rng.random() < 0.3:
            table.write([0], float(rng.random()))
            table._commit("auto", None, explicit=False)
            twin.commit(explicit=False)
            table.merge()
        assert table.shape[0] == twin.rows_now
        assert seen(table) == [entry for entry in twin.now if entry[0] < twin.rows_now]
        assert listed(table.token_log.entries()) == twin.now
        with Table.open(tmp_path / "t", "r") as reader:
            assert seen(reader) == twin.head
    quiet_close(table)


# --- crashes: log and V agree


@pytest.mark.parametrize("does_write", [False, True])
def test_an_append_that_fails_half_way_never_counts(table, monkeypatch, does_write):
    monkeypatch.setattr(token_frames, "PART_BYTES", 1)
    add(table, [b"kept"])
    table.commit()
    pwrite, count = os.pwrite, iter(range(100))

    def fails(fd, view, offset):
        if next(count) < 2:
            return pwrite(fd, view, offset)
        if does_write:
            pwrite(fd, view[: len(view) // 2], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fails)
    with pytest.raises(errors.DiskFull):
        table.token_log.append(*packed([b"a", b"b", b"c", b"d"]), 101)
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert listed(table.token_log.entries()) == [(100, b"kept")]
    table.grow(110)
    table.commit()
    assert seen(table) == [(100, b"kept")]
    abandon(table)
    with Table.open(table.path) as again:
        assert listed(again.token_log.entries()) == [(100, b"kept")]


def test_an_append_that_cannot_be_taken_back_lets_nothing_be_committed(table, monkeypatch):
    monkeypatch.setattr(token_frames, "PART_BYTES", 1)
    add(table, [b"kept"])
    table.commit()
    count = iter(range(100))

    def before(operation, path):
        if path.endswith("added") and (operation == "truncate" or (operation == "write" and next(count) == 1)):
            raise OSError(errno.EIO, "Input/output error")

    files.before = before
    with pytest.raises(errors.StorageFailed):
        table.token_log.append(*packed([b"a", b"b"]), 101)
    files.before = None
    table.grow(110)
    with pytest.raises(errors.PoisonedTable):
        table.commit()
    table.rollback()
    assert listed(table.token_log.entries()) == [(100, b"kept")]
    table.grow(110)
    table.commit()
    abandon(table)
    with Table.open(table.path) as again:
        assert listed(again.token_log.entries()) == [(100, b"kept")]


class SlowDisk(Disk):
    """A file that was cut off may get its old length back, and with it what was synced there."""

    def mixed(self, now, then, rng):
        if len(now) < len(then) and rng.random() < 0.7:
            return now + then[len(now) :]
        return super().mixed(now, then, rng)


class Script:
    """Adds, commits and rollbacks; keeps what a table opened after the step under way may hold."""

    STEPS = (
        ("add", 3),
        ("commit",),
        ("add", 1),
        ("add", 4),
        ("auto",),
        ("back",),
        ("grow", 9),
        ("commit",),
        ("add", 5),
        ("commit",),
        ("add", 2),
        ("drop",),
        ("add", 1),
        ("auto",),
        ("merge",),
        ("half", 4),
        ("commit",),
        ("reopen",),
        ("add", 3),
        ("commit",),
    )

    def __init__(self, path):
        self.path, self.table, self.count = path, None, 0
        self.states = []  # (V, entries) that may be found

    def run(self):
        self.table = Table.create(self.path, V, D, init="zeros", chunk_rows=4096)
        self.twin = naive_tokens.TokenLog(V)
        self.states = [self.head()]
        for step in self.STEPS:
            self.step(*step)

    def head(self):
        return self.twin.rows_head, list(self.twin.head)

    def step(self, name, count=0):
        twin, table = self.twin, self.table
        if name in ("add", "half"):
            tokens = [b"%d-%d" % (self.count, m) for m in range(count)]
            self.count += 1
            table.token_log.append(*packed(tokens), twin.rows_now)
            twin.append(tokens, twin.rows_now)
            rows = twin.rows_now + (count if name == "add" else count // 2)
            table.grow(rows)
            twin.grow(rows)
        elif name == "grow":
            twin.grow(twin.rows_now + count)
            table.grow(twin.rows_now)
        elif name in ("commit", "auto"):
            twin.commit(name == "commit")
            self.states.append(self.head())
            table._commit(name, None, explicit=name == "commit")
        elif name == "back":
            twin.rollback()
            self.states.append(self.head())
            table.rollback(table.generations()[0].number)
        elif name == "drop":
            twin.drop()
            table.rollback()
        elif name == "merge":
            table.merge()
        elif name == "reopen":
            quiet_close(table)
            twin.drop()
            self.table = Table.open(self.path)
        self.states = [self.head()]


def check_reopened(script):
    """What is found is what may be; and it goes on, growing past where tokens were, without any of them."""
    if not script.states:
        return
    for mode in ("r", "r+"):
        try:
            table = Table.open(script.path, mode)
        except errors.DamagedTable as error:
            if mode == "r" and "rollback" in str(error):  # which only a writer can finish
                continue
            raise
        assert (table.shape[0], seen(table)) in script.states
        if mode == "r":
            table.close()
    before = seen(table)
    table.grow(table.shape[0] + 10)
    table.commit()
    assert seen(table) == before
    add(table, [b"goes", b"on"])
    table.commit()
    quiet_close(table)
    with Table.open(script.path) as again:
        assert [token for _, token in seen(again)] == [*(token for _, token in before), b"goes", b"on"]
        assert set(os.listdir(os.path.join(script.path, "vocab"))) <= {"added"}


@pytest.mark.parametrize(
    ("stride", "fault"),
    [(1, {"code": errno.EIO}), (3, {"code": errno.ENOSPC, "lasting": True})],
    ids=["EIO", "ENOSPC from then on"],
)
def test_an_io_error_at_any_operation_leaves_log_and_rows_agreeing(memory, stride, fault):
    for n in range(1, 1000, stride):
        folder = memory / str(n)
        folder.mkdir()
        script = Script(str(folder / "t"))
        files.before = strike = FailAt(n, **fault)
        with contextlib.suppress(errors.BigembedError):
            script.run()
        files.before = None
        if script.table is not None:
            abandon(script.table)
            check_reopened(script)
        shutil.rmtree(folder)
        if not strike.has_struck:
            break
    assert n > 100


def test_after_an_io_error_the_same_table_goes_on_or_says_it_cannot(memory):
    poisoned = went_on = 0
    for n in range(1, 1000, 2):
        folder = memory / str(n)
        folder.mkdir()
        script = Script(str(folder / "t"))
        files.before = strike = FailAt(n, errno.EIO)
        with contextlib.suppress(errors.BigembedError):
            script.run()
        files.before = None
        table = script.table
        if table is not None and not table.is_closed:
            try:
                table.rollback()
            except errors.PoisonedTable:
                poisoned += 1
            else:
                assert (table.shape[0], seen(table)) in script.states
                before = seen(table)
                add(table, [b"later"])
                table.commit()
                script.states = [(table.shape[0], [*before, (table.shape[0] - 1, b"later")])]
                went_on += 1
            abandon(table)
            check_reopened(script)
        shutil.rmtree(folder)
        if not strike.has_struck:
            break
    assert poisoned > 10
    assert went_on > 20


def test_a_sync_of_the_log_that_failed_lets_nothing_be_committed(table):
    add(table, [b"a"])
    table.commit()
    add(table, [b"b"])

    def before(operation, path):
        if operation == "sync" and path.endswith("added"):
            raise OSError(errno.EIO, "Input/output error")

    files.before = before
    with pytest.raises(errors.StorageFailed, match="added"):
        table.commit()
    files.before = None
    for call in (table.commit, lambda: table.token_log.append(*packed([b"c"]), 102)):
        with pytest.raises(errors.PoisonedTable, match="Roll the table back"):
            call()
    table.rollback()
    add(table, [b"c"])
    table.commit()
    assert [token for _, token in seen(table)] == [b"a", b"c"]


@pytest.mark.parametrize(("kinds", "seeds"), [(SYNCS, 2), (CHANGES, 1)], ids=["ahead of syncs", "ahead of changes"])
def test_a_power_loss_at_any_operation_leaves_log_and_rows_agreeing(memory, monkeypatch, kinds, seeds):
    disk = SlowDisk(monkeypatch)
    for n in range(1, 1000):
        for seed in range(seeds):
            folder = memory / f"{n}-{seed}"
            folder.mkdir()
            script = Script(str(folder / "t"))
            files.before = StopAt(n, kinds)
            ran_through = False
            with contextlib.suppress(PowerLoss):
                script.run()
                ran_through = True
            files.before = None
            if script.table is not None:
                abandon(script.table)
                disk.lose_power(script.path, np.random.default_rng(1000 * seed + n))
                try:
                    check_reopened(script)
                except BaseException as error:
                    error.add_note(f"power lost at operation {n}, seed {seed}")
                    raise
            shutil.rmtree(folder)
        if ran_through:
            break
    assert n > 50
