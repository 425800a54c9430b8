"""SGD over the rows of a batch."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bigembed.kernels import rules
from bigembed.optim import device_rules
from bigembed.optim.optimizer import TableOptimizer
from bigembed.spec import StateColumns


class SGD(TableOptimizer):
    """w -= lr * g for every row with a pending gradient; equals torch.optim.SGD on sparse gradients.

    Args:
        modules: see TableOptimizer. lr: learning rate. maximize: climb instead.
    """

    rule = "sgd"
    device_rule = staticmethod(device_rules.sgd)

    def __init__(self, modules: Any, lr: float = 1e-3, *, maximize: bool = False, reset_state: bool = False) -> None:
        super().__init__(modules, {"lr": lr, "maximize": maximize}, reset_state)

    @classmethod
    def state_columns(cls, dim: int, group: dict[str, Any]) -> tuple[StateColumns, ...]:
        return ()

    def _kernel(self, group: dict[str, Any], step: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return rules.sgd, (np.float32(group["lr"]),)
