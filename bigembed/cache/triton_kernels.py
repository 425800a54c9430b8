"""A lookup in one pass, as a Triton kernel: probe and gather together, where torch ops write down every step between.

`device_ops.find_and_gather` is the same in torch ops, and equal to it; `device_ops.lookup_for` imports this one where
Triton is installed and the device is a CUDA one. Triton's interpreter runs it on CPU tensors in the tests.

Bytes moved for a position: its id, the 8 ways bytes of its set (mostly from the L2 cache), 4 D in and 4 D out, against
8 ways in and out several times, and the slots in between, in torch ops.
"""

import torch
import triton
import triton.language as tl

BLOCK_POSITIONS = 16
MAX_BLOCK_COLUMNS = 128


def find_and_gather(
    ids_N: torch.Tensor, key: torch.Tensor, values: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`device_ops.find_and_gather`, in one pass."""
    count = ids_N.numel()
    out_ND = torch.empty((count, dim), dtype=values.dtype, device=values.device)
    slots_N = torch.empty_like(ids_N)
    missed = torch.zeros((), dtype=torch.int32, device=values.device)
    if count:
        _find_and_gather[(triton.cdiv(count, BLOCK_POSITIONS),)](
            ids_N,
            key,
            values,
            out_ND,
            slots_N,
            missed,
            count,
            key.shape[0],
            key.shape[1],
            values.stride(0),
            dim,
            BLOCK_N=BLOCK_POSITIONS,
            BLOCK_W=triton.next_power_of_2(key.shape[1]),
            BLOCK_D=min(MAX_BLOCK_COLUMNS, triton.next_power_of_2(dim)),
            enable_fp_fusion=False,  # nothing to fuse here; unset, Triton 3.9 warns
        )
    return out_ND, slots_N, missed


@triton.jit
def _find_and_gather(
    ids, key, values, out, slots, missed, count, sets, ways, stride, dim,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(ids + n, mask=n < count, other=-1)
    home = _bucket(row, sets)
    way = tl.arange(0, BLOCK_W)
    at = home[:, None] * ways + way[None, :]
    held = tl.load(key + at, mask=(n < count)[:, None] & (way < ways)[None, :], other=-1)
    # Empty ways hold -1, and no row is negative; at most one way holds a row.
    is_here = (held == row[:, None]) & (row >= 0)[:, None]
    slot = tl.max(tl.where(is_here, at, -1), axis=1)
    tl.store(slots + n, slot, mask=n < count)
    # A sum of integers: the order of the atomics does not show.
    tl.atomic_add(missed, tl.sum(((slot < 0) & (n < count)).to(tl.int32), axis=0))
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        within = (n < count)[:, None] & (d < dim)[None, :]
        found = tl.load(values + slot[:, None] * stride + d[None, :], mask=within & (slot >= 0)[:, None], other=0.0)
        tl.store(out + n[:, None] * dim + d[None, :], found, mask=within)


@triton.jit
def _bucket(row, count):
    """`kernels.hashing.bucket`."""
    x = row.to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    high = (x ^ (x >> 31)) >> 32
    return ((high * count) >> 32).to(tl.int64)
