"""DeviceRowGradient against RowGradient, alone and pending behind a handle."""

import numpy as np
import pytest
import torch
from devices import DEVICES
from torch import nn

from bigembed.optim.device_gradient import DeviceRowGradient, moved
from bigembed.optim.pending import PendingGradient, RowGradient, add_gradients

D = 3


def random_gradient(seed, rows=15, step=1):
    rng = np.random.default_rng(seed)
    return RowGradient(rng.permutation(40)[:rows], rng.standard_normal((rows, D)).astype(np.float32), step)


def assert_same(on_device, on_host):
    assert isinstance(on_device, DeviceRowGradient)
    assert on_device.rows_U.tolist() == on_host.rows_U.tolist()
    assert on_device.sums_UD.cpu().numpy().tobytes() == on_host.sums_UD.tobytes()
    assert on_device.step == on_host.step
    assert on_device.memory_bytes == on_host.memory_bytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 300])
def test_summing_equals_the_hosts(count, device):
    rng = np.random.default_rng(count)
    rows_U, inverse_N = np.arange(count)[::-1].copy(), rng.permutation(3 * count) % max(1, count)
    grad_ND = torch.from_numpy(rng.standard_normal((3 * count, D)).astype(np.float32))
    tensors = [torch.from_numpy(array).to(device) for array in (rows_U, inverse_N)]
    on_device = DeviceRowGradient.summed(grad_ND.to(device), *tensors, step=4)
    on_host = RowGradient.summed(grad_ND, rows_U, inverse_N, step=4)
    assert_same(on_device, on_host)
    assert float(on_device.norm()) == pytest.approx(on_host.norm(), rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_adding_scaling_and_moving_equal_the_hosts(device):
    first, second = random_gradient(1, step=5), random_gradient(2, step=3)
    total = moved(first, torch.device(device)).plus(moved(second, torch.device(device)))
    expected = add_gradients(first, second)
    assert_same(total, expected)
    total.scale(0.3)
    expected.scale(0.3)
    assert_same(total, expected)
    back = moved(total, None)
    assert isinstance(back, RowGradient)
    assert_same(moved(back, torch.device(device)), expected)


class Bring(torch.autograd.Function):
    """A lookup without a table."""

    @staticmethod
    def forward(ctx, handle, pending, gradient):
        ctx.facts = pending, gradient
        return torch.zeros((), device=handle.device)

    @staticmethod
    def backward(ctx, grad):
        pending, gradient = ctx.facts
        pending.add(gradient)
        return torch.zeros(1, device=grad.device), None, None


def play(device, kind, actions):
    """The pending gradient and its factor after these actions, with gradients on the host or a device."""
    handle = nn.Parameter(torch.zeros(1, device=device if kind == "device" else "cpu"))
    pending = PendingGradient(handle)
    handle.register_post_accumulate_grad_hook(lambda _: pending.arrived())
    for action in actions:
        if isinstance(action, int):
            gradient = random_gradient(action)
            if kind == "device":
                gradient = moved(gradient, torch.device(device))
            Bring.apply(handle, pending, gradient).backward()
        elif action is None:
            handle.grad = None
        else:
            handle.grad.mul_(action)
    return pending.current()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "actions", [[1], [1, 2, 3], [1, 0.5], [1, 0.5, 2, -2.0], [1, 0.0], [1, 0.0, 2], [1, None], [1, None, 2, 0.25]]
)
def test_what_is_pending_equals_the_hosts(actions, device):
    on_host, on_device = play(device, "host", actions), play(device, "device", actions)
    if on_host is None:
        assert on_device is None
    else:
        assert_same(on_device[0], on_host[0])
        assert on_device[1] == on_host[1]
