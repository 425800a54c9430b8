"""Chained: a table optimizer and a dense one behind the face of one, for trainers that take a single optimizer."""

from collections.abc import Callable
from typing import Any

import torch

from bigembed.errors import InvalidArgument

_SHARED_KEYS = ("state", "param_groups")  # of every optimizer's state_dict


class Chained(torch.optim.Optimizer):
    """Steps several optimizers as one; equals calling each of them in the order given.

    `param_groups` are the parts' own groups in that order, so a scheduler's change reaches the part. GradScaler
    unscales every gradient once and skips all parts together. `state_dict` is that of one optimizer over all groups.

    Args:
        optimizers: the parts, for example a RowwiseAdagrad of the tables and an AdamW of the rest.

    Raises:
        InvalidArgument: no optimizer, something else, one that needs its closure itself (LBFGS), or a parameter that
            two of them hold.

    Example:
        >>> import torch, bigembed
        >>> emb = bigembed.Embedding(1000, 8)
        >>> head = torch.nn.Linear(8, 2)
        >>> opt = bigembed.optim.Chained(bigembed.optim.Adagrad(emb), torch.optim.AdamW(head.parameters()))
        >>> len(opt.param_groups)
        2

    Note:
        A part that raises leaves the parts before it stepped, the parts after it not.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        _check(optimizers)
        self.optimizers = optimizers
        shared = set.intersection(*(set(part.defaults) for part in optimizers))
        # What schedulers ask it for: whether there is momentum to cycle in every group.
        defaults = {name: value for name, value in optimizers[-1].defaults.items() if name in shared}
        # Not Optimizer.__init__, which would put parameters into groups of its own.
        super().__setstate__({"defaults": defaults})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all parts: a new list of the dicts themselves."""
        return [group for part in self.optimizers for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """The state of all parts: a new dict of the entries themselves."""
        return {key: value for part in self.optimizers for key, value in part.state.items()}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every part; the closure is called once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.optimizers:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of every part."""
        for part in self.optimizers:
            part.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: only the caller knows which part the group is for.

        Raises:
            InvalidArgument: always.
        """
        raise InvalidArgument(
            "Chained cannot tell which of its parts a new group is for. Call add_param_group of that part "
            "(chained.optimizers[0].add_param_group(...)); the group shows up here too."
        )

    def state_dict(self) -> dict[str, Any]:
        """As of one optimizer with all the groups: parameters are numbered through."""
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        others = []
        offset = 0
        for part in self.optimizers:
            saved = part.state_dict()
            state.update({_moved(key, offset): value for key, value in saved["state"].items()})
            groups += [{**group, "params": [n + offset for n in group["params"]]} for group in saved["param_groups"]]
            others.append({key: value for key, value in saved.items() if key not in _SHARED_KEYS})
            offset += sum(len(group["params"]) for group in saved["param_groups"])
        joined = {"state": state, "param_groups": groups}
        return {**joined, "chained": others} if any(others) else joined

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give every part what `state_dict` kept of it.

        Raises:
            InvalidArgument: it is of other groups, or of groups of other sizes. Nothing is loaded then.
        """
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in groups]
        own = [len(group["params"]) for group in self.param_groups]
        if sizes != own:
            raise InvalidArgument(
                f"this state_dict has groups of {sizes} parameters, but the chained optimizers have groups of {own}. "
                "Chain the same optimizers in the same order as when it was saved."
            )
        others = state_dict.get("chained", [{}] * len(self.optimizers))
        first, offset = 0, 0
        for part, other in zip(self.optimizers, others, strict=True):
            taken = groups[first : first + len(part.param_groups)]
            count = sum(len(group["params"]) for group in taken)
            its_own = {
                "state": {
                    _moved(key, -offset): value
                    for key, value in state_dict["state"].items()
                    if isinstance(key, int) and offset <= key < offset + count
                },
                "param_groups": [{**group, "params": [n - offset for n in group["params"]]} for group in taken],
            }
            first, offset = first + len(taken), offset + count
            part.load_state_dict({**its_own, **other})

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "defaults": self.defaults}

    def __repr__(self) -> str:
        return f"Chained({', '.join(type(part).__name__ for part in self.optimizers)})"


def _moved(key: Any, by: int) -> Any:
    return key + by if isinstance(key, int) else key


def _check(optimizers: tuple[Any, ...]) -> None:
    if not optimizers:
        raise InvalidArgument("Chained needs at least one optimizer.")
    held: dict[int, str] = {}
    for part in optimizers:
        name = type(part).__name__
        if not isinstance(part, torch.optim.Optimizer):
            raise InvalidArgument(f"a {name} is no optimizer: pass Chained(table_opt, dense_opt), not a list.")
        if isinstance(part, torch.optim.LBFGS):
            raise InvalidArgument("LBFGS calls its closure several times a step, which a table cannot take part in.")
        for parameter in (parameter for group in part.param_groups for parameter in group["params"]):
            if id(parameter) in held:
                raise InvalidArgument(
                    f"{held[id(parameter)]} and {name} share a parameter of shape {tuple(parameter.shape)}, which "
                    "would be stepped twice. The handles of tables belong to the table optimizer alone: give the dense "
                    "one (p for n, p in model.named_parameters() if not n.endswith('handle'))."
                )
            held[id(parameter)] = name
