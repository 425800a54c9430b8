"""The state columns of a rule by its name: for making a table that an optimizer will attach to for free."""

from bigembed import optim
from bigembed.errors import InvalidArgument
from bigembed.optim.optimizer import TableOptimizer
from bigembed.spec import StateColumns

_OFFERED = {name: getattr(optim, name) for name in optim.__all__}
RULES: dict[str, type[TableOptimizer]] = {
    name: rule for name, rule in _OFFERED.items() if isinstance(rule, type) and issubclass(rule, TableOptimizer)
}


def state_of_rule(name: str, dim: int) -> tuple[str, tuple[StateColumns, ...]]:
    """(owner, state columns) of an optimizer at its defaults, for rows of `dim` weights.

    Raises:
        InvalidArgument: there is no such optimizer; lists those there are.
    """
    if name not in RULES:
        raise InvalidArgument(f"there is no optimizer {name!r}; use one of {', '.join(sorted(RULES))}.")
    rule = RULES[name]
    return rule.rule, rule.state_columns(dim, {"initial_accumulator_value": 0.0})
