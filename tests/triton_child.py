"""Compares the Triton kernels with the torch ops on the device named in the arguments; run by test_device_triton.py."""

import sys

import numpy as np
import torch

from bigembed.cache import device_ops, triton_kernels
from bigembed.cache.device_index import DeviceSetIndex


def check(device, num_sets, ways, dim):
    rng = np.random.default_rng(0)
    index = DeviceSetIndex(num_sets, ways, device)
    index.admit(torch.from_numpy(rng.permutation(5000)[: 2 * index.num_slots]).to(device), 1, 1)
    values = torch.from_numpy(rng.standard_normal((index.num_slots + 1, dim + 2)).astype(np.float32)).to(device)
    held = index.key[index.key >= 0].cpu().numpy()
    strangers = np.array([-1, 5001, -(1 << 63), 1 << 62])
    for ids in [held, rng.choice(held, 33), np.concatenate([held[:3], strangers]), held[:0]]:
        ids_N = torch.from_numpy(ids).to(device)
        expected = device_ops.find_and_gather(ids_N, index.key, values, dim)
        got = triton_kernels.find_and_gather(ids_N, index.key, values, dim)
        for tensor, twin in zip(got, expected, strict=True):
            assert tensor.dtype == twin.dtype
            assert tensor.cpu().numpy().tobytes() == twin.cpu().numpy().tobytes()
        np.testing.assert_array_equal(got[1].cpu(), index.find(ids_N).cpu())
        assert int(got[2]) == np.isin(ids, held, invert=True).sum()


if __name__ == "__main__":
    for num_sets, ways, dim in [(1, 1, 1), (5, 3, 3), (7, 16, 64), (40, 16, 130)]:
        check(sys.argv[1], num_sets, ways, dim)
    print("equal")
