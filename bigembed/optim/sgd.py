"""SGD over the rows of a batch, with or without momentum."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bigembed.errors import InvalidArgument, StateMismatch
from bigembed.kernels import momentum, rules
from bigembed.optim import device_rules
from bigembed.optim.hyperparameters import at_least
from bigembed.optim.optimizer import TableOptimizer
from bigembed.spec import StateColumns


class SGD(TableOptimizer):
    """w -= lr * g for every row with a pending gradient; equals torch.optim.SGD on sparse gradients.

    With weight decay g += weight_decay * w first. With momentum b = momentum * b + (1 - dampening) * g, then
    w -= lr * b, or with nesterov w -= lr * (g + momentum * b); at a row's first gradient b = g. maximize turns g
    around before all this.

    A row without a gradient keeps w and b as they are: it neither decays nor glides on. A row with a gradient in
    every step goes where torch.optim.SGD takes it.

    Momentum takes D float32 columns of the record, with dampening one more, which says whether the row's b was ever
    set. They are made with the optimizer: momentum may change later (schedulers cycle it), but not start from 0.

    Args:
        modules: see TableOptimizer. lr: learning rate. momentum: how much of b stays, 0 for none.
        dampening: how much of g stays out of b. weight_decay: times w added to g. nesterov: look ahead.
        maximize: climb instead.

    Raises:
        InvalidArgument: one is below 0, or nesterov without momentum or with dampening.

    Note:
        torch.optim.SGD with momentum or decay on `nn.Embedding` moves every row at every step.
    """

    rule = "sgd"
    device_rule = staticmethod(device_rules.sgd)

    def __init__(
        self,
        modules: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        reset_state: bool = False,
    ) -> None:
        facts = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(modules, {**facts, "nesterov": nesterov, "maximize": maximize}, reset_state)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        at_least(0.0, group, "momentum", "weight_decay")
        if group["nesterov"] and not (group["momentum"] > 0 and group["dampening"] == 0):
            raise InvalidArgument(
                "nesterov needs a momentum above 0 and no dampening, not "
                f"momentum {group['momentum']} and dampening {group['dampening']}."
            )
        self._check_columns(group)

    def _check_columns(self, group: dict[str, Any]) -> None:
        """Raises StateMismatch where rows have momentum already, but dampening comes or goes."""
        wanted = [block.name for block in self.state_columns(1, group)]
        for handle in group["params"]:
            table = self._tables[id(handle)].table
            found = [block.name for block in table.spec.state]
            has_momentum = table.spec.owner == self.rule and table.has_rows and not self._reset_state
            if has_momentum and wanted and found != wanted:
                before, now = ("dampening", "none") if "is_set" in found else ("no dampening", "some")
                raise StateMismatch(
                    f"the rows of {table.path} were trained by SGD with momentum and {before}, and with {now} they "
                    "need other columns. Keep it as it was, or give their momentum up with reset_state=True."
                )

    @classmethod
    def state_columns(cls, dim: int, group: dict[str, Any]) -> tuple[StateColumns, ...]:
        if not group.get("momentum"):
            return ()
        buffer = StateColumns("momentum_buffer", dim)
        return (buffer, StateColumns("is_set", 1)) if group.get("dampening") else (buffer,)

    def _kernel(self, group: dict[str, Any], step: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        lr, decay = np.float32(float(group["lr"])), np.float32(float(group["weight_decay"]))
        factor = np.float32(float(group["momentum"]))
        if factor:
            has_flag = self._has_flag(group)
            kept = np.float32(1 - float(group["dampening"]))
            return momentum.sgd_momentum, (lr, decay, factor, kept, bool(group["nesterov"]), has_flag)
        return (momentum.sgd_decayed, (lr, decay)) if decay else (rules.sgd, (lr,))

    def _has_flag(self, group: dict[str, Any]) -> bool:
        """Whether the records say which rows have momentum.

        Raises:
            StateMismatch: they have no place for what the group asks for by now.
        """
        wanted = self.state_columns(1, group)
        for handle in group["params"]:
            table = self._tables[id(handle)].table
            blocks = [block.name for block in table.spec.state] if table.spec.owner == self.rule else []
            for block in wanted:
                if block.name not in blocks:
                    name = "momentum" if block.name == "momentum_buffer" else "dampening"
                    raise StateMismatch(
                        f"{name} is {group[name]} now, but it was 0 when this SGD was made, so the records of "
                        f"{table.path} have no column for it. Make the optimizer with some {name}, or leave it at 0 "
                        "(a scheduler may have set it: cycle_momentum=False)."
                    )
        return "is_set" in blocks
