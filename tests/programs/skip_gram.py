"""word2vec's skip-gram with negative sampling: two tables, sparse gradients, context padded with word 0."""

import torch
from torch import nn
from torch.nn import functional

WORDS, DIM, WINDOW, NEGATIVES, BATCH, TOPICS = 500, 16, 3, 5, 64, 8
PAD = 0


class SkipGram(nn.Module):
    def __init__(self, make_embedding):
        super().__init__()
        self.centers = make_embedding(WORDS, DIM, padding_idx=PAD, sparse=True)
        self.contexts = make_embedding(WORDS, DIM, padding_idx=PAD, sparse=True)

    def forward(self, center_B, context_BC, negative_BCK):
        """The mean loss of the contexts that are no padding."""
        center = self.centers(center_B).unsqueeze(1)
        right = (self.contexts(context_BC) * center).sum(-1)
        wrong = (self.contexts(negative_BCK) * center.unsqueeze(1)).sum(-1)
        loss = -functional.logsigmoid(right) - functional.logsigmoid(-wrong).sum(-1)
        is_word = context_BC != PAD
        return (loss * is_word).sum() / is_word.sum()


def windows(generator):
    """Batches (center, contexts, negatives) of sentences that each stay with one topic; short ones end in padding."""
    noise = 1.0 / torch.arange(1, WORDS).float() ** 0.75
    while True:
        topic = torch.randint(0, TOPICS, (BATCH, 1), generator=generator)
        rank = (torch.rand(BATCH, 2 * WINDOW + 1, generator=generator) ** 2 * (WORDS // TOPICS - 1)).long()
        words = 1 + rank * TOPICS + topic
        length = torch.randint(WINDOW + 2, 2 * WINDOW + 2, (BATCH, 1), generator=generator)
        words = torch.where(torch.arange(2 * WINDOW + 1) < length, words, PAD)
        contexts = torch.cat([words[:, :WINDOW], words[:, WINDOW + 1 :]], 1)
        drawn = torch.multinomial(noise, contexts.numel() * NEGATIVES, replacement=True, generator=generator) + 1
        yield words[:, WINDOW], contexts, drawn.view(*contexts.shape, NEGATIVES)


def run(make_embedding, make_bag, make_optimizer, steps, seed):
    """The loss of each step. `make_bag` is for programs that have bags."""
    torch.manual_seed(seed)
    model = SkipGram(make_embedding)
    optimizer = make_optimizer(model, "SGD", table_lr=2.0)
    losses = []
    for _, batch in zip(range(steps), windows(torch.Generator().manual_seed(seed)), strict=False):
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
