"""Writers: one contract over all formats, read back by the tools that people use; nothing left after an error."""

import errno
import itertools
import json
import os
import pickletools
import zipfile

import naive_export
import numpy as np
import pytest
import torch

from bigembed import threads
from bigembed.convert.formats import open_source
from bigembed.convert.source import ReadOptions
from bigembed.convert.writers import text
from bigembed.convert.writers.formats import SUFFIXES, WRITE_FORMATS, WRITERS, writer_for
from bigembed.convert.writers.narrow import narrowed
from bigembed.convert.writers.npy import NpyWriter
from bigembed.convert.writers.safetensors_file import SafetensorsWriter
from bigembed.convert.writers.tokens import find_refused, refused_bytes
from bigembed.convert.writers.torch_file import TorchWriter, state_dict_pickle
from bigembed.convert.writers.vocab_text import read_vocab_lines, vocab_lines
from bigembed.convert.writers.writer import WriteOptions
from bigembed.errors import BigembedError, DiskFull, InvalidArgument, TableExists, TableMissing, UnknownFormat
from bigembed.kernels.format_floats import NUMBER_BYTES, format_lines, line_offset
from bigembed.kernels.token_records import pack_records
from bigembed.storage import files
from bigembed.vocab.packed import PackedTokens

M, D = 7, 5
TOKENS = [b"the", b"", "naïve".encode(), b"\xff\xfe", b"-1.5", b"a" * 300, "猫".encode()]
WORDS = PackedTokens.of(TOKENS)
PLAIN = [b"the", b"of", "naïve".encode(), b"1", b"-1.5", b"a" * 300, "猫".encode()]  # that any tool reads


def some_values(rows=M, dim=D, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


@pytest.fixture(autouse=True)
def no_faults_left(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    yield
    files.before = None


@pytest.fixture(params=WRITE_FORMATS)
def kind(request):
    return WRITERS[request.param]


@pytest.fixture(params=[*WRITE_FORMATS, "parts"])
def case(request, tmp_path):
    """(writer, target, options) of each format, and of safetensors in parts; with tokens."""
    if request.param == "parts":
        return SafetensorsWriter, str(tmp_path / "model"), {"part_bytes": 250, "has_tokens": True}
    return WRITERS[request.param], str(tmp_path / "rows.file"), {"has_tokens": True}


def write(case, values_MD, tokens=WORDS, cuts=(), **more):
    kind, target, options = case
    tokens = PackedTokens.of(tokens)
    with kind(target, *values_MD.shape, WriteOptions(**options, **more)) as writer:
        edges = [0, *cuts, len(values_MD)]
        for start, stop in itertools.pairwise(edges):
            writer.append(values_MD[start:stop], tokens.between(start, stop))
    return writer


def content(folder):
    """Every file below a folder, with its bytes."""
    found = {}
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = file.read()
        if where != str(folder):
            found[os.path.relpath(where, folder) + "/"] = b""
    return found


# --- the contract


def test_the_target_appears_at_finish_and_not_before(case, tmp_path):
    kind, target, options = case
    with kind(target, M, D, WriteOptions(**options)) as writer:
        writer.append(some_values(), WORDS)
        assert not os.path.lexists(target)
        writer.finish()
        assert os.path.lexists(target)
        writer.finish()
    assert not [name for name in content(tmp_path) if ".new-" in name]
    assert sorted(writer.files) == sorted(str(tmp_path / name) for name in content(tmp_path) if not name.endswith("/"))


def test_the_bytes_do_not_depend_on_blocks_threads_or_time(case, tmp_path):
    write(case, some_values())
    once = content(tmp_path)
    before = threads.get_num_threads()
    for cuts, num_threads in [((1, 1, 4), 1), (range(1, M), 3)]:
        threads.set_num_threads(num_threads)
        write(case, some_values(), cuts=cuts, overwrite=True)
        assert content(tmp_path) == once
    threads.set_num_threads(before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_block_leaves_nothing(case, tmp_path, error):
    kind, target, options = case
    with pytest.raises(error), kind(target, M, D, WriteOptions(**options)) as writer:
        writer.append(some_values()[:3], WORDS.between(0, 3))
        raise error
    assert content(tmp_path) == {}
    writer.abandon()


@pytest.mark.parametrize("rows", [0, M - 1])
def test_too_few_rows_are_an_error_and_leave_nothing(case, tmp_path, rows):
    kind, target, options = case
    with pytest.raises(InvalidArgument) as caught, kind(target, M, D, WriteOptions(**options)) as writer:
        writer.append(some_values()[:rows], WORDS.between(0, rows))
    assert f"{rows} rows were given, {M} were announced" in str(caught.value)
    assert content(tmp_path) == {}


@pytest.mark.parametrize(
    ("values", "tokens", "text"),
    [
        (some_values(M + 1), PackedTokens.of([*TOKENS, b"x"]), f"{M + 1} rows were given, {M} were announced"),
        (some_values(M, D + 1), WORDS, f"float32 of shape (M, {D})"),
        (some_values()[0], WORDS, "is needed"),
        (some_values().astype(np.float64), WORDS, "float64"),
        (some_values(), WORDS.between(0, 2), "came with 2 tokens"),
        (some_values(), None, "came with no tokens"),
    ],
)
def test_rows_that_were_not_announced_leave_nothing(case, tmp_path, values, tokens, text):
    kind, target, options = case
    writer = kind(target, M, D, WriteOptions(**options))
    with pytest.raises(InvalidArgument) as caught:
        writer.append(values, tokens)
    assert text in str(caught.value)
    assert content(tmp_path) == {}
    with pytest.raises(InvalidArgument) as caught:
        writer.append(some_values(), WORDS)
    assert "Make a new one" in str(caught.value)


def test_tokens_that_were_not_announced_are_an_error(tmp_path):
    with pytest.raises(InvalidArgument) as caught, NpyWriter(tmp_path / "x", M, D) as writer:
        writer.append(some_values(), WORDS)
    assert "has_tokens=False was announced" in str(caught.value)


def test_what_stands_there_is_refused_and_left_alone(case, tmp_path):
    write(case, some_values())
    before = content(tmp_path)
    kind, target, options = case
    for path in [target, *(path for path in [target + ".vocab.txt"] if os.path.exists(path))]:
        with pytest.raises(TableExists) as caught:
            kind(target, M, D, WriteOptions(**options))
        assert "overwrite=True" in str(caught.value)
        assert content(tmp_path) == before
        if os.path.isfile(path):  # then the one beside it alone
            os.unlink(path)
            before = content(tmp_path)


def test_overwrite_replaces_all_of_it(case, tmp_path):
    write(case, some_values(M, D))
    write(case, some_values(2, D, seed=1), tokens=[b"a", b"b"], overwrite=True)
    replaced = content(tmp_path)
    for path in replaced:
        if path.endswith("/"):
            continue
        os.unlink(tmp_path / path)
    if os.path.isdir(case[1]):
        os.rmdir(case[1])
    write(case, some_values(2, D, seed=1), tokens=[b"a", b"b"])
    assert content(tmp_path) == replaced


def test_something_else_is_never_overwritten(case, tmp_path):
    kind, target, options = case
    is_folder = "part_bytes" in options
    if is_folder:
        (tmp_path / "model").write_bytes(b"a file")
    else:
        os.mkdir(target)
    with pytest.raises(TableExists) as caught:
        kind(target, M, D, WriteOptions(**options, overwrite=True))
    assert ("is not a folder" if is_folder else "is a folder") in str(caught.value)
    assert "not overwritten" in str(caught.value)


def test_a_folder_with_other_things_is_never_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(TableExists) as caught:
        SafetensorsWriter(tmp_path / "model", M, D, WriteOptions(overwrite=True, part_bytes=250))
    assert "holds 'config.json'" in str(caught.value)


def test_a_pipe_is_never_overwritten(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TableExists) as caught:
        NpyWriter(tmp_path / "pipe", M, D, WriteOptions(overwrite=True))
    assert "is not a plain file" in str(caught.value)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with NpyWriter(tmp_path / "link", M, D, WriteOptions(overwrite=True)) as writer:
        writer.append(some_values())
    assert (tmp_path / "link").is_symlink()
    np.testing.assert_array_equal(np.load(tmp_path / "real"), some_values())


def test_a_missing_folder(case, tmp_path):
    kind, target, options = case
    with pytest.raises(TableMissing) as caught:
        kind(str(tmp_path / "no" / os.path.basename(target)), M, D, WriteOptions(**options))
    assert "Make it first" in str(caught.value)


def test_what_appeared_meanwhile_is_left_alone(case, tmp_path):
    kind, target, options = case
    writer = kind(target, M, D, WriteOptions(**options))
    writer.append(some_values(), WORDS)
    with open(target, "wb") as file:
        file.write(b"of somebody else")
    with pytest.raises(TableExists):
        writer.finish()
    assert content(tmp_path) == {os.path.basename(target): b"of somebody else"}


class FailAt:
    """Lets the n-th operation fail; what cleans up afterwards works."""

    def __init__(self, n, error):
        self.left, self.error = n, error

    def __call__(self, operation, path):
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()], ids=["disk full", "ctrl-c"])
def test_a_fault_at_any_operation_leaves_old_or_new(case, tmp_path, overwrite, error):
    write(case, some_values(seed=1))
    new = content(tmp_path)
    write(case, some_values(), overwrite=True)
    old = content(tmp_path)
    assert old != new
    if not overwrite:
        for path in sorted(old, reverse=True):
            (os.rmdir if path.endswith("/") else os.unlink)(tmp_path / path)
        old = {}
    for n in range(1, 1000):
        files.before = fault = FailAt(n, error)
        try:
            write(case, some_values(seed=1), cuts=[2, 5], overwrite=overwrite)
        except (DiskFull, KeyboardInterrupt):
            files.before = None
            # The last step of all makes a replaced file's name durable, or removes what it took the place of.
            assert content(tmp_path) in ([old, new] if overwrite else [old]), n
            if content(tmp_path) != old:
                write(case, some_values(), overwrite=True)
        if fault.left > 0:
            break
    assert content(tmp_path) == new
    assert n > 7


def test_no_file_stays_open(case):
    before = len(os.listdir("/proc/self/fd"))
    write(case, some_values())
    kind, target, options = case
    writer = kind(target, M, D, WriteOptions(**options, overwrite=True))
    writer.append(some_values()[:4], WORDS.between(0, 4))
    writer.abandon()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_named(tmp_path):
    writer = NpyWriter(tmp_path / "x", M, D)
    files.before = FailAt(1, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DiskFull) as caught:
        writer.append(some_values())
    assert "free some space" in str(caught.value)
    assert content(tmp_path) == {}


# --- options


@pytest.mark.parametrize(
    ("format", "options", "text"),
    [
        ("npy", {"dtype": "bfloat16"}, "dtype 'bfloat16' cannot be written as npy; use 'float32', 'float16'"),
        ("glove", {"dtype": "float16", "has_tokens": True}, "use 'float32'"),
        ("torch", {"dtype": "float64"}, "'float32', 'float16', 'bfloat16'"),
        ("npy", {"tensor": "x"}, "hold no named tensors"),
        ("torch", {"part_bytes": 1 << 20}, "only safetensors files are written in parts"),
        ("word2vec-text", {}, "Pass has_tokens=True"),
        ("safetensors", {"tensor": "__metadata__"}, "keeps for itself"),
        ("safetensors", {"tensor": "\ud800"}, "written as UTF-8"),
        ("safetensors", {"part_bytes": 50}, "less than a row of 5 columns and its header"),
        ("safetensors", {"part_bytes": -1}, "less than a row"),
    ],
)
def test_options_that_the_format_lacks(tmp_path, format, options, text):
    with pytest.raises(InvalidArgument) as caught:
        WRITERS[format](tmp_path / "x", M, D, WriteOptions(**options))
    assert text in str(caught.value)
    assert content(tmp_path) == {}


@pytest.mark.parametrize(("rows", "dim"), [(0, 3), (3, 0)])
def test_nothing_to_write(tmp_path, rows, dim):
    with pytest.raises(InvalidArgument) as caught:
        NpyWriter(tmp_path / "x", rows, dim)
    assert "at least one of each" in str(caught.value)


def test_formats_by_name_and_by_suffix():
    for suffix, format in SUFFIXES.items():
        assert writer_for("/a/b.c" + suffix.upper()).format == format
        assert writer_for("words" + suffix, "glove").format == "glove"
    for target, format, named in [("x", None, "suffix ''"), ("x.gz", None, "'.gz'"), ("x.npy", "csv", "'csv'")]:
        with pytest.raises(UnknownFormat) as caught:
            writer_for(target, format)
        assert named in str(caught.value)
        assert "word2vec-binary" in str(caught.value)


# --- numbers


def hard_numbers():
    rng = np.random.default_rng(0)
    words = [
        rng.integers(0, 1 << 32, 8000).astype(np.uint32),
        rng.standard_normal(4000).astype(np.float32).view(np.uint32),
        (10.0 ** rng.uniform(-7, 18, 4000)).astype(np.float32).view(np.uint32),
        np.arange(0, 1 << 9, dtype=np.uint32) << 23,
        (np.arange(0, 1 << 9, dtype=np.uint32) << 23) + 1,
        (np.arange(1, 1 << 9, dtype=np.uint32) << 23) - 1,
        np.arange(1000, dtype=np.uint32),
        np.arange(-1000, 1000).astype(np.float32).view(np.uint32),
        np.array([1e-4, 1e16, 1e15, 16777216, 16777218, 3.4028235e38, 1.1754944e-38], np.float32).view(np.uint32),
        np.nextafter(np.array([1e-4, 1e16], np.float32), np.float32(0)).view(np.uint32),
    ]
    return np.concatenate(words).view(np.float32)


def formatted(values_MD, tokens, grain=3):
    packed = PackedTokens.of(tokens)
    out_B = np.zeros(int(line_offset(len(tokens), values_MD.shape[1], packed.start_M1)), np.uint8)
    args = (values_MD, packed.bytes_B, packed.start_M1, out_B)
    parts = threads.run(format_lines, len(tokens), *args, grain=grain)
    return b"".join(out_B[first:end].tobytes() for first, end in parts)


def test_numbers_equal_their_twin_and_give_the_same_float_back():
    values = hard_numbers()
    lines = formatted(values[:, None], [b""] * len(values)).split(b"\n")[:-1]
    assert [line[1:].decode() for line in lines] == [naive_export.write_float(value) for value in values]
    back = np.array([np.float32(float(line)) for line in lines])
    finite = np.isfinite(values)
    assert back[finite].tobytes() == values[finite].tobytes()
    np.testing.assert_array_equal(back[~finite], values[~finite])
    assert max(map(len, lines)) == NUMBER_BYTES


def test_lines_equal_their_twin():
    rng = np.random.default_rng(1)
    numbers = hard_numbers()
    for _ in range(20):
        rows, dim = rng.integers(1, 20, 2)
        values_MD = rng.choice(numbers, (rows, dim))
        tokens = [rng.bytes(rng.integers(0, 9)) for _ in range(rows)]
        assert formatted(values_MD, tokens) == naive_export.format_lines(values_MD, tokens)


def test_lines_of_tokens_that_begin_further_on():
    packed = PackedTokens.of([b"skipped", b"a", b"b"]).between(1, 3)
    out_B = np.zeros(100, np.uint8)
    first, end = format_lines(0, 2, np.ones((2, 1), np.float32), packed.bytes_B, packed.start_M1, out_B)
    assert out_B[first:end].tobytes() == b"a 1.0\nb 1.0\n"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_numbers_equal_torchs(dtype):
    rng = np.random.default_rng(2)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) + np.array([[0x8000], [0x7FFF], [0x8001], [0x1000]], np.uint32)
    values = np.concatenate([hard_numbers(), ties.reshape(-1).view(np.float32)])
    values = np.concatenate([values, (rng.standard_normal(5000) * 1e-6).astype(np.float32)])[:, None]
    narrow, overflowed = narrowed(values, dtype)
    expected = torch.from_numpy(values).to(getattr(torch, dtype))
    is_nan = np.isnan(values)
    np.testing.assert_array_equal(narrow.view(np.uint16)[~is_nan], expected.view(torch.uint16).numpy()[~is_nan])
    found = torch.from_numpy(narrow.view(np.uint16)).view(getattr(torch, dtype))
    assert found.isnan().numpy()[is_nan].all()
    assert overflowed == int((expected.isinf().numpy() & np.isfinite(values)).sum()) > 0


def test_float32_stays_bit_for_bit():
    values = hard_numbers()[:, None]
    assert narrowed(values, "float32")[0].tobytes() == values.tobytes()


# --- tokens


def test_refused_tokens_and_records_equal_their_twins():
    rng = np.random.default_rng(3)
    for _ in range(200):
        tokens = [bytes(rng.integers(97, 102, rng.integers(0, 6)).astype(np.uint8)) for _ in range(8)]
        inside, first, last = (bytes(rng.integers(97, 102, 1).astype(np.uint8)) for _ in range(3))
        found = find_refused(PackedTokens.of(tokens), refused_bytes(inside, first, last))
        assert (-1 if found is None else found) == naive_export.first_refused(tokens, inside, first, last)
        packed = PackedTokens.of([b"before", *tokens]).between(1, 9)
        numbers_MB = rng.integers(0, 256, (8, 4)).astype(np.uint8)
        out_B = np.empty(len(packed.bytes_B) - 6 + 8 * 5, np.uint8)
        threads.run(pack_records, 8, packed.bytes_B, packed.start_M1, numbers_MB, out_B, grain=2)
        assert out_B.tobytes() == naive_export.pack_records(tokens, numbers_MB)


@pytest.mark.parametrize(
    ("format", "token"),
    [
        *(("word2vec-text", token) for token in [b"a b", b" ", b"a\tb", b"a\n", b"\ra", b"a\vb", b"a\0b"]),
        *(
            ("glove", token)
            for token in [b" a", b"a ", b"a\t", b" ", b"a\nb", b"a\rb", b"\0", b"v 1.5", b"a -1e5 b", b"a\t.5"]
        ),
        *(("word2vec-binary", token) for token in [b"a b", b" ", b"\na", b"a\0"]),
    ],
)
def test_tokens_that_could_not_be_read_back(tmp_path, format, token):
    case = WRITERS[format], str(tmp_path / "x"), {"has_tokens": True}
    with pytest.raises(InvalidArgument) as caught:
        write(case, some_values(), tokens=[*TOKENS[:4], token, *TOKENS[5:]], cuts=[2])
    assert f"row 4 has the token {token!r}, which cannot be written as {format}" in str(caught.value)
    assert content(tmp_path) == {}


def test_a_long_token_is_named_by_its_beginning(tmp_path):
    case = WRITERS["glove"], str(tmp_path / "x"), {"has_tokens": True}
    with pytest.raises(InvalidArgument) as caught:
        write(case, some_values(1), tokens=[b"\n" * 10_000])
    assert len(str(caught.value)) < 700


def test_tokens_beside_come_back():
    rng = np.random.default_rng(4)
    tokens = [rng.choice(list(b"\\nr\n\rab"), rng.integers(0, 8)).astype(np.uint8).tobytes() for _ in range(3000)]
    tokens += [b"\\", b"\\\\", b"\n", b"\r\n", b"\\n", b""]
    lines = vocab_lines(PackedTokens.of(tokens))
    assert lines.count(b"\n") == len(tokens)
    assert b"\r" not in lines
    assert vocab_lines(PackedTokens.of([b"a", b"c d"])) == b"a\nc d\n"


def test_a_file_of_tokens_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("bigembed.convert.writers.vocab_text.READ_BYTES", 5)
    tokens = [b"a", b"\\\n\\n", b"", b"long" * 10, b"\r", b"z"]
    (tmp_path / "x").write_bytes(vocab_lines(PackedTokens.of(tokens)))
    assert [token for block in read_vocab_lines(str(tmp_path / "x")) for token in block.to_list()] == tokens
    (tmp_path / "x").write_bytes(b"a\nb")
    assert [token for block in read_vocab_lines(str(tmp_path / "x")) for token in block.to_list()] == [b"a", b"b"]


@pytest.mark.parametrize("format", ["npy", "safetensors", "torch"])
def test_formats_without_tokens_get_a_file_beside(tmp_path, format):
    write((WRITERS[format], str(tmp_path / "x"), {"has_tokens": True}), some_values(), cuts=[3])
    assert (tmp_path / "x.vocab.txt").read_bytes() == b"".join(token + b"\n" for token in TOKENS)


# --- read by the tools that people use


@pytest.fixture(scope="session")
def keyed_vectors():
    return pytest.importorskip("gensim.models").KeyedVectors


@pytest.mark.parametrize(
    ("format", "options"),
    [("word2vec-text", {}), ("glove", {"no_header": True}), ("word2vec-binary", {"binary": True})],
)
def test_gensim_reads_it_exactly(tmp_path, keyed_vectors, format, options):
    values_MD = some_values(M, 50)
    values_MD[0, :4] = [1e-40, 3e38, -0.0, 123456.7]
    write((WRITERS[format], str(tmp_path / "x"), {"has_tokens": True}), values_MD, tokens=PLAIN)
    loaded = keyed_vectors.load_word2vec_format(tmp_path / "x", **options)
    assert [key.encode() for key in loaded.index_to_key] == PLAIN
    assert loaded.vectors.tobytes() == values_MD.tobytes()


@pytest.mark.parametrize(("format", "is_binary"), [("word2vec-text", False), ("word2vec-binary", True)])
def test_the_bytes_are_gensims(tmp_path, keyed_vectors, format, is_binary):
    values_MD = some_values(M, 50)
    made = keyed_vectors(50)
    made.add_vectors([token.decode() for token in PLAIN], values_MD)
    made.save_word2vec_format(tmp_path / "gensim", binary=is_binary)
    write((WRITERS[format], str(tmp_path / "ours"), {"has_tokens": True}), values_MD, tokens=PLAIN)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "gensim").read_bytes()


def read_by_ourselves(path, format, **options):
    """(values, tokens) by the reader of a format."""
    values, tokens = [], []
    with open_source(path, format, ReadOptions(**options)) as source:
        for block in source.blocks():
            values.append(block.values_MD.copy())
            tokens += block.tokens.to_list() if block.tokens is not None else []
    return np.concatenate(values), tokens


@pytest.mark.parametrize("format", ["word2vec-text", "glove", "word2vec-binary"])
def test_whatever_tokens_are_written_our_own_readers_give_back(tmp_path, format):
    """What a reader would take apart must have been refused."""
    rng = np.random.default_rng(6)
    path, written = str(tmp_path / "x"), 0
    for n in range(300):
        tokens = [
            bytes(rng.choice(list(b"  \t\n\r\0\x0cab10.-e\xc3\xbc\x85\xff"), rng.integers(0, 5)).astype(np.uint8))
            for _ in range(rng.integers(1, 4))
        ]
        if n % 2:
            tokens = [token.translate(None, b"\r\n\0").strip() for token in tokens]
        values_MD = some_values(len(tokens), int(rng.integers(1, 4)), seed=n)
        try:
            write((WRITERS[format], path, {"has_tokens": True, "overwrite": True}), values_MD, tokens=tokens)
        except InvalidArgument:
            continue
        written += 1
        found = read_by_ourselves(path, format, dim=values_MD.shape[1] if format == "glove" else None)
        assert found[0].tobytes() == values_MD.tobytes()
        assert found[1] == tokens
    assert 30 < written < 290


@pytest.mark.parametrize("format", WRITE_FORMATS)
def test_our_own_readers_recognise_it(tmp_path, format):
    write((WRITERS[format], str(tmp_path / "x"), {"has_tokens": True}), some_values())
    values_MD, tokens = read_by_ourselves(str(tmp_path / "x"), None)
    assert values_MD.tobytes() == some_values().tobytes()
    assert tokens == (TOKENS if WRITERS[format].carries_tokens else [])


def test_our_own_reader_joins_parts(tmp_path):
    write((SafetensorsWriter, str(tmp_path / "x"), {"part_bytes": 250, "has_tokens": True}), some_values())
    values_MD, _ = read_by_ourselves(
        str(tmp_path / "x" / "model.safetensors.index.json"), None, tensor="embedding.weight.*"
    )
    assert values_MD.tobytes() == some_values().tobytes()


def test_glove_tokens_may_hold_spaces(tmp_path):
    tokens = [b". . .", b"at name@domain.com", b"a\tb", b"area 51", b"1.5", b"2.5 a"]
    write((WRITERS["glove"], str(tmp_path / "x"), {"has_tokens": True}), some_values(6), tokens=tokens)
    lines = (tmp_path / "x").read_bytes().split(b"\n")[:-1]
    assert [line.rsplit(b" ", D)[0] for line in lines] == tokens
    assert read_by_ourselves(str(tmp_path / "x"), None)[1] == tokens


def test_text_longer_than_the_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BUFFER_BYTES", 1)
    write((WRITERS["glove"], str(tmp_path / "x"), {"has_tokens": True}), some_values())
    assert (tmp_path / "x").read_bytes() == naive_export.format_lines(some_values(), TOKENS)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy_reads_npy_and_writes_the_same(tmp_path, dtype):
    expected = some_values().astype(dtype)
    write((NpyWriter, str(tmp_path / "x.npy"), {"dtype": dtype}), some_values(), tokens=WORDS, has_tokens=True)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy", mmap_mode="r"), expected)
    np.save(tmp_path / "y.npy", expected)
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.npy").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [None, "model.embed_tokens.weight", 'a "name" ü'])
def test_safetensors_reads_it(tmp_path, dtype, name):
    safetensors = pytest.importorskip("safetensors")
    path = str(tmp_path / "x.safetensors")
    with SafetensorsWriter(path, M, D, WriteOptions(dtype, tensor=name)) as writer:
        writer.append(some_values())
    expected = torch.from_numpy(some_values()).to(getattr(torch, dtype))
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.keys()) == [name or "embedding.weight"]
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor(name or "embedding.weight"), expected)
    if dtype != "bfloat16":
        with safetensors.safe_open(path, "np") as file:
            np.testing.assert_array_equal(file.get_tensor(name or "embedding.weight"), expected.numpy())
    with open(path, "rb") as file:
        assert (8 + int.from_bytes(file.read(8), "little")) % 8 == 0


@pytest.mark.parametrize(("part_bytes", "parts"), [(1 << 20, 1), (5000, 5), (240, 1000)])
def test_safetensors_in_parts(tmp_path, part_bytes, parts):
    safetensors = pytest.importorskip("safetensors")
    values_MD = some_values(1000, 5)
    folder = tmp_path / "model"
    with SafetensorsWriter(folder, 1000, 5, WriteOptions(part_bytes=part_bytes)) as writer:
        for start in range(0, 1000, 170):
            writer.append(values_MD[start : start + 170])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": values_MD.nbytes}
    if parts == 1000:
        parts = len(index["weight_map"])
        assert parts > 100
    assert list(index["weight_map"]) == [f"embedding.weight.{n}" for n in range(parts)]
    assert sorted(os.listdir(folder)) == sorted(
        {"model.safetensors.index.json", *(f"model-{n + 1:05}-of-{parts:05}.safetensors" for n in range(parts))}
    )
    found = []
    for name, file_name in index["weight_map"].items():
        assert os.path.getsize(folder / file_name) <= part_bytes
        with safetensors.safe_open(folder / file_name, "np") as file:
            assert list(file.keys()) == [name]
            found.append(file.get_tensor(name))
    np.testing.assert_array_equal(np.concatenate(found), values_MD)


def test_parts_need_a_folders_name(tmp_path):
    with pytest.raises(InvalidArgument) as caught:
        SafetensorsWriter(tmp_path / "x.safetensors", M, D, WriteOptions(part_bytes=500))
    assert "Name a folder, such as" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_torch_loads_it(tmp_path, dtype, weights_only, mmap):
    path = str(tmp_path / "x.pt")
    with TorchWriter(path, M, D, WriteOptions(dtype)) as writer:
        writer.append(some_values()[:4])
        writer.append(some_values()[4:])
    loaded = torch.load(path, weights_only=weights_only, mmap=mmap, map_location="cpu")
    assert torch.equal(loaded["weight"], torch.from_numpy(some_values()).to(getattr(torch, dtype)))
    module = torch.nn.Embedding(M, D, dtype=getattr(torch, dtype))
    module.load_state_dict(loaded)
    assert torch.equal(module.weight, loaded["weight"])
    assert loaded["weight"].data_ptr() % 64 == 0 or not mmap


def test_torch_takes_another_name(tmp_path):
    with TorchWriter(tmp_path / "x.pt", M, D, WriteOptions(tensor="emb.weight")) as writer:
        writer.append(some_values())
    assert list(torch.load(tmp_path / "x.pt", weights_only=True)) == ["emb.weight"]


def test_the_torch_file_is_a_sound_zip_that_torch_itself_would_write(tmp_path):
    with TorchWriter(tmp_path / "x.pt", M, D) as writer:
        writer.append(some_values())
    torch.save(torch.nn.Embedding.from_pretrained(torch.from_numpy(some_values())).state_dict(), tmp_path / "torch.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as ours, zipfile.ZipFile(tmp_path / "torch.pt") as theirs:
        assert ours.testzip() is None
        known = {name.split("/", 1)[1]: theirs.read(name) for name in theirs.namelist()}
        for name in ours.namelist():
            short = name.split("/", 1)[1]
            if short != "data.pkl":
                assert ours.read(name) == known[short]
        assert {name.split("/", 1)[1] for name in ours.namelist()} == set(known) - {".data/serialization_id"}
    raw = (tmp_path / "x.pt").read_bytes()
    assert raw.find(some_values().tobytes()) % 64 == 0


def test_a_tensor_of_any_size_is_named_in_the_pickle():
    rows, dim = 1 << 40, 256
    numbers = [
        argument
        for _, argument, _ in pickletools.genops(state_dict_pickle("weight", "float32", rows, dim))
        if isinstance(argument, int)
    ]
    assert numbers == [2, rows * dim, 0, rows, dim, dim, 1]


def test_every_error_is_ours(tmp_path):
    for error in (InvalidArgument, TableExists, TableMissing, UnknownFormat, DiskFull):
        assert issubclass(error, BigembedError)
