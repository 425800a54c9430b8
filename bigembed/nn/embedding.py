"""Embedding: torch.nn.Embedding's face on a table that is on disk."""

import os
import shutil
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from bigembed.cache.stack import DEFAULT_PREFETCH_BYTES
from bigembed.cache.transfer import checked_device
from bigembed.errors import BigembedError, InvalidArgument, TableExists
from bigembed.init import InitialValues
from bigembed.nn.autograd import look_up
from bigembed.nn.ids import checked_ids, ids_on
from bigembed.nn.options import (
    SMALL_TABLE_ROW_BYTES,
    InvalidEmbedding,
    check_supported,
    checked_options,
    checked_padding,
    temporary_path,
)
from bigembed.nn.tokens import embed_tokens
from bigembed.nn.weight import WeightView
from bigembed.optim.trainable import TrainableTable, trainable_of
from bigembed.storage.create import checked_integer
from bigembed.storage.opened import open_shared
from bigembed.storage.table import Table
from bigembed.vocab.vectors import Tokens
from bigembed.vocab.vocabulary import Vocabulary


class CannotCopy(BigembedError, TypeError):
    """A module was to be copied or pickled (torch users catch TypeError for what cannot be pickled)."""


class Embedding(nn.Module):
    """A lookup table of num_embeddings rows of embedding_dim float32, kept on disk; used as `torch.nn.Embedding`.

    Args:
        num_embeddings: V, the rows. embedding_dim: D.
        padding_idx: this row starts as zeros and gets no gradient; negative counts from the end.
        max_norm, norm_type, scale_grad_by_freq: not supported by this version, an error unless at their defaults.
        sparse: accepted; gradients are always kept by row.
        _weight: a (V, D) tensor that the rows start from. _freeze: do not train.
        device: where lookups and updates run: "cpu" (default) or a CUDA device. dtype: torch.float32.
        path: the table's folder, made anew; None is a temporary table that goes with the module.
        cache_bytes: memory for hot rows and the journal's index; by default 256 MiB, or what the whole table takes
            where that is less. With a CUDA device it is memory there, for hot rows; by default 1 GiB.
        host_cache_bytes: with a CUDA device, memory on the host for rows that are less hot, and for the journal's
            index; by default 256 MiB.
        init: what rows hold before they are written: bigembed.init.normal() (default), uniform, zeros, constant.
        seed: decides the initial values; by default drawn from torch's generator.
        journal_bytes: see Table.open.
        prefetch_bytes: memory for rows read ahead, beside cache_bytes; taken only where `prefetch` is used.
        policy: who stays in the host's cache: "lru" (default), "lfu", "sieve", "s3fifo" or "next_use". Changes no
            result.

    Shape:
        ids (*) int32 or int64, on the host or the module's device -> (*, D) float32 on the module's device.

    Raises:
        TableExists: something stands at `path`; open a table with Embedding.open.

    Example:
        >>> import torch, bigembed
        >>> emb = bigembed.Embedding(1_000_000_000, 64, seed=0)
        >>> emb(torch.tensor([[1, 999_999_999]])).shape
        torch.Size([1, 2, 64])

    Note:
        `weight` is a view, not a Parameter; a bigembed optimizer trains it. `emb.commit()` makes changes durable.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        host_cache_bytes: int | None = None,
        init: InitialValues | str | None = None,
        seed: int | None = None,
        journal_bytes: int = 1 << 30,
        prefetch_bytes: int = DEFAULT_PREFETCH_BYTES,
        policy: str = "lru",
    ) -> None:
        check_supported(max_norm, scale_grad_by_freq, dtype)
        num_embeddings = checked_integer("num_embeddings", num_embeddings)
        embedding_dim = checked_integer("embedding_dim", embedding_dim)
        padding_idx = checked_padding(padding_idx, num_embeddings)
        if _weight is not None and list(_weight.shape) != [num_embeddings, embedding_dim]:
            raise InvalidEmbedding(
                f"_weight has shape {tuple(_weight.shape)}; ({num_embeddings}, {embedding_dim}) was expected."
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
            raise TableExists(f"{here} exists. Open it with Embedding.open(path), or choose another path.") from error
        try:
            self._become(trainable_of(table, options), padding_idx, sparse)
            if _weight is not None:
                self.weight.copy_(_weight)
        except BaseException as error:  # what cannot be used leaves nothing in the way of the next try
            table.__exit__(type(error), error, None)
            shutil.rmtree(table.path, ignore_errors=True)
            raise
        if _freeze:
            self.handle.requires_grad_(False)

    def _become(self, trainable: TrainableTable, padding_idx: int | None, sparse: bool = False) -> None:
        super().__init__()
        self.trainable = trainable
        self.handle = trainable.handle
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, sparse

    # -- opening --------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        table: str | os.PathLike[str] | Table,
        *,
        mode: Literal["r", "r+"] = "r+",
        padding_idx: int | None = None,
        cache_bytes: int | None = None,
        cache_rows: int | None = None,
        journal_bytes: int = 1 << 30,
        prefetch_bytes: int = DEFAULT_PREFETCH_BYTES,
        policy: str = "lru",
        device: Any = None,
        host_cache_bytes: int | None = None,
        device_rows: int | None = None,
    ) -> "Embedding":
        """A module on an existing table, at its last commit; modules on one table share its cache and gradient.

        Args:
            table: a path, or an open Table.
            mode: "r+" to train, "r" to read beside a writer (frozen).
            padding_idx: by default the one the table was made with.
            cache_bytes, host_cache_bytes, journal_bytes, prefetch_bytes, policy: as in the constructor; what is open
                already keeps its own.
            device: as in the constructor; by default where the table's modules are, if it is open already.
            cache_rows: slots of the host's cache instead of bytes, for experiments.
            device_rows: slots of a cache on the device instead of bytes, for experiments; on the cpu there is one then.

        Raises:
            TableMissing, NotATable, TableLocked, DamagedTable: see Table.open. InvalidArgument: the table is open with
                modules on another device.
        """
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
        return module

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Any,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        path: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
    ) -> "Embedding":
        """A module with given rows: a (V, D) tensor or array, copied to a table at `path`, or the path of a table.

        Args:
            embeddings: torch.Tensor, np.ndarray, or the path of a table (opened, not copied; mode "r" if frozen).
            freeze: do not train. The others as in the constructor; rows are taken as they are, padding_idx too.
        """
        check_supported(max_norm, scale_grad_by_freq, None)
        if isinstance(embeddings, str | os.PathLike):
            if path is not None:
                raise InvalidArgument(f"{embeddings} is opened where it is, not copied: leave path={path!r} out.")
            module = cls.open(
                embeddings, mode="r" if freeze else "r+", padding_idx=padding_idx, cache_bytes=cache_bytes
            )
        else:
            given = embeddings if isinstance(embeddings, torch.Tensor) else torch.from_numpy(np.asarray(embeddings))
            if given.dim() != 2:
                raise InvalidEmbedding(f"Embeddings parameter is expected to be 2-dimensional, not {given.dim()}.")
            rows, dim = given.shape
            module = cls(rows, dim, padding_idx, sparse=sparse, _weight=given, path=path, cache_bytes=cache_bytes)
        module.handle.requires_grad_(not freeze)
        module.sparse = sparse
        return module

    # -- use ------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # under torch.compile it runs as it is, between two graphs
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of ids, (*ids.shape, D)."""
        trainable = self.trainable
        num_rows, dim = trainable.table.shape
        flat_N = ids_on(trainable.device, ids) if trainable.has_device_tier else checked_ids(ids, num_rows)
        return look_up(trainable, flat_N, self.padding_idx).view(*ids.shape, dim)

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
            NoVocabulary: the table has none.
        """
        return Vocabulary.open(self.table)

    def embed(self, tokens: Tokens, unknown: Any = None) -> torch.Tensor:
        """(N, D): the vectors of N tokens (text or bytes), part of the graph as `forward`'s.

        Words of a fastText vocabulary are the mean of their word's and subwords' rows, so unknown ones have a vector.

        Raises:
            UnknownToken: nothing stands for a token; say `unknown=row`. NoVocabulary: the table has none.
        """
        return embed_tokens(self, self.vocab, tokens, unknown)

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

    def commit(self, note: str = "", payload: Any = None) -> int:
        """Make the table's rows, optimizer state and step count durable; returns the generation's number."""
        return self.table.commit(note, payload)

    def stats(self) -> dict[str, Any]:
        """Counters and sizes by part: the table's, its cache's on the host ("cache") and on a device ("device")."""
        return self.trainable.stats()

    def to_nn_embedding(self) -> nn.Embedding:
        """A plain nn.Embedding with these rows, all V of them in memory."""
        plain = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=torch.empty(self.weight.shape)
        )
        with torch.no_grad():
            for first, last in self.weight._blocks():
                plain.weight[first:last] = self.weight[first:last].as_subclass(torch.Tensor)
        return plain.to(self.handle.device).requires_grad_(self.handle.requires_grad)

    def close(self) -> None:
        """Close the table, for every module on it; uncommitted changes are discarded with a warning."""
        self.table.close()

    def __reduce__(self) -> Any:
        raise CannotCopy(
            f"a module on {self.table.path} cannot be copied or pickled: its rows are on disk, and one process writes "
            "them. Commit and open the table where you need it (Embedding.open(path, mode='r')), or take a plain copy "
            "with to_nn_embedding()."
        )

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__reduce__()

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        return text + ("" if self.table.is_temporary else f", path={self.table.path!r}")

    def _apply(self, fn: Any, recurse: bool = True) -> "Embedding":
        """`.to()`, `.cuda()`, `.half()` and the like: rows are served on the new device, for every module on the table.

        The handle stays the same Parameter, one float32, and the table where it is.
        """
        moved = fn(self.handle.detach())
        if moved.device.type != "meta" and moved.device != self.handle.device:
            self.trainable.move(device=checked_device(moved.device))
        return self
