"""Building a vocabulary: its bytes, duplicates, odd tokens, spills, faults; and damage to any byte of it."""

import errno
import json
import os
import re
import secrets
import shutil
import zlib
from pathlib import Path

import naive_vocab
import numpy as np
import pytest

from bigembed import errors
from bigembed.kernels import tokens as token_kernels
from bigembed.storage import files
from bigembed.storage.readers import MappedFile
from bigembed.vocab import format as vocab_format
from bigembed.vocab import index_builder
from bigembed.vocab.builder import BuildReport, VocabBuilder
from bigembed.vocab.format import VocabFacts
from bigembed.vocab.packed import PackedTokens
from bigembed.vocab.stored import StoredVocabulary
from bigembed.vocab.verify import verify_stored

ODD = [b"", b"\0", b"a\0", b"a", b"\n", b"a\nb", b"\xff\xfe", b" ", b"x" * 127, b"y" * 128, b"z" * (1 << 20), b"\x80"]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    yield
    files.before = None


def build(folder, listed, rows=None, parts=1, **settings):
    """(what is stored, the report)."""
    with VocabBuilder(str(folder)) as builder:
        for part in range(parts):
            start, stop = len(listed) * part // parts, len(listed) * (part + 1) // parts
            builder.append(PackedTokens.of(listed[start:stop]), None if rows is None else np.array(rows[start:stop]))
        report = builder.finish(**settings)
    return open_stored(folder), report


def open_stored(folder):
    facts = VocabFacts.read(str(folder))
    assert facts is not None
    return StoredVocabulary(str(folder), facts)


def check_against_twin(stored, listed, rows=None):
    """Every token, strangers, every row, every entry."""
    rows = list(range(len(listed))) if rows is None else list(rows)
    twin = naive_vocab.Vocabulary(zip(listed, rows, strict=True), max(rows, default=0) + 2)
    asked = [*listed, *(token + b"?" for token in listed[:50]), b"no such token"]
    found_m = stored.rows_of(stored.find(PackedTokens.of(asked).checked()))
    np.testing.assert_array_equal(found_m, twin.rows(asked))
    row_n = np.arange(twin.num_rows)
    entry_n = stored.entries_of(row_n)
    packed = stored.entries.packed(entry_n).to_list()
    assert [None if entry < 0 else token for entry, token in zip(entry_n, packed, strict=True)] == twin.tokens(row_n)
    assert stored.entries.packed(np.arange(len(listed))).to_list() == listed
    verify_stored(stored)


class TestBytes:
    def test_three_tokens_are_these_bytes(self, tmp_path, monkeypatch):
        monkeypatch.setattr(secrets, "randbits", lambda bits: 0x0123456789ABCDEF)
        build(tmp_path / "v", [b"the", b"", b"cat"])
        assert (tmp_path / "v" / "tokens.1").read_bytes() == b"\3the\0\3cat"
        assert (tmp_path / "v" / "blocks.1").read_bytes() == bytes(8)
        slots = np.fromfile(tmp_path / "v" / "index.1", "<u8").tolist()
        assert len(slots) == 6
        want = {}
        for entry, token in enumerate([b"the", b"", b"cat"]):
            one = naive_vocab.hash_of(token, 0x0123456789ABCDEF)
            want[(one & 0xFFFFFF) << 40 | entry + 1] = one * 5 >> 64
        assert {slot for slot in slots if slot} == want.keys()
        assert all(
            home <= slots.index(slot) and 0 not in slots[home : slots.index(slot)] for slot, home in want.items()
        )
        want_json = {
            "format_version": 1,
            "sequence": 1,
            "num_entries": 3,
            "duplicates": 0,
            "num_homes": 5,
            "row_homes": 0,
            "seed": "0123456789abcdef",
            "folded_rows": 0,
            "unknown": {"kind": "error"},
            "subwords": None,
            "files": {
                kind: {"bytes": size, "crc32": [zlib.crc32((tmp_path / "v" / f"{kind}.1").read_bytes())]}
                for kind, size in [("tokens", 9), ("blocks", 8), ("index", 48)]
            },
        }
        text = json.dumps(want_json, sort_keys=True, separators=(",", ":"))
        found = json.loads((tmp_path / "v" / "vocab.json").read_text())
        assert found == {**want_json, "crc32": zlib.crc32(text.encode())}

    def test_a_reader_made_from_the_specification_agrees(self, tmp_path):
        """The README's Python, on files of the library."""
        rng = np.random.default_rng(0)
        listed = [b"t%d" % i for i in rng.integers(0, 400, 500)]
        rows = rng.integers(0, 600, 500).tolist()
        build(tmp_path / "v", listed, rows)
        names: dict = {}
        readme = (Path(index_builder.__file__).parent / "README.md").read_text()
        exec("\n".join(re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)), names)
        content = {kind: (tmp_path / "v" / f"{kind}.1").read_bytes() for kind in vocab_format.KINDS[:5]}
        facts = VocabFacts.read(str(tmp_path / "v"))
        twin = naive_vocab.Vocabulary(zip(listed, rows, strict=True), 700)
        row_e = np.frombuffer(content["rows"], "<i8")
        for token in [*listed[:150], b"no"]:
            found = -1
            for one in names["candidates"](
                names["hash_of_token"](token, facts.seed), content["index"], facts.num_homes
            ):
                if names["entry"](one, content["tokens"], content["blocks"]) == token:
                    found = row_e[one]
            assert [found] == twin.rows([token])
        for row in range(100):
            found = [
                one
                for one in names["candidates"](
                    names["hash_of_row"](row, facts.seed), content["entries"], facts.row_homes
                )
                if row_e[one] == row
            ]
            assert [names["entry"](found[0], content["tokens"], content["blocks"]) if found else None] == twin.tokens(
                [row]
            )


class TestBuild:
    @pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 300, 5000])
    @pytest.mark.parametrize("parts", [1, 7])
    def test_any_number_of_tokens(self, tmp_path, count, parts):
        listed = [b"t%d" % i for i in np.random.default_rng(count).permutation(count)]
        stored, report = build(tmp_path / "v", listed, parts=parts)
        assert report == BuildReport(count, 0, [])
        check_against_twin(stored, listed)
        assert sorted(os.listdir(tmp_path / "v")) == ["blocks.1", "index.1", "tokens.1", "vocab.json"]

    def test_odd_tokens(self, tmp_path):
        stored, _ = build(tmp_path / "v", ODD, parts=3)
        check_against_twin(stored, ODD)

    def test_rows_of_their_own(self, tmp_path):
        rng = np.random.default_rng(1)
        listed, rows = [b"t%d" % i for i in range(3000)], rng.integers(0, 2500, 3000).tolist()
        stored, report = build(tmp_path / "v", listed, rows, parts=4)
        assert report.num_tokens == 3000
        check_against_twin(stored, listed, rows)

    def test_rows_that_are_the_entries_own_numbers_are_not_stored(self, tmp_path):
        stored, _ = build(tmp_path / "v", [b"a", b"b", b"c"], [0, 1, 2])
        assert list(stored.facts.files) == ["tokens", "blocks", "index"]

    def test_rows_that_begin_to_differ_later(self, tmp_path):
        listed, rows = [b"t%d" % i for i in range(200_000)], [*range(150_000), *range(150_001, 200_001)]
        stored, _ = build(tmp_path / "v", listed, rows, parts=3)
        np.testing.assert_array_equal(stored.rows_of(np.arange(200_000)), rows)
        assert stored.entries_of(np.array([149_999, 150_000, 150_001])).tolist() == [149_999, -1, 150_000]

    def test_duplicates_first_wins_and_the_report_names_them(self, tmp_path):
        listed = [b"a", b"b", b"a", b"c", b"a", b"b"]
        stored, report = build(tmp_path / "v", listed)
        assert report == BuildReport(6, 3, [(b"a", 2, 0), (b"a", 4, 0), (b"b", 5, 1)])
        assert stored.facts.duplicates == 3
        check_against_twin(stored, listed)

    def test_many_duplicates_over_several_runs(self, tmp_path, monkeypatch):
        monkeypatch.setattr(index_builder, "PAIRS_IN_MEMORY", 1000)
        rng = np.random.default_rng(2)
        listed = [b"t%d" % i for i in rng.integers(0, 3000, 10_000)]
        rows = rng.integers(0, 9000, 10_000).tolist()
        stored, report = build(tmp_path / "v", listed, rows, parts=5)
        check_against_twin(stored, listed, rows)
        first = naive_vocab.put_distinct(listed)
        again = [(token, rows[m], rows[first[m]]) for m, token in enumerate(listed) if first[m] != m]
        assert report == BuildReport(10_000, len(again), again[:20])
        assert sorted(os.listdir(tmp_path / "v")) == [f"{k}.1" for k in sorted(vocab_format.KINDS[:5])] + ["vocab.json"]

    def test_spilled_or_not_the_files_are_the_same(self, tmp_path, monkeypatch):
        monkeypatch.setattr(secrets, "randbits", lambda bits: 5)
        listed = [b"t%d" % (i % 4500) for i in range(5000)]
        build(tmp_path / "memory", listed)
        monkeypatch.setattr(index_builder, "PAIRS_IN_MEMORY", 333)
        build(tmp_path / "spilled", listed, parts=11)
        for name in os.listdir(tmp_path / "memory"):
            assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "spilled" / name).read_bytes(), name

    @pytest.mark.parametrize("mask", [0, 1, 0xFF])
    def test_equal_fingerprints_are_told_apart_by_their_bytes(self, tmp_path, monkeypatch, mask):
        monkeypatch.setattr(token_kernels, "FINGERPRINT_MASK", np.uint64(mask))
        rng = np.random.default_rng(3)
        listed = [b"t%d" % i for i in rng.integers(0, 500, 700)]
        rows = rng.integers(0, 600, 700).tolist()
        stored, report = build(tmp_path / "v", listed, rows, parts=2)
        assert report.duplicates == 700 - len(set(listed))
        check_against_twin(stored, listed, rows)

    def test_all_hashes_equal(self, tmp_path, monkeypatch):
        """The worst that an attacker could do: one cluster, one fingerprint, at the end of the index."""
        real = VocabBuilder.append

        def append(builder, tokens, rows=None):
            monkeypatch.setattr("bigembed.vocab.packed.hash_tokens", same_hash)
            real(builder, tokens, rows)

        def same_hash(start, stop, bytes_b, start_m1, out_m, seed):
            out_m[start:stop] = np.uint64(2**64 - 1)

        monkeypatch.setattr(VocabBuilder, "append", append)
        _, report = build(tmp_path / "v", [b"a", b"b", b"a", b"c"])
        assert report == BuildReport(4, 1, [(b"a", 2, 0)])
        slots = np.fromfile(tmp_path / "v" / "index.1", "<u8").tolist()
        assert [slot & 0xFF for slot in slots] == [0, 0, 0, 0, 0, 1, 2, 4, 0]

    def test_the_unknown_policy_may_be_a_row_or_a_token(self, tmp_path):
        listed, rows = [b"<unk>", b"a"], [7, 3]
        for n, (unknown, row) in enumerate([(5, 5), ("<unk>", 7), (b"a", 3)]):
            stored, _ = build(tmp_path / str(n), listed, rows, unknown=unknown)
            assert stored.facts.unknown == {"kind": "row", "row": row}
        with pytest.raises(errors.InvalidArgument, match="unknown='b' is not among the tokens"):
            build(tmp_path / "v", listed, rows, unknown="b")
        assert not (tmp_path / "v").exists()

    def test_subwords_are_kept_as_they_are(self, tmp_path):
        settings = {"kind": "fasttext", "minn": 3, "first_row": 2, "nested": {"list": [1, 2.5, None, "ä"]}}
        stored, _ = build(tmp_path / "v", [b"a"], subwords=settings)
        assert stored.facts.subwords == settings

    def test_memory_stays_bounded(self, tmp_path, monkeypatch):
        """What the builder holds for 10^5 tokens with small limits is far less than their pairs."""
        monkeypatch.setattr(index_builder, "PAIRS_IN_MEMORY", 4096)
        with VocabBuilder(str(tmp_path / "v")) as builder:
            for first in range(0, 100_000, 10_000):
                builder.append(PackedTokens.of([b"t%d" % i for i in range(first, first + 10_000)]))
                assert len(builder._index._hash_K) <= 4096
            builder.finish()
        check_against_twin(open_stored(tmp_path / "v"), [b"t%d" % i for i in range(100_000)])


class TestErrors:
    def test_rows_must_fit(self, tmp_path):
        with VocabBuilder(str(tmp_path / "v")) as builder:
            for rows in ([1], [1, 2, 3], [1, -1]):
                with pytest.raises(errors.InvalidArgument, match="for 2 tokens"):
                    builder.append(PackedTokens.of(["a", "b"]), np.array(rows))
        assert not (tmp_path / "v").exists()

    def test_packed_tokens_that_lead_outside_are_refused(self, tmp_path):
        content = np.frombuffer(b"abc", np.uint8)
        with VocabBuilder(str(tmp_path / "v")) as builder:
            for starts in ([0, 4], [-1, 2], [2, 1], []):
                with pytest.raises(errors.InvalidArgument, match="packed tokens"):
                    builder.append(PackedTokens(content, np.array(starts, np.int64)))
            with pytest.raises(errors.InvalidArgument, match="packed tokens"):
                builder.append(PackedTokens(content, np.array([0, 1], np.int32)))

    def test_tokens_that_are_none_name_their_position(self):
        with pytest.raises(errors.InvalidArgument, match=r"3 \(at position 1\)"):
            PackedTokens.of(["a", 3])
        with pytest.raises(errors.InvalidArgument, match=r"'\\ud900' \(at position 2\)"):
            PackedTokens.of(["a", "b", "\ud900"])

    def test_a_token_that_is_too_long(self, tmp_path, monkeypatch):
        monkeypatch.setattr("bigembed.vocab.builder.MAX_TOKEN_BYTES", 5)
        with VocabBuilder(str(tmp_path / "v")) as builder:
            builder.append(PackedTokens.of(["12345"]))
            with pytest.raises(errors.InvalidArgument, match="a token has 6 bytes; at most 5"):
                builder.append(PackedTokens.of(["123456"]))

    def test_a_vocabulary_is_not_overwritten(self, tmp_path):
        build(tmp_path / "v", [b"a"])
        with pytest.raises(errors.TableExists, match=r"Vocabulary\.add"):
            VocabBuilder(str(tmp_path / "v"))
        check_against_twin(open_stored(tmp_path / "v"), [b"a"])

    def test_an_exception_leaves_nothing(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), VocabBuilder(str(tmp_path / "v")) as builder:
            builder.append(PackedTokens.of(["a"]), np.array([5]))
            raise KeyboardInterrupt
        assert not (tmp_path / "v").exists()

    def test_a_fault_at_any_operation_leaves_nothing_or_a_whole_vocabulary(self, tmp_path, monkeypatch):
        monkeypatch.setattr(index_builder, "PAIRS_IN_MEMORY", 10)
        listed, rows = [b"t%d" % (i % 35) for i in range(40)], list(range(1, 41))

        def fail(operation, path):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        for n in range(1, 1000):
            left = n
            files.before = fail
            try:
                build(tmp_path / "v", listed, rows, parts=4)
            except errors.StorageFailed as error:
                files.before = None
                assert "Input/output error" in str(error)  # noqa: PT017
                if (tmp_path / "v").exists():  # the fault was in removing, or in the very last steps
                    found = VocabFacts.read(str(tmp_path / "v"))
                    if found is not None:
                        check_against_twin(open_stored(tmp_path / "v"), listed, rows)
            else:
                files.before = None
                if left > 0:
                    break
            shutil.rmtree(tmp_path / "v", ignore_errors=True)
        assert n > 30


def test_everything_is_on_the_disk_before_the_file_that_decides(tmp_path):
    """A crash of the machine at any moment: vocab.json is there only when all that it names is."""
    seen = []
    files.before = lambda operation, path: seen.append((operation, os.path.basename(path)))
    build(tmp_path / "v", [b"a", b"b", b"a"], [3, 1, 2])
    files.before = None
    decides = seen.index(("rename", "vocab.json"))
    for kind in vocab_format.KINDS[:5]:
        writes = [at for at, one in enumerate(seen) if one == ("write", f"{kind}.1")]
        assert max(writes) < seen.index(("sync", f"{kind}.1")) < seen.index(("sync directory", "v")) < decides
    assert seen.index(("sync directory", tmp_path.name)) < decides
    assert seen.index(("sync", "vocab.json.new")) < decides < len(seen) - 1
    assert seen[decides + 1] == ("sync directory", "v")


class TestDamage:
    @pytest.fixture
    def whole(self, tmp_path):
        listed = [b"t%d" % i for i in range(40)] + [b"t3", b"", b"x" * 200]
        rows = [*range(30, 70), 1, 2, 2]
        build(tmp_path / "v", listed, rows, unknown=3)
        return tmp_path / "v", listed, rows

    def test_any_flipped_byte_is_found_and_until_then_does_no_harm(self, whole):
        folder, listed, rows = whole
        twin = naive_vocab.Vocabulary(zip(listed, rows, strict=True), 80)
        asked = [*listed, b"strange", b"t99"]
        packed, want_m = PackedTokens.of(asked).checked(), twin.rows(asked)
        for name in sorted(os.listdir(folder)):
            path = folder / name
            content = path.read_bytes()
            for at in range(len(content)):
                for flip in (1 << at % 8, 0xFF)[: 1 + at % 2]:
                    path.write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
                    self.check_damaged(folder, name, packed, want_m)
            path.write_bytes(content)
        verify_stored(open_stored(folder))

    def check_damaged(self, folder, name, packed, want_m):
        """Found by verify; a look-up gives the right row or none, or says that there is damage."""
        with pytest.raises(errors.BigembedError, match=re.escape(str(folder))):
            verify_stored(open_stored(folder))
        try:
            found_m = open_stored(folder).rows_of(open_stored(folder).find(packed))
        except errors.BigembedError as error:
            assert "Restore" in str(error) or "Update bigembed" in str(error)  # noqa: PT017
        else:
            assert ((found_m == want_m) | (found_m == -1) | name.startswith("rows")).all()

    def test_files_cut_anywhere_do_not_open(self, whole):
        folder, _, _ = whole
        for name in sorted(os.listdir(folder)):
            path = folder / name
            content = path.read_bytes()
            for size in [*range(0, len(content), 7), len(content) - 1, len(content) + 1]:
                path.write_bytes((content + b"\0")[:size])
                with pytest.raises(errors.DamagedTable, match=re.escape(str(path))):
                    open_stored(folder)
            path.unlink()
            with pytest.raises((FileNotFoundError, AssertionError)):
                open_stored(folder)
            path.write_bytes(content)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_homes": 0}, "cannot be 0 homes"),
            ({"num_homes": 10**9}, "cannot be 1000000000 homes"),
            ({"num_entries": 10**15}, "bytes were expected|were expected for"),
            ({"num_entries": -1}, "were expected for"),
            ({"seed": 1}, "is not found"),
            ({"duplicates": 9}, "came before"),
            ({"files": {}}, "cannot consist of no files"),
            ({"num_entries": 42}, "has"),
            ({"num_entries": 44}, "has"),
        ],
    )
    def test_facts_that_contradict_the_files(self, whole, change, message):
        """A vocab.json with a right checksum, made by somebody else."""
        folder, _, _ = whole
        facts = VocabFacts.read(str(folder))
        VocabFacts(**{**facts.__dict__, **change}).write(str(folder))
        with pytest.raises(errors.DamagedTable, match=message):
            verify_stored(open_stored(folder))

    def rewritten(self, folder, kind, content):
        """The vocabulary with other bytes in a file, and right sizes and sums for them."""
        facts = VocabFacts.read(str(folder))
        (folder / f"{kind}.1").write_bytes(content)
        one = vocab_format.FileFacts(len(content), [zlib.crc32(content)])
        VocabFacts(**{**facts.__dict__, "files": {**facts.files, kind: one}}).write(str(folder))
        return open_stored(folder)

    def test_files_that_contradict_themselves_with_right_sums(self, tmp_path):
        folder = tmp_path / "v"
        build(folder, [b"ab", b"ab", b"c"])
        tokens, index = (folder / "tokens.1").read_bytes(), (folder / "index.1").read_bytes()
        with pytest.raises(errors.DamagedTable, match=r"tokens\.1 has 9 bytes; its 3 tokens end at byte 8"):
            verify_stored(self.rewritten(folder, "tokens", tokens + b"\0"))
        with pytest.raises(errors.DamagedTable, match=r"entry 2 of 3 cannot be found.*tokens\.1"):
            verify_stored(self.rewritten(folder, "tokens", tokens[:-2] + b"\5c"))
        self.rewritten(folder, "tokens", tokens)
        slots = [slot - 1 if slot & 0xFF == 1 else slot for slot in np.frombuffer(index, "<u8").tolist()]
        other = np.array([slot + 2 if slot and slot & 0xFF == 0 else slot for slot in slots], "<u8").tobytes()
        with pytest.raises(errors.DamagedTable, match=r"index\.1 is damaged: entry 0 is found as the later entry 1"):
            verify_stored(self.rewritten(folder, "index", other))
        with pytest.raises(errors.DamagedTable, match=r"index\.1 is damaged: entry 0 is not found"):
            verify_stored(self.rewritten(folder, "index", bytes(len(index))))

    def test_a_newer_version_says_to_update(self, whole, monkeypatch):
        folder, _, _ = whole
        facts = VocabFacts.read(str(folder))
        monkeypatch.setattr(vocab_format, "FORMAT_VERSION", 2)
        facts.write(str(folder))
        monkeypatch.undo()
        with pytest.raises(errors.NewerFormat, match=r"version 2.*Update bigembed"):
            VocabFacts.read(str(folder))

    @pytest.mark.parametrize(
        "content", [b"", b"{}", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"crc32": 1}', b"1"]
    )
    def test_json_of_something_else(self, tmp_path, content):
        (tmp_path / "vocab.json").write_bytes(content)
        with pytest.raises(errors.DamagedTable, match=r"vocab\.json is damaged"):
            VocabFacts.read(str(tmp_path))


class TestColdAndTrimmed:
    """Reads with advice, and with pages let go after each, are the same reads."""

    def test_cold_files_give_the_same(self, tmp_path, monkeypatch):
        rng = np.random.default_rng(4)
        listed, rows = [b"t%d" % i for i in range(30_000)], rng.permutation(30_000).tolist()
        stored, _ = build(tmp_path / "v", listed, rows)
        monkeypatch.setattr("bigembed.vocab.cold.MIN_BYTES", 0)
        advised = []
        real = MappedFile.advise
        monkeypatch.setattr(MappedFile, "is_cold", lambda file, offsets: True)
        monkeypatch.setattr(MappedFile, "advise", lambda file, *args: (advised.append(file.path), real(file, *args)))
        monkeypatch.setattr("test_vocab_build.verify_stored", lambda stored: None)  # asks for all pages anyway
        check_against_twin(stored, listed, rows)
        assert {os.path.basename(path) for path in advised} == {f"{kind}.1" for kind in vocab_format.KINDS[:5]}

    def test_trimmed_pages_come_back(self, tmp_path):
        listed = [b"t%d" % i for i in range(3000)]
        stored, _ = build(tmp_path / "v", listed)
        for _ in range(3):
            check_against_twin(stored, listed)
            stored.trim()
            assert stored.mapped_bytes == 0
