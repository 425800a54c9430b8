"""Records: the check equals its twin, finds every single damaged bit, and all zero means never written."""

import naive
import numpy as np
import pytest

from bigembed import threads
from bigembed.kernels.initial import initial_rows
from bigembed.kernels.records import check_keys, count_and_sum, first_damaged, seal, unseal
from bigembed.spec import StateColumns, TableSpec

SPEC = TableSpec(10**6, 5, state=(StateColumns("sum", 1, 0.5),), salt=0x123456789ABCDEF0)


def sealed(rows_M, spec=SPEC, seed=0):
    values_ME = np.random.default_rng(seed).standard_normal((len(rows_M), spec.row_width)).astype(np.float32)
    records_MW = np.empty((len(rows_M), spec.record_words), np.uint32)
    seal(0, len(rows_M), rows_M, values_ME, check_keys(spec), records_MW)
    return values_ME, records_MW


def damaged(rows_M, records_MW, spec=SPEC):
    """The first damaged m, on which both kernels agree; -1 for none."""
    found = first_damaged(0, len(rows_M), rows_M, records_MW, check_keys(spec))
    out_ME = np.empty((len(rows_M), spec.row_width), np.float32)
    assert unseal(0, len(rows_M), rows_M, records_MW, check_keys(spec), initial_rows(spec), out_ME) == found
    return found


def test_the_check_equals_its_twin_and_is_never_zero():
    rows = np.array([0, 1, 5, 10**6 - 1])
    _, records = sealed(rows)
    for row, record in zip(rows.tolist(), records, strict=True):
        assert record[-1] == naive.record_check(SPEC, row, record[:-1])
    many = sealed(np.arange(200_000))[1]
    assert (many[:, -1] != 0).all()


def test_a_check_that_would_be_zero_is_one():
    keys = np.array([1, 0], np.uint64)  # salt 0, one key: row 0 with words 0 gives mix64(mix64(0) ^ 0) = 0
    from bigembed.kernels.records import record_check

    assert record_check(0, np.zeros(2, np.uint32), keys) == 1


def test_values_come_back_bit_for_bit_nan_and_negative_zero_included():
    rows = np.arange(6)
    bits = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1, 0, 0x7F7FFFFF], np.uint32)
    values = np.tile(bits.view(np.float32), (6, 1))
    records = np.empty((6, 7), np.uint32)
    seal(0, 6, rows, values, check_keys(SPEC), records)
    out = np.empty((6, 6), np.float32)
    assert unseal(0, 6, rows, records, check_keys(SPEC), initial_rows(SPEC), out) == -1
    np.testing.assert_array_equal(out.view(np.uint32), values.view(np.uint32))


def test_every_single_flipped_bit_is_found():
    rows = np.array([3, 77, 999_999])
    _, records = sealed(rows)
    assert damaged(rows, records) == -1
    for m in range(3):
        for bit in range(records.shape[1] * 32):
            torn = records.copy()
            torn[m, bit // 32] ^= np.uint32(1 << bit % 32)
            assert damaged(rows, torn) == m


@pytest.mark.parametrize("word", range(6))
def test_a_zero_check_with_any_other_byte_set_is_damage(word):
    for byte in range(4):
        records = np.zeros((2, 7), np.uint32)
        records[1, word] = 1 << (8 * byte)
        assert damaged(np.array([0, 1]), records) == 1


def test_a_record_of_another_row_or_of_another_table_is_damage():
    rows = np.arange(1000)
    _, records = sealed(rows)
    other = TableSpec(10**6, 5, state=SPEC.state, salt=SPEC.salt ^ 1)
    for m in range(0, 1000, 37):
        assert damaged(rows[m : m + 1] + 1, records[m : m + 1]) == 0
        assert damaged(rows[m : m + 1], records[m : m + 1], other) == 0


def test_an_all_zero_record_holds_initial_values():
    rows = np.array([4, 9])
    out = np.empty((2, 6), np.float32)
    zeros = np.zeros((2, 7), np.uint32)
    assert unseal(0, 2, rows, zeros, check_keys(SPEC), initial_rows(SPEC), out) == -1
    np.testing.assert_array_equal(out, naive.fill_initial(SPEC, rows))


def test_count_and_sum_are_those_of_the_written_records():
    rows = np.arange(500)
    _, records = sealed(rows)
    records[::3] = 0
    count, total = count_and_sum(records)
    assert (count, int(total)) == (333, int(records[:, -1].sum(dtype=np.uint64)))


def test_the_sum_that_seal_returns_is_the_same_for_any_thread_count():
    rows, before = np.arange(10_000), threads.get_num_threads()
    values, records = sealed(rows)
    again = np.empty_like(records)
    try:
        threads.set_num_threads(5)
        sums = threads.run(seal, len(rows), rows, values, check_keys(SPEC), again, grain=100)
    finally:
        threads.set_num_threads(before)
    np.testing.assert_array_equal(again, records)
    assert sum(map(int, sums)) == int(records[:, -1].sum(dtype=np.uint64))
