"""The history of hyperparameters that brings a row which missed steps to where a dense optimizer would have left it.

Standing alone: nothing here knows tables, and no optimizer uses it yet. kernels/lazy.py does the mathematics.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np

from bigembed import threads
from bigembed.errors import InvalidArgument
from bigembed.kernels import lazy, step_products


class History:
    """The facts of every step since the last `forget`, as runs of equal steps.

    A run takes 136 bytes or less in memory and about 50 in `scalars`; a constant rate is one run, a rate that changes
    at every step is as many runs as steps.
    """

    is_matrix: ClassVar[bool]
    num_facts: ClassVar[int]  # of a run, as kernels/step_products.py lists them
    kernel: ClassVar[Callable[..., None]]

    def __init__(self) -> None:
        self.steps = 0  # taken so far, those forgotten included
        self._oldest = 0  # no row that ever had a gradient is older than this step
        self._forgotten = step_products.identity(self.is_matrix)  # what the steps before did to the other rows
        self._count = 0
        self._first_R = np.empty(4, np.int64)
        self._facts_RF = np.empty((4, self.num_facts))
        self._whole_R4, self._tree_R4 = np.empty((4, 4)), np.empty((4, 4))
        self._bounds_5 = np.zeros(5)

    def append(self, group: dict[str, Any]) -> None:
        """Note one more step, with the hyperparameters of an optimizer's group.

        Raises:
            InvalidArgument: with these a missed step cannot be made up for.
        """
        self._append(self._facts_of(group))

    def _append(self, facts: tuple[float, ...]) -> None:
        self.steps += 1
        open_run = self._count - 1
        if open_run >= 0 and tuple(self._facts_RF[open_run, : len(facts)]) == facts:
            return
        if open_run >= 0:
            self._close(open_run, self.steps - int(self._first_R[open_run]))
        if self._count == len(self._first_R):
            self._make_room(2 * self._count)
        self._first_R[self._count] = self.steps
        self._facts_RF[self._count] = self._with_powers(facts)
        self._bounds_5 = np.maximum(self._bounds_5, self._bounds_of(facts))
        self._count += 1

    def _close(self, run: int, count: int) -> None:
        step_products.add_run(run, count, self._facts_RF[run], self._whole_R4, self._tree_R4, self.is_matrix)

    def _make_room(self, runs: int) -> None:
        for name in ("_first_R", "_facts_RF", "_whole_R4", "_tree_R4"):
            old = getattr(self, name)
            new = np.empty((runs, *old.shape[1:]), old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)

    def forget(self) -> None:
        """Begin anew after the last step: every row that ever had a gradient has been brought up to it.

        Rows that never had one stay at step 0, so that nobody needs to write them.
        """
        since = step_products.product(self._oldest, self.steps, *self._runs(), self.is_matrix)
        self._forgotten = step_products.times(since, self._forgotten, self.is_matrix)
        self._oldest, self._count, self._bounds_5 = self.steps, 0, np.zeros(5)

    def catch_up(
        self, values_SE: np.ndarray, past_PE: np.ndarray, slots_U: np.ndarray, last_U: np.ndarray, dim: int
    ) -> None:
        """Bring rows, in place, from after step last_U[u] to after the last step; `slots_U` as in kernels/rules.py.

        Args:
            last_U: int64; 0 for a row that never had a gradient.

        Raises:
            InvalidArgument: a row is older than what has been forgotten, or newer than the last step.
        """
        wrong_U = (last_U != 0) & ((last_U < self._oldest) | (last_U > self.steps))
        if wrong_U.any():
            raise InvalidArgument(
                f"a row is of step {last_U[wrong_U][0]}, but the history has steps {self._oldest} to {self.steps}."
            )
        rows = values_SE, past_PE, slots_U, last_U, self.steps, dim
        more = self._bounds_5, self._oldest, self._forgotten
        threads.run(self.kernel, len(last_U), *rows, *self._runs(), *more)

    def _runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        runs = self._count
        return self._first_R[:runs], self._facts_RF[:runs], self._whole_R4[:runs], self._tree_R4[:runs]

    # -- in a commit record -----------------------------------------------------------------------------------

    def scalars(self) -> dict[str, Any]:
        """What `from_scalars` needs, as JSON can hold it, to the last bit."""
        runs, facts = self._count, self._facts_RF[: self._count, : self._num_given()]
        return {
            "steps": self.steps,
            "oldest": self._oldest,
            "forgotten": list(self._forgotten),
            "first": self._first_R[:runs].tolist(),
            "facts": facts.tolist(),
            **self._more_scalars(),
        }

    @classmethod
    def from_scalars(cls, scalars: dict[str, Any]) -> Self:
        """The history that `scalars` is of: every later result has the same bits."""
        history = cls()
        history._oldest, history._forgotten = scalars["oldest"], tuple(scalars["forgotten"])
        for first, facts in zip(scalars["first"], scalars["facts"], strict=True):
            history.steps = first - 1
            history._append(tuple(facts))
        history.steps = scalars["steps"]
        history._take_more(scalars)
        return history

    def _more_scalars(self) -> dict[str, Any]:
        return {}

    def _take_more(self, scalars: dict[str, Any]) -> None:
        pass

    # -- what a rule says -------------------------------------------------------------------------------------

    def _facts_of(self, group: dict[str, Any]) -> tuple[float, ...]:
        raise NotImplementedError

    def _num_given(self) -> int:
        return self.num_facts

    def _with_powers(self, facts: tuple[float, ...]) -> tuple[float, ...]:
        return facts

    def _bounds_of(self, facts: tuple[float, ...]) -> tuple[float, ...]:
        return (0.0,) * 5


class SGDHistory(History):
    """Of torch.optim.SGD with momentum, dampening, nesterov and weight decay on dense gradients. Exact."""

    is_matrix, num_facts = True, 5
    kernel = staticmethod(lazy.catch_up_sgd)

    def __init__(self) -> None:
        super().__init__()
        self.has_buffer = False  # torch makes it, undampened, at the first step with momentum

    def _facts_of(self, group: dict[str, Any]) -> tuple[float, ...]:
        momentum = float(group["momentum"])
        kept = 1 - float(group["dampening"]) if self.has_buffer else 1.0
        self.has_buffer = self.has_buffer or momentum != 0
        return float(group["lr"]), momentum, kept, float(group["weight_decay"]), float(group["nesterov"])

    def _more_scalars(self) -> dict[str, Any]:
        return {"has_buffer": self.has_buffer}

    def _take_more(self, scalars: dict[str, Any]) -> None:
        self.has_buffer = scalars["has_buffer"]


class AdamHistory(History):
    """Of torch.optim.AdamW, or without weight decay Adam, on dense gradients. Factors exact, moves to 1e-6.

    Weight decay of Adam's own kind goes through m and v, which then depend on w at every missed step.
    """

    is_matrix, num_facts = False, 8
    kernel = staticmethod(lazy.catch_up_adam)
    is_decoupled: ClassVar[bool] = False

    def _facts_of(self, group: dict[str, Any]) -> tuple[float, ...]:
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        beta1, beta2 = map(float, group["betas"])
        if decay and not self.is_decoupled:
            raise InvalidArgument(
                f'lazy="exact" cannot make up for steps of Adam with weight_decay {decay}: use AdamW, whose decay does '
                "not pass through the averages, or weight_decay=0."
            )
        if group.get("amsgrad"):
            raise InvalidArgument('lazy="exact" cannot make up for steps with amsgrad: use amsgrad=False.')
        return lr, beta1, beta2, 1 - lr * decay, float(group["eps"])

    def _num_given(self) -> int:
        return 5

    def _with_powers(self, facts: tuple[float, ...]) -> tuple[float, ...]:
        _, beta1, beta2, _, _ = facts
        powers = step_products.integer_power(beta1, self.steps), step_products.integer_power(beta2, self.steps)
        return *facts, *powers, math.sqrt(beta2)

    def _bounds_of(self, facts: tuple[float, ...]) -> tuple[float, ...]:
        lr, beta1, beta2, _, eps = facts
        ratio = 0.0 if beta1 == 0 else math.inf if beta2 == 0 else beta1 / math.sqrt(beta2)
        return lr, ratio, beta1, eps, 1 / eps


class AdamWHistory(AdamHistory):
    """Of torch.optim.AdamW."""

    is_decoupled = True
