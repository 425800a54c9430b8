"""A click model as DLRM has it: 26 bags of categories with weights, 13 numbers, products of pairs, one probability."""

import torch
from torch import nn
from torch.nn import functional

SIZES = [3, 7, 10, 19, 31, 63, 100, 144, 250, 305, 512, 633, 1000] * 2  # rows of each category's table
NUMBERS, DIM, BATCH, LONGEST = 13, 8, 32, 5


class Model(nn.Module):
    def __init__(self, make_bag):
        super().__init__()
        self.bags = nn.ModuleList(make_bag(size, DIM, mode="sum") for size in SIZES)
        self.bottom = nn.Sequential(nn.Linear(NUMBERS, 32), nn.ReLU(), nn.Linear(32, DIM), nn.ReLU())
        pairs = (len(SIZES) + 1) * len(SIZES) // 2
        self.top = nn.Sequential(nn.Linear(DIM + pairs, 32), nn.ReLU(), nn.Linear(32, 1))
        self.register_buffer("pairs", torch.tril_indices(len(SIZES) + 1, len(SIZES) + 1, offset=-1))

    def forward(self, numbers, categories):
        """Args: categories: for each table (ids, offsets, per-sample weights)."""
        dense = self.bottom(numbers)
        bags = zip(self.bags, categories, strict=True)
        vectors = torch.stack([dense, *(bag(ids, offsets, weights) for bag, (ids, offsets, weights) in bags)], 1)
        products = (vectors @ vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([dense, products], 1)).squeeze(1)


def clicks(generator):
    """Batches (numbers, categories, whether it was clicked); popular ids are small, and some bags are empty."""
    taste = [torch.randn(size, generator=generator) for size in SIZES]
    while True:
        numbers = torch.rand(BATCH, NUMBERS, generator=generator).log1p()
        score, categories = numbers.sum(1) - 5.0, []
        for size, liked in zip(SIZES, taste, strict=True):
            counts = torch.randint(0, LONGEST, (BATCH,), generator=generator)
            ids = (torch.rand(int(counts.sum()), generator=generator) ** 3 * size).long()
            weights = torch.rand(len(ids), generator=generator) + 0.5
            categories.append((ids, functional.pad(counts.cumsum(0)[:-1], (1, 0)), weights))
            score = score.index_add(0, torch.arange(BATCH).repeat_interleave(counts), liked[ids] * weights)
        yield numbers, categories, (torch.rand(BATCH, generator=generator) < score.sigmoid()).float()


def run(make_embedding, make_bag, make_optimizer, steps, seed):
    """The loss of each step. `make_embedding` is for programs without bags."""
    torch.manual_seed(seed)
    model = Model(make_bag)
    optimizer = make_optimizer(model, "Adagrad", table_lr=0.05, lr=0.02)
    losses = []
    for _, (numbers, categories, clicked) in zip(
        range(steps), clicks(torch.Generator().manual_seed(seed)), strict=False
    ):
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(model(numbers, categories), clicked)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
