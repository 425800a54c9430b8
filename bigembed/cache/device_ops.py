"""Grouping, summing and hashing as torch ops, for a cache on a device: the same bits on every run of one device.

Nothing here waits for the device unless its docstring says so: where only the device knows a size, the host takes an
upper bound for it.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

ABSENT = -1
FAN = 32  # how many addends one thread adds in order

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_M1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_M2 = 0x94D049BB133111EB - (1 << 64)


def mix64(x: torch.Tensor) -> torch.Tensor:
    """`kernels.hashing.mix64` on int64, which holds the same 64 bits."""
    x = (x ^ _shift(x, 30)) * _M1
    x = (x ^ _shift(x, 27)) * _M2
    return x ^ _shift(x, 31)


def bucket(rows_M: torch.Tensor, count: int) -> torch.Tensor:
    """`kernels.hashing.bucket`: a bucket 0..count-1 for each row; count < 2**32."""
    return _shift(_shift(mix64(rows_M * _GOLDEN), 32) * count, 32)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits as of an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a batch, before the host knows how many there are.

    rows_N: int64; the first U entries are the distinct rows in order of first position, the rest ABSENT.
    inverse_N: int64, each position's place among them.
    num_unique: U, a tensor of no dimension, as the next two.
    bad_position, bad_id: the first id that is out of range and where it is; N where all are in range.
    """

    rows_N: torch.Tensor
    inverse_N: torch.Tensor
    num_unique: torch.Tensor
    bad_position: torch.Tensor
    bad_id: torch.Tensor


def group(ids_N: torch.Tensor, num_rows: int) -> Batch:
    """`group_by_row` and `first_out_of_range` in one, without waiting for the device.

    Args:
        ids_N: int64. num_rows: V.
    """
    count = ids_N.numel()
    sorted_N, order_N = torch.sort(ids_N, stable=True)
    places_N = torch.arange(count, device=ids_N.device)
    is_head_N = torch.ones_like(ids_N, dtype=torch.bool)
    is_head_N[1:] = sorted_N[1:] != sorted_N[:-1]
    # The sort is stable, so the head of a run of equal ids is their first position.
    is_first_N = torch.zeros_like(is_head_N).index_copy_(0, order_N, is_head_N)
    unique_N = torch.cumsum(is_first_N, 0) - 1
    head_N = torch.cummax(torch.where(is_head_N, places_N, 0), 0).values if count else places_N
    inverse_N = torch.empty_like(ids_N).index_copy_(0, order_N, unique_N[order_N[head_N]])
    rows = torch.full((count + 1,), ABSENT, dtype=torch.int64, device=ids_N.device)
    rows.index_copy_(0, torch.where(is_first_N, unique_N, count), ids_N)
    bad_position, bad_id = first_out_of_range(ids_N, num_rows)
    # Positions that are not first were all sent to the entry behind the last one; there is a row for no more than N.
    return Batch(rows[:count], inverse_N, is_first_N.sum(), bad_position, bad_id)


def distinct(rows_U: torch.Tensor) -> Batch:
    """The batch of these distinct rows, all in range."""
    count = rows_U.numel()
    size = torch.full((), count, dtype=torch.int64, device=rows_U.device)
    return Batch(rows_U, torch.arange(count, device=rows_U.device), size, size, size)


def group_by_row(ids_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.grouping.group_by_row`: (rows_U, inverse_N). Waits for the device, to learn U."""
    batch = group(ids_N, 1)
    return batch.rows_N[: int(batch.num_unique)], batch.inverse_N


def first_out_of_range(ids_N: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(position, id) of the first id that is negative or not below num_rows; position N where there is none."""
    count = ids_N.numel()
    is_bad_N = (ids_N < 0) | (ids_N >= num_rows)
    positions_N = torch.where(is_bad_N, torch.arange(count, device=ids_N.device), count)
    position = pad(positions_N, (0, 1), value=count).amin()
    return position, pad(ids_N, (0, 1)).index_select(0, position.reshape(1)).reshape(())


def find_and_gather(
    ids_N: torch.Tensor, key: torch.Tensor, values: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Look up ids that may repeat: (the first `dim` values of each, its slot, how many ids are in no slot).

    An id that is in no slot (any int64) has slot ABSENT and zeros. `triton_kernels` has it in one pass.

    Args:
        ids_N: int64. key: of a set index. values: (slots or more, E).
    """
    sets, ways = key.shape
    home_N = bucket(ids_N, sets)
    is_here = key[home_N] == ids_N.unsqueeze(1)
    way_N = (is_here * torch.arange(ways, device=ids_N.device)).sum(1)  # at most one is here
    is_found_N = is_here.any(1) & (ids_N >= 0)
    slots_N = torch.where(is_found_N, home_N * ways + way_N, ABSENT)
    out_ND = values[:, :dim].index_select(0, slots_N.clamp(min=0))
    out_ND = torch.where(is_found_N.unsqueeze(1), out_ND, 0.0)
    return out_ND, slots_N, (~is_found_N).sum(dtype=torch.int32)


def lookup_for(device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`find_and_gather` as it is fastest: Triton's on a CUDA device where Triton is installed."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from bigembed.cache import triton_kernels

        return triton_kernels.find_and_gather
    return find_and_gather


def compact(mask_N: torch.Tensor) -> torch.Tensor:
    """(N,) int64: first the positions where the mask is true, ascending, then zeros."""
    count = mask_N.numel()
    at_N = torch.where(mask_N, torch.cumsum(mask_N, 0) - 1, count)
    found = torch.zeros(count + 1, dtype=torch.int64, device=mask_N.device)
    return found.index_copy_(0, at_N, torch.arange(count, device=mask_N.device))[:count]


def rank_in_group(groups_M: torch.Tensor) -> torch.Tensor:
    """How many entries before this one are of the same group."""
    sorted_M, order_M = torch.sort(groups_M, stable=True)
    places_M = torch.arange(groups_M.numel(), device=groups_M.device)
    is_head_M = torch.ones_like(groups_M, dtype=torch.bool)
    is_head_M[1:] = sorted_M[1:] != sorted_M[:-1]
    head_M = torch.cummax(torch.where(is_head_M, places_M, 0), 0).values if groups_M.numel() else places_M
    return torch.empty_like(groups_M).index_copy_(0, order_M, places_M - head_M)


def sum_by_row(grad_ND: torch.Tensor, inverse_N: torch.Tensor, num_unique: int) -> torch.Tensor:
    """Each row's gradients added in a fixed tree, in float32: `naive.sum_by_row_in_tree` exactly.

    Of each row, runs of 32 positions (the last may be shorter) are added in order of position, from 0.0 on; then runs
    of 32 of these sums in the same way, until one is left. So a row with up to 32 positions equals that of
    `kernels.grouping.sum_by_row`, and one hot row is not one serial loop. No atomics: the same bits on every run.

    Args:
        grad_ND: float32. inverse_N: int64, the row of each position, 0 <= inverse_N < num_unique; N < 2**31.
        num_unique: U, the rows of the result; a row without a position is 0.
    """
    count, dim = grad_ND.shape
    if not count or not num_unique:
        return grad_ND.new_zeros((num_unique, dim))
    sorted_N, order_N = torch.sort(inverse_N.to(torch.int32), stable=True)
    rows_U = torch.arange(num_unique, dtype=torch.int32, device=grad_ND.device)
    lengths_U = torch.diff(torch.searchsorted(sorted_N, rows_U, right=True), prepend=sorted_N.new_zeros(1))
    addends_AD, longest = grad_ND[order_N], count
    while longest > FAN:
        runs_B, runs_U = _runs(lengths_U, addends_AD.shape[0])
        addends_AD, lengths_U = sum_segments(addends_AD, runs_B), runs_U
        longest = -(-longest // FAN)
    return sum_segments(addends_AD, lengths_U)


def _runs(lengths_U: torch.Tensor, num_addends: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(length of each run of at most 32 addends, runs of each row); the lengths are followed by zeros."""
    num_unique = lengths_U.numel()
    # Every row with addends has one run, and one more for each further 32.
    bound = min(num_addends, num_unique + max(0, num_addends - num_unique) // FAN)
    runs_U = (lengths_U + (FAN - 1)) // FAN
    ends_U = torch.cumsum(runs_U, 0)
    runs_B = torch.arange(bound, device=lengths_U.device)
    rows_B = torch.searchsorted(ends_U, runs_B, right=True)
    within_B = rows_B.clamp(max=num_unique - 1)
    before_B = runs_B - (ends_U - runs_U)[within_B]
    return torch.where(rows_B < num_unique, (lengths_U[within_B] - FAN * before_B).clamp(max=FAN), 0), runs_U


def sum_segments(addends_AD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """(B, D): the sums of consecutive segments, each added in order from 0.0 on (one thread a segment and column).

    Source: `segment_reduce_forward_kernel` in PyTorch's aten/src/ATen/native/cuda/SegmentReduce.cu.
    """
    return torch.segment_reduce(addends_AD, "sum", lengths=lengths_B, axis=0, unsafe=True)  # no check: no wait
