"""Adam over the rows of a batch.

Source: Kingma, Ba, "Adam", ICLR 2015; torch.optim.SparseAdam for what a row that has no gradient does: nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bigembed.errors import InvalidArgument
from bigembed.kernels import rules
from bigembed.optim import device_rules
from bigembed.optim.optimizer import TableOptimizer
from bigembed.spec import StateColumns


class Adam(TableOptimizer):
    """m += (1 - b1)(g - m); v += (1 - b2)(g**2 - v); w -= lr_t * m / (sqrt(v) + eps); as torch.optim.SparseAdam.

    lr_t = lr * sqrt(1 - b2**t) / (1 - b1**t), t counting the table's steps. The record grows by 2 D float32 columns.

    Args:
        modules: see TableOptimizer. lr: learning rate. betas: decay of m and of v, each in [0, 1).
        eps: added to the root. maximize: climb instead.
    """

    rule = "adam"
    device_rule = staticmethod(device_rules.adam)

    def __init__(
        self,
        modules: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        maximize: bool = False,
        reset_state: bool = False,
    ) -> None:
        super().__init__(modules, {"lr": lr, "betas": betas, "eps": eps, "maximize": maximize}, reset_state)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise InvalidArgument(f"betas must be at least 0 and below 1, not {group['betas']}.")
        if not group["eps"] > 0.0:
            raise InvalidArgument(f"eps must be above 0, not {group['eps']}.")

    @classmethod
    def state_columns(cls, dim: int, group: dict[str, Any]) -> tuple[StateColumns, ...]:
        return StateColumns("exp_avg", dim), StateColumns("exp_avg_sq", dim)

    def _kernel(self, group: dict[str, Any], step: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        beta1, beta2 = group["betas"]
        rate = float(group["lr"]) * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        return rules.adam, tuple(map(np.float32, (rate, 1 - beta1, 1 - beta2, group["eps"])))
