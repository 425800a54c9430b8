"""The vocabulary's kernels against their slow twins, in the compiler and without it."""

import os
import subprocess
import sys
from pathlib import Path

import naive_vocab
import numpy as np
import pytest

from bigembed import threads
from bigembed.kernels import token_index, token_map, token_search, tokens
from bigembed.vocab import packed
from bigembed.vocab.packed import PackedTokens

ODD = [b"", b"\0", b"\0\0", b"a", b"a\0", b"\na", b"1234567", b"12345678", b"123456789", bytes(range(256)) * 5, b"\xff"]


KNOWN = [
    "0000000000000000",
    "3c5019c546843bb4",
    "a6ea4506c0f135d1",
    "d7840732aadb1615",
]  # of "", "a", "12345678", "\xffembedding"


def some_tokens(rng, count, most=20):
    return [rng.integers(0, 256, rng.integers(0, most)).astype(np.uint8).tobytes() for _ in range(count)]


def pack(listed):
    return PackedTokens.of(listed).checked()


class TestHash:
    def test_known_values(self):
        """On disk and in hashed vocabularies: these never change."""
        hash_m = np.empty(4, np.uint64)
        found = pack([b"", b"a", b"12345678", b"\xffembedding"])
        tokens.hash_tokens(0, 4, found.bytes_B, found.start_M1, hash_m)
        assert [f"{one:016x}" for one in hash_m.tolist()] == KNOWN

    @pytest.mark.parametrize("seed", [0, 1, 0xFFFFFFFFFFFFFFFF])
    def test_equals_its_twin(self, seed):
        listed = ODD + some_tokens(np.random.default_rng(0), 200)
        found, hash_m = pack(listed), np.empty(len(listed), np.uint64)
        threads.run(tokens.hash_tokens, len(listed), found.bytes_B, found.start_M1, hash_m, np.uint64(seed), grain=10)
        assert hash_m.tolist() == naive_vocab.hash_tokens(listed, seed)

    def test_rows_twin(self):
        row_m, hash_m = np.array([0, 1, 2**40, 2**62]), np.empty(4, np.uint64)
        token_index.hash_rows(0, 4, row_m, np.uint64(77), hash_m)
        assert hash_m.tolist() == naive_vocab.hash_rows(row_m, 77)

    def test_homes_twin(self):
        rng = np.random.default_rng(1)
        for num_homes in (1, 2, 3, 1000, 2**31 + 7, 2**32 - 1):
            for one in [0, 2**64 - 1, *rng.integers(0, 2**64, 50, np.uint64).tolist()]:
                assert tokens.home_of(np.uint64(one), num_homes) == naive_vocab.home_of(one, num_homes)

    def test_hashes_look_random(self):
        """No two of 10^5 similar tokens share a hash, and every bit is set half of the time (6 sigma)."""
        found, hash_m = pack([f"w{i}" for i in range(100_000)]), np.empty(100_000, np.uint64)
        tokens.hash_tokens(0, len(hash_m), found.bytes_B, found.start_M1, hash_m)
        assert len(np.unique(hash_m)) == len(hash_m)
        for bit in range(64):
            assert abs(int((hash_m >> np.uint64(bit) & np.uint64(1)).sum()) - 50_000) < 6 * 158


def as_file(listed):
    """(tokens, blocks) as the builder writes them."""
    content = naive_vocab.encode_tokens(listed)
    offsets = [begin for begin, _ in naive_vocab.read_tokens(content)]
    return np.frombuffer(content, np.uint8), np.array(offsets[::16], np.uint64)


class TestFile:
    def test_encoding_twin(self):
        listed = [*ODD, b"x" * 127, b"y" * 128, b"z" * 20_000, *some_tokens(np.random.default_rng(2), 100)]
        found, at_m1 = pack(listed), np.zeros(len(listed) + 1, np.int64)
        token_index.encoded_lengths(0, len(listed), found.start_M1, at_m1[1:])
        np.cumsum(at_m1, out=at_m1)
        out_t = np.empty(at_m1[-1], np.uint8)
        token_index.encode_tokens(0, len(listed), found.bytes_B, found.start_M1, at_m1, out_t)
        assert out_t.tobytes() == naive_vocab.encode_tokens(listed)
        assert [token for _, token in naive_vocab.read_tokens(out_t.tobytes())] == listed

    def test_entries_are_read_as_their_twin_reads_them(self):
        listed = [*ODD, b"y" * 128, *some_tokens(np.random.default_rng(3), 90), b"z" * 300]
        entries = token_search.TokenBytes(*as_file(listed), len(listed))
        entry_n = np.array([*range(len(listed)), -1, 3])
        offset_n, length_n = np.empty(len(entry_n), np.int64), np.empty(len(entry_n), np.int64)
        assert token_search.locate_entries(0, len(entry_n), entry_n, entries, offset_n, length_n) == -1
        start_n1 = np.concatenate([[0], np.cumsum(length_n)])
        out_b = np.empty(start_n1[-1], np.uint8)
        token_search.copy_ranges(0, len(entry_n), entries.tokens_T, offset_n, length_n, start_n1, out_b)
        assert PackedTokens(out_b, start_n1).to_list() == [*listed, b"", listed[3]]
        assert token_search.walk_entries(0, len(listed), 0, entries) == (-1, len(entries.tokens_T))

    def test_an_entry_that_is_not_there_is_named(self):
        entries = token_search.TokenBytes(*as_file([b"ab"] * 40), 40)
        offset_n, length_n = np.empty(3, np.int64), np.empty(3, np.int64)
        for wrong in (40, -2, 10**12):
            entry_n = np.array([1, wrong, 2])
            assert token_search.locate_entries(0, 3, entry_n, entries, offset_n, length_n) == 1

    @pytest.mark.parametrize("at", range(0, 60, 3))
    def test_damaged_lengths_lead_nowhere(self, at):
        """Any byte replaced by any other: every entry is inside the file, or reported."""
        tokens_t, blocks_c = as_file([b"ab", b"", b"cde"] * 12)
        for byte in (0, 1, 50, 127, 128, 255):
            damaged_t = tokens_t.copy()
            damaged_t[at] = byte
            entries = token_search.TokenBytes(damaged_t, blocks_c, 36)
            for entry in range(36):
                offset_n, length_n = np.zeros(1, np.int64), np.zeros(1, np.int64)
                if token_search.locate_entries(0, 1, np.array([entry]), entries, offset_n, length_n) == -1:
                    assert 0 <= offset_n[0] <= offset_n[0] + length_n[0] <= len(damaged_t)
            broken, _ = token_search.walk_entries(0, 36, 0, entries)
            assert -1 <= broken < 36

    def test_damaged_blocks_lead_nowhere(self):
        tokens_t, blocks_c = as_file([b"ab"] * 40)
        for wrong in (2**63, 2**64 - 1, len(tokens_t), len(tokens_t) + 1, 10**15):
            damaged_c = blocks_c.copy()
            damaged_c[1] = wrong
            entries = token_search.TokenBytes(tokens_t, damaged_c, 40)
            offset_n, length_n = np.empty(3, np.int64), np.empty(3, np.int64)
            assert token_search.locate_entries(0, 3, np.array([3, 20, 35]), entries, offset_n, length_n) == 1
            assert token_search.walk_entries(0, 40, 0, entries)[0] == 16

    def test_the_same_entries_twin(self):
        rng = np.random.default_rng(4)
        listed = [[b"", b"a", b"b", b"longer than eight", b"longer than eigh_"][i] for i in rng.integers(0, 5, 60)]
        entries = token_search.TokenBytes(*as_file(listed), len(listed))
        a_n, b_n, out_n = rng.integers(0, 60, 300), rng.integers(0, 60, 300), np.empty(300, bool)
        assert token_search.same_entries(0, 300, a_n, b_n, entries, out_n) == -1
        assert out_n.tolist() == [listed[a] == listed[b] for a, b in zip(a_n, b_n, strict=True)]


class TestIndex:
    def test_partitions_twin(self):
        rng = np.random.default_rng(5)
        hash_k, entry_k = rng.integers(0, 2**64, 500, np.uint64), np.arange(500) + 7
        count_p, pairs_k2 = np.empty(256, np.int64), np.empty((500, 2), np.uint64)
        token_index.by_partition(hash_k, entry_k, count_p, pairs_k2)
        expected = sorted(zip(hash_k.tolist(), entry_k.tolist(), strict=True), key=lambda pair: pair[0] >> 56)
        assert pairs_k2.tolist() == [list(pair) for pair in expected]
        assert count_p.tolist() == [sum(one >> 56 == p for one in hash_k.tolist()) for p in range(256)]

    @pytest.mark.parametrize("mask", [0xFFFFFF, 3, 0], ids=["24 bits", "2 bits", "all fingerprints equal"])
    @pytest.mark.parametrize("count", [1, 2, 40, 1000])
    def test_filled_slots_are_found_from_their_homes(self, mask, count):
        """What is not in doubt is in the index, and the search meets it before an empty slot."""
        listed = [f"t{i}".encode() for i in range(count)]
        hash_m = np.array(naive_vocab.hash_tokens(listed, 3), np.uint64)
        pairs_k2 = np.stack([hash_m, np.arange(count, dtype=np.uint64)], axis=1)
        num_homes = int(np.ceil(count / 0.7))
        slots_s, doubt_k2 = np.zeros(num_homes + count + 1, np.uint64), np.empty((count, 2), np.int64)
        doubtful = token_index.fill_slots(pairs_k2, np.uint64(mask), num_homes, 0, slots_s, doubt_k2)
        if mask == 0xFFFFFF:
            assert doubtful == 0
        doubted = set(doubt_k2[:doubtful, 0].tolist())
        index = token_search.TokenIndex(slots_s, num_homes, np.uint64(3), np.uint64(mask))
        entries, found = token_search.TokenBytes(*as_file(listed), count), pack(listed)
        out_m = np.empty(count, np.int64)
        assert token_search.find_tokens(0, count, found.bytes_B, found.start_M1, index, entries, out_m)[0] == -1
        assert out_m.tolist() == [-1 if m in doubted else m for m in range(count)]
        strange = pack([b"u%d" % i for i in range(300)])
        out_m = np.empty(300, np.int64)
        token_search.find_tokens(0, 300, strange.bytes_B, strange.start_M1, index, entries, out_m)
        assert (out_m == -1).all()

    def test_rows_are_found_by_their_slots(self):
        rng = np.random.default_rng(6)
        row_e = rng.permutation(5000)[:400]
        hash_e = np.array(naive_vocab.hash_rows(row_e, 9), np.uint64)
        slots_s, doubt_k2 = np.zeros(1100, np.uint64), np.empty((400, 2), np.int64)
        pairs_k2 = np.stack([hash_e, np.arange(400, dtype=np.uint64)], axis=1)
        assert token_index.fill_slots(pairs_k2, tokens.FINGERPRINT_MASK, 572, 0, slots_s, doubt_k2) == 0
        index = token_search.TokenIndex(slots_s, 572, np.uint64(9), tokens.FINGERPRINT_MASK)
        row_n, hash_n, out_n = np.arange(5000), np.empty(5000, np.uint64), np.empty(5000, np.int64)
        token_index.hash_rows(0, 5000, row_n, np.uint64(9), hash_n)
        assert token_search.find_rows(0, 5000, row_n, hash_n, index, row_e, out_n) == -1
        entry_of = {row: entry for entry, row in enumerate(row_e.tolist())}
        assert out_n.tolist() == [entry_of.get(row, -1) for row in range(5000)]

    def test_a_slot_that_names_no_entry_is_reported_and_not_followed(self):
        found = pack([b"a"])
        one = naive_vocab.hash_of(b"a", 0)
        entries, out_m = token_search.TokenBytes(*as_file([b"a"]), 1), np.empty(1, np.int64)
        for wrong in (0, 2, 2**40 - 1):
            slot = (one & 0xFFFFFF) << 40 | wrong
            slots_s = np.array([slot, 0], np.uint64)
            index = token_search.TokenIndex(slots_s, 1, np.uint64(0), tokens.FINGERPRINT_MASK)
            damaged, _ = token_search.find_tokens(0, 1, found.bytes_B, found.start_M1, index, entries, out_m)
            assert (damaged, out_m[0]) == (0, -2)

    def test_a_full_index_ends_the_search(self):
        """Damage may fill every slot; the search ends with the array."""
        found = pack([b"a"])
        slots_s = np.full(50, 1 << 40 | 1, np.uint64)
        index = token_search.TokenIndex(slots_s, 20, np.uint64(0), tokens.FINGERPRINT_MASK)
        entries, out_m = token_search.TokenBytes(*as_file([b"b"]), 1), np.empty(1, np.int64)
        token_search.find_tokens(0, 1, found.bytes_B, found.start_M1, index, entries, out_m)
        assert out_m[0] == -1


class TestMap:
    def test_twins(self):
        rng = np.random.default_rng(7)
        for count in (0, 1, 30, 400):
            listed = [b"t%d" % i for i in rng.integers(0, max(1, count // 2), count)]
            found = pack(listed)
            hash_m = np.array(naive_vocab.hash_tokens(listed), np.uint64)
            slots_s, first_m = np.zeros(1024, np.uint64), np.empty(count, np.int64)
            half = count // 2
            put = (found.bytes_B, found.start_M1)
            token_map.put_distinct(0, found.bytes_B, found.start_M1[: half + 1], hash_m[:half], slots_s, first_m[:half])
            token_map.put_distinct(half, *put, hash_m[half:], slots_s, first_m[half:])
            assert first_m.tolist() == naive_vocab.put_distinct(listed)
            asked = [b"t%d" % i for i in range(-3, count)]
            query, out_m = pack(asked), np.empty(len(asked), np.int64)
            asked_m = np.array(naive_vocab.hash_tokens(asked), np.uint64)
            token_map.find_among(0, len(asked), query.bytes_B, query.start_M1, asked_m, *put, slots_s, out_m)
            assert out_m.tolist() == naive_vocab.find_among(asked, listed)
            seen = (found.bytes_B[: found.start_M1[half]].copy(), found.start_M1[: half + 1].copy())
            token_map.find_among(0, len(asked), query.bytes_B, query.start_M1, asked_m, *seen, slots_s, out_m)
            assert out_m.tolist() == naive_vocab.find_among(asked, listed[:half]), "others were put meanwhile"


class TestPacking:
    @pytest.mark.parametrize(
        ("joined", "count"), [(b"", 1), (b"a", 1), (b"a\nb", 2), (b"a\nb", 1), (b"a\nb", 3), (b"\n\n", 3), (b"\n", 1)]
    )
    def test_cut_at_line_ends_twin(self, joined, count):
        bytes_b, start_m1 = np.empty(max(0, len(joined) - count + 1), np.uint8), np.empty(count + 1, np.int64)
        whole = packed.cut_at_line_ends(np.frombuffer(joined, np.uint8), count, bytes_b, start_m1)
        expected = naive_vocab.cut_at_line_ends(joined, count)
        assert whole == (expected is not None)
        if whole:
            assert PackedTokens(bytes_b, start_m1).to_list() == expected


@pytest.mark.parametrize("switch", ["NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"])
def test_kernels_are_right_without_the_compiler_and_within_bounds(switch, tmp_path):
    """The tests of this file again, in a process where the kernels are plain Python, or check every index."""
    if os.environ.get("NUMBA_DISABLE_JIT") == "1" or os.environ.get("NUMBA_BOUNDSCHECK") == "1":
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "not look_random"]
    command += ["-W", "ignore::RuntimeWarning"]  # numpy warns where uint64 scalars wrap around, as they must
    environment = {**os.environ, switch: "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
