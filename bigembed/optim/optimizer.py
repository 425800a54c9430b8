"""TableOptimizer: what the rules share. A torch.optim.Optimizer whose parameters are handles of tables."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from bigembed.errors import BigembedError, InvalidArgument
from bigembed.optim.ranks import check_ranks
from bigembed.optim.trainable import TrainableTable
from bigembed.spec import StateColumns


class CannotCopyOptimizer(BigembedError, TypeError):
    """An optimizer was to be copied or pickled."""


class TableOptimizer(torch.optim.Optimizer):
    """Trains the tables of bigembed modules; the rows' state lives in the tables, beside their weights.

    A row that no pending gradient names is not touched, as with torch's sparse optimizers. Schedulers, `state_dict`,
    GradScaler and `clip_grad_norm_` work as with any torch optimizer. The step count travels with the table's
    commits: a new optimizer of the same rule goes on where the table is.

    Args:
        modules: a bigembed module, any nn.Module that holds some, a list of these, or a list of dicts
            {"params": such, "lr": ...}.
        reset_state: give up the state that the tables hold, of whatever rule.

    Raises:
        InvalidArgument: no table among the modules. StateMismatch: the tables hold another rule's state.
        ReadOnlyTable: a table is open with mode="r".
    """

    rule: ClassVar[str]
    device_rule: ClassVar[Callable[..., torch.Tensor]]  # what `_kernel` names, in torch ops

    def __init__(self, modules: Any, defaults: dict[str, Any], reset_state: bool) -> None:
        self._tables: dict[int, TrainableTable] = {}
        self._reset_state = reset_state
        self._attached_groups = 0
        is_groups = isinstance(modules, list | tuple) and modules and isinstance(modules[0], dict)
        super().__init__(modules if is_groups else [{"params": modules}], defaults)
        self._attach()

    def __deepcopy__(self, memo: Any) -> Any:
        raise CannotCopyOptimizer(
            f"a {type(self).__name__} cannot be copied: one optimizer trains a table. Keep its state_dict(), and make "
            "another one for the copy of the module."
        )

    def __reduce__(self) -> Any:
        return self.__deepcopy__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state_dict of an earlier version has fewer hyperparameters
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch's, put there by the line above
                    group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more tables: {"params": modules, "lr": ...}, modules as in the constructor."""
        super().add_param_group({**param_group, "params": self._handles(param_group["params"])})
        if self._attached_groups:
            self._attach()

    def _attach(self) -> None:
        """Take over the tables of the groups that are new: all of them, or none."""
        new = self.param_groups[self._attached_groups :]
        try:
            for group in new:
                self._check(group)
                for handle in group["params"]:
                    self._tables[id(handle)].check_attachable(self.rule, self._reset_state)
        except BaseException:
            del self.param_groups[self._attached_groups :]
            raise
        for group in new:
            for handle in group["params"]:
                self._tables[id(handle)].attach(self, self.state_columns, group, self._reset_state)
        self._attached_groups = len(self.param_groups)

    def _handles(self, modules: Any) -> list[nn.Parameter]:
        """The handles of the tables in `modules`, each once."""
        found = {id(t.handle): t for t in _tables_in(modules)}
        if not found:
            raise InvalidArgument(
                f"{type(modules).__name__} holds no bigembed module. Pass the Embedding, or a module that contains it."
            )
        self._tables.update(found)
        return [table.handle for table in found.values()]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every row with a pending gradient, by one fused kernel a table.

        Raises:
            NoOptimizer: a newer optimizer has taken the table over. RanksWouldDiverge: see `optim.ranks`.
        """
        for table in self._tables.values():
            check_ranks(table)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for handle in group["params"]:
                self._tables[id(handle)].step(self, group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the pending gradients."""
        for group in self.param_groups:
            for handle in group["params"]:
                self._tables[id(handle)].pending.zero(set_to_none)

    # -- what a rule says -----------------------------------------------------------------------------------

    def _check(self, group: dict[str, Any]) -> None:
        """Raises InvalidArgument for hyperparameters that cannot be."""
        if not float(group["lr"]) >= 0.0:
            raise InvalidArgument(f"lr must be at least 0, not {group['lr']}.")

    @classmethod
    def state_columns(cls, dim: int, group: dict[str, Any]) -> tuple[StateColumns, ...]:
        """The state that a row of `dim` weights keeps."""
        raise NotImplementedError

    def _kernel(self, group: dict[str, Any], step: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The rule's kernel for step number `step` (from 1), and its arguments after `scale`."""
        raise NotImplementedError


def _tables_in(modules: Any) -> Iterable[TrainableTable]:
    if isinstance(modules, nn.Module):
        for module in modules.modules():
            trainable = getattr(module, "trainable", None)
            if isinstance(trainable, TrainableTable):
                yield trainable
    elif isinstance(modules, Iterable):
        for module in modules:
            if not isinstance(module, nn.Module):
                raise InvalidArgument(
                    f"a {type(module).__name__} is no module. bigembed's optimizers take modules (opt = SGD(emb)), "
                    "not parameters: dense parameters need an optimizer of torch's own."
                )
            yield from _tables_in(module)
    else:
        raise InvalidArgument(f"a {type(modules).__name__} is no module; pass the Embedding.")
