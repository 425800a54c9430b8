"""Vocabulary: tokens to rows and back, policies, growth with commits and rollbacks, crashes, forks, company."""

import contextlib
import errno
import os
import pickle
import threading
import warnings

import naive_vocab
import numpy as np
import pytest

from bigembed import errors
from bigembed.storage import files
from bigembed.storage.table import Table
from bigembed.vocab import current, growth, vocabulary
from bigembed.vocab.hashed import HashBuckets
from bigembed.vocab.packed import PackedTokens
from bigembed.vocab.vocabulary import Vocabulary

SEEDS = range(int(os.environ.get("BIGEMBED_FUZZ_SEEDS", "8")))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    yield
    files.before = None


@pytest.fixture
def table(tmp_path):
    table = Table.create(tmp_path / "t", 10, 2)
    yield table
    quiet_close(table)


def quiet_close(table):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        table.close()


def small(table, **settings):
    """the, a, the (again), "" and a token of any bytes, in rows of their own."""
    return Vocabulary.create(table, ["the", "a", "the", "", b"\xff\n"], [4, 3, 2, 1, 0], **settings)


class TestLookingUp:
    def test_rows_of_text_bytes_and_packed_tokens(self, table):
        vocab = small(table)
        for asked in (["a", "the", "", "a"], [b"a", "the", b"", "a"], PackedTokens.of(["a", "the", "", "a"])):
            found = vocab.rows(asked)
            assert found.dtype == np.int64
            assert found.tolist() == [3, 4, 1, 3]
        assert vocab.rows(iter(["a"])).tolist() == vocab.rows("a").tolist() == vocab.rows(b"a").tolist() == [3]
        assert vocab.rows(("a", b"\xff\n")).tolist() == [3, 0]
        assert vocab.rows("\udcff\n").tolist() == [0]
        assert vocab.rows([]).tolist() == vocab.rows(PackedTokens.of([])).tolist() == []

    def test_tokens_of_rows(self, table):
        vocab = small(table)
        assert vocab.tokens([4, 3, 2, 1, 0, 9, 4]) == [b"the", b"a", b"the", b"", b"\xff\n", None, b"the"]
        assert vocab.tokens([]) == vocab.tokens(np.empty(0, np.int64)) == []
        with pytest.raises(errors.RowOutOfRange, match=r"10 \(at position 1\)"):
            vocab.tokens([1, 10])

    def test_ranges_of_rows_and_of_entries(self, table):
        vocab = small(table)
        assert vocab.packed(2, 10).to_list() == [b"the", b"a", b"the", b"", b"", b"", b"", b""]
        assert len(vocab.packed(3, 3)) == 0
        tokens, row_n = vocab.entries(1, 4)
        assert (tokens.to_list(), row_n.tolist()) == ([b"a", b"the", b""], [3, 2, 1])
        assert vocab.entries(4, 100)[1].tolist() == [0]
        assert len(vocab.entries(7, 9)[0]) == len(vocab.entries(3, 1)[0]) == 0

    def test_as_a_collection(self, table):
        vocab = small(table)
        assert "a" in vocab
        assert b"the" in vocab
        assert "b" not in vocab
        assert 3 not in vocab
        assert len(vocab) == 5
        assert list(vocab) == [b"the", b"a", b"the", b"", b"\xff\n"]
        assert "5 tokens" in repr(vocab)

    def test_more_tokens_than_a_slice(self, table, monkeypatch):
        monkeypatch.setattr(vocabulary, "SLICE_TOKENS", 3)
        vocab = Vocabulary.create(table, (f"t{i}" for i in range(10)))
        asked = [f"t{i}" for i in (9, 3, 3, 0, 7, 8, 1)]
        for given in (asked, tuple(asked), PackedTokens.of(asked)):
            assert vocab.rows(given).tolist() == [9, 3, 3, 0, 7, 8, 1]
        assert vocab.tokens([9, 3, 3, 0, 7]) == [b"t9", b"t3", b"t3", b"t0", b"t7"]
        assert list(vocab) == [b"t%d" % i for i in range(10)]
        with pytest.raises(errors.UnknownToken, match=r"^'x' \(at position 1\), 'y' \(at position 5\) are not"):
            vocab.rows(["t1", "x", "t1", "t1", "t1", "y"])

    def test_several_threads_look_up_at_once_and_one_adds(self, table):
        vocab = Vocabulary.create(table, [f"t{i}" for i in range(10)])
        failed = []

        def look():
            try:
                least = 0
                while least < 300:
                    assert vocab.rows([f"t{i}" for i in range(10)] * 10).tolist() == list(range(10)) * 10
                    known = vocab.rows([f"new{i}" for i in range(300)], unknown=-1)
                    assert ((known == -1) | (known == np.arange(300) + 10)).all()
                    assert (known[:least] >= 0).all()  # what was there once stays
                    least = int(np.argmin(np.append(known, -1)))
            except BaseException as error:
                failed.append(error)

        looking = [threading.Thread(target=look) for _ in range(3)]
        for thread in looking:
            thread.start()
        for i in range(300):
            vocab.add([f"new{i}"])
        for thread in looking:
            thread.join()
        assert not failed


class TestUnknown:
    def test_an_error_names_tokens_positions_and_ways_out(self, table):
        vocab = small(table)
        with pytest.raises(errors.UnknownToken, match=r"^'x' \(at position 1\) is not in the vocabulary\. Say what"):
            vocab.rows(["a", "x"])
        with pytest.raises(errors.UnknownToken, match=r"'6' \(at position 4\) and 2 more are not.*unknown=row.*add\("):
            vocab.rows([*"23456", "a", "8", b"\xfe"])
        with pytest.raises(KeyError):
            vocab.rows("x" * 1000)

    def test_a_row_a_token_a_mark(self, table):
        vocab = small(table)
        assert vocab.rows(["x", "a", "y"], unknown=7).tolist() == [7, 3, 7]
        assert vocab.rows(["x", "a", "y"], unknown="the").tolist() == [4, 3, 4]
        assert vocab.rows(["x", "a", "y"], unknown=np.int64(-1)).tolist() == [-1, 3, -1]
        for wrong in (10, -2, 2.0, True, [1]):
            with pytest.raises(errors.InvalidArgument, match="unknown="):
                vocab.rows(["a"], unknown=wrong)
        with pytest.raises(errors.UnknownToken, match="'nothing'"):
            vocab.rows(["a"], unknown="nothing")

    @pytest.mark.parametrize("as_packed", [False, True])
    def test_hash_buckets(self, table, as_packed):
        vocab, buckets = small(table), HashBuckets(5, 4)
        asked = ["x", "a", "y", "x"]
        found = vocab.rows(PackedTokens.of(asked) if as_packed else asked, unknown=buckets)
        want = buckets.rows_of(PackedTokens.of(asked)).tolist()
        assert found.tolist() == [want[0], 3, want[2], want[3]]
        with pytest.raises(errors.InvalidArgument, match="the table has 10 rows"):
            vocab.rows(["x"], unknown=HashBuckets(10, 1))

    @pytest.mark.parametrize(
        ("unknown", "want"), [(6, 6), ("a", 3), (-1, -1), (HashBuckets(8, 1), 8)], ids=["row", "token", "mark", "hash"]
    )
    def test_the_stored_policy_is_used_and_survives(self, table, unknown, want):
        vocab = small(table, unknown=unknown)
        assert vocab.rows(["x", "a"]).tolist() == [want, 3]
        path = table.path
        table.close()
        with Table.open(path, mode="r") as again:
            assert Vocabulary.open(again).rows(["x", "a"]).tolist() == [want, 3]
            assert Vocabulary.open(again).rows(["x"], unknown=5).tolist() == [5]
            assert (
                Vocabulary.open(again).unknown.to_json()
                == vocabulary.as_policy(3 if unknown == "a" else unknown).to_json()
            )

    def test_with_subwords_the_error_says_to_embed(self, table):
        settings = {"kind": "fasttext", "minn": 1}
        vocab = small(table, subwords=settings)
        assert vocab.subwords == settings
        with pytest.raises(errors.UnknownToken, match=r"embed\(tokens\)"):
            vocab.rows(["x"])
        assert vocab.rows(["x"], unknown=-1).tolist() == [-1]


class TestCreate:
    def test_there_is_none_before(self, table):
        assert not Vocabulary.stands_at(table.path)
        with pytest.raises(errors.NoVocabulary, match=r"no vocabulary.*Vocabulary\.create"):
            Vocabulary.open(table)
        small(table)
        assert Vocabulary.stands_at(table.path)
        with pytest.raises(errors.TableExists, match="has a vocabulary already"):
            small(table)
        assert Vocabulary.open(table).rows("a").tolist() == [3]

    def test_tokens_must_have_rows_that_no_rollback_takes(self, table):
        table.grow(12)
        with pytest.raises(errors.InvalidArgument, match="at least 12 tokens were given for 10 committed rows"):
            Vocabulary.create(table, [str(i) for i in range(12)])
        with pytest.raises(errors.RowOutOfRange):
            Vocabulary.create(table, ["a"], [10])
        assert not os.path.exists(os.path.join(table.path, "vocab"))
        table.commit()
        assert len(Vocabulary.create(table, [str(i) for i in range(12)])) == 12

    @pytest.mark.parametrize("rows", [[1], [1, 2, 3]])
    def test_as_many_rows_as_tokens(self, table, rows):
        with pytest.raises(errors.InvalidArgument, match=rf"2 tokens were given, and {len(rows)} rows"):
            Vocabulary.create(table, ["a", "b"], rows)
        assert not Vocabulary.stands_at(table.path)

    def test_a_reader_may_not(self, table):
        with Table.open(table.path, mode="r") as reader, pytest.raises(errors.ReadOnlyTable):
            small(reader)

    def test_what_a_killed_create_left_is_removed(self, table):
        folder = os.path.join(table.path, "vocab")
        os.mkdir(folder)
        for name in ("tokens.1", "index.1", "pairs.1", "vocab.json.new"):
            open(os.path.join(folder, name), "wb").write(b"half")  # noqa: SIM115
        assert not Vocabulary.stands_at(table.path)
        small(table)
        want = {f"{kind}.1" for kind in ("tokens", "blocks", "index", "rows", "entries")} | {"vocab.json"}
        assert set(os.listdir(folder)) == want

    def test_a_fault_at_any_operation_gives_none_or_a_whole_one(self, tmp_path):
        for n in range(1, 1000):
            table = Table.create(tmp_path / str(n), 10, 2)
            fault = FailAt(n)
            files.before = fault
            with contextlib.suppress(errors.StorageFailed):
                small(table)
            files.before = None
            if Vocabulary.stands_at(table.path):
                assert Vocabulary.open(table).rows(["the", "a"]).tolist() == [4, 3]
                Vocabulary.open(table).verify()
            else:
                assert small(table).rows(["the", "a"]).tolist() == [4, 3]
            table.close()
            if not fault.has_struck:
                break
        assert n > 25


class FailAt:
    """Raises OSError at the n-th operation."""

    def __init__(self, n):
        self.n, self.count = n, 0

    @property
    def has_struck(self):
        return self.count >= self.n

    def __call__(self, operation, path):
        self.count += 1
        if self.count == self.n:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


class TestAdd:
    def test_new_tokens_get_new_rows_in_their_order(self, table):
        vocab = small(table)
        assert vocab.add(["x", "a", "y", "x", "the", b"x"]).tolist() == [10, 3, 11, 10, 4, 10]
        assert table.shape == (12, 2)
        assert vocab.rows(["y", "x", "a"]).tolist() == [11, 10, 3]
        assert vocab.tokens([11, 4, 10, 9]) == [b"y", b"the", b"x", None]
        assert vocab.packed(8, 12).to_list() == [b"", b"", b"x", b"y"]
        assert vocab.add(["y", "x"]).tolist() == [11, 10]
        assert vocab.add([]).tolist() == []
        assert vocab.add("alone").tolist() == [12]
        assert table.shape == (13, 2)
        assert list(vocab)[5:] == [b"x", b"y", b"alone"]
        tokens, row_n = vocab.entries(4, 7)
        assert (tokens.to_list(), row_n.tolist()) == ([b"\xff\n", b"x", b"y"], [0, 10, 11])
        stats = vocab.stats()
        assert (stats["tokens"], stats["stored_tokens"], stats["added_tokens"], stats["duplicates"]) == (8, 5, 3, 1)

    def test_rows_that_the_table_grew_by_itself_have_no_tokens(self, table):
        vocab = small(table)
        vocab.add(["x"])
        table.grow(20)
        assert vocab.add(["y"]).tolist() == [20]
        assert vocab.tokens([10, 15, 20]) == [b"x", None, b"y"]

    def test_they_are_there_for_others_after_the_commit(self, table):
        vocab = small(table)
        with Table.open(table.path, mode="r") as reader:
            beside = Vocabulary.open(reader)
            vocab.add(["x"])
            assert beside.rows("x", unknown=-1).tolist() == [-1]
            reader.refresh()
            assert beside.rows("x", unknown=-1).tolist() == [-1]
            table.commit()
            assert beside.rows("x", unknown=-1).tolist() == [-1]
            reader.refresh()
            assert beside.rows("x").tolist() == [10]
            assert beside.tokens([10]) == [b"x"]

    def test_a_rollback_takes_rows_and_tokens_back(self, table):
        vocab = small(table)
        vocab.add(["x"])
        table.rollback()
        assert table.shape[0] == 10
        assert vocab.rows("x", unknown=-1).tolist() == [-1]
        assert vocab.add(["y", "x"]).tolist() == [10, 11]
        first = table.commit()
        vocab.add(["z"])
        table.rollback()
        assert vocab.rows(["x", "z"], unknown=-1).tolist() == [11, -1]
        table._commit("auto", None, explicit=False)
        vocab.add(["z"])
        table._commit("auto", None, explicit=False)
        assert vocab.rows(["x", "z"]).tolist() == [11, 12]
        table.rollback(first)
        assert vocab.rows(["x", "z"], unknown=-1).tolist() == [11, -1]
        assert vocab.tokens([10, 11]) == [b"y", b"x"]

    def test_closed_without_a_commit_they_are_gone(self, table):
        small(table).add(["x"])
        quiet_close(table)
        with Table.open(table.path) as again:
            vocab = Vocabulary.open(again)
            assert vocab.rows("x", unknown=-1).tolist() == [-1]
            assert vocab.add(["z"]).tolist() == [10]
            again.commit()

    def test_reader_child_and_closed_table_may_not_add(self, table):
        vocab = small(table)
        with Table.open(table.path, mode="r") as reader, pytest.raises(errors.ReadOnlyTable):
            Vocabulary.open(reader).add(["x"])
        table.close()
        for call in (lambda: vocab.add(["x"]), lambda: vocab.rows("a"), lambda: len(vocab), lambda: vocab.tokens([1])):
            with pytest.raises(errors.TableClosed):
                call()

    def test_a_token_that_is_too_long_adds_nothing(self, table, monkeypatch):
        monkeypatch.setattr("bigembed.vocab.builder.MAX_TOKEN_BYTES", 5)
        vocab = small(table)
        with pytest.raises(errors.InvalidArgument, match="a token has 6 bytes"):
            vocab.add(["x", "123456"])
        assert table.shape[0] == 10
        assert len(vocab) == 5

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
    def test_what_fails_adds_nothing_and_can_be_repeated(self, tmp_path, error):
        for n in range(1, 100):
            table = Table.create(tmp_path / f"t{n}", 10, 2)
            vocab = small(table)
            vocab.add(["before"])
            struck = interrupt_at(n, error)
            try:
                vocab.add(["x", "y"])
            except (errors.DiskFull, KeyboardInterrupt):
                files.before = None
                assert table.shape[0] == 11
                assert vocab.rows(["before", "x", "y"], unknown=-1).tolist() == [10, -1, -1]
                try:
                    assert vocab.add(["y", "x"]).tolist() == [11, 12]
                except errors.PoisonedTable:  # what was half written could not be cut off either
                    table.rollback()
                    assert vocab.add(["before", "y", "x"]).tolist() == [10, 11, 12]
                table.commit()
                assert vocab.rows(["before", "x", "y"]).tolist() == [10, 12, 11]
            files.before = None
            quiet_close(table)
            if not struck():
                break
        assert n >= 2

    @pytest.mark.parametrize("where", ["grow", "append"])
    def test_interrupted_between_log_table_and_memory(self, table, monkeypatch, where):
        """Ctrl-C while the table grows adds nothing; a moment later, everything."""
        vocab = small(table)
        vocab.add(["before"])

        def stop(*args):
            raise KeyboardInterrupt

        if where == "grow":
            monkeypatch.setattr(Table, "grow", stop)
        else:
            monkeypatch.setattr(vocab._read().added, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            vocab.add(["x", "y"])
        monkeypatch.undo()
        added = [] if where == "grow" else [11, 12]
        assert table.shape[0] == 11 + len(added)
        assert vocab.rows(["before", "x", "y"], unknown=-1).tolist() == [10, *(added or [-1, -1])]
        assert vocab.add(["y", "x", "z"]).tolist() == ([12, 11, 13] if added else [11, 12, 13])
        table.commit()
        path = table.path
        table.close()
        with Table.open(path, mode="r") as again:
            assert sorted(Vocabulary.open(again).rows(["x", "y", "z"]).tolist()) == [11, 12, 13]
            assert len(Vocabulary.open(again)) == 9

    def test_an_error_in_memory_is_made_good(self, table, monkeypatch):
        vocab = small(table)
        current_tokens = vocab._read()
        monkeypatch.setattr(current_tokens.added, "append", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            vocab.add(["x"])
        assert vocab.rows("x").tolist() == [10]


def interrupt_at(n, error):
    count = 0

    def before(operation, path):
        nonlocal count
        count += 1
        if count == n:
            raise error

    files.before = before
    return lambda: count >= n


class TestCompact:
    def test_added_tokens_move_into_the_files(self, table):
        vocab = small(table, unknown=7, subwords={"kind": "x"})
        vocab.add(["x", "y"])
        table.commit()
        vocab.add(["not committed"])
        table._commit("auto", None, explicit=False)
        before = list(vocab), vocab.rows(["x", "y", "the", "not committed", "?"]).tolist(), vocab.tokens(range(13))
        vocab.compact()
        assert (
            list(vocab),
            vocab.rows(["x", "y", "the", "not committed", "?"]).tolist(),
            vocab.tokens(range(13)),
        ) == before
        stats = vocab.stats()
        assert (stats["stored_tokens"], stats["added_tokens"], stats["duplicates"]) == (7, 1, 1)
        assert vocab.subwords == {"kind": "x"}
        vocab.verify()
        names = {f"{kind}.2" for kind in ("tokens", "blocks", "index", "rows", "entries")} | {"vocab.json", "added"}
        assert set(os.listdir(os.path.join(table.path, "vocab"))) == names
        assert table.token_log.entries()[2].tolist() == [12]  # the log forgets what was folded
        table.rollback(table.generations()[0].number)
        assert vocab.rows(["y", "not committed"], unknown=-1).tolist() == [11, -1]
        assert vocab.add(["z"]).tolist() == [12]
        table.commit()
        vocab.compact()
        assert vocab.rows(["x", "y", "z"]).tolist() == [10, 11, 12]

    def test_nothing_to_fold_is_nothing_done(self, table):
        vocab = small(table)
        vocab.compact()
        vocab.add(["x"])
        vocab.compact()
        assert os.path.exists(os.path.join(table.path, "vocab", "index.1"))

    def test_add_compacts_by_itself_when_it_pays(self, table, monkeypatch):
        monkeypatch.setattr(growth, "COMPACT_TOKENS", 20)
        vocab = Vocabulary.create(table, [str(i) for i in range(10)])
        for i in range(60):
            vocab.add([f"t{i}"])
            table.commit()
        assert vocab.stats()["added_tokens"] < 22
        assert vocab.stats()["stored_tokens"] > 40
        assert vocab.rows([f"t{i}" for i in range(60)]).tolist() == list(range(10, 70))

    def test_a_reader_beside_it_goes_on(self, table):
        vocab = small(table)
        with Table.open(table.path, mode="r") as reader:
            beside = Vocabulary.open(reader)
            vocab.add(["x"])
            table.commit()
            vocab.compact()
            assert beside.rows(["a", "x"], unknown=-1).tolist() == [3, -1]  # from files that have no name any more
            reader.refresh()
            assert beside.rows(["a", "x"]).tolist() == [3, 10]
            for n in range(5):
                vocab.add([f"y{n}"])
                table.commit()
                vocab.compact()
                reader.refresh()
                assert beside.rows(["x", f"y{n}"]).tolist() == [10, 11 + n]

    def test_a_reader_opened_before_sees_no_rows_that_it_does_not_have(self, table):
        vocab = small(table)
        with Table.open(table.path, mode="r") as reader:
            vocab.add(["x"])
            table.commit()
            vocab.compact()
            beside = Vocabulary.open(reader)
            assert beside.rows(["a", "x"], unknown=-1).tolist() == [3, -1]

    def test_files_that_go_while_a_reader_opens_are_looked_for_again(self, table, monkeypatch):
        vocab = small(table)
        vocab.add(["x"])
        table.commit()
        real, looks = current.StoredVocabulary, []

        def slow(folder, facts):
            looks.append(facts.sequence)
            if len(looks) == 1:
                monkeypatch.setattr(current, "StoredVocabulary", real)
                vocab.compact()
                monkeypatch.setattr(current, "StoredVocabulary", slow)
            return real(folder, facts)

        with Table.open(table.path, mode="r") as reader:
            monkeypatch.setattr(current, "StoredVocabulary", slow)
            assert Vocabulary.open(reader).rows(["x"]).tolist() == [10]
        assert looks == [1, 2]

    def test_a_fault_or_a_crash_at_any_operation_loses_nothing(self, tmp_path):
        for n in range(1, 1000):
            table = Table.create(tmp_path / str(n), 10, 2)
            vocab = small(table)
            vocab.add(["x", "y"])
            table.commit()
            fault = FailAt(n)
            files.before = fault
            with contextlib.suppress(errors.StorageFailed):
                vocab.compact()
            files.before = None
            if n % 2:  # the same table goes on
                assert vocab.rows(["the", "x", "y"]).tolist() == [4, 10, 11]
                vocab.verify()
            table.close()
            with Table.open(table.path) as again:
                vocab = Vocabulary.open(again)
                assert vocab.rows(["the", "x", "y"]).tolist() == [4, 10, 11]
                assert list(vocab) == [b"the", b"a", b"the", b"", b"\xff\n", b"x", b"y"]
                vocab.verify()
                sequence = vocab._read().stored.facts.sequence
                names = os.listdir(os.path.join(again.path, "vocab"))
                assert all(name.endswith((f".{sequence}", "vocab.json", "added")) for name in names), names
                vocab.add(["z"])
                again.commit()
                vocab.compact()
                assert vocab.rows(["the", "x", "y", "z"]).tolist() == [4, 10, 11, 12]
            if not fault.has_struck:
                break
        assert n > 30


class TestProcesses:
    def test_a_forked_child_reads(self, table):
        vocab = small(table)
        vocab.add(["x"])
        child = os.fork()
        if child == 0:
            try:
                assert vocab.rows(["a", "x"] * 5000).tolist() == [3, 10] * 5000
                assert vocab.tokens([4, 10]) == [b"the", b"x"]
                with pytest.raises(errors.ForkedTable):
                    vocab.add(["y"])
                os._exit(0)
            except BaseException:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert vocab.add(["y"]).tolist() == [11]

    def test_a_pickled_copy_reads_the_last_commit(self, table):
        vocab = small(table)
        vocab.add(["x"])
        table.commit()
        vocab.add(["y"])
        copy = pickle.loads(pickle.dumps(vocab))
        assert copy.rows(["a", "x", "y"], unknown=-1).tolist() == [3, 10, -1]
        with pytest.raises(errors.ReadOnlyTable):
            copy.add(["z"])
        copy.table.close()

    def test_a_table_is_not_kept_alive(self, tmp_path):
        table = Table.create(tmp_path / "t", 10, 2)
        small(table)
        before = len(vocabulary._current_of)
        table.close()
        del table
        assert len(vocabulary._current_of) == before - 1

    def test_opened_vocabularies_share_what_they_read(self, table):
        vocab = small(table)
        again = Vocabulary.open(table)
        vocab.add(["x"])
        assert again.rows("x").tolist() == [10]
        assert again._read() is vocab._read()


class TestDamage:
    def test_a_missing_file_is_named(self, table):
        small(table)
        vocabulary._current_of.clear()
        os.unlink(os.path.join(table.path, "vocab", "index.1"))
        with pytest.raises(errors.DamagedTable, match=r"index\.1 is missing"):
            Vocabulary.open(table)

    def test_an_unknown_policy_of_a_stranger(self, table):
        vocab = small(table)
        facts = vocab._read().stored.facts
        type(facts)(**{**facts.__dict__, "unknown": {"kind": "else"}}).write(os.path.join(table.path, "vocab"))
        vocabulary._current_of.clear()
        with pytest.raises(errors.DamagedTable, match="names no policy"):
            Vocabulary.open(table)


# --- fuzz


class Machine:
    """A table with a vocabulary, its twin, and a reader; every operation, chosen by a seed."""

    def __init__(self, path, seed):
        self.rng = np.random.default_rng(seed)
        self.path = path
        self.table = Table.create(path, 60, 2)
        count = int(self.rng.integers(0, 50))
        tokens = [self.token() for _ in range(count)]
        rows = list(range(count)) if seed % 2 else self.rng.integers(0, 60, count).tolist()
        self.vocab = Vocabulary.create(self.table, tokens, None if seed % 2 else rows)
        self.twin = naive_vocab.Vocabulary(zip(tokens, rows, strict=True), 60)
        self.reader = Table.open(path, mode="r")
        self.beside = Vocabulary.open(self.reader)

    def token(self):
        return (
            b"%d" % self.rng.integers(0, 300) if self.rng.random() < 0.95 else b"" if self.rng.random() < 0.5 else b"\n"
        )

    def close(self):
        self.reader.close()
        quiet_close(self.table)

    def do_add(self):
        tokens = [self.token() for _ in range(int(self.rng.integers(0, 12)))]
        np.testing.assert_array_equal(self.vocab.add(tokens), self.twin.add(tokens))

    def do_grow(self):
        self.twin.grow(self.twin.num_rows + int(self.rng.integers(0, 3)))
        self.table.grow(self.twin.num_rows)

    def do_commit(self):
        self.table.commit()
        self.twin.commit()

    def do_auto_commit(self):
        self.table._commit("auto", None, explicit=False)
        self.twin.commit(explicit=False)

    def do_rollback(self):
        to_retained = bool(self.rng.random() < 0.5)
        self.table.rollback(self.table.generations()[0].number if to_retained else None)
        self.twin.rollback(to_retained)

    def do_compact(self):
        self.vocab.compact()

    def do_merge(self):
        before = self.table.generation
        self.table.merge()
        if self.table.generation != before:
            self.twin.commit(explicit=False)

    def do_reopen(self):
        quiet_close(self.table)
        self.table = Table.open(self.path)
        self.vocab = Vocabulary.open(self.table)
        self.twin.rollback(to_retained=False)

    def do_refresh(self):
        self.reader.refresh()
        self.compare(self.beside, naive_vocab.Vocabulary(*self.twin.head), self.reader)

    def compare(self, vocab, twin, table):
        assert table.shape[0] == twin.num_rows
        asked = [b"%d" % i for i in range(300)] + [b"", b"\n"]
        np.testing.assert_array_equal(vocab.rows(asked, unknown=-1), twin.rows(asked))
        row_n = np.arange(twin.num_rows)
        assert vocab.tokens(row_n) == twin.tokens(row_n)
        assert vocab.packed(0, twin.num_rows).to_list() == [token or b"" for token in twin.tokens(row_n)]
        tokens, row_n = vocab.entries(0, len(vocab))
        assert list(zip(tokens.to_list(), row_n.tolist(), strict=True)) == twin.entries


@pytest.mark.parametrize("seed", SEEDS)
def test_fuzz(tmp_path, seed):
    machine = Machine(str(tmp_path / "t"), seed)
    steps = [name for name in dir(machine) if name.startswith("do_")]
    try:
        for step in range(40):
            name = str(machine.rng.choice([*steps, "do_add", "do_add", "do_commit"]))
            try:
                getattr(machine, name)()
                machine.compare(machine.vocab, machine.twin, machine.table)
            except BaseException as error:
                error.add_note(f"step {step}, {name}")
                raise
        machine.vocab.verify()
    finally:
        machine.close()
