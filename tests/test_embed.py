"""Tokens in, vectors out: numpy's and torch's way agree, gradients reach every row that a token is made of."""

import naive
import numpy as np
import pytest
import torch

import bigembed
from bigembed import threads
from bigembed.errors import NoVocabulary, UnknownToken
from bigembed.vocab.vectors import mean_of_parts, parts_of_tokens, vectors_of_tokens

WORDS = ["the", "cat", "sat", "été"]
SUBWORDS = {
    "kind": "fasttext",
    "minn": 2,
    "maxn": 3,
    "bucket": 50,
    "first_row": len(WORDS),
    "num_words": len(WORDS),
}


@pytest.fixture
def plain():
    emb = bigembed.Embedding(4, 3, seed=1)
    bigembed.Vocabulary.create(emb.table, WORDS)
    return emb


@pytest.fixture
def subworded():
    emb = bigembed.Embedding(len(WORDS) + 50, 3, seed=1)
    bigembed.Vocabulary.create(emb.table, WORDS, subwords=SUBWORDS)
    return emb


def test_mean_of_parts_equals_its_twin():
    rng = np.random.default_rng(0)
    start_N1 = np.concatenate([[0], np.cumsum(rng.integers(0, 5, 3000))])
    values_FD = rng.standard_normal((start_N1[-1], 4)).astype(np.float32)
    out_ND = np.full((3000, 4), np.nan, np.float32)
    threads.run(mean_of_parts, 3000, values_FD, start_N1, out_ND)
    assert out_ND.tobytes() == naive.mean_of_parts(values_FD, start_N1).tobytes()


def test_a_plain_token_is_its_row(plain):
    out = plain.embed(["cat", b"the", "cat"])
    assert out.detach().numpy().tobytes() == plain(torch.tensor([1, 0, 1])).detach().numpy().tobytes()
    assert plain.embed("sat").shape == (1, 3)
    assert plain.embed([]).shape == (0, 3)
    assert plain.vocab.tokens([3]) == ["été".encode()]


def test_unknown_tokens(plain):
    with pytest.raises(UnknownToken, match="dog"):
        plain.embed(["cat", "dog"])
    known = plain.embed(["dog"], unknown=2).detach()
    assert torch.equal(known, plain(torch.tensor([2])).detach())


def test_without_a_vocabulary():
    with pytest.raises(NoVocabulary, match=r"Vocabulary\.create"):
        bigembed.Embedding(4, 3).embed(["cat"])


def test_gradients_reach_the_rows_of_tokens(plain):
    opt = bigembed.optim.SGD(plain, lr=1.0)
    before = plain.weight[:].clone()
    plain.embed(["cat", "cat", "sat"]).sum().backward()
    opt.step()
    moved = before - plain.weight[:]
    assert moved.tolist() == [[0] * 3, pytest.approx([2] * 3), pytest.approx([1] * 3), [0] * 3]


def test_words_of_subwords_are_means_and_unknown_ones_have_vectors(subworded):
    rows_F, start_N1 = parts_of_tokens(subworded.vocab, ["cat", "dog", ""])
    assert rows_F[0] == 1
    assert start_N1[1] > 1
    assert start_N1[2] > start_N1[1]
    whole = subworded.weight[:].numpy()
    out = subworded.embed(["cat", "dog", ""])
    expected = naive.mean_of_parts(whole[rows_F], start_N1)
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-6)
    vectors = vectors_of_tokens(subworded.table, subworded.vocab, ["cat", "dog", ""])
    assert vectors.tobytes() == expected.tobytes()


def test_gradients_reach_every_part_of_a_word(subworded):
    opt = bigembed.optim.SGD(subworded, lr=1.0)
    before = subworded.weight[:].clone()
    rows_F, _ = parts_of_tokens(subworded.vocab, ["dog"])
    subworded.embed(["dog"]).sum().backward()
    opt.step()
    moved = (before - subworded.weight[:]).numpy()
    expected = np.zeros_like(moved)
    np.add.at(expected, rows_F, np.float32(1 / len(rows_F)))
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_new_tokens_train_and_come_back(tmp_path):
    emb = bigembed.Embedding(2, 3, path=tmp_path / "t")
    bigembed.Vocabulary.create(emb.table, ["a", "b"])
    opt = bigembed.optim.SGD(emb, lr=1.0)
    emb.commit()
    assert emb.vocab.add(["c", "a"]).tolist() == [2, 0]
    assert emb.num_embeddings == 3
    before = emb.embed(["c"]).detach().clone()
    emb.embed(["c"]).sum().backward()
    opt.step()
    emb.commit("a new word")
    after = emb.embed(["c"]).detach().clone()
    assert torch.equal(before - 1, after)
    emb.close()
    emb = bigembed.Embedding.open(tmp_path / "t")
    assert torch.equal(emb.embed(["c"]).detach(), after)
    emb.vocab.add(["d"])
    emb.table.rollback()
    with pytest.raises(UnknownToken):
        emb.embed(["d"])
    emb.close()
