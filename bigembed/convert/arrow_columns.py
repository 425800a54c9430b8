"""Columns of pyarrow as arrays: lists of numbers as rows, text as packed tokens, without a copy where there is none."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigembed.convert.candidates import Candidate
from bigembed.convert.number_types import number_type
from bigembed.vocab.packed import PackedTokens


class BadRow(Exception):  # not an error that a user sees: the source adds the file and the row's number in it
    """A value that no table can hold; `row` counts from the column's start."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(row, problem)
        self.row, self.problem = row, problem


def plain_type(type: Any) -> Any:
    """The type itself, or what an extension type (a tensor of fixed shape) stores."""
    return getattr(type, "storage_type", type)


def list_size(type: Any) -> int | None:
    """The length of a list type's lists: -1 where only reading tells; None for a type without lists."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(type):
        return type.list_size
    return -1 if pa.types.is_list(type) or pa.types.is_large_list(type) else None


def number_dtype(type: Any) -> np.dtype:
    """NumPy's type of a number, or of the numbers in a list; objects for what has none."""
    try:
        return np.dtype((type if list_size(type) is None else type.value_type).to_pandas_dtype())
    except (NotImplementedError, TypeError):
        return np.dtype(object)


def number_name(type: Any) -> str:
    """As number_types names it, or what Arrow says where it is no number."""
    name = number_dtype(type).name
    return name if number_type(name) is not None else str(type)


def is_text(type: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(type):
        type = type.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(type) for test in tests)


def numbered(columns: Sequence[Candidate]) -> dict[str, list[str]]:
    """Columns of one number type whose names differ in their last number, from 0 or 1 on: {"dim_*": [dim_0, ...]}."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for each in columns:
        digits = re.search(r"(\d{1,9})(\D*)$", each.name)
        if digits and number_type(each.dtype) is not None:
            pattern = each.name[: digits.start()] + "*" + digits.group(2)
            groups[pattern, each.dtype].append((int(digits.group(1)), each.name))
    found = {}
    for (pattern, _), members in groups.items():
        numbers = sorted(number for number, _ in members)
        if len(numbers) > 1 and numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            found[pattern] = [name for _, name in sorted(members)]
    return found


def first_length(column: Any) -> int:
    """The length of the first list in a column that is not empty."""
    length = _storage(column).slice(0, 1).value_lengths()[0].as_py()
    if length is None:
        raise BadRow(0, "there is no list in it (null); every row needs one.")
    return length


def list_values(column: Any, dim: int | None) -> np.ndarray:
    """(M, dim) numbers of a column of lists; (M,) of a column of numbers, with dim None.

    Raises:
        BadRow: a list or a number is missing (null), or a list has another length.
    """
    column = _storage(column)
    column.validate()
    _refuse_null(column, 1, "there is nothing in it (null); every row needs its numbers.")
    if dim is None:
        return column.to_numpy(zero_copy_only=True)
    if list_size(column.type) == -1:
        length_M = column.value_lengths().to_numpy(zero_copy_only=True)
        if (length_M != dim).any():
            m = int(np.flatnonzero(length_M != dim)[0])
            raise BadRow(m, f"it has {length_M[m]} numbers, {dim} were expected as in the first row.")
    flat = column.flatten()
    _refuse_null(flat, dim, "a number is missing in it (null).")
    return flat.to_numpy(zero_copy_only=True).reshape(len(column), dim)


def packed_tokens(column: Any) -> PackedTokens:
    """A column of text or bytes; shares its bytes.

    Raises:
        BadRow: a token is missing (null).
    """
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = column.cast(pa.large_binary())
    column.validate(full=True)  # the offsets are used as they are
    _refuse_null(column, 1, "its token is missing (null).")
    if len(column) == 0:
        return PackedTokens(np.empty(0, np.uint8), np.zeros(1, np.int64))
    _, offsets, content = column.buffers()
    start_M1 = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    return PackedTokens(np.frombuffer(content or b"", np.uint8), start_M1)


def _storage(column: Any) -> Any:
    return getattr(column, "storage", column)


def _refuse_null(column: Any, values_per_row: int, problem: str) -> None:
    if column.null_count:
        missing_N = column.is_null().to_numpy(zero_copy_only=False)
        raise BadRow(int(np.flatnonzero(missing_N)[0]) // values_per_row, problem)
