"""PendingGradient: the gradient of a table between backward and step, as (rows, summed gradient rows).

The handle's `grad` stands for it in torch's eyes: after each backward it is the gradient's 2-norm, so scaling it scales
the gradient (clipping, loss scaling), and None or 0 there means that nothing is pending.
"""

import math
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import nn

from bigembed import threads
from bigembed.cache.located import Located
from bigembed.kernels.grouping import group_by_row, square_by_block, sum_by_row
from bigembed.kernels.matching import first_place, replaced_by_last
from bigembed.kernels.rules import scale_rows


class Gradient(Protocol):
    """A sum of gradients by row: RowGradient, or DeviceRowGradient with tensors for arrays."""

    rows_U: Any
    sums_UD: Any
    step: int

    def norm(self) -> float | torch.Tensor: ...
    def plus(self, other: Self) -> Self: ...
    def scale(self, factor: float) -> None: ...
    @property
    def memory_bytes(self) -> int: ...


@dataclass
class RowGradient:
    """Distinct rows_U and the sum of each one's gradients, float32 sums_UD; `step` is the oldest forward's.

    squares_B: their sums of squares by block of rows, float64; None where they are not known.
    located: where the cache has these rows, None where that is not known.
    """

    rows_U: np.ndarray
    sums_UD: np.ndarray
    step: int
    squares_B: np.ndarray | None = None
    located: Located | None = None

    def norm(self) -> float:
        """The 2-norm as a float32, added up in float64 in a fixed order: the same for any thread count."""
        if self.squares_B is None:
            self.squares_B = square_by_block(self.sums_UD)
        with np.errstate(over="ignore"):  # past float32's range it is inf, as torch's norm would be
            return float(np.float32(math.sqrt(float(self.squares_B.sum()))))

    @classmethod
    def summed(
        cls,
        grad_XD: torch.Tensor,
        rows_U: np.ndarray,
        inverse_N: np.ndarray,
        step: int,
        *,
        padding_idx: int | None = None,
        located: Located | None = None,
        source_N: np.ndarray | None = None,
        factor_N: np.ndarray | None = None,
    ) -> "RowGradient":
        """From the gradient at each position.

        Args:
            padding_idx: this row gets none.
            source_N, factor_N: as in `kernels.grouping.sum_by_row`.
        """
        without = -1 if padding_idx is None else first_place(rows_U, padding_idx)
        given = grad_XD.numpy(), inverse_N, len(rows_U), source_N, factor_N
        sums_UD, squares_B = sum_by_row(*given, without=without)
        if without >= 0:  # the last row takes its place: no other one moves
            sums_UD[without] = sums_UD[-1]
            rows_U, sums_UD = replaced_by_last(rows_U, without), sums_UD[:-1]
            located = None if located is None else located.without(without, rows_U)
        return cls(rows_U, sums_UD, step, squares_B, located)

    def plus(self, other: "RowGradient") -> "RowGradient":
        """`add_gradients`."""
        return add_gradients(self, other)

    def scale(self, factor: float) -> None:
        """Multiply it, in place."""
        threads.run(scale_rows, len(self.rows_U), self.sums_UD, np.float32(factor))
        self.squares_B = square_by_block(self.sums_UD)

    @property
    def memory_bytes(self) -> int:
        return self.rows_U.nbytes + self.sums_UD.nbytes


def add_gradients(first: RowGradient, second: RowGradient) -> RowGradient:
    """Their sum; rows in order of first mention."""
    both = np.concatenate([first.rows_U, second.rows_U])
    rows_U, inverse_N = group_by_row(both)
    sums_UD, squares_B = sum_by_row(np.concatenate([first.sums_UD, second.sums_UD]), inverse_N, len(rows_U))
    return RowGradient(rows_U, sums_UD, min(first.step, second.step), squares_B)


class PendingGradient:
    """What has been added since the handle's grad was last None or 0.

    Args:
        handle: the parameter whose grad shows the norm.
    """

    def __init__(self, handle: nn.Parameter) -> None:
        self._handle = handle
        self._kept: Gradient | None = None
        self._norm_shown: float | torch.Tensor = 0.0  # on a device a tensor, for which nobody waits yet
        self._incoming: dict[tuple[int, int], list[Gradient]] = {}  # by thread and autograd's number of the pass
        self._mutex = threading.RLock()

    def add(self, gradient: Gradient) -> None:
        """Take a gradient during a backward pass; it counts once autograd reaches the handle.

        A pass that fails before that leaves nothing, as it leaves no `.grad` in a dense parameter.
        """
        with self._mutex:
            if self._handle.grad is None:
                self._kept, self._norm_shown = None, 0.0
            self._incoming.setdefault(this_pass(), []).append(gradient)

    def arrived(self) -> None:
        """Autograd has reached the handle: merge what the pass brought, and show the norm in the handle's grad."""
        with self._mutex:
            here = this_pass()
            incoming = self._incoming.pop(here, None)
            # Of this thread, lower numbers may be passes that this one runs inside of (reentrant checkpoints); higher
            # ones have failed.
            self._forget_passes(lambda other: other[0] == here[0] and other[1] > here[1])
            if incoming is None:
                return
            grad = self._handle.grad
            assert grad is not None
            kept = self._settled(grad)
            total = incoming[0]
            for gradient in incoming[1:]:
                total = total.plus(gradient)
            self._kept = total if kept is None else kept.plus(total)
            self._norm_shown = self._kept.norm()
            with torch.no_grad():
                grad.fill_(self._norm_shown)

    def _forget_passes(self, is_over: Callable[[tuple[int, int]], bool]) -> None:
        self._incoming = {key: brought for key, brought in self._incoming.items() if not is_over(key)}

    def _settled(self, grad: torch.Tensor) -> Gradient | None:
        """What is kept, scaled by what the user did to the handle's grad since."""
        if self._kept is None:
            return None
        scale = self._scale(*self._read(grad))
        if scale == 0.0:
            return None
        if scale != 1.0:
            self._kept.scale(scale)
        return self._kept

    def _read(self, grad: torch.Tensor) -> tuple[float, float]:
        """(what the handle's grad holds, the norm that was put there). Waits for the device, once."""
        if isinstance(self._norm_shown, float):
            return float(grad.detach()), self._norm_shown
        shown, norm = torch.cat([grad.detach().reshape(1), self._norm_shown.reshape(1)]).tolist()
        return shown, norm

    @staticmethod
    def _scale(shown: float, norm: float) -> float:
        if shown == norm or (math.isnan(shown) and math.isnan(norm)):
            return 1.0
        if norm == 0.0:  # every sum is zero and stays so, whatever finite number somebody put into the handle's grad
            return 1.0 if math.isfinite(shown) else math.nan
        return shown / norm

    def current(self) -> tuple[Gradient, float] | None:
        """The pending gradient and the factor it is to be taken with; None when there is none."""
        here = threading.get_ident()
        with self._mutex:
            if self._incoming:  # this thread is in no pass, and nor is one that has ended: those have failed
                running = sys._current_frames().keys() - {here}
                self._forget_passes(lambda other: other[0] not in running)
            grad = self._handle.grad
            if grad is None:
                self._kept, self._norm_shown = None, 0.0
            if grad is None or self._kept is None:
                return None
            shown, norm = self._read(grad)
            scale = self._scale(shown, norm)
            cleared = shown == 0.0 and norm != 0.0
            return None if cleared else (self._kept, scale)

    def zero(self, set_to_none: bool) -> None:
        """What `zero_grad` does to the handle; with `set_to_none` what is pending is dropped, in the same moment."""
        with self._mutex:
            if set_to_none:
                self._handle.grad = None
                self.drop()
            elif self._handle.grad is not None:
                self._handle.grad = torch.zeros_like(self._handle.grad)

    def move(self, moved: Callable[[Gradient], Gradient]) -> None:
        """What is pending is of rows that are served elsewhere from now on."""
        with self._mutex:
            self._incoming = {}
            self._norm_shown = float(self._norm_shown)
            if self._kept is not None:
                self._kept = moved(self._kept)

    def drop(self) -> None:
        with self._mutex:
            self._kept, self._norm_shown, self._incoming = None, 0.0, {}

    @property
    def oldest_step(self) -> int | None:
        """The cache step of the oldest forward that contributed."""
        return self._kept.step if self._kept is not None else None

    @property
    def memory_bytes(self) -> int:
        kept = [] if self._kept is None else [self._kept]
        every = kept + [gradient for brought in self._incoming.values() for gradient in brought]
        return sum(gradient.memory_bytes for gradient in every)


def this_pass() -> tuple[int, int]:
    return threading.get_ident(), torch._C._current_graph_task_id()
