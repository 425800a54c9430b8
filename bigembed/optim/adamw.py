"""AdamW over the rows of a batch: Adam with weight decay that does not pass through its averages.

Source: Loshchilov, Hutter, "Decoupled weight decay regularization", ICLR 2019; torch.optim.AdamW.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bigembed.kernels import decay
from bigembed.optim import device_rules
from bigembed.optim.adam import Adam


class AdamW(Adam):
    """A row with a gradient in every step goes, to float32 rounding, where torch.optim.AdamW takes it.

    w *= 1 - lr * weight_decay; m += (1 - b1)(g - m); v += (1 - b2)(g**2 - v);
    w -= lr * m' / (sqrt(v') + eps), m' = m / (1 - b1**t), v' = v / (1 - b2**t), t counting the table's steps.

    A row without a gradient keeps w, m and v as they are: it neither decays nor glides on. The record grows by 2 D
    float32 columns.

    Args:
        modules: see TableOptimizer. lr: learning rate. betas: decay of m and of v, each in [0, 1).
        eps: added to the root of v'. weight_decay: how fast w shrinks, times lr. maximize: climb instead.

    Note:
        torch.optim.AdamW moves every row at every step. eps stands inside the bias correction as there, while `Adam`
        has it outside, as torch.optim.SparseAdam.
    """

    rule = "adamw"
    device_rule = staticmethod(device_rules.adamw)

    def __init__(
        self,
        modules: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        reset_state: bool = False,
    ) -> None:
        super().__init__(modules, lr, betas, eps, weight_decay, maximize=maximize, reset_state=reset_state)

    def _kernel(self, group: dict[str, Any], step: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        lr = float(group["lr"])
        beta1, beta2 = map(float, group["betas"])
        # m' / (sqrt(v') + eps), with the corrections taken out of the row's loop.
        root = math.sqrt(1 - beta2**step)
        facts = lr * root / (1 - beta1**step), 1 - beta1, 1 - beta2, group["eps"] * root
        return decay.adamw, tuple(map(np.float32, (*facts, 1 - lr * float(group["weight_decay"]))))
