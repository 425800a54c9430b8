"""The rules in torch ops against the kernels: the same bits on a CPU."""

import naive
import numpy as np
import pytest
import torch
from devices import DEVICES, NO_CUDA

from bigembed.kernels import rules
from bigembed.optim import device_rules

RULES = {  # name: (state columns for D, arguments after scale)
    "sgd": (lambda dim: 0, (0.1,)),
    "adagrad": (lambda dim: dim, (0.1, 1e-10)),
    "rowwise_adagrad": (lambda dim: 1, (0.1, 1e-10)),
    "adam": (lambda dim: 2 * dim, (0.013, 0.1, 0.001, 1e-8)),
}


def gradient(rng, num_rows, dim):
    """Magnitudes so different that another order or a fused operation gives other bits; some zeros."""
    values = rng.standard_normal((num_rows, dim)) * 2.0 ** rng.integers(-12, 12, (num_rows, dim))
    return np.where(rng.random((num_rows, dim)) < 0.05, 0.0, values).astype(np.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [1, 3, 64, 129])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_equals_its_kernel_bit_for_bit(name, dim, device):
    rng, num_rows = np.random.default_rng(0), 300
    columns, args = RULES[name]
    args = tuple(map(np.float32, args))
    width = dim + columns(dim)
    host = rng.standard_normal((num_rows, width)).astype(np.float32)
    host[:, dim:] = np.abs(host[:, dim:])
    rows_UE = torch.from_numpy(host.copy()).to(device)
    nothing = np.empty((0, width), np.float32)
    for scale in (1.0, 0.37, -1.0):
        sums_UD, scale = gradient(rng, num_rows, dim), np.float32(scale)
        getattr(rules, name)(0, num_rows, host, nothing, np.arange(num_rows), sums_UD, scale, *args)
        given = torch.from_numpy(sums_UD.copy()).to(device)
        assert getattr(device_rules, name)(rows_UE, given, scale, *args) is rows_UE
        assert given.cpu().numpy().tobytes() == sums_UD.tobytes(), "the gradient is pending still"
        assert rows_UE.cpu().numpy().tobytes() == host.tobytes()


@pytest.mark.parametrize("device", DEVICES)
def test_rules_leave_further_columns_alone(device):
    for name, (columns, args) in RULES.items():
        rows_UE = torch.full((4, 3 + columns(3) + 2), 7.0, device=device)
        getattr(device_rules, name)(rows_UE, torch.ones((4, 3), device=device), 1.0, *args)
        assert (rows_UE[:, 3 + columns(3) :] == 7.0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_rules_take_no_rows(device):
    for name, (columns, args) in RULES.items():
        rows_UE = torch.empty((0, 3 + columns(3)), device=device)
        assert getattr(device_rules, name)(rows_UE, torch.empty((0, 3), device=device), 1.0, *args).shape[0] == 0
    assert float(device_rules.norm(torch.empty((0, 3), device=device))) == 0.0


@pytest.mark.parametrize("device", DEVICES)
def test_row_squares_equal_their_twin_and_scaling_its_kernel(device):
    rng = np.random.default_rng(1)
    for num_rows, dim in [(0, 3), (1, 1), (200, 64), (50, 129)]:
        sums_UD = gradient(rng, num_rows, dim)
        given = torch.from_numpy(sums_UD.copy()).to(device)
        squares_U = device_rules.row_squares(given).cpu().numpy()
        assert squares_U.tobytes() == naive.row_squares(sums_UD).tobytes()
        norm = float(device_rules.norm(given))
        assert norm == pytest.approx(float(np.sqrt(squares_U.sum())), rel=1e-6)  # of float32, and in another order
        naive.scale_rows(sums_UD, 0.3)
        assert device_rules.scale_rows(given, 0.3).cpu().numpy().tobytes() == sums_UD.tobytes()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NO_CUDA)])
def test_the_same_bits_on_every_run(device):
    given = torch.randn((5000, 64), device=device, generator=torch.Generator(device).manual_seed(0))
    assert len({float(device_rules.norm(given)) for _ in range(5)}) == 1
