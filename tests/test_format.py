"""The format on disk: a stranger's reader agrees with the library, and a small table is these exact bytes."""

import ast
import json
import re
import secrets
import shutil
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import stranger

from bigembed import init
from bigembed.errors import BigembedError
from bigembed.kernels.initial import fill_initial, initial_rows
from bigembed.kernels.records import check_keys, seal
from bigembed.spec import FORMAT_VERSION, MIN_CHUNK_ROWS, StateColumns, TableSpec
from bigembed.storage import merge as merge_module
from bigembed.storage import rewrite, segments, store, superblock, upkeep
from bigembed.storage.table import Table

README = Path(sys.modules["bigembed.storage"].__path__[0]) / "README.md"
INITS = [init.normal(0.5, 2.0), init.uniform(-3.0, 0.25), init.constant(0.1), init.zeros()]


def bits(values):
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def assert_agree(path):
    """Stranger and a reader of ours see the same bits and the same commit; returns the stranger's answer."""
    facts, weight_VD, state_VK, commits = stranger.read_table(path)
    with Table.open(path, "r") as table:
        ours = table.read(np.arange(table.shape[0]), with_state=True)
        assert table.generations()[-1].to_json() == commits[-1]
        assert table.shape == weight_VD.shape
    np.testing.assert_array_equal(bits(np.hstack([weight_VD, state_VK])), bits(ours))
    return facts, weight_VD, state_VK, commits


def write_rows(table, rng, count):
    """Write `count` random rows, weight and state."""
    rows = np.sort(rng.choice(table.shape[0], min(count, table.shape[0]), replace=False)).astype(np.int64)
    values = rng.standard_normal((len(rows), table.spec.row_width)).astype(np.float32)
    table.append_rows(rows, values)


def auto_commit(table):
    table._commit("auto", None, explicit=False)


# --- a stranger reads what we wrote


@pytest.mark.parametrize("given", INITS, ids=lambda given: f"{given.kind}-{given.a}")
@pytest.mark.parametrize(("dim", "state_dim", "padding_idx"), [(1, 0, None), (3, 2, 17), (16, 1, 4500)])
def test_never_written_rows_have_their_initial_values(tmp_path, given, dim, state_dim, padding_idx):
    facts = {"state_dim": state_dim, "init": given, "seed": 2**62 + 5, "padding_idx": padding_idx}
    with Table.create(tmp_path / "t", 5000, dim, **facts) as table:
        write_rows(table, np.random.default_rng(1), 50)
        table.commit()
    _, weight_VD, _, _ = assert_agree(tmp_path / "t")
    if padding_idx is not None:
        assert not weight_VD[padding_idx].any()


@pytest.mark.parametrize("seed", range(6))
def test_a_stranger_agrees_after_any_history(tmp_path, seed):
    """After each of many random steps the stranger reads the last commit, whatever lies in journal, undo and base."""
    rng = np.random.default_rng(seed)
    path = tmp_path / "t"
    dim, given = int(rng.integers(1, 6)), INITS[seed % 4]
    table = Table.create(path, 5000, dim, state_dim=2, init=given, seed=seed, chunk_rows=4096)
    for step in range(20):
        kind = rng.choice(["write", "commit", "auto", "merge", "rollback", "grow", "publish", "state", "reopen"])
        if kind == "write":
            write_rows(table, rng, int(rng.integers(1, 400)))
        elif kind == "commit":
            table.scalars = {"rule": "adam", "step": step}
            table.commit(f"step {step} \N{SNOWMAN}", payload={"x": [1.5, None]})
        elif kind == "auto":
            auto_commit(table)
        elif kind == "merge":
            table.merge()
        elif kind == "rollback":
            table.rollback(table.generations()[0].number)
        elif kind == "grow":
            table.grow(table.shape[0] + int(rng.integers(1, 2000)))
        elif kind == "publish":
            table.publish()
        elif kind == "state":
            columns = (StateColumns("sum", int(rng.integers(1, 4)), 0.5), StateColumns("last", 1, -1.0))
            table.set_state("adagrad", columns, reset=True)
        else:
            table.rollback()
            table.close()
            table = Table.open(path)
        assert_agree(path)
    auto_commit(table)
    _, weight_VD, state_VK, commits = assert_agree(path)
    assert commits[-1]["number"] == table.generation
    np.testing.assert_array_equal(
        bits(np.hstack([weight_VD, state_VK])), bits(table.read(np.arange(table.shape[0]), with_state=True))
    )
    table.close()


def test_several_segments_and_an_uncommitted_tail(tmp_path):
    rng, path = np.random.default_rng(3), tmp_path / "t"
    Table.create(path, 5000, 4, init="uniform").close()
    for _ in range(4):
        table = Table.open(path)
        write_rows(table, rng, 300)
        table.commit()
        write_rows(table, rng, 300)
        table.rollback()
        write_rows(table, rng, 300)
        assert_agree(path)
        with pytest.warns(UserWarning, match="without a commit"):
            table.close()
    assert len(list((path / "journal").iterdir())) >= 4
    facts, _, _, commits = assert_agree(path)
    assert [commit["number"] for commit in commits] == [0, 1, 2, 3, 4]
    assert (facts.V, facts.D, facts.K) == (5000, 4, 1)


def test_a_torn_tail_is_ignored(tmp_path):
    """Cut anywhere behind the last commit, or inside it, the table is as of a whole commit."""
    rng, path = np.random.default_rng(4), tmp_path / "t"
    with Table.create(path, 100, 4) as table:
        write_rows(table, rng, 20)
        table.commit()
        first = (path / "journal" / "0000000000000001").stat().st_size
        write_rows(table, rng, 20)
        table.commit()
        second = (path / "journal" / "0000000000000001").stat().st_size
        write_rows(table, rng, 20)
        whole = (path / "journal" / "0000000000000001").read_bytes()
        table.rollback()
    for cut in [30, 64, 200, first - 1, *rng.integers(first, len(whole), 12), second - 1, second, second + 1]:
        (path / "journal" / "0000000000000001").write_bytes(whole[:cut])
        *_, commits = assert_agree(path)
        padded = -(-int(cut) // 8) * 8  # only zeros of a commit frame's padding may be missing
        assert commits[-1]["number"] == int(padded >= first) + int(padded >= second)


def test_a_merge_that_broke_off_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "SLICE_BYTES", 2000)
    rng, path = np.random.default_rng(5), tmp_path / "t"
    table = Table.create(path, 5000, 4, init="uniform")
    for _ in range(2):
        write_rows(table, rng, 500)
        table.commit()
        table.merge()
    write_rows(table, rng, 300)
    auto_commit(table)
    write_rows(table, rng, 300)
    auto_commit(table)
    _, before, *_ = assert_agree(path)
    upkeep.begin_merge(table._store)
    while not upkeep.advance_merge(table._store, 50):
        copy = tmp_path / "copy"
        shutil.copytree(path, copy)
        assert stranger.read_superblock(copy / "superblock")[0]["suspect"] == "merge"
        _, weight_VD, *_ = assert_agree(copy)
        np.testing.assert_array_equal(bits(weight_VD), bits(before))
        shutil.rmtree(copy)
    assert_agree(path)
    table.close()


@pytest.mark.parametrize("merged", [False, True])
def test_a_rollback_that_broke_off_counts(tmp_path, monkeypatch, merged):
    """Its commit record is the promise: the stranger sees what the library's next writer makes true."""
    rng, path = np.random.default_rng(6), tmp_path / "t"
    table = Table.create(path, 5000, 4, init="normal")
    write_rows(table, rng, 500)
    table.commit()
    table.merge()
    write_rows(table, rng, 500)
    table.commit("keep")
    _, kept, *_ = assert_agree(path)
    write_rows(table, rng, 500)
    auto_commit(table)
    if merged:
        table.merge()
    table.grow(9000)
    write_rows(table, rng, 500)
    auto_commit(table)
    with monkeypatch.context() as patch:
        patch.setattr(upkeep, "finish_rollback", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            table.rollback(2)
    table.close()
    facts, weight_VD, _, commits = stranger.read_table(path)
    assert (facts.V, commits[-1]["rollback_to"]) == (5000, 2)
    np.testing.assert_array_equal(bits(weight_VD), bits(kept))
    with Table.open(path) as table:
        np.testing.assert_array_equal(bits(table.read(np.arange(5000))), bits(kept))
    assert_agree(path)


def test_a_rewrite_that_broke_off_is_left_to_a_writer(tmp_path, monkeypatch):
    rng, path = np.random.default_rng(7), tmp_path / "t"
    table = Table.create(path, 5000, 4)
    write_rows(table, rng, 500)
    table.commit()
    _, before, *_ = assert_agree(path)
    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "finish_rewrite", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            table.set_state("adam", (StateColumns("m", 4), StateColumns("v", 4, 0.25)))
    table.close()
    with pytest.raises(stranger.Damage, match="rewritten"):
        stranger.read_table(path)
    Table.open(path).close()
    facts, weight_VD, state_VK, commits = assert_agree(path)
    np.testing.assert_array_equal(bits(weight_VD), bits(before))
    assert (state_VK == [0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25]).all()
    assert facts.attributes["owner"] == "adam"
    assert [commit["number"] for commit in commits] == [2]


def test_a_published_table_is_all_written(tmp_path):
    with Table.create(tmp_path / "t", 5000, 4, init="normal", chunk_rows=4096) as table:
        _, before, *_ = assert_agree(tmp_path / "t")
        table.publish()
    facts, weight_VD, *_ = assert_agree(tmp_path / "t")
    assert facts.plain
    np.testing.assert_array_equal(bits(weight_VD), bits(before))
    records = np.fromfile(tmp_path / "t" / "weight" / "c.0.0", "<u4").reshape(4096, 6)
    assert records[:, -1].all()
    np.testing.assert_array_equal(records[:, :4], bits(before)[:4096])


# --- both refuse the same bytes


def outcome(read):
    """What `read` answers, or "damage"."""
    try:
        return read()
    except (stranger.Damage, BigembedError):
        return "damage"


def read_by_stranger(path):
    _, weight_VD, _, commits = stranger.read_table(path)
    return commits[-1]["number"], bits(weight_VD).tobytes()


def read_by_us(path):
    with Table.open(path, "r") as table:
        table.verify()
        return table.generation, bits(table.read(np.arange(table.shape[0]))).tobytes()


@pytest.mark.parametrize("name", ["superblock", "weight/c.0.0", "journal/0000000000000001", "journal/0000000000000002"])
def test_both_refuse_the_same_bytes(tmp_path, monkeypatch, name):
    """A flipped byte anywhere is damage to both or to neither, and then both read the same commit."""
    monkeypatch.setattr(store, "LOAD_ROUNDS", 1)  # nobody writes meanwhile: no use in waiting
    rng, path = np.random.default_rng(8), tmp_path / "t"
    with Table.create(path, 40, 2, seed=8) as table:
        write_rows(table, rng, 30)
        table.commit()
        table.merge()
    for _ in range(2):
        with Table.open(path) as table:
            for _ in range(2):
                write_rows(table, rng, 3)
                table.commit()
    whole = (path / name).read_bytes()
    length = min(len(whole), 40 * 16)
    outcomes = []
    for at in rng.choice(length, min(length, 80), replace=False):
        changed = bytearray(whole)
        changed[at] ^= 1 << int(rng.integers(8))
        (path / name).write_bytes(changed)
        expected = outcome(lambda: read_by_us(path))
        assert outcome(lambda: read_by_stranger(path)) == expected, at
        outcomes.append(expected)
    assert outcomes.count("damage") > len(outcomes) // 4


def test_a_lost_page_of_a_journal_is_damage(tmp_path):
    """A record of zeros stands for a never-written row in the base only."""
    path = tmp_path / "t"
    with Table.create(path, 40, 2) as table:
        table.write([3, 4], np.ones((2, 2), np.float32))
        table.commit()
    segment = path / "journal" / "0000000000000001"
    content = bytearray(segment.read_bytes())
    content[64 + 40 + 16 : 64 + 40 + 32] = bytes(16)
    segment.write_bytes(content)
    with pytest.raises(stranger.Damage):
        stranger.read_table(path)
    with Table.open(path, "r") as table, pytest.raises(BigembedError, match="row 3"):
        table.read([3])


# --- golden bytes

CREATED = (
    '{"number": 0, "parent": 0, "num_rows": 3, "note": "created", "time": 1700000000.25, "explicit": true, '
    '"scalars": {}, "payload": null, "rollback_to": null}'
)
TWO_ROWS = (
    '{"number": 1, "parent": 0, "num_rows": 3, "note": "two rows", "time": 1700000000.25, "explicit": true, '
    '"scalars": {}, "payload": {"epoch": 1}, "rollback_to": null}'
)
RECORD_0 = "0000803f 000000c0 00000000 8646ea51"
RECORD_1 = "e22a6140 e4f4963f 00000000 75fb1364"  # the initial values of row 1
RECORD_2 = "0000803e 00004040 00000000 0d820033"
JOURNAL_START = """
    42454a4f55524e4c 01000000 10000000 0100000000000000 01000000f0f0f0f0
    0000000000000000 efcdab8967452301 0000000000000000 abe7979e 00000000
    524f5753 00000000 01000000f0f0f0f0 0200000000000000 93c8ea8400000000 0bdedc5f 6de2a1d7
    0000000000000000 0200000000000000
"""
COMMIT_HEAD = "434d4954 00000000 01000000f0f0f0f0 a300000000000000 0000000000000000 6576b160 3aa7cc8b"
UNDO = """
    4245554e444f0000 01000000 10000000 0100000000000000 03000000f0f0f0f0
    0100000000000000 efcdab8967452301 0000000000000000 91cea7bd 00000000
    4e554c4c 00000000 03000000f0f0f0f0 0100000000000000 0000000000000000 daf68bca 69be9b8e
    0100000000000000
    524f5753 00000000 03000000f0f0f0f0 0100000000000000 0d82003300000000 3acc053d 5581efe5
    0200000000000000
"""
GROUP = {
    "zarr_format": 3,
    "node_type": "group",
    "attributes": {
        "bigembed": {
            "format_version": 1,
            "num_rows": 3,
            "dim": 2,
            "dtype": "float32",
            "state": [{"name": "reserved", "width": 1, "initial": 0.0}],
            "owner": None,
            "init": {"kind": "normal", "a": 0.5, "b": 2.0, "version": 1},
            "seed": 42,
            "salt": "0123456789abcdef",
            "chunk_rows": 4096,
            "padding_idx": 0,
            "plain": False,
        }
    },
}
ARRAY = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [3, 2],
    "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4096, 4]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
    "fill_value": 0.0,
    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
}


@pytest.fixture
def golden(tmp_path, monkeypatch):
    """(path, table) of a three-row table whose every byte is known: fixed time, fixed salts."""
    salts = iter([0x0123456789ABCDEF] + [0xF0F0F0F000000000 + i for i in range(1, 20)])
    monkeypatch.setattr(secrets, "randbits", lambda _: next(salts))
    monkeypatch.setattr(time, "time", lambda: 1700000000.25)
    table = Table.create(tmp_path / "t", 3, 2, init=init.normal(0.5, 2.0), seed=42, padding_idx=0)
    yield tmp_path / "t", table
    table.close()


def superblock_bytes(base, retained, tail):
    text = f'{{"base": {base}, "retained": {retained}, "suspect": "", "num_chunks": 1}}'.encode()
    return b"BESUPER1" + len(text).to_bytes(4, "little") + text + bytes.fromhex(tail)


def write_two_rows(table):
    table.write([0, 2], np.array([[1.0, -2.0], [0.25, 3.0]], np.float32))
    table.commit("two rows", {"epoch": 1})


def test_golden_metadata(golden):
    path, _ = golden
    for name, expected in {"zarr.json": GROUP, "weight/zarr.json": ARRAY}.items():
        found = json.loads((path / name).read_bytes())
        said = {key: value for key, value in found.items() if value not in ({}, [], None)}  # zarr may add empty keys
        assert said == expected
        assert not (set(found) - set(said)) & set(expected)
    assert list(json.loads((path / "zarr.json").read_bytes())["attributes"]) == ["bigembed"]


def test_golden_superblock(golden):
    path, table = golden
    assert (path / "superblock").read_bytes() == superblock_bytes(CREATED, CREATED, "00" * 16 + "40aa0728")
    write_two_rows(table)
    table.merge()
    tail = "0200000000000000 93c8ea8400000000 7130a536"
    assert (path / "superblock").read_bytes() == superblock_bytes(TWO_ROWS, TWO_ROWS, tail)


def test_golden_journal(golden):
    path, table = golden
    write_two_rows(table)
    expected = bytes.fromhex(JOURNAL_START + RECORD_0 + RECORD_2 + COMMIT_HEAD) + TWO_ROWS.encode() + bytes(5)
    assert (path / "journal" / "0000000000000001").read_bytes() == expected
    assert len(expected) == 64 + (40 + 2 * 8 + 2 * 16) + (40 + 0xA3 + 5)


def test_golden_records(golden):
    path, table = golden
    write_two_rows(table)
    table.merge()
    rest = bytes((4096 - 3) * 16)
    chunk = path / "weight" / "c.0.0"
    assert chunk.read_bytes() == bytes.fromhex(RECORD_0) + bytes(16) + bytes.fromhex(RECORD_2) + rest
    table.publish()
    assert chunk.read_bytes() == bytes.fromhex(RECORD_0 + RECORD_1 + RECORD_2) + rest


def test_golden_undo(golden):
    path, table = golden
    write_two_rows(table)
    table.merge()
    table.write([1, 2], np.float32(9))
    table.merge()
    assert (path / "undo" / "0000000000000001").read_bytes() == bytes.fromhex(UNDO + RECORD_2)
    table.rollback(1)
    assert not list((path / "undo").iterdir())
    assert not list((path / "journal").iterdir())


def test_the_folder_of_a_new_table(golden):
    path, _ = golden
    found = sorted(str(name.relative_to(path)) for name in path.rglob("*"))
    assert found == ["journal", "lock", "superblock", "undo", "weight", "weight/zarr.json", "zarr.json"]
    lock = (path / "lock").read_bytes()
    assert len(lock) == 512
    assert set(json.loads(lock)) == {"host", "pid", "program", "since"}


# --- what README.md says is what the code does


def section(title):
    return README.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def keys_of_tables(text):
    """The first cells of the table rows that begin with a name in backquotes."""
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def test_constants():
    assert (FORMAT_VERSION, MIN_CHUNK_ROWS) == (1, 4096)
    assert (segments.HEADER_BYTES, segments.FRAME_BYTES) == (64, 40)
    assert (segments.JOURNAL, segments.UNDO) == (b"BEJOURNL", b"BEUNDO\0\0")
    assert (segments.ROWS, segments.NULLS, segments.COMMIT) == (b"ROWS", b"NULL", b"CMIT")
    assert (superblock.MAGIC, superblock.NAME) == (b"BESUPER1", "superblock")
    assert segments.segment_name(12) == "0000000000000012"
    assert (rewrite.NEXT, rewrite.READY) == ("next", "ready")


def test_the_readme_names_every_key():
    attributes = TableSpec(1, 1).to_attributes()
    assert keys_of_tables(section("Zarr metadata")) == [*attributes, "plain"]
    commit = [field.name for field in fields(superblock.Commit)]
    assert keys_of_tables(section("Commits")) == commit
    block = superblock.Superblock.fresh(1, superblock.Commit(0, 0, 1, "", 0.0, True)).encode()
    length = int.from_bytes(block[8:12], "little")
    assert keys_of_tables(section("Superblock")) == list(json.loads(block[12 : 12 + length]))


def test_the_readmes_python_equals_the_library():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(compile(block, str(README), "exec"), names)
    spec = TableSpec(1 << 40, 50, init=init.normal(), seed=2**63 - 1, salt=2**64 - 3)
    rows = np.random.default_rng(0).integers(0, spec.num_rows, 40)
    values = np.empty((40, 50), np.float32)
    fill_initial(0, 40, rows, initial_rows(spec), values)
    again = [[names["quantile"](names["uniform_01"](spec.seed, row, c)) for c in range(50)] for row in rows.tolist()]
    np.testing.assert_array_equal(bits(again), bits(values))
    records = np.empty((40, 51), np.uint32)
    seal(0, 40, rows, values, check_keys(spec), records)
    checks = names["checks"](rows.astype(np.uint64), records[:, :-1], spec.salt)
    np.testing.assert_array_equal(checks, records[:, -1])


def test_the_stranger_knows_only_the_standard_library_and_numpy():
    imported = set()
    for node in ast.walk(ast.parse(Path(stranger.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or ".").split(".")[0])
    assert imported - {"numpy"} <= sys.stdlib_module_names
    assert not {"importlib", "runpy"} & imported
