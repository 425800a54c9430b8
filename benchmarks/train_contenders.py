"""Who takes part in the training benchmark: bigembed's modules and their peers, each with the rule it trains by.

All of them start with rows and state in memory: ours have read every row once, and what torch would first touch inside
the timing (lazily zeroed state) is written before it.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import bigembed

LR = 0.01
RULES = ("SGD", "Adagrad", "RowwiseAdagrad", "Adam")
STATE_OF_RULE = {"SGD": 0, "Adagrad": 1, "RowwiseAdagrad": 0, "Adam": 2}  # copies of the weight, beside it
TORCH_RULES: dict[str, Callable[..., Any]] = {
    "SGD": torch.optim.SGD,
    "Adagrad": torch.optim.Adagrad,
    "RowwiseAdagrad": torch.optim.Adagrad,  # torch has no row-wise one
    "Adam": torch.optim.SparseAdam,
}
FBGEMM_RULES = {"SGD": "EXACT_SGD", "Adagrad": "EXACT_ADAGRAD", "RowwiseAdagrad": "EXACT_ROWWISE_ADAGRAD"}
HAS_FBGEMM = importlib.util.find_spec("fbgemm_gpu") is not None
PRELOAD_ROWS = 1 << 16


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    name: as printed. is_ours: bigembed's. module: for what is to be asked of it.
    forward: inputs -> rows or bags. update: applies the gradients and drops them.
    """

    name: str
    is_ours: bool
    forward: Callable[..., torch.Tensor]
    update: Callable[[], None]
    module: Any

    def step(self, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
        """Forward, backward with this upstream gradient, optimizer step, zero_grad."""
        self.forward(*inputs).backward(gradient)
        self.update()


def bigembed_table(rule: str, num_rows: int, dim: int, folder: str, cache_rows: int | None = None) -> Contender:
    """A table of which every row is in the cache: by the identity index, or through the hash with `cache_rows` slots.

    The limits of journal and index are wider than a journal of every row, so that nothing is committed or merged by
    itself while time is taken: changed rows in the cache count towards them.
    """
    path = tempfile.mkdtemp(dir=folder) + "/table"
    index_bytes = 256 * num_rows
    table = bigembed.Table.create(
        path, num_rows, dim, state_dim=0, init="uniform", journal_bytes=4 * num_rows * (12 * dim + 64),
        index_bytes=index_bytes, is_temporary=True,
    )  # fmt: skip
    cache_bytes = num_rows * (4 * dim * (1 + STATE_OF_RULE[rule]) + 64) + index_bytes
    how = {"cache_bytes": cache_bytes} if cache_rows is None else {"cache_rows": cache_rows}
    emb = bigembed.Embedding.open(table, **how)
    opt = getattr(bigembed.optim, rule)(emb, lr=LR)
    if cache_rows is None:
        preload(emb, torch.arange(num_rows))

    def update() -> None:
        opt.step()
        opt.zero_grad()

    return Contender("bigembed" if cache_rows is None else "bigembed, hashed", True, emb, update, emb)


@torch.no_grad()
def preload(emb: Any, rows: torch.Tensor) -> None:
    """Look every one of these rows up once."""
    for part in rows.split(PRELOAD_ROWS):
        emb(part)


def torch_sparse(rule: str, num_rows: int, dim: int) -> Contender:
    """nn.Embedding(sparse=True) with torch's optimizer for the rule."""
    emb = torch.nn.Embedding(num_rows, dim, sparse=True, _weight=torch.empty(num_rows, dim).fill_(0.25))
    kind = TORCH_RULES[rule]
    opt = kind(emb.parameters(), lr=LR)

    def update() -> None:
        opt.step()
        opt.zero_grad()

    contender = Contender(f"nn.Embedding + {kind.__name__}", False, emb, update, emb)
    contender.step((torch.zeros(1, dtype=torch.int64),), torch.ones(1, dim))
    for state in opt.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.shape == emb.weight.shape:
                value.fill_(0.0)
    return contender


def torch_dense_adam(num_rows: int, dim: int) -> Contender:
    """nn.Embedding with a dense gradient and Adam, fused: every row, whatever the batch."""
    emb = torch.nn.Embedding(num_rows, dim, _weight=torch.empty(num_rows, dim).fill_(0.25))
    opt = torch.optim.Adam(emb.parameters(), lr=LR, fused=True)

    def update() -> None:
        opt.step()
        opt.zero_grad(set_to_none=False)  # the gradient's memory stays: torch's faster way here

    return Contender("nn.Embedding, dense + Adam", False, emb, update, emb)


def fbgemm(rule: str, num_rows: int, dim: int) -> Contender | None:
    """FBGEMM's table on the CPU, its update fused into backward; None where it is not installed or lacks the rule."""
    if not HAS_FBGEMM or rule not in FBGEMM_RULES:
        return None
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(num_rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType[FBGEMM_RULES[rule]], learning_rate=LR, eps=1e-8, pooling_mode=PoolingMode.NONE,
    )  # fmt: skip
    table.init_embedding_weights_uniform(0.25, 0.25)
    for states in table.split_optimizer_states():
        for state in states:
            state.fill_(0.0)
    offsets: dict[int, torch.Tensor] = {}

    def forward(ids_N: torch.Tensor) -> torch.Tensor:
        count = ids_N.numel()
        if count not in offsets:
            offsets[count] = torch.arange(count + 1)
        found: torch.Tensor = table(ids_N, offsets[count])
        return found

    return Contender(f"FBGEMM CPU {FBGEMM_RULES[rule].lower()}", False, forward, lambda: None, table)


def contenders_of(rule: str, num_rows: int, dim: int, folder: str) -> list[Contender]:
    """Ours first, then every peer that can run."""
    found = [
        bigembed_table(rule, num_rows, dim, folder),
        torch_sparse(rule, num_rows, dim),
        fbgemm(rule, num_rows, dim),
    ]
    return [contender for contender in found if contender is not None]


def bags_of(contenders: list[Contender]) -> list[Contender]:
    """Bags over the very tables of contenders, ours and torch's; empty while bigembed has no EmbeddingBag."""
    kind = getattr(bigembed, "EmbeddingBag", None)
    found = []
    for contender in contenders if kind is not None else []:
        if contender.is_ours:
            module = kind.open(contender.module.table, bag_mode="sum")
            found.append(Contender("bigembed.EmbeddingBag", True, module, contender.update, module))
        elif isinstance(contender.module, torch.nn.Embedding):
            weight = contender.module.weight
            module = torch.nn.EmbeddingBag(*weight.shape, mode="sum", sparse=True, _weight=weight.data)
            module.weight = weight  # the parameter that the optimizer holds
            name = contender.name.replace("nn.Embedding", "nn.EmbeddingBag")
            found.append(Contender(name, False, module, contender.update, module))
    return found
