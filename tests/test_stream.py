"""ByteStream and ReadAhead: the same bytes whatever the compression and the sizes asked for; damage is named."""

import hashlib
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest

from bigembed.convert.decompress import Members, kind_of
from bigembed.convert.read_ahead import ReadAhead
from bigembed.convert.stream import ByteStream
from bigembed.errors import BadSource, MissingLibrary, StorageFailed
from bigembed.storage import files

KINDS = ["gzip", "bzip2", "xz", "zstd"]


def compressed(kind, data):
    if kind == "zstd":
        return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)
    return __import__({"gzip": "gzip", "bzip2": "bz2", "xz": "lzma"}[kind]).compress(data)


def some_bytes(seed, count):
    rng = random.Random(seed)
    return b"".join(rng.choice([b"the ", b"0.25 ", rng.randbytes(7), b"\0" * 30]) for _ in range(count))


def stream_of(tmp_path, data):
    path = tmp_path / "source"
    path.write_bytes(data)
    return ByteStream.open(path)


def read_all(stream, size=1 << 16):
    parts, buffer = [], bytearray(size)
    try:
        while count := stream.read_into(buffer):
            parts.append(bytes(buffer[:count]))
        assert stream.read_into(buffer) == 0
        assert stream.head(5) == b""
    finally:
        stream.close()
    return b"".join(parts)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("count", [0, 1, 2, 50, 40_000])
def test_a_stream_is_the_bytes_of_its_file(tmp_path, kind, count):
    data = some_bytes(count, count)
    raw = compressed(kind, data) if kind else data
    stream = stream_of(tmp_path, raw)
    assert (stream.compression, stream.total_bytes, stream.can_be_read_again) == (kind, len(raw), True)
    assert read_all(stream) == data
    assert (stream.done_bytes, stream.sha256) == (len(raw), None)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("seed", range(4))
def test_any_sizes_and_looks_ahead_give_the_same(tmp_path, kind, seed):
    rng = random.Random(seed)
    data = some_bytes(seed, 3000)
    stream = stream_of(tmp_path, compressed(kind, data) if kind else data)
    at = 0
    while at < len(data):
        if rng.random() < 0.4:
            size = rng.choice([0, 1, 100, 5000])
            assert stream.head(size) == data[at : at + size]
        buffer = bytearray(rng.choice([1, 3, 200, 4000]))
        count = stream.read_into(buffer)
        assert count == min(len(buffer), len(data) - at)
        assert buffer[:count] == data[at : at + count]
        at += count
    assert stream.read_into(bytearray(9)) == 0
    stream.close()
    stream.close()


@pytest.mark.parametrize("kind", KINDS)
def test_members_follow_each_other_and_padding_is_no_data(tmp_path, kind):
    data = some_bytes(1, 500)
    parts = [compressed(kind, part) for part in (data[:100], b"", data[100:101], data[101:])]
    padding = b"\0" * 4096 if kind in ("gzip", "xz") else b""
    assert read_all(stream_of(tmp_path, b"".join(parts) + padding)) == data
    assert read_all(stream_of(tmp_path, padding.join(parts) + padding), 17) == data


def test_a_frame_to_skip_may_come_first(tmp_path):
    """As pzstd writes them."""
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    assert read_all(stream_of(tmp_path, skipped + compressed("zstd", b"data") + skipped)) == b"data"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_is_an_error_that_names_the_byte(tmp_path, kind):
    data = some_bytes(2, 30)
    raw = compressed(kind, data)
    for cut in range(10, len(raw)):
        with pytest.raises(BadSource, match=f"source, byte {cut} of the compressed file: the {kind} data end before"):
            read_all(stream_of(tmp_path, raw[:cut]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_is_an_error_or_does_not_matter(tmp_path, kind):
    data = some_bytes(3, 30)
    raw = compressed(kind, data)
    errors = []
    for at in range(10, len(raw)):
        try:
            assert read_all(stream_of(tmp_path, raw[:at] + bytes([raw[at] ^ 0x41]) + raw[at + 1 :])) == data
        except BadSource as error:
            errors.append(str(error))
    assert len(errors) > 0.9 * (len(raw) - 10)
    assert all("of the compressed file: " in error for error in errors)


@pytest.mark.parametrize("kind", KINDS)
def test_something_else_after_the_data_is_an_error(tmp_path, kind):
    with pytest.raises(BadSource, match=f"after the {kind} data comes something else: b'garbage"):
        read_all(stream_of(tmp_path, compressed(kind, b"data") + b"garbage that follows"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_unpacks_to_a_thousand_times_its_size_is_unpacked_in_pieces(kind):
    given = [compressed(kind, bytes(200 << 20 if kind == "zstd" else 8 << 20))]
    start = given[0][:10]
    given[0] = given[0][10:]
    members = Members(kind, start, lambda limit: given.pop() if given else b"", BadSource)
    part = members.some(1000)
    assert 0 < len(part) <= (70 << 20 if kind == "zstd" else 1000)


def test_text_that_begins_like_a_compressed_file_is_text(tmp_path):
    assert read_all(stream_of(tmp_path, b"BZh91 0.25\n")) == b"BZh91 0.25\n"
    assert kind_of(b"BZh91AY&SY") == "bzip2"
    for kind in KINDS:
        assert kind_of(compressed(kind, b"")) == kind


def test_zstandard_missing_is_told(tmp_path, monkeypatch):
    raw = compressed("zstd", b"data")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingLibrary, match=r"pip install 'bigembed\[convert\]'"):
        stream_of(tmp_path, raw)


def test_what_cannot_be_opened_or_read(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        ByteStream.open(tmp_path / "nothing")
    with pytest.raises(StorageFailed, match=r"open of .* failed: Is a directory"):
        ByteStream.open(tmp_path)
    stream = stream_of(tmp_path, bytes(1000))

    def fail(operation, path):
        if operation == "read":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "before", fail)
    with pytest.raises(StorageFailed, match=r"read of .*source failed: Input/output error"):
        read_all(stream)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_standard_input_is_summed_as_it_came(kind):
    data = some_bytes(4, 20_000)
    raw = compressed(kind, data) if kind else data
    code = (
        "import hashlib; from bigembed.convert.stream import ByteStream\n"
        "stream, buffer, total = ByteStream.open('-'), bytearray(1000), hashlib.sha256()\n"
        "assert (stream.total_bytes, stream.can_be_read_again, stream.sha256) == (None, False, None)\n"
        "while count := stream.read_into(buffer): total.update(buffer[:count])\n"
        "stream.close()\n"
        "import os; os.fstat(0)\n"
        "print(total.hexdigest(), stream.sha256, stream.done_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=raw, capture_output=True)
    expected = f"{hashlib.sha256(data).hexdigest()} {hashlib.sha256(raw).hexdigest()} {len(raw)}\n"
    assert done.stdout.decode() == expected, done.stderr.decode()


# --- ReadAhead


@pytest.mark.parametrize("window_bytes", [1, 7, 64, 1000, 100_000])
@pytest.mark.parametrize("kind", [None, "gzip"])
def test_windows_are_the_stream_whatever_is_left_of_each(tmp_path, window_bytes, kind):
    rng = random.Random(window_bytes)
    data = some_bytes(5, 60 if window_bytes < 64 else 3000)
    stream = stream_of(tmp_path, compressed(kind, data) if kind else data)
    at = rng.randrange(10)
    stream.read_into(bytearray(at))
    with ReadAhead(stream, at, window_bytes) as ahead:
        while True:
            window = ahead.next()
            assert window.offset == at
            assert window.buffer_B[window.start : window.stop].tobytes() == data[at : at + len(window)]
            window.buffer_B[window.stop : window.stop + 16] = 7  # the slack is there to be written
            if window.is_last:
                break
            used = rng.choice([0, len(window), rng.randint(0, len(window))])
            window.use(window.start + used)
            at += used
        assert at + len(window) == len(data)
    stream.close()


def test_an_error_of_the_thread_is_raised_where_the_window_is_asked_for(tmp_path):
    raw = compressed("gzip", np.random.default_rng(0).bytes(5000))
    with (
        ReadAhead(stream_of(tmp_path, raw[:-20]), window_bytes=100) as ahead,
        pytest.raises(BadSource, match="cut off"),
    ):
        while not ahead.next().is_last:
            pass
    assert not ahead.is_reading


def test_a_thread_that_waits_for_a_pipe_does_not_hold_up_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("bigembed.convert.read_ahead.CLOSE_SECONDS", 0.05)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b"0123456789ab",))
    writer.start()
    keep_open = os.open(path, os.O_RDWR)  # so that its end is not reached
    stream = ByteStream.open(path)
    assert (stream.total_bytes, stream.can_be_read_again) == (None, False)
    with ReadAhead(stream, window_bytes=100) as ahead:
        writer.join()
    assert ahead.is_reading
    os.write(keep_open, b"x" * 200)  # it ends once its window is full
    ahead._thread.join(10)
    assert not ahead.is_reading
    os.close(keep_open)
    stream.close()
