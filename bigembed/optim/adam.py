"""Adam over the rows of a batch.

Source: Kingma, Ba, "Adam", ICLR 2015; torch.optim.SparseAdam for what a row that has no gradient does: nothing.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from bigembed.errors import InvalidArgument
from bigembed.kernels import decay, rules
from bigembed.optim import device_rules
from bigembed.optim.hyperparameters import are_betas, at_least
from bigembed.optim.optimizer import TableOptimizer
from bigembed.spec import StateColumns


class Adam(TableOptimizer):
    """m += (1 - b1)(g - m); v += (1 - b2)(g**2 - v); w -= lr_t * m / (sqrt(v) + eps); as torch.optim.SparseAdam.

    lr_t = lr * sqrt(1 - b2**t) / (1 - b1**t), t counting the table's steps. With weight decay g += weight_decay * w
    first; for decay that does not pass through m and v see AdamW. A row without a gradient keeps w, m and v as they
    are: it neither decays nor glides on. The record grows by 2 D float32 columns.

    Args:
        modules: see TableOptimizer. lr: learning rate. betas: decay of m and of v, each in [0, 1).
        eps: added to the root. weight_decay: times w added to g. maximize: climb instead.

    Note:
        torch.optim.Adam on dense gradients moves every row at every step, and has eps inside the bias correction.
    """

    rule = "adam"
    device_rule: ClassVar[Callable[..., Any]] = staticmethod(device_rules.adam)

    def __init__(
        self,
        modules: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        reset_state: bool = False,
    ) -> None:
        facts = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(modules, facts, reset_state)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        are_betas(group)
        at_least(0.0, group, "weight_decay")
        if not group["eps"] > 0.0:
            raise InvalidArgument(f"eps must be above 0, not {group['eps']}.")

    @classmethod
    def state_columns(cls, dim: int, group: dict[str, Any]) -> tuple[StateColumns, ...]:
        return StateColumns("exp_avg", dim), StateColumns("exp_avg_sq", dim)

    def _kernel(self, group: dict[str, Any], step: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        beta1, beta2 = map(float, group["betas"])
        rate = float(group["lr"]) * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        facts = tuple(map(np.float32, (rate, 1 - beta1, 1 - beta2, group["eps"])))
        weight_decay = np.float32(group["weight_decay"])
        return (decay.adam_decayed, (*facts, weight_decay)) if weight_decay else (rules.adam, facts)
