"""Adagrad, with one accumulator per weight.

Source: Duchi, Hazan, Singer, "Adaptive subgradient methods", JMLR 12 (2011); torch.optim.Adagrad's sparse branch.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from bigembed.kernels import decay, rules
from bigembed.optim import device_rules
from bigembed.optim.hyperparameters import at_least
from bigembed.optim.optimizer import TableOptimizer
from bigembed.spec import StateColumns


class Adagrad(TableOptimizer):
    """s += g**2; w -= lr_t * g / (sqrt(s) + eps), lr_t = lr / (1 + (t - 1) lr_decay); as torch.optim.Adagrad.

    With weight decay g += weight_decay * w first. A row without a gradient keeps w and s as they are and does not
    decay, while t counts on. The record grows by D float32 columns.

    Args:
        modules: see TableOptimizer. lr: learning rate. lr_decay: how fast it falls with the step t.
        weight_decay: times w added to g. initial_accumulator_value: s of a row before its first gradient.
        eps: added to the root. maximize: climb instead.

    Note:
        torch.optim.Adagrad refuses weight decay on sparse gradients, and on dense ones lets every row decay.
    """

    rule = "adagrad"
    device_rule = staticmethod(device_rules.adagrad)

    def __init__(
        self,
        modules: Any,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        reset_state: bool = False,
    ) -> None:
        facts = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps, "maximize": maximize}
        super().__init__(modules, {**facts, "initial_accumulator_value": initial_accumulator_value}, reset_state)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        at_least(0.0, group, "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    @classmethod
    def state_columns(cls, dim: int, group: dict[str, Any]) -> tuple[StateColumns, ...]:
        return (StateColumns("sum", dim, float(group["initial_accumulator_value"])),)

    def _kernel(self, group: dict[str, Any], step: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        lr = np.float32(float(group["lr"]) / (1 + (step - 1) * float(group["lr_decay"])))
        eps, weight_decay = np.float32(group["eps"]), np.float32(group["weight_decay"])
        return (decay.adagrad_decayed, (lr, eps, weight_decay)) if weight_decay else (rules.adagrad, (lr, eps))
