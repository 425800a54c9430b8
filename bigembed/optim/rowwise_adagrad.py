"""Adagrad with one accumulator per row: the state of a billion rows is 4 GB instead of 256.

Source: the "exact row-wise Adagrad" of FBGEMM's table-batched embeddings; Gupta et al., "Training recommender systems
at scale", KDD 2021.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from bigembed.kernels import decay, rules
from bigembed.optim import device_rules
from bigembed.optim.hyperparameters import at_least
from bigembed.optim.optimizer import TableOptimizer
from bigembed.spec import StateColumns


class RowwiseAdagrad(TableOptimizer):
    """s += mean(g**2) over the row; w -= lr * g / (sqrt(s) + eps).

    With weight decay g += weight_decay * w first, as FBGEMM's WeightDecayMode.L2. A row without a gradient keeps w and
    s as they are and does not decay. Its one state column is reserved in every table by default, so attaching costs
    nothing.

    Args:
        modules: see TableOptimizer. lr: learning rate. eps: added to the root.
        initial_accumulator_value: s of a row before its first gradient. weight_decay: times w added to g.
        maximize: climb instead.
    """

    rule = "rowwise_adagrad"
    device_rule = staticmethod(device_rules.rowwise_adagrad)

    def __init__(
        self,
        modules: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        reset_state: bool = False,
    ) -> None:
        facts = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(modules, {**facts, "initial_accumulator_value": initial_accumulator_value}, reset_state)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        at_least(0.0, group, "initial_accumulator_value", "eps", "weight_decay")

    @classmethod
    def state_columns(cls, dim: int, group: dict[str, Any]) -> tuple[StateColumns, ...]:
        return (StateColumns("row_sum", 1, float(group["initial_accumulator_value"])),)

    def _kernel(self, group: dict[str, Any], step: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        facts = np.float32(float(group["lr"])), np.float32(group["eps"])
        weight_decay = np.float32(group["weight_decay"])
        return (
            (decay.rowwise_adagrad_decayed, (*facts, weight_decay)) if weight_decay else (rules.rowwise_adagrad, facts)
        )
