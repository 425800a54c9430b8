"""How a compiled graph names a table: what its operators share, see compiled.py.

A graph holds tensors, not tables, so a table has a number, in a tensor of no dimension. That is an input of the graph
and no constant in it, so one graph serves every module of the same kind, and the next process too where the compiler
keeps graphs on disk. What a lookup knows for its backward goes through the graph as a tensor too: the stamp.
"""

import itertools
import secrets
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from bigembed.cache.stack import CacheOptions
from bigembed.errors import BigembedError, TableClosed
from bigembed.nn.transforms import check_hooks
from bigembed.optim.pending import this_pass
from bigembed.optim.trainable import Ticket, TrainableTable

_numbers = itertools.count(secrets.randbits(62))  # another process's numbers name no table here
_tables: "weakref.WeakValueDictionary[int, TrainableTable]" = weakref.WeakValueDictionary()
_places: list[CacheOptions] = []  # every one that rows were served with; a stamp says which
_mutex = threading.Lock()


class BackwardInGraph(BigembedError, RuntimeError):
    """A graph was to run `backward` itself, where no autograd pass tells the handle that a gradient arrived."""


class GraphKey:
    """What a module hands to a graph in place of its table: the table's number, never used twice, and its dim."""

    def __init__(self, trainable: TrainableTable) -> None:
        number = next(_numbers)
        _tables[number] = trainable
        self.key = torch.tensor(number, dtype=torch.int64, device="cpu")
        self.dim = trainable.table.shape[1]


def table_of(key: torch.Tensor) -> TrainableTable:
    """The table that a graph means.

    Raises:
        TableClosed: this process has none of that number.
    """
    trainable = _tables.get(int(key))
    if trainable is None:
        raise TableClosed(
            f"a compiled graph asks for table number {int(key)}, which this process does not have: its module is gone, "
            "or the graph comes from another process. Compile the model again, with the module in it."
        )
    return trainable


# -- operators --------------------------------------------------------------------------------------------------

# Host code runs in the operators, which a CUDA graph would leave out when it is replayed. The tag says so; of effectful
# operators the compiler does not ask it, but keeps out of such graphs what has a first tensor on the host: the key.
_TAGS = [tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None)) is not None]


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the operator `bigembed::name`, which changes no tensor it is given. Its first one is the key.

    Compilers keep graphs on disk under the names of operators, with the backward that they had: one whose backward or
    effect changes needs a new name.
    """
    tags: dict[str, Any] = {"tags": _TAGS} if _TAGS else {}
    return torch.library.custom_op(f"bigembed::{name}", mutates_args=(), **tags)


def register_effect(name: str) -> None:
    """No pass of the compiler may drop this operator, run it twice, merge two, or change the order of such."""
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

    _register_effectful_op(getattr(torch.ops.bigembed, name).default, _EffectType.ORDERED)


# -- from forward to backward -----------------------------------------------------------------------------------


def stamp_of(ticket: Ticket) -> torch.Tensor:
    """What a ticket says but its step, int64 (2,): rollbacks so far, and where rows are served.

    The step would be another one each time, and a lookup could not be said to be pure.
    """
    with _mutex:
        if ticket.options not in _places:
            _places.append(ticket.options)
        place = _places.index(ticket.options)
    return torch.tensor([ticket.rollbacks, place], dtype=torch.int64, device="cpu")


def empty_stamp() -> torch.Tensor:
    """For the compiler: one of unknown content."""
    return torch.empty(2, dtype=torch.int64, device="cpu")


def ticket_of(stamp: torch.Tensor, step: int) -> Ticket:
    """The ticket again, for TrainableTable.add_gradient."""
    rollbacks, place = stamp.tolist()
    return Ticket(step, rollbacks, _places[place])


# A ticket protects rows used since its step while it lives. In a graph they are protected from the backward on, by the
# pending gradient: from the first lookup since the gradient before it. No bit depends on that.
_steps: "weakref.WeakKeyDictionary[TrainableTable, tuple[int | None, int]]" = weakref.WeakKeyDictionary()


def looked_up_at(trainable: TrainableTable, step: int) -> None:
    """A lookup that a backward is expected for."""
    with _mutex:
        oldest, _ = _steps.get(trainable, (None, 0))
        _steps[trainable] = (step if oldest is None else oldest, step)


def oldest_step(trainable: TrainableTable) -> int:
    """The step that a gradient protects from; the next gradient's lookups are yet to come."""
    with _mutex:
        oldest, latest = _steps.get(trainable, (None, 0))
        _steps[trainable] = (None, latest)
        return latest if oldest is None else oldest


def check_in_pass(trainable: TrainableTable) -> None:
    """For an operator that keeps a gradient. Raises BackwardInGraph: no autograd pass runs it. HookOnHandle: a hook."""
    check_hooks(trainable.handle)
    if torch._C._current_graph_task_id() == -1:
        raise BackwardInGraph(
            f"the graph that looks rows of {trainable.table.path} up was compiled with its backward() inside, so the "
            "gradient would be lost. Call backward() outside of what torch.compile gets, or leave "
            "torch._dynamo.config.trace_autograd_ops False."
        )


def forget_after_pass(trainable: TrainableTable) -> None:
    """A pass that asks for no handle's gradient (torch.autograd.grad of others in the graph) leaves nothing behind."""
    pending, here = trainable.pending, this_pass()

    def forget() -> None:
        with pending._mutex:
            pending._forget_passes(lambda other: other == here)

    torch.autograd.Variable._execution_engine.queue_callback(forget)
