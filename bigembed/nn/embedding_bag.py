"""EmbeddingBag: torch.nn.EmbeddingBag's face on a table that is on disk."""

import os
from typing import Any, ClassVar

import torch
from torch import nn

from bigembed.cache.stack import DEFAULT_PREFETCH_BYTES
from bigembed.errors import InvalidArgument
from bigembed.init import InitialValues
from bigembed.nn import compiled_bags, transforms
from bigembed.nn.bag_lookup import reduce_bags, reduce_in_graph
from bigembed.nn.bags import check_mode, checked_bags, out_of_bags
from bigembed.nn.max_norm import renorm
from bigembed.nn.options import check_dtype, check_norms, check_not_meta, checked_padding
from bigembed.nn.table_module import TableModule
from bigembed.storage.table import Table


class EmbeddingBag(TableModule):
    """Sums, means or maxima of bags of rows of a table on disk; used as `torch.nn.EmbeddingBag`.

    On the host no array of all positions' rows is made: bags are reduced where the rows are in the cache, and their
    gradients added up by row.

    Args:
        num_embeddings: V, the rows. embedding_dim: D.
        max_norm, norm_type: before a lookup, each row it names whose norm is above max_norm is shortened in the table.
        scale_grad_by_freq: divide a row's gradient by how often the batch names it; not with mode="max".
        mode: "sum", "mean" or "max".
        sparse: accepted, but with mode="max"; gradients are always kept by row.
        _weight: a (V, D) tensor that the rows start from.
        include_last_offset: offsets have one more element, the end of the last bag; ids behind it are in no bag.
        padding_idx: this row starts as zeros, is left out of every bag, and gets no gradient; negative counts from
            the end.
        device, dtype, path, cache_bytes, host_cache_bytes, init, seed, journal_bytes, prefetch_bytes, policy,
            rank_local: as in `Embedding`.

    Shape:
        input (N,) with offsets (B,), or (B, N), or a jagged (B, *); int32 or int64 -> (B, D) float32 on the module's
        device. per_sample_weights: as input. An empty bag gives zeros.

    Raises:
        InvalidArgument: a mode that is none, or that does not go with the rest.
        TableExists: something stands at `path`; open a table with EmbeddingBag.open.

    Example:
        >>> import torch, bigembed
        >>> bag = bigembed.EmbeddingBag(1_000_000_000, 16, mode="sum", seed=0)
        >>> bag(torch.tensor([1, 999_999_999, 7]), torch.tensor([0, 2])).shape
        torch.Size([2, 16])

    Note:
        As with `Embedding`, `weight` is a view and a bigembed optimizer trains it. Modes and their combinations are
        checked by the constructor too. With scale_grad_by_freq, torch's CPU divides by counts of other rows (it indexes
        them by the wrong number); here it is the row's own. Bags of no ids in 2D input are zeros, where torch raises.
    """

    # As nn.EmbeddingBag declares them, for code that copies a module's settings by these names.
    __constants__: ClassVar[list[str]] = [
        "num_embeddings",
        "embedding_dim",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "mode",
        "sparse",
        "include_last_offset",
        "padding_idx",
    ]
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    mode: str
    sparse: bool
    include_last_offset: bool
    padding_idx: int | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
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
        rank_local: bool = False,
    ) -> None:
        check_dtype(dtype)
        check_norms(max_norm, norm_type)
        check_mode(mode, scale_grad_by_freq, sparse)
        check_not_meta(device)
        self._create(
            num_embeddings,
            embedding_dim,
            padding_idx,
            _weight,
            device=device,
            path=path,
            cache_bytes=cache_bytes,
            host_cache_bytes=host_cache_bytes,
            init=init,
            seed=seed,
            journal_bytes=journal_bytes,
            prefetch_bytes=prefetch_bytes,
            policy=policy,
            rank_local=rank_local,
            settings={
                "max_norm": max_norm,
                "norm_type": norm_type,
                "scale_grad_by_freq": scale_grad_by_freq,
                "mode": mode,
                "sparse": sparse,
                "include_last_offset": include_last_offset,
            },
        )

    # -- opening --------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        table: str | os.PathLike[str] | Table,
        *,
        bag_mode: str = "mean",
        include_last_offset: bool = False,
        scale_grad_by_freq: bool = False,
        **options: Any,
    ) -> "EmbeddingBag":
        """A module on an existing table, at its last commit; modules on one table share its cache and gradient.

        Args:
            table: a path, or an open Table.
            bag_mode: the constructor's `mode`, a word that means here how the table is opened.
            include_last_offset, scale_grad_by_freq: as in the constructor.
            options: mode, padding_idx, max_norm, cache_bytes and the others of `Embedding.open`.

        Raises:
            As `Embedding.open`; InvalidArgument for a bag_mode as in the constructor.
        """
        if options.get("mode") in ("sum", "mean", "max"):
            raise InvalidArgument(
                f"mode={options['mode']!r} is no way to open a table ('r' or 'r+'). Use bag_mode={options['mode']!r}."
            )
        check_mode(bag_mode, scale_grad_by_freq, sparse=False)
        module = super().open(table, scale_grad_by_freq=scale_grad_by_freq, **options)
        module.mode, module.include_last_offset = bag_mode, include_last_offset
        return module

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Any,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
    ) -> "EmbeddingBag":
        """A module with given rows: a (V, D) tensor or array, copied to a table at `path`, or the path of a table.

        Args:
            embeddings: torch.Tensor, np.ndarray, or the path of a table (opened, not copied; mode "r" if frozen, but
                with max_norm "r+", as a lookup writes then).
            freeze: do not train. The others as in the constructor; rows are taken as they are, padding_idx too.
        """
        check_norms(max_norm, norm_type)
        writes = not freeze or max_norm is not None
        check_mode(mode, scale_grad_by_freq, sparse)
        module = cls._pretrained(embeddings, freeze, writes, padding_idx, path, cache_bytes)
        module.max_norm, module.norm_type = max_norm, norm_type
        module.scale_grad_by_freq, module.sparse = scale_grad_by_freq, sparse
        module.mode, module.include_last_offset = mode, include_last_offset
        return module

    # -- use ------------------------------------------------------------------------------------------------

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Each bag's rows reduced, (B, D).

        Args:
            input: the ids; a line of 2D or jagged input is a bag.
            offsets: where each bag begins in 1D input, ascending from 0; None otherwise.
            per_sample_weights: float32, what each row is multiplied by; for mode="sum", and with a gradient of its own.

        Raises:
            InvalidBags and its kinds (see nn/bags.py), InvalidIds, RowOutOfBags: with torch's builtin type for each.
        """
        check_mode(self.mode, self.scale_grad_by_freq, self.sparse)
        if torch.compiler.is_compiling():
            if compiled_bags.takes(self, input, offsets, per_sample_weights):
                return compiled_bags.look_up_bags(self, input, offsets, per_sample_weights)
            return reduce_in_graph(self, input, offsets, per_sample_weights)
        transforms.check_traced()
        transforms.check_handle(self)
        trainable, padding_idx = self.trainable, self.padding_idx
        if padding_idx is not None:
            padding_idx = checked_padding(padding_idx, self.num_embeddings)  # somebody may have set it
        if transforms.are_active():
            trains = torch.is_grad_enabled() and trainable.handle.requires_grad
            needs_grad = trains or per_sample_weights is not None
            return transforms.look_up_constants(lambda ids: self.forward(ids, offsets), input, needs_grad)
        bags = checked_bags(trainable, input, offsets, per_sample_weights, self.mode, self.include_last_offset)
        with out_of_bags(bags, self.num_embeddings):
            if self.max_norm is not None:
                renorm(trainable, bags.ids_N, self.max_norm, self.norm_type)
            taken = bags if padding_idx is None else bags.without(padding_idx)
            return reduce_bags(trainable, taken, self.mode, self.scale_grad_by_freq)

    @torch._disable_dynamo
    def prefetch(self, ids: torch.Tensor) -> None:
        """As `Embedding.prefetch`; the ids of a jagged tensor too."""
        super().prefetch(ids.values() if isinstance(ids, torch.Tensor) and ids.is_nested else ids)

    def to_nn_embedding_bag(self) -> nn.EmbeddingBag:
        """A plain nn.EmbeddingBag with these rows, all V of them in memory."""
        weight = self.to_nn_embedding().weight
        return nn.EmbeddingBag.from_pretrained(
            weight.detach(),
            not weight.requires_grad,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            self.include_last_offset,
            self.padding_idx,
        )

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        if self.max_norm is not None:
            text += f", max_norm={self.max_norm!r}"
        if self.norm_type != 2:
            text += f", norm_type={self.norm_type!r}"
        if self.scale_grad_by_freq is not False:
            text += f", scale_grad_by_freq={self.scale_grad_by_freq!r}"
        text += f", mode={self.mode!r}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx!r}"
        text += "" if self.table.is_temporary else f", path={self.table.path!r}"
        return text + (", read-only" if self.table.mode == "r" else "")  # mode is that of the bags
