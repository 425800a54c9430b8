"""Adagrad, with one accumulator per weight.

Source: Duchi, Hazan, Singer, "Adaptive subgradient methods", JMLR 12 (2011); torch.optim.Adagrad's sparse branch.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from bigembed.errors import InvalidArgument
from bigembed.kernels import rules
from bigembed.optim import device_rules
from bigembed.optim.optimizer import TableOptimizer
from bigembed.spec import StateColumns


class Adagrad(TableOptimizer):
    """s += g**2; w -= lr_t * g / (sqrt(s) + eps), lr_t = lr / (1 + (t - 1) lr_decay); as torch.optim.Adagrad.

    The record grows by D float32 columns.

    Args:
        modules: see TableOptimizer. lr: learning rate. lr_decay: how fast it falls with the step t.
        initial_accumulator_value: s of a row before its first gradient.
        eps: added to the root. maximize: climb instead.
    """

    rule = "adagrad"
    device_rule = staticmethod(device_rules.adagrad)

    def __init__(
        self,
        modules: Any,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        reset_state: bool = False,
    ) -> None:
        facts = {"lr": lr, "lr_decay": lr_decay, "initial_accumulator_value": initial_accumulator_value, "eps": eps}
        super().__init__(modules, {**facts, "maximize": maximize}, reset_state)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        for name in ("lr_decay", "initial_accumulator_value", "eps"):
            if not group[name] >= 0.0:
                raise InvalidArgument(f"{name} must be at least 0, not {group[name]}.")

    @classmethod
    def state_columns(cls, dim: int, group: dict[str, Any]) -> tuple[StateColumns, ...]:
        return (StateColumns("sum", dim, float(group["initial_accumulator_value"])),)

    def _kernel(self, group: dict[str, Any], step: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        lr = float(group["lr"]) / (1 + (step - 1) * group["lr_decay"])
        return rules.adagrad, (np.float32(lr), np.float32(group["eps"]))
