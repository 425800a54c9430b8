"""Reading ahead: order, errors, early ends, and that the thread is gone afterwards."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from bigembed.convert.ahead import AheadSource, fill_ahead
from bigembed.convert.source import Block, ReadOptions
from bigembed.errors import BadSource


def reading_threads() -> int:
    return sum(thread.name == "bigembed read" for thread in threading.enumerate())


class Counting(AheadSource):
    """Rows 0, 1, 2, ... of two columns; row `bad_row` cannot be read."""

    def __init__(self, rows: int, bad_row: int = -1) -> None:
        super().__init__("counting", "test")
        self.settle(rows, 2, ReadOptions())
        self.bad_row, self.released = bad_row, 0

    def pieces(self) -> Iterator[int]:
        yield from range(self.num_rows or 0)

    def fill(self, piece: int, buffer_MD: np.ndarray) -> Block:
        if piece == self.bad_row:
            raise self.bad(f"row {piece}", "no.")
        buffer_MD[0] = piece
        return Block(buffer_MD[:1])

    def release(self) -> None:
        assert reading_threads() == 0
        self.released += 1


def test_blocks_come_in_order_and_keep_their_values_until_the_next() -> None:
    with Counting(100) as source:
        for number, block in enumerate(source.blocks()):
            assert (block.values_MD == number).all()
    assert number == 99
    assert source.released == 2


def test_an_error_comes_after_the_blocks_before_it() -> None:
    source, seen = Counting(100, bad_row=7), 0
    with pytest.raises(BadSource, match="counting, row 7: no"):
        for _ in source.blocks():
            seen += 1
    assert seen == 7
    assert reading_threads() == 0
    assert source.released == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whoever_stops_early_leaves_no_thread(error: type[BaseException]) -> None:
    source = Counting(100)
    with pytest.raises(error), source:
        for block in source.blocks():
            if block.values_MD[0, 0] == 3:
                raise error
    assert reading_threads() == 0


def test_close_in_the_middle_of_a_loop() -> None:
    source = Counting(100)
    blocks = source.blocks()
    next(blocks)
    source.close()
    source.close()
    assert reading_threads() == 0
    assert next(blocks, None) is None


def test_an_error_of_the_pieces_themselves() -> None:
    def pieces() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    filled = fill_ahead(pieces(), lambda piece, buffer: piece, ["a", "b"])
    with pytest.raises(OSError, match="gone"):
        list(filled)


@pytest.mark.parametrize(("rows", "dim"), [(0, 4), (4, 0), ((1 << 48) + 1, 4), (4, 1 << 24)])
def test_shapes_that_no_table_has(rows: int, dim: int) -> None:
    with pytest.raises(BadSource, match=r"counting, its shape: there are .* a table has at least one"):
        Counting(1).settle(rows, dim, ReadOptions())


def test_another_dim_than_was_asked_for() -> None:
    with pytest.raises(BadSource, match="there are 4 columns, but dim=5 was asked for"):
        Counting(1).settle(3, 4, ReadOptions(dim=5))
    Counting(1).settle(3, 4, ReadOptions(dim=4))
