"""Row numbers and element counts are int64 everywhere: tables past 2**31, used at both ends. Their files are sparse."""

import numpy as np
import pytest
import torch
from torch import nn
from training import RULES, small_embedding

import bigembed
from bigembed.errors import RowOutOfRange

HUGE = {
    "elements": (2**31 // 64 + 5, 64),  # more than 2**31 elements, of fewer rows
    "rows": (2**31 + 5, 4),
    "rows_past_uint32": (2**32 + 5, 2),
    "rows_past_a_tebi": (2**40 + 5, 1),
}
CACHES = [{"cache_rows": 4}, {"cache_rows": 64}, {"cache_rows": 64, "device_rows": 16}]


def both_ends(num_rows):
    """Ids with repeats at the first rows, the last ones, and around every power of two from 2**30."""
    powers = [2**bits + near for bits in range(30, 60) for near in (-1, 0, 1)]
    middle = [row for row in (*powers, num_rows // 2) if row < num_rows]
    ids = [0, 1, num_rows - 1, num_rows - 2, *middle, num_rows - 1, 0]
    return torch.tensor(ids + [0] * (len(ids) % 2)).view(2, -1)


@pytest.mark.parametrize("caches", CACHES)
@pytest.mark.parametrize("rule", ["SGD", "Adam"])
@pytest.mark.parametrize("size", HUGE)
def test_training_at_both_ends_equals_a_small_table_of_the_same_rows(tmp_path, size, rule, caches):
    num_rows, dim = HUGE[size]
    make, hyper = RULES[rule]
    ids = both_ends(num_rows)
    rows_U, small_ids = np.unique(ids.numpy(), return_inverse=True)
    emb = small_embedding(tmp_path, num_rows, dim, seed=3, **caches)
    small = small_embedding(tmp_path, len(rows_U), dim, seed=4, **caches)
    small.weight[:] = emb.weight[rows_U]
    results = []
    for module, given in ((emb, ids), (small, torch.from_numpy(small_ids).view(ids.shape))):
        opt, outputs = make(module, **hyper), []
        for step in range(3):
            rows = module(given[step % 2 :])
            outputs.append(rows.detach().clone())
            rows.tanh().square().sum().backward()
            opt.step()
            opt.zero_grad()
        module.trainable.caches._check()
        where = rows_U if module is emb else np.arange(len(rows_U))
        results.append((torch.cat(outputs), torch.from_numpy(module.table.read(where, with_state=True))))
    (outputs, rows), (small_outputs, small_rows) = results
    assert torch.equal(outputs, small_outputs)
    assert torch.equal(rows, small_rows)


@pytest.mark.parametrize("size", HUGE)
def test_committed_rows_at_both_ends_are_there_after_reopening_and_merging(tmp_path, size):
    num_rows, dim = HUGE[size]
    path, ids = tmp_path / "t", both_ends(num_rows)
    emb = bigembed.Embedding(num_rows, dim, path=path, seed=3, cache_bytes=1 << 20)
    opt = bigembed.optim.SGD(emb, lr=1.0)
    before = emb.weight[ids].clone()
    emb(ids).sum().backward()
    opt.step()
    emb.commit()
    emb.table.merge()
    emb.close()
    times = torch.tensor([[float((ids == row).sum()) for row in line] for line in ids]).unsqueeze(-1)
    with bigembed.Table.open(path, mode="r") as table:
        assert torch.equal(torch.from_numpy(table.read(ids.numpy())), before - times)
        untouched = [2, num_rows - 3]
        seeded = bigembed.Embedding(num_rows, dim, seed=3)
        assert np.array_equal(table.read(untouched), seeded.table.read(untouched))


@pytest.mark.parametrize("size", HUGE)
def test_ids_just_past_the_end_and_those_that_int32_would_wrap(tmp_path, size):
    num_rows, dim = HUGE[size]
    emb = small_embedding(tmp_path, num_rows, dim)
    for wrong in (num_rows, num_rows + 2**32, 2**63 - 1, -1, -(2**31), -(2**63)):
        with pytest.raises(RowOutOfRange, match=f"contain {wrong} "):
            emb(torch.tensor([0, wrong]))


def test_bags_at_both_ends():
    num_rows, dim = HUGE["rows"]
    ids = both_ends(num_rows)
    emb = bigembed.EmbeddingBag(num_rows, dim, mode="sum", seed=3, cache_bytes=1 << 20)
    opt = bigembed.optim.SGD(emb, lr=1.0)
    rows_U, inverse = np.unique(ids.numpy(), return_inverse=True)
    plain = nn.EmbeddingBag.from_pretrained(emb.weight[rows_U].as_subclass(torch.Tensor).clone(), False, mode="sum")
    small_ids = torch.from_numpy(inverse).view(ids.shape)
    bags = emb(ids)
    torch.testing.assert_close(bags, plain(small_ids))
    factors = torch.arange(bags.numel()).view(bags.shape) % 5 - 2.0
    (bags * factors).sum().backward()
    (plain(small_ids) * factors).sum().backward()
    before = plain.weight.detach().clone()
    opt.step()
    assert torch.equal(emb.weight[rows_U].as_subclass(torch.Tensor), before - plain.weight.grad)
