"""The model of the demo: a small network that predicts the next token, with or without rows from a table."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bigembed import Embedding, optim
from bigembed.demo.ngrams import CONTEXT, Batch, make_batch
from bigembed.demo.tokens import Corpus, Tokens

TOKEN_DIM = 16
HIDDEN_DIM = 128
DENSE_LEARNING_RATE = 4e-3
TABLE_LEARNING_RATE = 0.1
EVALUATED_AT_ONCE = 4096


class NextToken(nn.Module):
    """hidden = context tokens @ A + sum of n-gram rows @ B;  logits = GELU(LayerNorm(hidden)) @ C.

    Args:
        num_classes: tokens that can be predicted. table_dim: D of the rows; None for a model without a table.

    Shape:
        context_NC (N, CONTEXT) int64, rows_NGD (N, G, D) or None -> (N, num_classes)
    """

    def __init__(self, num_classes: int, table_dim: int | None) -> None:
        super().__init__()
        self.token = nn.Embedding(num_classes + 1, TOKEN_DIM)  # one more: before the document
        self.context = nn.Linear(CONTEXT * TOKEN_DIM, HIDDEN_DIM)
        self.norm = nn.LayerNorm(HIDDEN_DIM)
        self.logits = nn.Linear(HIDDEN_DIM, num_classes)
        # The last to be made, so that models of one seed share every other initial weight.
        self.memory = nn.Linear(table_dim, HIDDEN_DIM, bias=False) if table_dim is not None else None

    def forward(self, context_NC: torch.Tensor, rows_NGD: torch.Tensor | None) -> torch.Tensor:
        hidden = self.context(self.token(context_NC).flatten(1))
        if self.memory is not None and rows_NGD is not None:
            hidden = hidden + self.memory(rows_NGD.sum(1))
        return self.logits(nn.functional.gelu(self.norm(hidden)))


@dataclass(frozen=True)
class Loss:
    """Mean cross entropy over held-out positions."""

    nats: float

    @property
    def bits(self) -> float:
        return self.nats / math.log(2)


class Learner:
    """A model, the table it reads (or None) and their optimizers.

    seconds: spent in `step` so far.
    """

    def __init__(self, num_classes: int, table: Embedding | None, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = NextToken(num_classes, table.embedding_dim if table is not None else None)
        self.table = table
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(self.model.parameters(), lr=DENSE_LEARNING_RATE)
        ]
        if table is not None:
            self.optimizers.append(optim.RowwiseAdagrad(table, lr=TABLE_LEARNING_RATE))
        self.seconds = 0.0

    def step(self, batch: Batch) -> float:
        """Learn from a batch; returns its loss, in nats per token, before the step."""
        started = time.perf_counter()
        loss = self._loss(batch, reduction="mean")
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        nats = loss.item()
        self.seconds += time.perf_counter() - started
        return nats

    @torch.no_grad()
    def held_out_loss(self, corpus: Corpus, tokens: Tokens, positions: np.ndarray) -> Loss:
        """The loss at `positions`, batch by batch; the same to the last bit for the same weights and rows."""
        num_rows = self.table.num_embeddings if self.table is not None else 1
        total = 0.0
        for first in range(0, len(positions), EVALUATED_AT_ONCE):
            batch = make_batch(corpus, tokens, positions[first : first + EVALUATED_AT_ONCE], num_rows)
            total += self._loss(batch, reduction="sum").item()
        return Loss(total / len(positions))

    def _loss(self, batch: Batch, reduction: str) -> torch.Tensor:
        rows_NGD = self.table(batch.ids_NG) if self.table is not None else None
        logits_NC = self.model(batch.context_NC, rows_NGD)
        return nn.functional.cross_entropy(logits_NC, batch.target_N, reduction=reduction)
