"""Checks of hyperparameters that several rules share."""

from typing import Any

from bigembed.errors import InvalidArgument


def at_least(lowest: float, group: dict[str, Any], *names: str) -> None:
    """Raises InvalidArgument for the first of `names` whose value is below `lowest`, or no number."""
    for name in names:
        if not float(group[name]) >= lowest:
            raise InvalidArgument(f"{name} must be at least {lowest:g}, not {group[name]}.")


def are_betas(group: dict[str, Any]) -> None:
    """Raises InvalidArgument unless betas are two numbers, each at least 0 and below 1."""
    betas = group["betas"]
    if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
        raise InvalidArgument(f"betas must be at least 0 and below 1, not {betas}.")
