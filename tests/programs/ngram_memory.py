"""A language model whose transformer block looks the last tokens up in a hashed n-gram memory.

All sub-tables (orders 2 and 3, several heads each, prime sizes) lie one behind the other in a single embedding. A row
is a hash of the last tokens: each times an odd multiplier of its own, joined by XOR, modulo the sub-table's size.
"""

import torch
from torch import nn
from torch.nn import functional

TOKENS, DIM, HEADS, LENGTH, BATCH = 32, 32, 2, 24, 8
ORDERS, PART = (2, 3), 8
PRIMES = (997, 1009, 1013, 1019)  # a sub-table for each order and head


class NgramHash(nn.Module):
    """(B, T) tokens -> (B, T, sub-tables) rows; a place before the text counts as token 0."""

    def __init__(self, generator):
        super().__init__()
        odd = torch.randint(0, 2**31, (len(PRIMES), max(ORDERS)), generator=generator) * 2 + 1
        self.register_buffer("multipliers", odd)
        self.register_buffer("sizes", torch.tensor(PRIMES))
        self.register_buffer("offsets", torch.tensor([0, *PRIMES[:-1]]).cumsum(0))

    def forward(self, tokens):
        before = [functional.pad(tokens, (shift, 0))[:, : tokens.shape[1]] for shift in range(max(ORDERS))]
        rows = []
        for head, multipliers in enumerate(self.multipliers):
            mixed = torch.zeros_like(tokens)
            for shift in range(ORDERS[head // HEADS]):
                mixed = mixed ^ (before[shift] + 1) * multipliers[shift]
            rows.append(mixed % self.sizes[head] + self.offsets[head])
        return torch.stack(rows, -1)


class Memory(nn.Module):
    """What the n-grams say, let in by a gate that compares it with the hidden state."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.key = nn.Linear(len(PRIMES) * PART, DIM)
        self.value = nn.Linear(len(PRIMES) * PART, DIM)

    def forward(self, hidden, rows):
        found = self.embedding(rows).flatten(2)
        key = functional.layer_norm(self.key(found), (DIM,))
        gate = (functional.layer_norm(hidden, (DIM,)) * key).sum(-1, keepdim=True) / DIM**0.5
        return hidden + gate.sigmoid() * self.value(found)


class Model(nn.Module):
    def __init__(self, make_embedding, generator):
        super().__init__()
        self.hash = NgramHash(generator)
        self.tokens = nn.Embedding(TOKENS, DIM)
        self.memory = Memory(make_embedding(sum(PRIMES), PART))
        self.block = nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(DIM, TOKENS)

    def forward(self, tokens):
        hidden = self.memory(self.tokens(tokens), self.hash(tokens))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        return self.head(self.block(hidden, src_mask=mask, is_causal=True))


def text(generator):
    """Batches of a language in which the last two tokens all but say the next one."""
    follows = torch.randint(0, TOKENS, (TOKENS, TOKENS), generator=generator)
    while True:
        line = [torch.randint(0, TOKENS, (BATCH,), generator=generator) for _ in range(2)]
        while len(line) <= LENGTH:
            noise = torch.randint(0, TOKENS, (BATCH,), generator=generator)
            is_noise = torch.rand(BATCH, generator=generator) < 0.1
            line.append(torch.where(is_noise, noise, follows[line[-2], line[-1]]))
        yield torch.stack(line, 1)


def run(make_embedding, make_bag, make_optimizer, steps, seed):
    """The loss of each step. `make_bag` is for programs that have bags."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Model(make_embedding, generator)
    optimizer = make_optimizer(model, "Adam", table_lr=0.01, lr=0.005)
    losses = []
    for _, batch in zip(range(steps), text(generator), strict=False):
        logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
