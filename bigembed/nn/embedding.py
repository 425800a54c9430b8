"""Embedding: torch.nn.Embedding's face on a table that is on disk."""

import os
from typing import Any, ClassVar

import torch

from bigembed.cache.stack import DEFAULT_PREFETCH_BYTES
from bigembed.init import InitialValues
from bigembed.nn import compiled, transforms
from bigembed.nn.autograd import look_up
from bigembed.nn.frequency import divided_by_count
from bigembed.nn.ids import checked_ids, ids_on
from bigembed.nn.max_norm import renorm
from bigembed.nn.options import check_dtype, check_norms, check_not_meta, checked_padding
from bigembed.nn.table_module import TableModule
from bigembed.nn.tokens import embed_tokens
from bigembed.vocab.vectors import Tokens

# What is told of a module where it is not this, in the order of nn.Embedding's extra_repr.
SHOWN = {"padding_idx": None, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False}


class Embedding(TableModule):
    """A lookup table of num_embeddings rows of embedding_dim float32, kept on disk; used as `torch.nn.Embedding`.

    Args:
        num_embeddings: V, the rows. embedding_dim: D.
        padding_idx: this row starts as zeros and gets no gradient; negative counts from the end.
        max_norm: before a lookup, rows it names whose norm is above this are shortened to it, in the table; also in
            eval mode and where the table is frozen. norm_type: the p of that p-norm.
        scale_grad_by_freq: divide the gradient of a row by how often the batch names it.
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
        rank_local: under torch.distributed, train although no other process sees the change.

    Shape:
        ids (*) int32 or int64, on the host or the module's device -> (*, D) float32 on the module's device.

    Raises:
        TableExists: something stands at `path`; open a table with Embedding.open. InvalidEmbedding: padding_idx is no
            row, or `_weight` has another shape. NotANumber: max_norm or norm_type.

    Example:
        >>> import torch, bigembed
        >>> emb = bigembed.Embedding(1_000_000_000, 64, seed=0)
        >>> emb(torch.tensor([[1, 999_999_999]])).shape
        torch.Size([1, 2, 64])

    Note:
        `weight` is a view, not a Parameter; a bigembed optimizer trains it. `emb.commit()` makes changes durable.
        There is no device="meta": a new table takes neither memory nor time, so make the module where it shall run.
    """

    # As nn.Embedding declares them, for code that copies a module's settings by these names.
    __constants__: ClassVar[list[str]] = ["num_embeddings", "embedding_dim", *SHOWN]
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool

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
        rank_local: bool = False,
    ) -> None:
        check_dtype(dtype)
        check_norms(max_norm, norm_type)
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
                "sparse": sparse,
            },
        )
        if _freeze:
            self.handle.requires_grad_(False)

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
            embeddings: torch.Tensor, np.ndarray, or the path of a table (opened, not copied; mode "r" if frozen, but
                with max_norm "r+", as a lookup writes then).
            freeze: do not train. The others as in the constructor; rows are taken as they are, padding_idx too.
        """
        check_norms(max_norm, norm_type)
        writes = not freeze or max_norm is not None
        module = cls._pretrained(embeddings, freeze, writes, padding_idx, path, cache_bytes)
        module.max_norm, module.norm_type = max_norm, norm_type
        module.scale_grad_by_freq, module.sparse = scale_grad_by_freq, sparse
        return module

    # -- use ------------------------------------------------------------------------------------------------

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows of ids, (*input.shape, D).

        Args:
            input: the ids, int32 or int64, of any shape.
        """
        if torch.compiler.is_compiling():
            return compiled.look_up(self, input)
        transforms.check_traced()
        transforms.check_handle(self)
        trainable = self.trainable
        num_rows, dim = trainable.table.shape
        padding_idx = self.padding_idx
        if padding_idx is not None and not 0 <= padding_idx < num_rows:  # somebody has set it since
            padding_idx = checked_padding(padding_idx, num_rows)
        if transforms.are_active():
            needs_grad = torch.is_grad_enabled() and trainable.handle.requires_grad
            return transforms.look_up_constants(self.forward, input, needs_grad)
        flat_N = ids_on(trainable.device, input) if trainable.has_device_tier else checked_ids(input, num_rows)
        if self.max_norm is not None:
            renorm(trainable, flat_N, self.max_norm, self.norm_type)
        rows_ND = look_up(trainable, flat_N, padding_idx, count=self.max_norm is None)
        if self.scale_grad_by_freq and rows_ND.requires_grad:
            rows_ND = divided_by_count(rows_ND, flat_N)
        return rows_ND.view(*input.shape, dim)

    def embed(self, tokens: Tokens, unknown: Any = None) -> torch.Tensor:
        """(N, D): the vectors of N tokens (text or bytes), part of the graph as `forward`'s.

        Words of a fastText vocabulary are the mean of their word's and subwords' rows, so unknown ones have a vector.

        Raises:
            UnknownToken: nothing stands for a token; say `unknown=row`. NoVocabulary: the table has none.
        """
        return embed_tokens(self, self.vocab, tokens, unknown)

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        for name, default in SHOWN.items():
            value = getattr(self, name)
            if value is not default and (default is None or value != default):
                text += f", {name}={value}"
        text += "" if self.table.is_temporary else f", path={self.table.path!r}"
        return text + (", mode='r'" if self.table.mode == "r" else "")
