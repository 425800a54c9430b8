"""max_norm: kernels against their slow twins, and lookups that shorten rows against torch's, bit by bit."""

import gc
import os
import platform

import numpy as np
import pytest
import torch
from naive_renorm import row_norm
from naive_renorm import row_scales as slow_scales
from naive_renorm import scale_weights as slow_weights
from torch import nn
from training import batches, coefficients, plain_twin, rows_and_state, small_table, weights

import bigembed
from bigembed import optim, threads
from bigembed.errors import BigembedError, ForkedTable, InvalidArgument, ReadOnlyTable, RowOutOfRange, StorageFailed
from bigembed.kernels import renorm as kernels
from bigembed.nn import max_norm as on_device

V, D = 50, 4
EXACT_NORMS = [0.0, 1.0, 2.0, float("inf"), float("-inf")]
OTHER_NORMS = [0.5, 1.5, 3.0, -1.0, 10.0]
# Each place: (slots of the host's cache, slots of a device's), None is room for all or no such cache.
PLACES = {"4 rows": (4, None), "all rows": (None, None), "device": (4, 4)}


def hostile_rows(dim, count=60, seed=0):
    """Rows of any length, with zeros, NaN, inf, and numbers whose squares overflow or vanish."""
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    rows[0], rows[1, -1], rows[2, 0], rows[3] = 0.0, np.nan, np.inf, rows[3] * np.float32(1e25)
    rows[4], rows[5, 0], rows[6] = rows[4] * np.float32(1e-25), -0.0, np.float32(-1.0)
    return rows


def same(ours, theirs):
    """Equal bit by bit where torch's sum is compiled as kernels/renorm.py says; elsewhere within its rounding."""
    if platform.machine() == "x86_64":
        return torch.equal(ours, theirs)
    return torch.allclose(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)


def pair(folder, place, max_norm, norm_type=2.0, dim=D, rows=None, **facts):
    """A module on a temporary table, and torch's with the same rows."""
    cache_rows, device_rows = PLACES[place]
    emb = bigembed.Embedding.open(small_table(folder, V, dim, **facts), cache_rows=cache_rows, device_rows=device_rows)
    if rows is not None:
        emb.weight[: len(rows)] = rows
        emb.commit()
    plain = plain_twin(emb)
    for module in (emb, plain):
        module.max_norm, module.norm_type = max_norm, norm_type
    return emb, plain


@pytest.fixture(params=PLACES)
def place(request):
    return request.param


# -- kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, where a number is past float32
@pytest.mark.parametrize("p", [*EXACT_NORMS, *OTHER_NORMS, float("nan"), 1e-300, 1e300])
@pytest.mark.parametrize("dim", [1, 3, 8, 15, 16, 33])
def test_scales_equal_their_slow_twin(dim, p):
    rows_UD = hostile_rows(dim)
    scale_U = np.empty(len(rows_UD), np.float32)
    for max_norm in (1.5, 0.0, -1.0, float("nan"), float("inf")):
        kernels.row_scales(0, len(rows_UD), rows_UD, max_norm, p, scale_U)
        np.testing.assert_array_equal(scale_U, slow_scales(rows_UD, max_norm, p))
        there = on_device.row_scales(torch.from_numpy(rows_UD), max_norm, p).numpy()
        if p in EXACT_NORMS:
            np.testing.assert_array_equal(there, scale_U)
        else:  # torch's power in float64 is off by an ulp, which shows where the sum is just at a rounding
            np.testing.assert_allclose(there, scale_U, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("p", [*EXACT_NORMS, *OTHER_NORMS])
@pytest.mark.parametrize("dim", [1, 3, 4, 5, 8, 12, 15, 64])
def test_norms_are_torchs(dim, p):
    rows_UD = torch.from_numpy(hostile_rows(dim))
    theirs_U = torch.stack([row.norm(p) for row in rows_UD])
    with np.errstate(all="ignore"):
        ours_U = torch.from_numpy(np.array([row_norm(row, p) for row in rows_UD.numpy()], np.float32))
    # The exponents torch has no loop of its own for go through its float32 power, whose last bit is not always right.
    exact = p in EXACT_NORMS and platform.machine() == "x86_64"
    torch.testing.assert_close(ours_U, theirs_U, rtol=0 if exact else 2e-6, atol=0, equal_nan=True)


def test_weights_are_scaled_where_they_are():
    rng = np.random.default_rng(0)
    values_SE, past_PE = rng.standard_normal((5, 6)).astype(np.float32), rng.standard_normal((2, 6)).astype(np.float32)
    slots_U, scale_U = np.array([3, 5, 0, 6]), np.array([0.5, 0.3, np.nan, 1.0], np.float32)
    every = np.concatenate([values_SE, past_PE])
    expected = every.copy()
    expected[slots_U] = slow_weights(every[slots_U], scale_U, 4)
    there = on_device.scale_weights(torch.from_numpy(every[slots_U]), torch.from_numpy(scale_U), 4)
    assert there.numpy().tobytes() == expected[slots_U].tobytes()
    kernels.scale_weights(0, 4, values_SE, past_PE, slots_U, scale_U, 4)
    assert np.concatenate([values_SE, past_PE]).tobytes() == expected.tobytes()


# -- lookups ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1.0, 0.25, 0.0, True, False, 3])
@pytest.mark.parametrize("norm_type", EXACT_NORMS)
def test_rows_are_shortened_as_torchs(tmp_path, place, max_norm, norm_type):
    emb, plain = pair(tmp_path, place, max_norm, norm_type, dim=11)
    for ids in batches(2):
        rows, expected = emb(ids), plain(ids)
        assert same(rows, expected)
        assert same(weights(emb), plain.weight.detach())
        assert torch.equal(rows, weights(emb)[ids]), "what is looked up is what the table holds"
        assert rows.requires_grad


@pytest.mark.parametrize("norm_type", OTHER_NORMS)
def test_other_norms_are_torchs_within_rounding(tmp_path, place, norm_type):
    emb, plain = pair(tmp_path, place, 1.0, norm_type)
    for ids in batches(3):
        torch.testing.assert_close(emb(ids), plain(ids), rtol=2e-6, atol=0)
        torch.testing.assert_close(weights(emb), plain.weight.detach(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("mode", ["eval", "frozen", "no_grad", "inference_mode"])
def test_rows_are_shortened_whoever_looks(tmp_path, place, mode):
    emb, plain = pair(tmp_path, place, 0.5)
    ids = torch.tensor([[3, 3, 7], [1, 49, 3]])
    for module in (emb, plain):
        if mode == "eval":
            module.eval()
        elif mode == "frozen":
            module.requires_grad_(False)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        assert same(emb(ids).clone(), plain(ids).clone())
    assert same(weights(emb), plain.weight.detach())
    assert same(emb(ids), plain(ids))


@pytest.mark.parametrize("ids", [[], 5, [[5]], [2, 2, 2], [0, 49, 0]], ids=str)
def test_inputs_of_any_shape(tmp_path, place, ids):
    emb, plain = pair(tmp_path, place, 0.125, padding_idx=2)
    ids = torch.tensor(ids, dtype=torch.int64 if ids == 5 else torch.int32)
    emb.weight[2] = torch.ones(D)  # the padding row is shortened like any other
    plain.weight.data[2] = 1.0
    assert same(emb(ids), plain(ids))
    assert same(emb(ids.expand(3, *ids.shape)), plain(ids.expand(3, *ids.shape)))
    assert same(weights(emb), plain.weight.detach())


def test_hostile_rows(tmp_path, place):
    rows = hostile_rows(9, V)
    for max_norm in (1.0, -1.0, float("inf"), float("nan")):
        emb, plain = pair(tmp_path, place, max_norm, dim=9, rows=rows)
        ids = torch.arange(V)
        ours, theirs = emb(ids).detach(), plain(ids).detach()
        assert same(torch.nan_to_num(ours, nan=12345.0), torch.nan_to_num(theirs, nan=12345.0))
        assert torch.equal(ours.isnan(), theirs.isnan())


def test_training_is_torchs(tmp_path, place):
    """Twenty steps of SGD: every sum is exact in any order, so all bits are torch's."""
    emb, plain = pair(tmp_path, place, 1.25, dim=11, padding_idx=4)
    opt, plain_opt = optim.SGD(emb, lr=0.5), torch.optim.SGD(plain.parameters(), lr=0.5)
    for ids in batches(20):
        factors = coefficients(ids, 11)
        for module, optimizer in ((emb, opt), (plain, plain_opt)):
            optimizer.zero_grad()
            (module(ids) * factors).sum().backward()
            if module is emb:
                found = emb.pending_gradient().to_dense()
        assert torch.equal(found, plain.weight.grad), "the gradient is of the shortened rows"
        for optimizer in (opt, plain_opt):
            optimizer.step()
        assert same(weights(emb), plain.weight.detach())


def test_lookups_before_a_backward_and_a_step_between(tmp_path, place):
    emb, plain = pair(tmp_path, place, 0.75)
    first, second = torch.tensor([1, 2, 3]), torch.tensor([3, 2, 2, 30])
    for module in (emb, plain):
        kind = optim.SGD if module is emb else torch.optim.SGD
        optimizer = kind(module if module is emb else module.parameters(), lr=1.0)
        a, b = module(first).sum(), module(second).sum()
        b.backward()
        optimizer.step()
        module(first)
        a.backward()
        optimizer.step()
    assert same(weights(emb), plain.weight.detach())


# -- a lookup that writes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_rows", [16, None])
def test_only_rows_that_change_are_dirty(tmp_path, cache_rows):
    emb = bigembed.Embedding.open(small_table(tmp_path, V, D), cache_rows=cache_rows)
    emb.weight[:] = torch.full((V, D), 0.1)
    emb.weight[[3, 9]] = torch.ones(2, D)
    emb.commit()
    emb.max_norm = 1.0
    emb(torch.tensor([3, 3, 4, 9, 10]))
    assert emb.stats()["cache"]["dirty_rows"] == 2
    emb.commit()
    emb(torch.tensor([3, 4, 9, 10]))
    assert emb.stats()["cache"]["dirty_rows"] == 0, "they are short enough now"


def test_shortened_rows_are_there_after_a_commit(tmp_path):
    emb = bigembed.Embedding(V, D, max_norm=0.5, path=tmp_path / "t", cache_bytes=1, seed=1)
    opt = optim.Adagrad(emb, lr=0.1)
    for ids in batches(5):
        emb(ids).sum().backward()
        opt.step()
    state = rows_and_state(emb)[:, D:]
    emb(torch.arange(V))
    assert rows_and_state(emb)[:, D:].tobytes() == state.tobytes(), "an optimizer's state is not scaled"
    emb.commit()
    expected = weights(emb)
    emb.close()
    again = bigembed.Embedding.open(tmp_path / "t", mode="r")
    assert torch.equal(weights(again), expected)
    assert expected.norm(dim=1).max() < 0.5 + 1e-6


def test_caches_threads_and_journals_change_no_bit(tmp_path):
    found = set()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 3000, 5000))
    before = threads.get_num_threads()
    for count, facts in ((1, {}), (3, {}), (3, {"cache_rows": 4}), (2, {"cache_rows": 300, "device_rows": 40})):
        threads.set_num_threads(count)
        table = small_table(tmp_path, 3000, 20, journal_bytes=1 << (16 if facts else 30))
        emb = bigembed.Embedding.open(table, **facts)
        emb.max_norm = 4.0
        found.add(emb(ids).detach().numpy().tobytes() + weights(emb).numpy().tobytes())
    threads.set_num_threads(before)
    assert len(found) == 1


def test_ids_out_of_range_change_nothing(tmp_path, place):
    """torch shortens the rows in front of the bad one in sorted order; here a refused lookup leaves no trace."""
    emb, _ = pair(tmp_path, place, 0.1)
    before = rows_and_state(emb).tobytes()
    for bad in (V, -1):
        with pytest.raises(RowOutOfRange, match=rf"ids contain {bad} \(at position 2\)"):
            emb(torch.tensor([3, 3, bad]))
    assert rows_and_state(emb).tobytes() == before


def test_storage_that_fails_loses_nothing(tmp_path, monkeypatch):
    emb, plain = pair(tmp_path, "4 rows", 0.25)
    emb.max_norm = None
    emb(torch.arange(40, 44))
    emb.max_norm = 0.25
    append, failures = bigembed.Table.append_rows, [1]

    def fails_once(table, rows_M, values_ME):
        if failures:
            failures.pop()
            raise StorageFailed("no")
        append(table, rows_M, values_ME)

    monkeypatch.setattr(bigembed.Table, "append_rows", fails_once)
    ids = torch.arange(40)
    with pytest.raises(StorageFailed):
        emb(ids)
    assert not failures
    emb.trainable.caches._check()
    # The rows were shortened in the cache or not at all, and a lookup shortens what is still too long: once more where
    # rounding left a row a hair above the limit, as torch's second lookup does.
    plain(ids)
    torch.testing.assert_close(emb(ids), plain(ids), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights(emb), plain.weight.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("device_rows", [None, 8])
def test_rows_read_ahead_are_shortened_too(tmp_path, device_rows):
    emb = bigembed.Embedding.open(small_table(tmp_path, V, D), cache_rows=4, device_rows=device_rows)
    emb.weight[:] = torch.ones(V, D)
    emb.commit()
    emb.max_norm = 1.0
    for ids in batches(5):
        emb.prefetch(ids)
        emb(ids)
        emb.prefetch(ids)  # what is read before a lookup shortens it
        assert emb(ids).detach().norm(dim=-1).max() < 1 + 1e-6
        assert torch.equal(emb(ids), weights(emb)[ids])


# -- refused ----------------------------------------------------------------------------------------------------


def test_a_reader_refuses_and_says_what_to_do(tmp_path):
    writer = bigembed.Embedding(V, D, path=tmp_path / "t", seed=1)
    writer.commit()
    reader = bigembed.Embedding.open(tmp_path / "t", mode="r")
    reader.max_norm = 1e9  # whether or not a row is too long: an error should not wait for the data
    with pytest.raises(ReadOnlyTable, match=r"max_norm shortens rows.*mode='r'.*torch\.renorm") as caught:
        reader(torch.tensor([1]))
    assert isinstance(caught.value, BigembedError)
    with pytest.raises(ReadOnlyTable, match="max_norm shortens rows"):
        bigembed.Embedding.open(tmp_path / "t", mode="r", max_norm=1.0)
    again = bigembed.Embedding.open(tmp_path / "t", max_norm=0.5, norm_type=1.0)
    assert again.trainable is writer.trainable
    assert again(torch.tensor(1)).abs().sum() < 0.5 + 1e-6
    assert torch.equal(writer(torch.tensor(1)), again(torch.tensor(1))), "one table"
    writer.commit()
    writer.close()


def test_from_pretrained_of_a_path_opens_it_to_write(tmp_path):
    bigembed.Embedding(V, D, path=tmp_path / "t", seed=1).close()
    emb = bigembed.Embedding.from_pretrained(tmp_path / "t", max_norm=0.5, norm_type=1.0)
    assert emb.table.mode == "r+"
    assert not emb(torch.tensor([1])).requires_grad
    assert emb.weight[1].abs().sum() < 0.5 + 1e-6
    emb.commit()


def test_a_forked_child_refuses(tmp_path):
    emb, _ = pair(tmp_path, "all rows", 0.5)
    emb.max_norm = None
    emb(torch.tensor([1]))
    emb.max_norm = 0.5
    gc.collect()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            emb(torch.tensor([1]))
            os.write(writing, b"looked up")
        except BaseException as error:
            is_ours = isinstance(error, ReadOnlyTable) and isinstance(error.__cause__, ForkedTable)
            os.write(writing, f"{is_ours} {'torch.renorm' in str(error)}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == b"True True"
    os.close(reading), os.close(writing)


@pytest.mark.parametrize("wrong", ["1", [1.0], 1j, torch.ones(1), object()], ids=str)
def test_what_is_no_number(tmp_path, wrong):
    """torch raises TypeError at the first lookup; here the constructor does, and a lookup where it was set later."""
    plain = nn.Embedding(V, D, max_norm=wrong)
    if not isinstance(wrong, torch.Tensor):  # torch takes one of one element
        with pytest.raises(TypeError):
            plain(torch.tensor([1]))
    for arguments in ({"max_norm": wrong}, {"max_norm": 1.0, "norm_type": wrong}):
        for make in (
            lambda facts: bigembed.Embedding(V, D, **facts),
            lambda facts: bigembed.Embedding.from_pretrained(torch.zeros(V, D), **facts),
        ):
            with pytest.raises(InvalidArgument, match="must be a number") as caught:
                make(arguments)
            assert isinstance(caught.value, TypeError)
    emb, _ = pair(tmp_path, "all rows", wrong)
    before = rows_and_state(emb).tobytes()
    with pytest.raises(TypeError, match="max_norm must be a number"):
        emb(torch.tensor([1]))
    assert rows_and_state(emb).tobytes() == before


def test_a_scalar_tensor_is_a_number(tmp_path):
    emb, plain = pair(tmp_path, "all rows", torch.tensor(0.5))
    assert same(emb(torch.arange(V)), plain(torch.arange(V)))
    assert bigembed.Embedding(V, D, max_norm=np.float32(0.5)).max_norm == 0.5
