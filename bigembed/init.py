"""Distributions of initial values: what a row holds before anything was written to it."""

import math
from dataclasses import dataclass

from bigembed.errors import InvalidArgument

KINDS = ("normal", "uniform", "constant")


@dataclass(frozen=True)
class InitialValues:
    """The distribution that never-written rows are drawn from, one value per (seed, row, column).

    Args:
        kind: "normal" (a = mean, b = standard deviation), "uniform" (values in [a, b)) or "constant" (a).
    """

    kind: str
    a: float
    b: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidArgument(f"init kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}.")
        if not (math.isfinite(self.a) and math.isfinite(self.b)):
            raise InvalidArgument(f"init {self.kind} needs finite parameters, not {self.a} and {self.b}.")
        if self.kind == "normal" and self.b < 0:
            raise InvalidArgument(f"init normal needs a standard deviation >= 0, not {self.b}.")
        if self.kind == "uniform" and self.b < self.a:
            raise InvalidArgument(f"init uniform needs low <= high, not {self.a} and {self.b}.")


def normal(mean: float = 0.0, std: float = 1.0) -> InitialValues:
    """Values from N(mean, std^2), as `torch.nn.Embedding` starts with."""
    return InitialValues("normal", float(mean), float(std))


def uniform(low: float = 0.0, high: float = 1.0) -> InitialValues:
    """Values from the uniform distribution over [low, high)."""
    return InitialValues("uniform", float(low), float(high))


def constant(value: float) -> InitialValues:
    """Every value equals `value`."""
    return InitialValues("constant", float(value), 0.0)


def zeros() -> InitialValues:
    """Every value is 0."""
    return constant(0.0)


def as_initial_values(init: "InitialValues | str | None") -> InitialValues:
    """The distribution a user names: an `InitialValues`, "normal", "uniform", "zeros", or None (normal)."""
    if init is None:
        return normal()
    if isinstance(init, InitialValues):
        return init
    named = {"normal": normal, "uniform": uniform, "zeros": zeros}
    if init not in named:
        raise InvalidArgument(
            f"init={init!r} is unknown; use {', '.join(map(repr, named))} or bigembed.init.normal(mean, std) "
            "and its neighbours."
        )
    return named[init]()
