"""Copies of a module: a plain one in memory, a deep one on a table of its own, and one that reads in another process.

A table has one writer. So a pickled module comes back as a reader of the table as of its last commit, and only a
temporary table is copied with its module: to copy a table that has a path is a decision (where to, how large).
"""

import copy
import multiprocessing
import warnings
from collections import OrderedDict
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from bigembed.cache.stack import CacheOptions
from bigembed.errors import BigembedError, InvalidArgument
from bigembed.nn.options import temporary_path
from bigembed.nn.state import TableState, has_changes
from bigembed.nn.weight import row_blocks
from bigembed.optim.trainable import TrainableTable, trainable_of
from bigembed.storage.copy import copy_table
from bigembed.storage.opened import open_shared
from bigembed.storage.table import Table

OF_THE_TABLE = frozenset(["trainable", "graph_key"])  # attributes that a module on another table has of its own


class CannotCopy(BigembedError, TypeError):
    """A module was to be copied or pickled (torch users catch TypeError for what cannot be pickled)."""


class OtherTable(BigembedError, RuntimeError):
    """A pickled module's path holds another table now; or parameters of a copy were averaged, which reaches no row."""


# -- in memory --------------------------------------------------------------------------------------------------


def plain_embedding(
    module: Any, rows: Any = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> nn.Embedding:
    """A plain nn.Embedding with the module's rows, all of them or those given; see TableModule.to_nn_embedding."""
    weight = module.weight
    index_V = None if rows is None else weight._rows(rows)
    if index_V is not None and index_V.ndim != 1:
        raise InvalidArgument(f"rows must be a slice, a list or a 1-D tensor, not {type(rows).__name__} {rows!r}.")
    count, dim = weight.shape[0] if index_V is None else len(index_V), weight.shape[1]
    padding_idx = module.padding_idx
    if index_V is not None and padding_idx is not None:
        found = np.flatnonzero(index_V == padding_idx)
        padding_idx = int(found[0]) if len(found) else None
    place = weight.device if device is None else device
    plain = nn.Embedding(
        count,
        dim,
        padding_idx,
        module.max_norm,
        module.norm_type,
        module.scale_grad_by_freq,
        module.sparse,
        _weight=torch.empty(count, dim, dtype=dtype or weight.dtype, device=place),
    )
    with torch.no_grad():
        for first, last in row_blocks(count, dim):
            part = weight[first:last] if index_V is None else weight[index_V[first:last]]
            plain.weight[first:last] = part.as_subclass(torch.Tensor)
    return plain.train(module.training).requires_grad_(weight.requires_grad)


# -- what goes along --------------------------------------------------------------------------------------------


def own_state(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module that are not its table's: flags, hooks, what a subclass or a user has put there.

    Raises:
        OtherTable: the module is a copy whose parameters were averaged; its copy could no longer tell.
    """
    state = {name: value for name, value in module.__dict__.items() if name not in OF_THE_TABLE}
    state["_parameters"] = {name: value for name, value in module._parameters.items() if name != "handle"}
    state["_forward_pre_hooks"] = hooks = OrderedDict(module._forward_pre_hooks)
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, RefuseAverages):
            hook(module, ())
            del hooks[key]
    return state


def with_handle(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """What `own_state` gave, for a module that is on a table already."""
    return {**state, "_parameters": {"handle": module._parameters["handle"], **state["_parameters"]}}


# -- deep -------------------------------------------------------------------------------------------------------


def deep_copy(module: Any, memo: dict[int, Any]) -> TrainableTable:
    """The table for a deep copy of the module: for a reader the same one, for a temporary table a copy of it.

    Two modules on one table have copies on one table.

    Raises:
        CannotCopy: the table has a path and may be written. DiskFull: no room for the copy.
    """
    trainable, table = module.trainable, module.table
    if table.mode == "r":
        return trainable
    if id(trainable) in memo:
        return memo[id(trainable)]
    if not table.is_temporary:
        raise CannotCopy(
            f"a module on {table.path} cannot be deep-copied: the copy would need a second table of that size, and its "
            "place is yours to choose: bigembed.copy_table(path, new_path), then "
            f"{type(module).__name__}.open(new_path). To read the same rows elsewhere use open(path, mode='r'). A "
            "model average (AveragedModel) reaches no rows: average the other modules alone."
        )
    path = temporary_path()
    with table.mutex:
        store_changes(table)
        copy_table(table.path, path)
    limits = {"journal_bytes": table.limits.journal_bytes, "index_bytes": table.limits.index_bytes}
    copied = trainable_of(Table.open(path, is_temporary=True, **limits), trainable.options)
    copied.handle.requires_grad_(trainable.handle.requires_grad)
    memo[id(trainable)], memo[id(trainable.handle)] = copied, copied.handle
    return copied


def store_changes(table: Table) -> None:
    """Commit what is not committed, as the table does by itself; the last explicit commit stays restorable."""
    with table.mutex:
        if table.mode == "r+" and has_changes(table):
            table.check_writable()
            table._commit("auto", None, explicit=False)


class RefuseAverages:
    """A forward pre-hook of deep copies: an average of parameters (AveragedModel) would leave their rows as copied.

    It knows by the handle's version, which every write through `detach()` or under `no_grad` moves on; and as writes
    through `.data` do not, by its sign: a copy's handle is -0.0, which any mean with the 0.0 of another handle loses.
    A table that an optimizer trains is no average: its parameters may be written to, as torch's optimizers do to
    all there are. It misses what is written through `.data` to a copy of a copy from that copy (both are -0.0), and a
    compiled graph could not hold it and passes it over.
    """

    def __init__(self, handle: torch.Tensor) -> None:
        handle.data.fill_(-0.0)
        self._version = _version(handle)

    def __call__(self, module: Any, args: Any) -> None:
        if torch.compiler.is_compiling() or module.trainable.attached is not None:
            return
        handle = module.handle
        if _version(handle) != self._version or not torch.signbit(handle.detach()).all():
            raise OtherTable(
                f"the parameters of this copy of a module were written to, as AveragedModel does, but its {module} has "
                "its rows on disk: they are as they were when it was copied. Average the other modules alone, and give "
                "the average this module as it is."
            )


def _version(handle: torch.Tensor) -> int:
    return 0 if handle.is_inference() else handle._version


# -- in another process -----------------------------------------------------------------------------------------


def pickled(module: Any) -> tuple[Any, ...]:
    """What `__reduce__` returns: open the table as a reader, then `own_state`. Changes are committed first."""
    table, options = module.table, module.trainable.options
    if table.is_temporary and multiprocessing.context.get_spawning_popen() is None:
        raise CannotCopy(
            "a module on a temporary table cannot be pickled: the table goes with the module, so nothing could load "
            "it. Make the module with path=..., or save to_nn_embedding(). (A process that is started while the "
            "module lives can be given it.)"
        )
    store_changes(table)
    sizes = {"host_bytes": options.host_bytes, "cache_rows": options.cache_rows}
    sizes |= {"prefetch_bytes": options.prefetch_bytes, "policy": options.policy}
    return reopened, (type(module), table.path, table.spec.salt, table.generation, sizes), own_state(module)


def reopened(kind: Any, path: str, salt: int, generation: int, sizes: dict[str, Any]) -> Any:
    """The module that was pickled, on the host, frozen, with the table as of its last commit.

    Raises:
        TableMissing: the table is not at its path. OtherTable: another one is there.
    """
    options = CacheOptions(**sizes)
    table = open_shared(path, "r", index_bytes=max(1, options.host_bytes // 4))
    if table.spec.salt != salt:
        raise OtherTable(
            f"{path} holds another table than the one this module was pickled with. Put that one back, or open a table "
            f"with {kind.__name__}.open(path) and load a state_dict."
        )
    if table.generation < generation:
        table.refresh()  # this process read it before
    if table.generation != generation and multiprocessing.parent_process() is None:
        warnings.warn(
            f"the module was pickled at generation {generation} of {path}, which is at {table.generation} now: its "
            "rows are those of now. To go back, save state_dict() and load it.",
            stacklevel=2,
        )
    module = kind.__new__(kind)
    module._become(trainable_of(table, options), table.spec.padding_idx)
    return module


# -- the module's part ------------------------------------------------------------------------------------------


class TableCopies(TableState):
    """How a TableModule is copied and pickled."""

    def to_nn_embedding(
        self, rows: Any = None, *, dtype: torch.dtype | None = None, device: Any = None
    ) -> nn.Embedding:
        """A plain nn.Embedding with these rows in memory, and this module's options.

        Args:
            rows: which ones, in this order: a slice, a list, a 1-D tensor or array of ids, or a mask; None for all V.
                Row i of the result is the i-th of them; padding_idx goes along where it is among them.
            dtype: torch.float32 by default. device: by default this module's.

        Raises:
            RowOutOfRange: an id is no row. RuntimeError: no memory for them (torch's).
        """
        return plain_embedding(self, rows, dtype=dtype, device=device)

    def __reduce__(self) -> Any:
        """Pickled for another process, or by torch.save(model): there it reads the table, frozen. Commits first."""
        return pickled(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(with_handle(self, state))

    def __copy__(self) -> Self:
        """Another module with the same table and handle."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A module on a copy of a temporary table; of a reader one on the same table; otherwise CannotCopy."""
        trainable = deep_copy(self, memo)
        copied: Any = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied._become(trainable, self.padding_idx)
        copied.__setstate__(copy.deepcopy(own_state(self), memo))
        if trainable is not self.trainable:
            copied.register_forward_pre_hook(RefuseAverages(copied.handle))
        return copied
