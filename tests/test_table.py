"""Table's public face: what each method promises, and the type and text of every error."""

import json
import os
import subprocess
import sys
import warnings

import naive
import numpy as np
import pytest

from bigembed import errors, init
from bigembed.spec import StateColumns
from bigembed.storage import files
from bigembed.storage.table import Table

V, D = 10_000, 3
STATE = (StateColumns("sum", 1, 0.5),)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "words.bigembed")


@pytest.fixture
def table(path):
    made = Table.create(path, V, D, init="uniform", seed=4, chunk_rows=4096)
    yield made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made.close()


def ones(count):
    return np.ones((count, D), np.float32)


def initial(table, rows):
    return naive.fill_initial(table.spec, rows)[:, : table.spec.dim]


# --- reading and writing


def test_a_new_table_holds_initial_values_and_takes_no_disk(table):
    np.testing.assert_array_equal(table.read(np.arange(V)), initial(table, np.arange(V)))
    assert table.shape == (V, D)
    assert table.generation == 0
    assert not table.has_rows
    assert files.disk_bytes(table.path) < 1 << 20


def test_read_keeps_the_shape_and_the_order_of_rows(table):
    rows = np.array([[5, 5, 9], [0, V - 1, 5]])
    np.testing.assert_array_equal(table.read(rows), initial(table, rows.reshape(-1)).reshape(2, 3, D))
    assert table.read(7).shape == (D,)
    assert table.read([]).shape == (0, D)
    assert table.read([1, 2], with_state=True).shape == (2, D + 1)
    assert table.read(np.array([3], np.int32)).dtype == np.float32


def test_write_counts_the_last_of_repeated_rows_broadcasts_and_keeps_state(table):
    table.append_rows(np.array([4]), np.array([[1, 2, 3, 7]], np.float32))
    table.write([4, 8, 4], np.arange(9, dtype=np.float32).reshape(3, 3))
    assert table.read([4, 8], with_state=True).tolist() == [[6, 7, 8, 7], [3, 4, 5, 0]]
    table.write([1, 2], 0.5)
    table.write([2], [1, 2, 3])
    assert table.read([1, 2]).tolist() == [[0.5] * 3, [1, 2, 3]]
    table.write([], ones(0))


def test_uncommitted_rows_are_seen_here_and_nowhere_else(table):
    table.write([1], 1.0)
    with Table.open(table.path, mode="r") as reader:
        assert reader.read([1]).tolist() == initial(table, [1]).tolist()
        table.commit()
        assert reader.refresh() == 1
        assert reader.read([1]).tolist() == [[1.0] * D]


def test_the_same_seed_gives_the_same_rows_in_any_table(tmp_path):
    with (
        Table.create(tmp_path / "a", 5000, 4, seed=9) as one,
        Table.create(tmp_path / "b", 10**9, 4, seed=9, chunk_rows=8192, state_dim=3) as other,
        Table.create(tmp_path / "c", 5000, 4, seed=10) as third,
    ):
        rows = np.arange(0, 5000, 7)
        np.testing.assert_array_equal(one.read(rows), other.read(rows))
        assert (one.read(rows) != third.read(rows)).any()


# --- commits


def test_generations_name_what_can_be_restored(table):
    table.write([1], 1.0)
    assert table.commit("first", {"epoch": 1}) == 1
    table.write([1], 2.0)
    table.merge()
    first, last = table.generations()
    assert (first.number, first.note, first.payload, first.explicit) == (1, "first", {"epoch": 1}, True)
    assert (last.number, last.parent, last.note, last.explicit) == (2, 1, "auto", False)
    assert abs(last.time - os.stat(table.path).st_mtime) < 3600


def test_rollback_is_a_new_generation_with_a_parent(table):
    table.write([1, 9000], 1.0)
    table.scalars = {"step": 5}
    table.commit("good")
    table.scalars = {"step": 6}
    table.write([1], 2.0)
    table.merge()
    table.write([2], 3.0)
    assert table.rollback(1) == 3
    assert table.read([1, 9000])[:, 0].tolist() == [1, 1]
    np.testing.assert_array_equal(table.read([2]), initial(table, [2]))
    assert table.scalars == {"step": 5}
    (commit,) = table.generations()
    assert (commit.number, commit.parent, commit.rollback_to) == (3, 1, 1)


def test_rollback_without_a_number_drops_what_is_uncommitted(table):
    table.write([1], 1.0)
    table.commit()
    table.write([1, 2], 2.0)
    table.grow(V + 10)
    assert table.rollback() == 1
    assert table.shape == (V, D)
    assert table.read([1]).tolist() == [[1] * D]
    np.testing.assert_array_equal(table.read([2]), initial(table, [2]))


def test_scalars_and_payload_come_back_after_a_reopen(table):
    table.scalars = {"rule": "sgd", "step": 3}
    table.commit("x", [1, {"a": None}])
    table.close()
    with Table.open(table.path) as again:
        assert again.scalars == {"rule": "sgd", "step": 3}
        assert again.generations()[-1].payload == [1, {"a": None}]


def test_commits_without_rows_are_merged_away_too(table):
    for _ in range(5):
        table.commit("empty", "x" * 1000)
    table.merge()
    assert os.listdir(os.path.join(table.path, "journal")) == []
    assert table.generations()[-1].payload == "x" * 1000


def test_close_without_commit_warns_with_a_count_and_discards(path):
    table = Table.create(path, V, D)
    table.write([1, 2, 3], 1.0)
    with pytest.warns(UserWarning, match="closed without a commit: changes to 3 rows are discarded"):
        table.close()
    table.close()
    with Table.open(path) as again:
        assert not again.has_rows


def test_an_exception_in_flight_discards_without_a_word(path):
    with pytest.raises(KeyError), Table.create(path, V, D) as table:
        table.write([1], 1.0)
        raise KeyError
    assert table.is_closed
    with Table.open(path) as again:
        assert again.generation == 0


def test_a_temporary_table_goes_with_its_last_reference(path):
    table = Table.create(path, V, D, is_temporary=True)
    table.write([1], 1.0)
    table.close()
    assert not os.path.exists(path)


def test_grow_appends_initial_rows_and_counts_from_the_next_commit_on(table):
    table.write([V - 1], 1.0)
    table.commit()
    table.grow(30_000)
    rows = np.arange(V, 30_000)
    np.testing.assert_array_equal(table.read(rows), initial(table, rows))
    table.write([29_999], 2.0)
    with Table.open(table.path, mode="r") as reader:
        assert reader.shape == (V, D)
        table.commit()
        reader.refresh()
        assert reader.read([29_999]).tolist() == [[2] * D]
    table.merge()
    table.verify()


def test_set_state_keeps_every_weight_and_starts_every_state(table):
    rows = np.array([0, 5, 9999])
    table.write(rows, 2.0)
    table.commit()
    for owner, state in (("adam", (StateColumns("m", D), StateColumns("v", D, 0.25))), ("sgd", ()), ("ada", STATE)):
        table.set_state(owner, state, reset=True)
        want = np.concatenate([np.full((3, D), 2.0), np.tile(table.spec.state_initial, (3, 1))], axis=1)
        np.testing.assert_array_equal(table.read(rows, with_state=True), want)
        np.testing.assert_array_equal(table.read([1]), initial(table, [1]))
        assert (table.spec.owner, len(table.generations())) == (owner, 1)
        table.verify()


def test_the_reserved_column_is_taken_over_for_free(table):
    table.write([1], 1.0)
    table.commit()
    table.set_state("rowwise_adagrad", (StateColumns("sum", 1),))
    assert table.generation == 1
    assert json.load(open(table.path + "/zarr.json"))["attributes"]["bigembed"]["owner"] == "rowwise_adagrad"  # noqa: SIM115


def test_set_init_changes_a_table_without_rows(table):
    table.set_init(init.constant(3.0), padding_idx=0)
    assert table.read([0, 1]).tolist() == [[0] * D, [3] * D]
    table.close()
    with Table.open(table.path) as again:
        assert again.read([1]).tolist() == [[3] * D]


# --- what other Zarr readers see


def zarr_values(path):
    import zarr

    return zarr.open_array(os.path.join(path, "weight"), mode="r")[:]


def tensorstore_values(path):
    import tensorstore

    kvstore = {"driver": "file", "path": os.path.join(path, "weight")}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()


@pytest.mark.parametrize("values_of", [zarr_values, tensorstore_values], ids=["zarr-python", "tensorstore"])
def test_another_reader_sees_merged_rows_zeros_and_after_publish_everything(table, values_of):
    rows = np.array([0, 5, 4096, 9999])
    table.write(rows, 2.0)
    table.commit()
    assert not values_of(table.path).any()
    table.merge()
    want = np.zeros((V, D), np.float32)
    want[rows] = 2.0
    np.testing.assert_array_equal(values_of(table.path), want)
    table.publish()
    np.testing.assert_array_equal(values_of(table.path), table.read(np.arange(V)))
    table.verify()


def is_plain(path):
    return json.loads(files.read_bytes(path + "/zarr.json"))["attributes"]["bigembed"]["plain"]


def test_plain_is_true_after_publish_and_false_before_anything_else_changes(table):
    assert is_plain(table.path) is False
    table.publish()
    assert is_plain(table.path) is True
    operations = []
    files.before = lambda operation, path: operations.append((operation, os.path.relpath(path, table.path)))
    try:
        table.write([1], 1.0)
    finally:
        files.before = None
    synced = operations.index(("rename", "zarr.json"))
    assert operations[synced + 1] == ("sync directory", ".")
    assert [name for _, name in operations].index("journal/0000000000000001") > synced + 1
    assert is_plain(table.path) is False
    table.rollback()
    table.publish()
    table.close()
    with Table.open(table.path) as again:
        assert is_plain(table.path) is True
        again.grow(V + 1)
        again.commit()
        assert is_plain(table.path) is False


# --- large


def test_a_billion_rows_take_under_a_mebibyte_and_are_read_and_written(path):
    rng = np.random.default_rng(0)
    rows = np.unique(rng.integers(0, 10**9, 100_000))
    values = rng.standard_normal((len(rows), 64)).astype(np.float32)
    with Table.create(path, 10**9, 64) as table:
        assert files.disk_bytes(path) < 1 << 20
        some = rows[::1000]
        np.testing.assert_array_equal(table.read(some), initial(table, some))
        table.write(rows, values)
        table.commit()
        np.testing.assert_array_equal(table.read(rows), values)
    with Table.open(path) as table:
        order = rng.permutation(len(rows))
        np.testing.assert_array_equal(table.read(rows[order]), values[order])
        assert files.disk_bytes(path) < 40 << 20


PEAK = """
import resource, sys, numpy as np
from bigembed.storage.table import Table
with Table.create(sys.argv[1], int(sys.argv[2]), 64) as table:
    rows = np.unique(np.random.default_rng(0).integers(0, table.shape[0], 20_000))
    table.write(rows, 1.0)
    table.commit()
    table.read(rows)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_peak_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    peaks = []
    for count in (10**6, 10**9):
        command = [sys.executable, "-c", PEAK, str(tmp_path / str(count)), str(count)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert abs(peaks[1] - peaks[0]) < 64


def test_stats_have_a_line_for_each_part(table):
    table.write([1, 2], 1.0)
    stats = table.stats()
    assert set(stats) == {"table", "cache", "index", "journal", "undo", "pending", "staging", "merge"}
    assert stats["pending"]["uncommitted_rows"] == 2
    assert stats["index"]["rows"] == 2
    table.merge()
    assert table.stats()["table"]["written_rows"] == 2
    assert table.stats()["undo"]["rows"] == 2


# --- damage


@pytest.fixture
def merged(table):
    """A closed table with rows in two chunks of its base; its path."""
    table.write([7, 9000], 1.0)
    table.commit()
    table.merge()
    table.close()
    return table.path


def damage(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("reader", ["cold", "mapped"])
def test_a_flipped_byte_is_a_damaged_row_that_names_row_and_file(merged, reader):
    damage(merged + "/weight/c.0.0", 7 * 20 + 2, b"\x55")
    with Table.open(merged, mode="r", reader=reader) as table:
        with pytest.raises(errors.DamagedRow, match=r"row 7 is damaged: its record at byte 140 of .*c\.0\.0"):
            table.read([6, 7])
        with pytest.raises(errors.DamagedRow, match="row 7 "):
            table.verify()
        assert table.read([9000]).tolist() == [[1] * D]


def test_verify_finds_a_zeroed_page_and_a_stale_record_that_reads_do_not(merged, tmp_path):
    old = files.read_bytes(merged + "/weight/c.0.0")
    with Table.open(merged) as table:
        table.write([7], 2.0)
        table.commit()
        table.merge()
    new = files.read_bytes(merged + "/weight/c.0.0")
    for content in (bytes(4096) + new[4096:], old):
        damage(merged + "/weight/c.0.0", 0, content)
        with Table.open(merged) as table:
            table.read([7])
            with pytest.raises(
                errors.DamagedTable, match=r"c\.0\.0 holds . written rows .* rows were lost or are stale"
            ):
                table.verify()
    damage(merged + "/weight/c.0.0", 0, new)
    with Table.open(merged) as table:
        assert table.verify().written_rows == 2


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_chunk_file_that_is_missing_or_of_the_wrong_size_stops_the_open(merged, mode):
    chunk = merged + "/weight/c.2.0"
    os.truncate(chunk, 100)
    with pytest.raises(errors.DamagedTable, match=r"c\.2\.0 has 100 bytes, a chunk of this table has 81920"):
        Table.open(merged, mode=mode)
    os.unlink(chunk)
    with pytest.raises(errors.DamagedTable, match=r"c\.2\.0 is missing; it held 1 rows from row 8192 on"):
        Table.open(merged, mode=mode)


def test_a_damaged_or_missing_superblock_stops_the_open(merged):
    content = files.read_bytes(merged + "/superblock")
    for at in range(0, len(content), 7):
        damage(merged + "/superblock", 0, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(errors.DamagedTable, match="superblock is damaged"):
            Table.open(merged, mode="r")
    os.unlink(merged + "/superblock")
    with pytest.raises(errors.DamagedTable, match="superblock is missing"):
        Table.open(merged)


@pytest.mark.parametrize("folder", ["journal", "undo"])
def test_a_missing_folder_is_named(merged, folder):
    os.rmdir(os.path.join(merged, folder))
    with pytest.raises(errors.DamagedTable, match=f"{folder} is missing"):
        Table.open(merged)


def change_attributes(path, **changes):
    group = json.loads(files.read_bytes(path + "/zarr.json"))
    group["attributes"]["bigembed"].update(changes)
    with open(path + "/zarr.json", "w") as file:
        json.dump(group, file)


def test_a_newer_format_is_said_so(merged):
    change_attributes(merged, format_version=2)
    with pytest.raises(errors.NewerFormat, match=r"has format version 2, this library reads up to 1. Upgrade bigembed"):
        Table.open(merged)


@pytest.mark.parametrize(
    "changes",
    [{"dim": "3"}, {"seed": -1}, {"chunk_rows": 5000}, {"init": None}, {"salt": "xyz"}, {"format_version": 0}],
)
def test_attributes_that_make_no_sense_are_no_table(merged, changes):
    change_attributes(merged, **changes)
    with pytest.raises(errors.NotATable, match=r"attributes|format_version|dim"):
        Table.open(merged)


def test_a_failed_open_leaves_no_descriptor_and_no_lock(merged):
    os.truncate(merged + "/weight/c.2.0", 100)
    before = len(os.listdir("/proc/self/fd"))
    for mode in ("r", "r+", "r+"):
        with pytest.raises(errors.DamagedTable):
            Table.open(merged, mode=mode)
    assert len(os.listdir("/proc/self/fd")) == before


# --- mistakes


def test_what_is_no_table_is_said_so(tmp_path):
    import zarr

    with pytest.raises(errors.TableMissing, match=r"does not exist. Create a table with Table.create"):
        Table.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    zarr.create_group(tmp_path / "group", attributes={"x": 1})
    for name in ("file", "empty", "group"):
        for mode in ("r", "r+"):
            kind = "a file, not a table" if name == "file" else "not a bigembed table"
            with pytest.raises(errors.NotATable, match=f"{name} is {kind}"):
                Table.open(tmp_path / name, mode=mode)
        for overwrite in (False, True):
            with pytest.raises(errors.TableExists, match="exists"):
                Table.create(tmp_path / name, 10, 2, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "group"]


def test_create_replaces_a_table_only_when_asked_and_only_if_nobody_writes_it(table):
    with pytest.raises(errors.TableExists, match="pass overwrite=True"):
        Table.create(table.path, 5, 1)
    with pytest.raises(errors.TableLocked, match=f"open for writing by process {os.getpid()}"):
        Table.create(table.path, 5, 1, overwrite=True)
    table.close()
    with pytest.raises(errors.InvalidArgument, match="journal_bytes"):
        Table.create(table.path, 5, 1, overwrite=True, journal_bytes=0)
    Table.open(table.path).close()
    with Table.create(table.path, 5, 1, overwrite=True) as new:
        assert new.shape == (5, 1)
    assert os.listdir(os.path.dirname(table.path)) == [os.path.basename(table.path)]


def test_a_fault_while_a_table_is_replaced_leaves_the_old_or_the_new(tmp_path):
    path = str(tmp_path / "t")
    for n in range(1, 100):
        Table.create(path, 50, 1, overwrite=True).close()
        count = iter(range(1, 1 << 30))

        def strike(operation, path, count=count, n=n):
            if next(count) == n:
                raise OSError(5, "Input/output error")

        files.before = strike
        try:
            Table.create(path, 60, 2, overwrite=True).close()
        except errors.BigembedError:
            files.before = None
            with Table.open(path) as found:
                assert found.shape in ((50, 1), (60, 2))
            assert set(os.listdir(path)) == {"zarr.json", "weight", "superblock", "journal", "undo", "lock"}
            assert os.listdir(tmp_path) == ["t"]
        finally:
            files.before = None
        if next(count) <= n:
            break
    assert n > 40


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_rows": 0}, "num_rows must be between 1"),
        ({"num_rows": 2.5}, r"num_rows must be an integer, not 2\.5"),
        ({"num_rows": True}, "num_rows must be an integer"),
        ({"dim": 0}, "dim 0 with 1 state columns"),
        ({"state_dim": -1}, "state_dim must be at least 0, not -1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"dtype": "float16"}, "'float16' is not supported"),
        ({"init": "xavier"}, "init='xavier' is unknown; use 'normal', 'uniform', 'zeros'"),
        ({"chunk_rows": 5000}, "chunk_rows must be a power of two of at least 4096, not 5000"),
        ({"chunk_rows": 4096.0}, "chunk_rows must be an integer"),
        ({"padding_idx": 10}, "padding_idx 10 is not a row of 10 rows"),
        ({"padding_idx": "x"}, "padding_idx must be an integer"),
        ({"journal_bytes": 0}, "journal_bytes=0"),
        ({"index_bytes": 1.5}, "index_bytes must be an integer"),
        ({"reader": "fast"}, "reader='fast' is unknown; use 'auto', 'cold', 'mapped'"),
    ],
)
def test_create_refuses_what_cannot_be_and_makes_nothing(tmp_path, facts, message):
    with pytest.raises(errors.InvalidArgument, match=message):
        Table.create(tmp_path / "t", **{"num_rows": 10, "dim": 2, **facts})
    assert os.listdir(tmp_path) == []


def test_numpy_integers_are_integers(tmp_path):
    with Table.create(tmp_path / "t", np.int64(10), np.int32(2), seed=np.uint8(3), padding_idx=np.int64(1)) as table:
        table.grow(np.int64(20))
        table.commit()
    with Table.open(tmp_path / "t") as table:
        assert table.shape == (20, 2)


def test_rows_that_cannot_be_are_refused_before_anything_is_written(table):
    for call in (table.read, lambda rows: table.write(rows, ones(len(rows)))):
        with pytest.raises(
            IndexError, match=r"ids contain 10000 \(at position 1\), but this table has 10000 rows .*0 to 9999"
        ) as caught:
            call([0, V, -1])
        assert isinstance(caught.value, errors.RowOutOfRange)
        with pytest.raises(errors.RowOutOfRange, match=r"ids contain -1 \(at position 0\)"):
            call([-1])
        with pytest.raises(errors.InvalidIds, match="rows have dtype float64; integers are needed"):
            call([1.0])
        with pytest.raises(errors.InvalidIds, match="rows have dtype bool"):
            call(np.array([True]))
    assert not table.has_rows


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((2, D)), "values have dtype float64, this table holds float32"),
        (np.ones((2, D + 1), np.float32), r"values have shape \(2, 4\); 2 rows of 3 columns were expected"),
        (np.ones((3, D), np.float32), r"values have shape \(3, 3\)"),
        (np.ones((2, D), np.complex64), "values have dtype complex64"),
        ("x", "values have dtype"),
        (None, "values have dtype object"),
    ],
)
def test_values_that_do_not_fit_are_refused(table, values, message):
    with pytest.raises(ValueError, match=message) as caught:
        table.write([1, 2], values)
    assert isinstance(caught.value, errors.InvalidArgument)
    assert not table.has_rows


def test_other_mistakes_teach(table):
    with pytest.raises(errors.InvalidArgument, match="mode='w' is unknown; use 'r' to read or 'r\\+' to write"):
        Table.open(table.path, mode="w")
    with pytest.raises(errors.InvalidArgument, match="payload must be what JSON can hold"):
        table.commit("x", {1, 2})
    with pytest.raises(errors.NotRestorable, match=r"generation 7 cannot be restored; .* keeps \[0\]"):
        table.rollback(7)
    with pytest.raises(errors.InvalidArgument, match="cannot grow to 5 rows: the table has 10000 already"):
        table.grow(5)
    with pytest.raises(errors.InvalidArgument, match=r"num_rows must be an integer, not 20000.5"):
        table.grow(20_000.5)
    table.set_state("adagrad", STATE)
    table.set_state("adam", STATE)  # no row is written yet: nothing to lose
    table.set_state("adagrad", STATE)
    table.write([1], 1.0)
    with pytest.raises(errors.StateMismatch, match="hold the state of adagrad, not of adam"):
        table.set_state("adam", ())
    with pytest.raises(errors.InvalidArgument, match="rows were written already"):
        table.set_init(init.zeros())
    assert table.shape == (V, D)


def test_a_closed_table_says_so(table):
    table.close()
    calls = [lambda: table.read([1]), lambda: table.write([1], 1.0), table.commit, table.merge, table.rollback]
    calls += [table.generations, table.publish, table.refresh, lambda: table.grow(10**5), table.verify, table.stats]
    for call in calls:
        with pytest.raises(errors.TableClosed, match=r"was closed. Open it again with Table.open"):
            call()
    assert "closed" in repr(table)


def test_a_table_open_for_reading_refuses_to_write(table):
    with Table.open(table.path, mode="r") as reader:
        calls = [lambda: reader.write([1], 1.0), reader.commit, reader.merge, reader.rollback, reader.publish]
        calls += [lambda: reader.grow(10**5), lambda: reader.set_init(init.zeros()), lambda: reader.set_state("x", ())]
        for call in calls:
            with pytest.raises(errors.ReadOnlyTable, match=r"is open with mode='r'. Open it with mode='r\+' to write"):
                call()
        assert reader.verify().chunks == 0


def test_a_full_disk_is_said_so_and_loses_nothing(table):
    table.write([1], 1.0)
    table.commit()

    def full(operation, path):
        if operation == "write":
            raise OSError(28, "No space left on device")

    files.before = full
    try:
        with pytest.raises(errors.DiskFull, match="free some space and try again"):
            table.write([2], 2.0)
    finally:
        files.before = None
    table.write([3], 3.0)
    table.commit()
    assert table.read([1, 3])[:, 0].tolist() == [1, 3]
    np.testing.assert_array_equal(table.read([2]), initial(table, [2]))


# --- beside others

FORK_BESIDE_A_POOL = """
import os, sys, threading, time
import numpy as np
from bigembed.storage.table import Table

table = Table.create(sys.argv[1], 10, 2)
table.verify()  # zarr-python is loaded, and its pool
held = threading.Event()

def use_a_pool():
    from concurrent.futures import ThreadPoolExecutor
    with table.mutex:
        held.set()
        time.sleep(0.5)  # the fork has begun by now, and waits for us
        ThreadPoolExecutor(1).submit(int).result()

thread = threading.Thread(target=use_a_pool)
thread.start()
held.wait()
pid = os.fork()
if pid == 0:
    os._exit(0)
os.waitpid(pid, 0)
thread.join()
"""


def test_a_fork_waits_for_who_verifies_without_holding_what_that_needs(path):
    # Each would wait for the other for ever, in the thread pool's lock and in the table's.
    subprocess.run([sys.executable, "-c", FORK_BESIDE_A_POOL, path], check=True, timeout=60)


def test_a_reader_verifies_beside_a_writer_that_grows(table):
    with Table.open(table.path, mode="r") as reader:
        table.grow(V + 5)
        table.commit()
        reader.verify()
        assert reader.shape == (V, D)


def test_a_reader_verifies_beside_a_writer_that_merges(table):
    table.write([0, V - 1], 1.0)
    table.commit()
    table.merge()
    with Table.open(table.path, mode="r") as reader:
        table.write([5], 2.0)
        table.commit()
        table.merge()
        assert reader.verify().written_rows == 3
        with open(os.path.join(table.path, "weight", "c.2.0"), "r+b") as file:
            file.write(b"\0" * os.path.getsize(file.name))
        with pytest.raises(errors.DamagedTable, match=r"c\.2\.0 holds 0 written rows"):
            reader.verify()


def test_a_reader_verifies_what_a_crash_left_between_the_two_files_of_metadata(table):
    def stop(operation, path):
        if operation == "rename" and os.path.basename(os.path.dirname(path)) == "words.bigembed":
            raise OSError(5, "injected")

    table.grow(V + 5)
    files.before = stop
    try:
        with pytest.raises(errors.StorageFailed):
            table.commit()
    finally:
        files.before = None
    with Table.open(table.path, mode="r") as reader:
        assert reader.shape == (V + 5, D)
        reader.verify()
    at = os.path.join(table.path, "weight", "zarr.json")
    with open(at) as file:
        metadata = json.load(file)
    metadata["shape"][0] = V + 4
    with open(at, "w") as file:
        json.dump(metadata, file)
    with (
        Table.open(table.path, mode="r") as reader,
        pytest.raises(errors.DamagedTable, match=f"weight is .{V + 4}, 3.*to zarr-python"),
    ):
        reader.verify()


@pytest.mark.parametrize("name", ["zarr.json", "weight/zarr.json"])
@pytest.mark.parametrize("operation", ["open", "read"])
def test_a_read_of_metadata_that_fails_is_no_other_kind_of_folder(table, name, operation):
    at = os.path.join(table.path, name)

    def fail(kind, path):
        if (kind, path) == (operation, at):
            raise OSError(5, "injected")

    table.close()
    files.before = fail
    try:
        for call in (
            lambda: Table.open(table.path),
            lambda: Table.open(table.path, mode="r"),
            lambda: Table.create(table.path, 5, 1, overwrite=True),
        ):
            with pytest.raises(errors.StorageFailed, match=f"{operation} of .*zarr.json failed: injected"):
                call()
    finally:
        files.before = None
    os.unlink(at)
    os.mkdir(at)
    with pytest.raises(errors.NotATable, match="Choose another path"):
        Table.open(table.path)
