"""TrainableTable: a table with its cache, its handle and its pending gradient. All modules on one table share it."""

import contextlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bigembed.cache.row_cache import Located, RowCache
from bigembed.cache.stack import CacheOptions, CacheStack
from bigembed.errors import NoOptimizer, StaleGraph, StateMismatch, StorageFailed, TableClosed
from bigembed.kernels.grouping import group_by_row
from bigembed.optim.pending import PendingGradient, RowGradient
from bigembed.spec import StateColumns
from bigembed.storage.table import Table

if TYPE_CHECKING:
    from bigembed.optim.optimizer import TableOptimizer


class Ticket:
    """Held by a forward's graph: while it lives, rows used since its step should stay in the cache."""

    __slots__ = ("__weakref__", "rollbacks", "step")

    def __init__(self, step: int, rollbacks: int) -> None:
        self.step = step
        self.rollbacks = rollbacks


class TrainableTable:
    """Look rows up, take their gradients, step.

    Args:
        table: the rows. options: sizes and policy of the caches above them.
    """

    def __init__(self, table: Table, options: CacheOptions) -> None:
        self.table = table
        self._options = options
        self.handle = nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))
        self.pending = PendingGradient(self.handle)
        arrived = weakref.WeakMethod(self.pending.arrived)
        self.handle.register_post_accumulate_grad_hook(lambda _: _call(arrived))
        self.handle.requires_grad_(table.mode == "r+")
        self._tickets: weakref.WeakSet[Ticket] = weakref.WeakSet()
        self._optimizer: weakref.ref[TableOptimizer] | None = None
        self._rollbacks = table.rollbacks
        self.rebuild_cache()

    def rebuild_cache(self) -> None:
        """New, empty caches for the table as it is now (its rows or their width have changed)."""
        before = self.__dict__.get("caches")
        self.caches = CacheStack(weakref.proxy(self.table), self._options, self.table.limits.index_bytes)
        self.table.attach_cache(self.caches, self.rebuild_cache)
        if before is not None:
            before.staging.drop()
        if self._rollbacks != self.table.rollbacks:  # the gradient was of rows that are no more
            self._rollbacks = self.table.rollbacks
            self.pending.drop()
            self.handle.grad = None

    @property
    def cache(self) -> RowCache:
        """The cache that serves lookups."""
        return self.caches.rows

    # -- ahead ----------------------------------------------------------------------------------------------

    def prefetch(self, ids_N: np.ndarray) -> None:
        """Start reading the rows of checked ids that a lookup would have to read; see cache/staging.py."""
        rows_U, _ = group_by_row(ids_N)
        with self.table.mutex:
            self._check_open()
            self.caches.prefetch(rows_U)

    # -- forward --------------------------------------------------------------------------------------------

    def look_up(
        self, ids_N: np.ndarray, needs_grad: bool
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray, Ticket | None]:
        """The rows of checked ids: (N, D) float32; and for backward rows_U, inverse_N and a ticket."""
        rows_U, inverse_N = group_by_row(ids_N)
        with self.table.mutex:
            located = self._fetch(rows_U)
            self.caches.looked_up(rows_U)
            out_ND = self.cache.gather(located, inverse_N)
        ticket = None
        if needs_grad:
            ticket = Ticket(located.step, self.table.rollbacks)
            self._tickets.add(ticket)
        return out_ND, rows_U, inverse_N, ticket

    def _fetch(self, rows_U: np.ndarray, count: bool = True) -> Located:
        self._check_open()
        # A forked child must not evict: it could not store what it evicts.
        admit = self.table.may_write or self.table.mode == "r"
        return self.cache.fetch(rows_U, protect_step=self._protect_step(), admit=admit, count=count)

    def _check_open(self) -> None:
        if self.table.is_closed:  # rows that are still in the cache would be served
            raise TableClosed(f"{self.table.path} was closed. Open it again with bigembed.Embedding.open.")

    def _protect_step(self) -> int | None:
        steps = [ticket.step for ticket in self._tickets]
        if self.pending.oldest_step is not None:
            steps.append(self.pending.oldest_step)
        return min(steps, default=None)

    # -- backward -------------------------------------------------------------------------------------------

    def add_gradient(self, gradient: RowGradient, ticket: Ticket) -> None:
        """Take the gradient of one forward.

        Raises:
            NoOptimizer: nobody would ever apply it. StaleGraph: the table was rolled back since the forward.
        """
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

    def drop_pending(self) -> None:
        self.pending.drop()

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
            named = "".join(part.title() for part in str(owner).split("_"))
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
        untouched = not state and spec.owner is None  # a rule without state leaves reserved columns alone
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
            located = self._fetch(gradient.rows_U, count=False)
            steps = int(self.table.scalars.get("step", 0)) + 1
            kernel, args = optimizer._kernel(group, steps)
            self.table.scalars = {"rule": optimizer.rule, "step": steps, **_plain(group)}
            signed = -scale if group.get("maximize") else scale
            # The rows have changed even where storing those past the cache fails: they wait in the cache, and the
            # next lookup, step or commit raises before it changes anything. Raising here would invite a second step.
            with contextlib.suppress(StorageFailed):
                self.cache.update(located, kernel, gradient.sums_UD, np.float32(signed), *args, count_grain=256)

    def stats(self) -> dict[str, Any]:
        """The table's stats, with those of prefetching and the pending gradient's bytes."""
        stats = self.table.stats()
        stats["prefetch"] = self.caches.staging.stats()
        stats["pending"]["gradient_bytes"] = self.pending.memory_bytes
        return stats


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """A group's hyperparameters in the form a commit record can hold."""
    plain: dict[str, Any] = {}
    for name, value in group.items():
        if isinstance(value, torch.Tensor):
            value = value.item()
        if name != "params" and isinstance(value, int | float | bool | str | list | tuple | None):
            plain[name] = list(value) if isinstance(value, tuple) else value
    return plain


def _show(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _call(method: "weakref.WeakMethod[Any]") -> None:
    function = method()
    if function is not None:
        function()


def trainable_of(table: Table, options: CacheOptions) -> TrainableTable:
    """The one TrainableTable of a table in this process; made at the first call, whose options count."""
    known = _trainables.get(id(table))
    if known is None or known.table is not table:
        known = TrainableTable(table, options)
        _trainables[id(table)] = known
    return known


_trainables: "weakref.WeakValueDictionary[int, TrainableTable]" = weakref.WeakValueDictionary()
