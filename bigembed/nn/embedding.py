"""Embedding: torch.nn.Embedding's face on a table that is on disk."""

import os
import secrets
import shutil
import tempfile
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from bigembed.cache.stack import DEFAULT_PREFETCH_BYTES, CacheOptions
from bigembed.errors import BigembedError, InvalidArgument
from bigembed.init import InitialValues
from bigembed.nn.autograd import look_up
from bigembed.nn.ids import checked_ids
from bigembed.nn.weight import WeightView
from bigembed.optim.trainable import TrainableTable, trainable_of
from bigembed.storage.create import checked_integer
from bigembed.storage.opened import open_shared
from bigembed.storage.table import Table

DEFAULT_CACHE_BYTES = 256 << 20
SMALL_TABLE_ROW_BYTES = 512  # beside a row's weights: state, and a quarter of the budget is enough index for every row


class CannotCopy(BigembedError, TypeError):
    """A module was to be copied or pickled (torch users catch TypeError for what cannot be pickled)."""


class InvalidEmbedding(InvalidArgument, AssertionError):
    """padding_idx is not a row, or given rows have the wrong shape (torch raises AssertionError for these)."""


class Embedding(nn.Module):
    """A lookup table of num_embeddings rows of embedding_dim float32, kept on disk; used as `torch.nn.Embedding`.

    Args:
        num_embeddings: V, the rows. embedding_dim: D.
        padding_idx: this row starts as zeros and gets no gradient; negative counts from the end.
        max_norm, norm_type, scale_grad_by_freq: not supported by this version, an error unless at their defaults.
        sparse: accepted; gradients are always kept by row.
        _weight: a (V, D) tensor that the rows start from. _freeze: do not train.
        device: "cpu". dtype: torch.float32.
        path: the table's folder, made anew; None is a temporary table that goes with the module.
        cache_bytes: memory for hot rows and the journal's index; by default 256 MiB, or what the whole table takes
            where that is less.
        init: what rows hold before they are written: bigembed.init.normal() (default), uniform, zeros, constant.
        seed: decides the initial values; by default drawn from torch's generator.
        journal_bytes: see Table.open.
        prefetch_bytes: memory for rows read ahead, beside cache_bytes; taken only where `prefetch` is used.
        policy: who stays in the cache: "lru" (default), "lfu", "sieve", "s3fifo" or "next_use". Changes no result.

    Shape:
        ids (*) int32 or int64 -> (*, D) float32.

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
        init: InitialValues | str | None = None,
        seed: int | None = None,
        journal_bytes: int = 1 << 30,
        prefetch_bytes: int = DEFAULT_PREFETCH_BYTES,
        policy: str = "lru",
    ) -> None:
        _check_supported(max_norm, scale_grad_by_freq, device, dtype)
        num_embeddings = checked_integer("num_embeddings", num_embeddings)
        embedding_dim = checked_integer("embedding_dim", embedding_dim)
        padding_idx = _checked_padding(padding_idx, num_embeddings)
        if _weight is not None and list(_weight.shape) != [num_embeddings, embedding_dim]:
            raise InvalidEmbedding(
                f"_weight has shape {tuple(_weight.shape)}; ({num_embeddings}, {embedding_dim}) was expected."
            )
        if seed is None:
            seed = int(torch.randint(0, 1 << 62, (), device="cpu").item())
        budget = _budget(cache_bytes, num_embeddings * (4 * embedding_dim + SMALL_TABLE_ROW_BYTES))
        where = path if path is not None else _temporary_path()
        table = Table.create(
            where,
            num_embeddings,
            embedding_dim,
            init=init,
            seed=seed,
            padding_idx=padding_idx,
            is_temporary=path is None,
            journal_bytes=journal_bytes,
            index_bytes=max(1, budget // 4),
        )
        try:
            options = checked_options(budget, prefetch_bytes, policy)
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
    ) -> "Embedding":
        """A module on an existing table, at its last commit; modules on one table share its cache and gradient.

        Args:
            table: a path, or an open Table.
            mode: "r+" to train, "r" to read beside a writer (frozen).
            padding_idx: by default the one the table was made with.
            cache_bytes, journal_bytes, prefetch_bytes, policy: as in the constructor; what is open already keeps its
                own.
            cache_rows: slots of the cache instead of bytes, for experiments.

        Raises:
            TableMissing, NotATable, TableLocked, DamagedTable: see Table.open.
        """
        budget = _budget(cache_bytes, None)
        options = checked_options(budget, prefetch_bytes, policy, cache_rows)
        if not isinstance(table, Table):
            table = open_shared(os.fspath(table), mode, journal_bytes=journal_bytes, index_bytes=max(1, budget // 4))
        if padding_idx is None:
            padding_idx = table.spec.padding_idx
        module = cls.__new__(cls)
        module._become(trainable_of(table, options), _checked_padding(padding_idx, table.shape[0]))
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
        _check_supported(max_norm, scale_grad_by_freq, None, None)
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
        table = self.trainable.table
        flat_N = checked_ids(ids, table.shape[0])
        return look_up(self.trainable, flat_N, self.padding_idx).view(*ids.shape, table.shape[1])

    @torch._disable_dynamo
    def prefetch(self, ids: torch.Tensor) -> None:
        """Start reading the rows of ids (as for `forward`) that are not in the cache; returns at once.

        A lookup that comes later takes them from there, or waits for what is still on its way. No result changes, and
        nothing is evicted for it; a prefetch whose lookup never comes is forgotten. At most `prefetch_bytes` of rows
        are held; what finds no room is read by the lookup, as without prefetch.

        Raises:
            InvalidIds, RowOutOfRange: as the lookup would.
        """
        self.trainable.prefetch(checked_ids(ids, self.table.shape[0]))

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
        """Counters and sizes of the table and its cache, by part."""
        return self.trainable.stats()

    def to_nn_embedding(self) -> nn.Embedding:
        """A plain nn.Embedding with these rows, all V of them in memory."""
        plain = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=torch.empty(self.weight.shape)
        )
        with torch.no_grad():
            for first, last in self.weight._blocks():
                plain.weight[first:last] = self.weight[first:last].as_subclass(torch.Tensor)
        return plain.requires_grad_(self.handle.requires_grad)

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
        """`.to()`, `.half()` and the like: the handle stays one float32 on the cpu, as the rows do."""
        moved = fn(self.handle.detach())
        if moved.device.type not in ("cpu", "meta"):
            raise InvalidArgument(
                f"device {str(moved.device)!r} is not supported; this version serves rows on the cpu."
            )
        return self


def _check_supported(max_norm: Any, scale_grad_by_freq: bool, device: Any, dtype: Any) -> None:
    if max_norm is not None or scale_grad_by_freq:
        raise InvalidArgument("max_norm and scale_grad_by_freq are not supported by this version; leave them out.")
    if device is not None and torch.device(device).type != "cpu":
        raise InvalidArgument(f"device {str(device)!r} is not supported; this version serves rows on the cpu.")
    if dtype not in (None, torch.float32):
        raise InvalidArgument(f"dtype {dtype} is not supported; this version stores torch.float32.")


def _checked_padding(padding_idx: int | None, num_rows: int) -> int | None:
    if padding_idx is None:
        return None
    if not -num_rows <= checked_integer("padding_idx", padding_idx) < num_rows:
        raise InvalidEmbedding(
            f"Padding_idx must be within num_embeddings: {padding_idx} is not a row of {num_rows} rows. Use "
            f"{-num_rows} to {num_rows - 1}, or None."
        )
    return padding_idx % num_rows


def _budget(cache_bytes: int | None, table_bytes: int | None) -> int:
    """The memory for cache and index; by default 256 MiB, or what holds a smaller table whole."""
    if cache_bytes is None:
        return DEFAULT_CACHE_BYTES if table_bytes is None else min(DEFAULT_CACHE_BYTES, table_bytes + (1 << 20))
    cache_bytes = checked_integer("cache_bytes", cache_bytes)
    if cache_bytes < 1:
        raise InvalidArgument(f"cache_bytes must be positive, not {cache_bytes}.")
    return cache_bytes


def _temporary_path() -> str:
    return os.path.join(tempfile.gettempdir(), f"bigembed-{secrets.token_hex(8)}")


def checked_options(cache_bytes: int, prefetch_bytes: int, policy: str, cache_rows: int | None = None) -> CacheOptions:
    """What a user chose about the caches, checked before anything is made."""
    prefetch_bytes = checked_integer("prefetch_bytes", prefetch_bytes)
    if prefetch_bytes < 0:
        raise InvalidArgument(f"prefetch_bytes must be at least 0, not {prefetch_bytes}.")
    return CacheOptions(cache_bytes, prefetch_bytes, policy, cache_rows)
