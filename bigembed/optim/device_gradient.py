"""DeviceRowGradient: the gradient of a table whose rows are served on a device; `RowGradient` in torch ops."""

from dataclasses import dataclass

import numpy as np
import torch

from bigembed.cache.device_ops import group_by_row, sum_by_row
from bigembed.optim import device_rules
from bigembed.optim.pending import Gradient, RowGradient


@dataclass
class DeviceRowGradient:
    """Distinct rows_U and the sum of each one's gradients, float32 sums_UD; `step` is the oldest forward's.

    Equals RowGradient bit by bit while no row has more than 32 positions, see `device_ops.sum_by_row`.
    """

    rows_U: torch.Tensor
    sums_UD: torch.Tensor
    step: int

    @classmethod
    def summed(
        cls, grad_ND: torch.Tensor, rows_U: torch.Tensor, inverse_N: torch.Tensor, step: int
    ) -> "DeviceRowGradient":
        """From the gradient at each position."""
        return cls(rows_U, sum_by_row(grad_ND, inverse_N, rows_U.numel()), step)

    def norm(self) -> torch.Tensor:
        """The 2-norm as a float32 tensor of no dimension; the host does not wait for it."""
        return device_rules.norm(self.sums_UD)

    def plus(self, other: "DeviceRowGradient") -> "DeviceRowGradient":
        """Their sum; rows in order of first mention. Waits for the device, to learn how many rows that are."""
        rows_U, inverse_N = group_by_row(torch.cat([self.rows_U, other.rows_U]))
        sums_ND = torch.cat([self.sums_UD, other.sums_UD])
        return DeviceRowGradient.summed(sums_ND, rows_U, inverse_N, min(self.step, other.step))

    def scale(self, factor: float) -> None:
        """Multiply it, in place."""
        device_rules.scale_rows(self.sums_UD, float(np.float32(factor)))

    @property
    def memory_bytes(self) -> int:
        return self.rows_U.nbytes + self.sums_UD.nbytes


def moved(gradient: Gradient, device: torch.device | None) -> Gradient:
    """The same gradient for rows that are served on `device` from now on; None is the host, without a device cache."""
    rows_U, sums_UD = torch.as_tensor(gradient.rows_U), torch.as_tensor(gradient.sums_UD)
    if device is not None:
        return DeviceRowGradient(rows_U.to(device), sums_UD.to(device), gradient.step)
    return RowGradient(rows_U.cpu().numpy(), sums_UD.cpu().numpy(), gradient.step)
