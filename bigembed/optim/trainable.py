"""TrainableTable: a table with its cache, its handle and its pending gradient. All modules on one table share it."""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bigembed.cache.device_stack import make_stack
from bigembed.cache.row_cache import RowCache
from bigembed.cache.stack import CacheOptions, Take
from bigembed.errors import NoOptimizer, StaleGraph, StateMismatch, StorageFailed, TableClosed
from bigembed.kernels.grouping import group_by_row
from bigembed.optim.device_gradient import moved
from bigembed.optim.pending import Gradient, PendingGradient
from bigembed.spec import StateColumns
from bigembed.storage.table import Table

if TYPE_CHECKING:
    from bigembed.optim.optimizer import TableOptimizer


CLASS_NAMES = {"sgd": "SGD", "adamw": "AdamW"}


class Ticket:
    """Held by a forward's graph: while it lives, rows used since its step should stay in the cache.

    Args:
        held: where it stands as long as it lives, its step under its number.
    """

    __slots__ = ("_held", "options", "rollbacks", "step")

    def __init__(self, step: int, rollbacks: int, options: CacheOptions, held: dict[int, int] | None = None) -> None:
        self.step = step
        self.rollbacks = rollbacks
        self.options = options
        self._held = held
        if held is not None:
            held[id(self)] = step

    def __del__(self) -> None:
        if self._held is not None:
            self._held.pop(id(self), None)


class TrainableTable:
    """Look rows up, take their gradients, step.

    Args:
        table: the rows. options: sizes and policy of the caches above them.
    """

    def __init__(self, table: Table, options: CacheOptions) -> None:
        self.table = table
        self._options = options
        self.handle = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=options.device))
        self.pending = PendingGradient(self.handle)
        arrived = weakref.WeakMethod(self.pending.arrived)
        self.handle.register_post_accumulate_grad_hook(lambda _: _call(arrived))
        self.handle.requires_grad_(table.mode == "r+")
        self._tickets: dict[int, int] = {}  # the step of each ticket alive
        self._optimizer: weakref.ref[TableOptimizer] | None = None
        self._rollbacks = table.rollbacks
        self.rank_local = False  # whether other ranks have tables of their own
        self.rebuild_cache()

    def rebuild_cache(self) -> None:
        """New, empty caches for the table as it is now (its rows or their width have changed)."""
        if self._options.has_device_tier and "caches" in self.__dict__:
            self.table.attach_cache(None)  # a device need not have room for the old and the new
            self.caches.staging.drop()
            del self.caches
        self._make_caches(self._options)
        if self._rollbacks != self.table.rollbacks:  # the gradient was of rows that are no more
            self._rollbacks = self.table.rollbacks
            self.pending.drop()
            self.handle.grad = None

    def _make_caches(self, options: CacheOptions) -> None:
        """New caches in place of those there are, whose changed rows the table takes first; or nothing has happened."""
        before = self.__dict__.get("caches")
        caches = make_stack(weakref.proxy(self.table), options, self.table.limits.index_bytes)
        self.table.attach_cache(caches, self.rebuild_cache)
        self.caches = caches
        if before is not None:
            before.staging.drop()

    @property
    def cache(self) -> RowCache:
        """The host's cache."""
        return self.caches.rows

    @property
    def options(self) -> CacheOptions:
        """What the caches were made with."""
        return self._options

    # -- on a device ----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where rows are served."""
        return self._options.device

    @property
    def has_device_tier(self) -> bool:
        """Whether ids and gradients are tensors there, not arrays."""
        return self._options.has_device_tier

    def move(self, **place: Any) -> None:
        """Serve rows on another device from now on: changed rows are written back, the caches begin empty.

        A pending gradient goes along, as torch moves `.grad`; a graph from before is stale.

        Args:
            place: device=..., or other of the CacheOptions that are to change.

        Raises:
            InvalidArgument: no room there. Whatever storing changed rows raises. Nothing has moved then.
        """
        with self.table.mutex:
            self._check_open()
            options = dataclasses.replace(self._options, **place)
            self._make_caches(options)
            self._options = options
            device = options.device if options.has_device_tier else None
            self.pending.move(lambda gradient: moved(gradient, device))
            grad, self.handle.grad = self.handle.grad, None
            self.handle.data = self.handle.data.to(options.device)
            if grad is not None:
                self.handle.grad = grad.to(options.device)

    # -- ahead ----------------------------------------------------------------------------------------------

    def prefetch(self, ids_N: np.ndarray) -> None:
        """Start reading the rows of checked ids that a lookup would have to read; see cache/staging.py."""
        rows_U, _ = group_by_row(ids_N)
        with self.table.mutex:
            self._check_open()
            self.caches.prefetch(rows_U)

    # -- forward --------------------------------------------------------------------------------------------

    def look_up(
        self, ids_N: Any, needs_grad: bool, take: Take | None = None, *, count: bool = True
    ) -> tuple[torch.Tensor, Any, Any, Ticket | None]:
        """The rows of ids: (N, D) float32; and for backward where they are, inverse_N and a ticket.

        Where they are is `Hits`, and inverse_N None, where that is not known yet; not with `take`.

        Args:
            ids_N: int64, a checked array; with a device tier any ids, a tensor there, as rows_U and inverse_N are.
            take: what to make of the rows in place of (N, D), see `CacheStack.look_up`.
            count: whether hits and misses go into `stats`.

        Raises:
            RowOutOfRange: an id, where they are not checked yet.
        """
        with self.table.mutex:
            self._check_open()
            out_ND, located, inverse_N = self.caches.look_up(
                ids_N, take, keep=needs_grad, **self._how_to_fetch(), count=count
            )
            rollbacks, options = self.table.rollbacks, self._options
        ticket = None
        if needs_grad:
            ticket = Ticket(located.step, rollbacks, options, self._tickets)
        return out_ND, located, inverse_N, ticket

    def _how_to_fetch(self) -> dict[str, Any]:
        # A forked child must not evict: it could not store what it evicts.
        admit = self.table.may_write or self.table.mode == "r"
        return {"protect_step": self._protect_step, "admit": admit}

    def _check_open(self) -> None:
        if self.table.is_closed:  # rows that are still in the cache would be served
            raise TableClosed(f"{self.table.path} was closed. Open it again with bigembed.Embedding.open.")

    def _protect_step(self) -> int | None:
        steps = list(self._tickets.values())
        if self.pending.oldest_step is not None:
            steps.append(self.pending.oldest_step)
        return min(steps, default=None)

    # -- backward -------------------------------------------------------------------------------------------

    def add_gradient(self, gradient: Gradient, ticket: Ticket) -> None:
        """Take the gradient of one forward.

        Raises:
            NoOptimizer: nobody would ever apply it. StaleGraph: the table was rolled back since the forward, or
                serves its rows on another device now.
        """
        if ticket.options != self._options:
            raise StaleGraph(
                f"the module on {self.table.path} was moved from {ticket.options.device} to {self.device} between "
                "this graph's forward and its backward. Run the forward again."
            )
        if ticket.rollbacks != self.table.rollbacks:
            raise StaleGraph(
                f"{self.table.path} was rolled back between this graph's forward and its backward, so the gradient "
                "is of rows that are no more. Run the forward again."
            )
        if self.attached is None:
            raise NoOptimizer(
                f"a gradient reached {self.table.path}, but no bigembed optimizer is attached to it, so it would be "
                "lost. Make one first (opt = bigembed.optim.Adagrad(emb, lr=...); torch's own optimizers cannot update "
                "rows on disk), or freeze the table with emb.requires_grad_(False)."
            )
        self.pending.add(gradient)

    # -- step -----------------------------------------------------------------------------------------------

    @property
    def attached(self) -> "TableOptimizer | None":
        """The optimizer that trains this table."""
        return self._optimizer() if self._optimizer is not None else None

    def check_attachable(self, rule: str, reset: bool) -> None:
        """Raises what `attach` would raise, before anything is changed."""
        self.table.check_writable()
        owner = self.table.spec.owner
        if owner not in (None, rule) and not reset and self.table.has_rows:
            named = CLASS_NAMES.get(str(owner)) or "".join(part.title() for part in str(owner).split("_"))
            raise StateMismatch(
                f"the records of {self.table.path} hold the state of {owner}, not of {rule}. Use "
                f"bigembed.optim.{named}, or give that state up with reset_state=True."
            )

    def attach(
        self,
        optimizer: "TableOptimizer",
        columns: Callable[[int, dict[str, Any]], tuple[StateColumns, ...]],
        group: dict[str, Any],
        reset: bool,
    ) -> None:
        """Let `optimizer` train this table from now on; its state columns are made, or found as it left them."""
        spec = self.table.spec
        state = columns(spec.dim, group)
        shape = [(block.name, block.width) for block in state]
        as_it_was = spec.owner == optimizer.rule and [(b.name, b.width) for b in spec.state] == shape
        as_it_was = as_it_was and (self.table.has_rows or spec.state == state)
        untouched = not state and spec.owner in (
            None,
            optimizer.rule,
        )  # a rule without state leaves reserved columns alone
        if reset or not (as_it_was or untouched):
            owner = optimizer.rule if state else None
            with tqdm(total=None, desc=f"state columns for {optimizer.rule}", disable=None, leave=False) as bar:
                self.table.set_state(owner, state, reset=reset, progress=lambda done, total: _show(bar, done, total))
        self._optimizer = weakref.ref(optimizer)

    def step(self, optimizer: "TableOptimizer", group: dict[str, Any]) -> None:
        """Update the pending rows, weight and state, in the cache; rows without room there go to the journal."""
        if self.attached is not optimizer:
            raise NoOptimizer(
                f"this {type(optimizer).__name__} no longer trains {self.table.path}: "
                f"{type(self.attached).__name__} took it over. Step that one."
            )
        found = self.pending.current()
        if found is None:
            return
        gradient, scale = found
        with self.table.mutex:
            self.table.safe_point(len(gradient.rows_U))
            self._check_open()
            located = self.caches.fetch_again(gradient, **self._how_to_fetch())
            steps = int(self.table.scalars.get("step", 0)) + 1
            kernel, args = optimizer._kernel(group, steps)
            self.table.scalars = {"rule": optimizer.rule, "step": steps, **_plain(group)}
            signed = -scale if group.get("maximize") else scale
            # The rows have changed even where storing those past the cache fails: they wait in the cache, and the
            # next lookup, step or commit raises before it changes anything. Raising here would invite a second step.
            with contextlib.suppress(StorageFailed):
                rule = optimizer.device_rule
                self.caches.update(located, kernel, rule, gradient.sums_UD, np.float32(signed), *args)

    def stats(self) -> dict[str, Any]:
        """The table's stats, with those of prefetching and the pending gradient's bytes."""
        stats = self.table.stats()
        stats["device"] = self.caches.device_stats()
        stats["prefetch"] = self.caches.staging.stats()
        stats["pending"]["gradient_bytes"] = self.pending.memory_bytes
        return stats


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """A group's hyperparameters in the form a commit record can hold."""
    plain: dict[str, Any] = {}
    for name, value in group.items():
        value = [_unwrapped(part) for part in value] if isinstance(value, list | tuple) else _unwrapped(value)
        if name != "params" and isinstance(value, int | float | bool | str | list | None):
            plain[name] = value
    return plain


def _unwrapped(value: Any) -> Any:
    """A tensor's or NumPy's number as Python's."""
    return value.item() if isinstance(value, np.generic | torch.Tensor) else value


def _show(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _call(method: "weakref.WeakMethod[Any]") -> None:
    function = method()
    if function is not None:
        function()


def trainable_of(table: Table, options: CacheOptions) -> TrainableTable:
    """The one TrainableTable of a table in this process; made at the first call, whose options count."""
    known = open_trainables.get(id(table))
    if known is None or known.table is not table:
        known = TrainableTable(table, options)
        open_trainables[id(table)] = known
    return known


open_trainables: "weakref.WeakValueDictionary[int, TrainableTable]" = weakref.WeakValueDictionary()
