"""TableModule: what Embedding and EmbeddingBag share, a module's face on a table that is on disk."""

import os
import shutil
from typing import Any, Literal, Never, Self

import numpy as np
import torch
from torch import nn

from bigembed.cache.stack import DEFAULT_PREFETCH_BYTES
from bigembed.errors import InvalidArgument, TableExists
from bigembed.init import InitialValues
from bigembed.nn.conversions import converted, refuse_weight
from bigembed.nn.copies import TableCopies
from bigembed.nn.graph_key import GraphKey
from bigembed.nn.ids import checked_ids
from bigembed.nn.max_norm import check_writable
from bigembed.nn.options import (
    SMALL_TABLE_ROW_BYTES,
    InvalidEmbedding,
    check_norms,
    checked_options,
    checked_padding,
    temporary_path,
)
from bigembed.nn.pending_gradient import pending_gradient
from bigembed.nn.tokens import vocabulary_of
from bigembed.nn.transforms import refuse_script
from bigembed.nn.weight import WeightView
from bigembed.optim.trainable import TrainableTable, trainable_of
from bigembed.storage.create import checked_integer
from bigembed.storage.opened import open_shared
from bigembed.storage.table import Table
from bigembed.vocab.vocabulary import Vocabulary


class TableModule(TableCopies):
    """A module on a table: how it is made and opened, and all of its face but the constructor and `forward`."""

    def _create(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        _weight: torch.Tensor | None,
        *,
        device: Any,
        path: str | os.PathLike[str] | None,
        cache_bytes: int | None,
        host_cache_bytes: int | None,
        init: InitialValues | str | None,
        seed: int | None,
        journal_bytes: int,
        prefetch_bytes: int,
        policy: str,
        rank_local: bool,
        settings: dict[str, Any],
    ) -> None:
        """Become a module on a new table, which is gone again where that fails.

        Args:
            settings: attributes that the class has beside these, set before a subclass's `reset_parameters` is called.
        """
        num_embeddings = checked_integer("num_embeddings", num_embeddings)
        embedding_dim = checked_integer("embedding_dim", embedding_dim)
        padding_idx = checked_padding(padding_idx, num_embeddings)
        if _weight is not None and list(_weight.shape) != [num_embeddings, embedding_dim]:
            raise InvalidEmbedding(
                f"Shape of weight does not match num_embeddings and embedding_dim: _weight has shape "
                f"{tuple(_weight.shape)}; ({num_embeddings}, {embedding_dim}) was expected."
            )
        if seed is None:
            seed = int(torch.randint(0, 1 << 62, (), device="cpu").item())
        options = checked_options(
            device=device,
            cache_bytes=cache_bytes,
            host_cache_bytes=host_cache_bytes,
            prefetch_bytes=prefetch_bytes,
            policy=policy,
            table_bytes=num_embeddings * (4 * embedding_dim + SMALL_TABLE_ROW_BYTES),
        )
        where = path if path is not None else temporary_path()
        facts: dict[str, Any] = {"init": init, "seed": seed, "padding_idx": padding_idx, "is_temporary": path is None}
        limits: dict[str, Any] = {"journal_bytes": journal_bytes, "index_bytes": max(1, options.host_bytes // 4)}
        try:
            table = Table.create(where, num_embeddings, embedding_dim, **facts, **limits)
        except TableExists as error:  # whose advice is that of Table.create
            here = os.path.abspath(os.fsdecode(where))
            raise TableExists(
                f"{here} exists. Open it with {type(self).__name__}.open(path), or choose another path."
            ) from error
        try:
            self._become(trainable_of(table, options), padding_idx)
            self.trainable.rank_local = rank_local
            for name, value in settings.items():
                setattr(self, name, value)
            if _weight is not None:
                self.weight.copy_(_weight)
            elif init is None and type(self).reset_parameters is not TableModule.reset_parameters:
                self.reset_parameters()  # as torch's constructors do; ours has nothing to do on a new table
        except BaseException as error:  # what cannot be used leaves nothing in the way of the next try
            table.__exit__(type(error), error, None)
            shutil.rmtree(table.path, ignore_errors=True)
            raise

    def _become(self, trainable: TrainableTable, padding_idx: int | None) -> None:
        super().__init__()
        self.trainable = trainable
        self.handle = trainable.handle
        self.graph_key = GraphKey(trainable)
        self.padding_idx = padding_idx
        self.max_norm: float | None = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False

    # -- opening --------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        table: str | os.PathLike[str] | Table,
        *,
        mode: Literal["r", "r+"] = "r+",
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        rank_local: bool = False,
        cache_bytes: int | None = None,
        cache_rows: int | None = None,
        journal_bytes: int = 1 << 30,
        prefetch_bytes: int = DEFAULT_PREFETCH_BYTES,
        policy: str = "lru",
        device: Any = None,
        host_cache_bytes: int | None = None,
        device_rows: int | None = None,
    ) -> Self:
        """A module on an existing table, at its last commit; modules on one table share its cache and gradient.

        Args:
            table: a path, or an open Table.
            mode: "r+" to train, "r" to read beside a writer (frozen).
            padding_idx: by default the one the table was made with.
            max_norm, norm_type, scale_grad_by_freq, rank_local: as in the constructor; a table does not keep them.
            cache_bytes, host_cache_bytes, journal_bytes, prefetch_bytes, policy: as in the constructor; what is open
                already keeps its own.
            device: as in the constructor; by default where the table's modules are, if it is open already.
            cache_rows: slots of the host's cache instead of bytes, for experiments.
            device_rows: slots of a cache on the device instead of bytes, for experiments; on the cpu there is one then.

        Raises:
            TableMissing, NotATable, TableLocked, DamagedTable: see Table.open. InvalidArgument: the table is open with
                modules on another device. MaxNormNeedsWriting: max_norm with mode="r".
        """
        check_norms(max_norm, norm_type)
        options = checked_options(
            device=device,
            cache_bytes=cache_bytes,
            host_cache_bytes=host_cache_bytes,
            prefetch_bytes=prefetch_bytes,
            policy=policy,
            cache_rows=cache_rows,
            device_rows=device_rows,
        )
        if not isinstance(table, Table):
            index_bytes = max(1, options.host_bytes // 4)
            table = open_shared(os.fspath(table), mode, journal_bytes=journal_bytes, index_bytes=index_bytes)
        if padding_idx is None:
            padding_idx = table.spec.padding_idx
        module = cls.__new__(cls)
        module._become(trainable_of(table, options), checked_padding(padding_idx, table.shape[0]))
        if device is not None and module.trainable.device != options.device:
            raise InvalidArgument(
                f"{table.path} is open with modules on {module.trainable.device}. Open it without device=..., and move "
                f"all of them with .to({str(options.device)!r})."
            )
        if max_norm is not None:
            check_writable(module.trainable)
        module.max_norm, module.norm_type, module.scale_grad_by_freq = max_norm, norm_type, scale_grad_by_freq
        if rank_local:
            module.trainable.rank_local = True
        return module

    @classmethod
    def _pretrained(
        cls,
        embeddings: Any,
        freeze: bool,
        writes: bool,
        padding_idx: int | None,
        path: str | os.PathLike[str] | None,
        cache_bytes: int | None,
    ) -> Self:
        """What `from_pretrained` of the classes shares; the caller sets what else a module has.

        Args:
            freeze: do not train. writes: whether a table that is opened may be written all the same.
        """
        if isinstance(embeddings, str | os.PathLike):
            if path is not None:
                raise InvalidArgument(f"{embeddings} is opened where it is, not copied: leave path={path!r} out.")
            module = cls.open(
                embeddings, mode="r+" if writes else "r", padding_idx=padding_idx, cache_bytes=cache_bytes
            )
        else:
            given = embeddings if isinstance(embeddings, torch.Tensor) else torch.from_numpy(np.asarray(embeddings))
            if given.dim() != 2:
                raise InvalidEmbedding(f"Embeddings parameter is expected to be 2-dimensional, not {given.dim()}.")
            rows, dim = given.shape
            module = cls(rows, dim, padding_idx=padding_idx, _weight=given, path=path, cache_bytes=cache_bytes)
        module.handle.requires_grad_(not freeze)
        return module

    # -- use ------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def prefetch(self, ids: torch.Tensor) -> None:
        """Start reading the rows of ids (as for `forward`) that are in no cache; returns at once.

        A lookup that comes later takes them from there, or waits for what is still on its way. No result changes, and
        nothing is evicted for it; a prefetch whose lookup never comes is forgotten. At most `prefetch_bytes` of rows
        are held; what finds no room is read by the lookup, as without prefetch. On a device module this waits for the
        device, to ask which rows it holds.

        Raises:
            InvalidIds, RowOutOfRange: as the lookup would.
        """
        self.trainable.prefetch(checked_ids(ids, self.table.shape[0], self.trainable.device))

    @property
    def vocab(self) -> Vocabulary:
        """The table's vocabulary: `vocab.rows(tokens)`, `vocab.tokens(rows)`, `vocab.add(tokens)`.

        Raises:
            NoVocabularyHere: the table has none; also an AttributeError, so `hasattr(emb, "vocab")` asks for it.
        """
        return vocabulary_of(self.table)

    def __getattr__(self, name: str) -> Any:
        """Called where a property has raised an AttributeError too; nn.Module's would forget what it said."""
        return vocabulary_of(self.table) if name == "vocab" else super().__getattr__(name)

    @property
    def table(self) -> Table:
        """The Table on disk."""
        return self.trainable.table

    @property
    def num_embeddings(self) -> int:
        return self.table.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.table.shape[1]

    @property
    def weight(self) -> WeightView:
        """The (V, D) weight: `weight[ids]` reads rows, `weight[ids] = values` writes them."""
        return WeightView(self.trainable)

    @weight.setter
    def weight(self, value: Any) -> None:
        refuse_weight(self)

    def reset_parameters(self) -> None:
        """Every row from N(0, 1), then zeros in row padding_idx; state of an optimizer stays. Cost as `normal_`.

        A subclass's own is called by the constructor, as torch's is, unless `_weight` or `init` is given.
        """
        self.weight.normal_()
        self._fill_padding_idx_with_zero()

    def _fill_padding_idx_with_zero(self) -> None:
        if self.padding_idx is not None and self.weight[self.padding_idx].any():  # else a new table stays unwritten
            self.weight[self.padding_idx] = 0.0

    def pending_gradient(self) -> torch.Tensor | None:
        """A copy of what the next step would apply, sparse (V, D) and coalesced; None where nothing is pending."""
        return pending_gradient(self.trainable)

    def commit(self, note: str = "", payload: Any = None) -> int:
        """Make the table's rows, optimizer state and step count durable; returns the generation's number."""
        return self.table.commit(note, payload)

    def stats(self) -> dict[str, Any]:
        """Counters and sizes by part: the table's, its cache's on the host ("cache") and on a device ("device")."""
        return self.trainable.stats()

    def close(self) -> None:
        """Close the table, for every module on it; uncommitted changes are discarded with a warning."""
        self.table.close()

    def __prepare_scriptable__(self) -> Never:
        """Raises NotAPureFunction: torch.jit.script, which would read on into the table's code."""
        refuse_script()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":  # emb.weight = parameter comes here
            refuse_weight(self)
        super().register_parameter(name, param)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """`.to()`, `.cuda()` and the like: rows are served on the new device, for every module on the table.

        The handle stays the same Parameter, one float32, and the table where it is.
        """
        converted(self, fn)
        return self
