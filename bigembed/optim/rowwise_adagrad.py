"""Adagrad with one accumulator per row: the state of a billion rows is 4 GB instead of 256.

Source: the "exact row-wise Adagrad" of FBGEMM's table-batched embeddings; Gupta et al., "Training recommender systems
at scale", KDD 2021.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from bigembed.errors import InvalidArgument
from bigembed.kernels import rules
from bigembed.optim import device_rules
from bigembed.optim.optimizer import TableOptimizer
from bigembed.spec import StateColumns


class RowwiseAdagrad(TableOptimizer):
    """s += mean(g**2) over the row; w -= lr * g / (sqrt(s) + eps).

    Its one state column is reserved in every table by default, so attaching costs nothing.

    Args:
        modules: see TableOptimizer. lr: learning rate. eps: added to the root.
        initial_accumulator_value: s of a row before its first gradient. maximize: climb instead.
    """

    rule = "rowwise_adagrad"
    device_rule = staticmethod(device_rules.rowwise_adagrad)

    def __init__(
        self,
        modules: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
        *,
        maximize: bool = False,
        reset_state: bool = False,
    ) -> None:
        facts = {"lr": lr, "eps": eps, "initial_accumulator_value": initial_accumulator_value, "maximize": maximize}
        super().__init__(modules, facts, reset_state)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        for name in ("initial_accumulator_value", "eps"):
            if not group[name] >= 0.0:
                raise InvalidArgument(f"{name} must be at least 0, not {group[name]}.")

    @classmethod
    def state_columns(cls, dim: int, group: dict[str, Any]) -> tuple[StateColumns, ...]:
        return (StateColumns("row_sum", 1, float(group["initial_accumulator_value"])),)

    def _kernel(self, group: dict[str, Any], step: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return rules.rowwise_adagrad, (np.float32(group["lr"]), np.float32(group["eps"]))
