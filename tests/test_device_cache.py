"""DeviceCache serves the newest values, loses none whatever its source raises, and equals RowCache step by step."""

import numpy as np
import pytest
import torch
from cache_contract import ArraySource, D, K, OnHost, Pair, SourceFailed, add, newest, play, random_delta, random_rows
from devices import NO_CUDA

from bigembed.cache import device_report, row_cache
from bigembed.cache.device_cache import DeviceCache
from bigembed.cache.device_ops import group
from bigembed.cache.row_cache import RowCache
from bigembed.errors import InvalidArgument, RowOutOfRange
from bigembed.storage.rows import check_range

V = 200
CAPACITIES = [1, 3, 16, 64, V]
KINDS = ["host", "cpu", pytest.param("cuda", marks=NO_CUDA)]
DEVICES = KINDS[1:]


def make(kind, source, **options):
    return RowCache(source, **options) if kind == "host" else OnHost(DeviceCache(source, **options, device=kind))


@pytest.mark.parametrize("kind", KINDS)
class TestContract:
    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("capacity_rows", CAPACITIES)
    def test_fuzz_against_its_twin(self, kind, capacity_rows, seed):
        pair = Pair(make(kind, ArraySource(seed=seed), capacity_rows=capacity_rows))
        assert pair.cache.num_slots == capacity_rows
        play(pair, seed, steps=60)
        pair.write_back()

    @pytest.mark.parametrize("how_often", [1, 3])
    @pytest.mark.parametrize("capacity_rows", [1, 16, V])
    def test_nothing_is_lost_when_the_source_fails_at_any_call(self, kind, capacity_rows, how_often, monkeypatch):
        monkeypatch.setattr(row_cache, "APPEND_BYTES", 7 * 4 * (D + K))  # so that a write_back fails between batches
        call = 0
        while True:
            pair = Pair(make(kind, ArraySource(fail_at=range(call, call + how_often)), capacity_rows=capacity_rows))
            play(pair, seed=5, steps=25)
            pair.write_back()
            if pair.failures == 0:
                break
            call += 1
        assert call > 10

    def test_rows_changed_past_the_cache_wait_for_a_source_that_fails(self, kind):
        cache = make(kind, ArraySource(), capacity_rows=1)
        rows_U = np.array([9, 4, 7, 1, 8])
        located = cache.fetch(rows_U)
        expected_VE = cache.source.stored_VE.copy()
        expected_VE[rows_U] += 1
        cache.source.fail_at = range(1, 100)
        with pytest.raises(SourceFailed):
            cache.update(located, add, np.ones((5, D + K), np.float32))
        assert cache.dirty_rows == 5
        cache._check()
        with pytest.raises(AssertionError):
            cache.update(located, add, np.ones((5, D + K), np.float32))
        for failing in (cache.write_back, lambda: cache.fetch(rows_U)):
            with pytest.raises(SourceFailed):
                failing()
            assert newest(cache).tobytes() == expected_VE.tobytes()
        cache.source.fail_at = ()
        peeked = cache.gather(cache.fetch(np.array([1, 2, 7, 9]), admit=False), np.arange(4))
        assert peeked.numpy().tobytes() == expected_VE[[1, 2, 7, 9], :D].tobytes()
        refreshed = np.zeros((2, D + K), np.float32)
        expected_VE[[4, 8]] = cache.source.stored_VE[[4, 8]] = refreshed
        cache.refresh(np.array([4, 8]), refreshed)
        cache._check()
        cache.write_back()
        assert cache.source.stored_VE.tobytes() == expected_VE.tobytes()

    def test_refresh_of_every_waiting_row_leaves_none_waiting(self, kind):
        cache = make(kind, ArraySource(), capacity_rows=1)
        located = cache.fetch(np.arange(5))
        cache.source.fail_at = {1}
        with pytest.raises(SourceFailed):
            cache.update(located, add, np.ones((5, D + K), np.float32))
        cache.refresh(np.arange(5), cache.source.stored_VE[:5])
        cache._check()
        assert cache.dirty_rows == 0

    def test_a_fetch_reads_once_and_appends_once(self, kind):
        cache = make(kind, ArraySource(), capacity_rows=16)
        cache.update(cache.fetch(np.arange(16)[::-1].copy()), add, np.ones((16, D + K), np.float32))
        assert [name for name, _ in cache.source.calls] == ["fetch"]
        cache.fetch(np.array([50, 0, 40, 1, 60]))
        assert [name for name, _ in cache.source.calls] == ["fetch", "append", "fetch"]
        cache.fetch(np.array([0, 50]))
        assert len(cache.source.calls) == 3, "hits need no source"

    def test_protected_rows_stay_until_they_are_not_protected(self, kind):
        cache = make(kind, ArraySource(), capacity_rows=16)
        cache.fetch(np.arange(10))
        cache.fetch(np.arange(100, 116), protect_step=1)
        assert cache.stats()["past"] == 10
        assert (cache.fetch(np.arange(10), protect_step=1).slots_U < 16).all()
        cache.fetch(np.arange(150, 166))
        assert cache.stats()["evictions"] == 16

    def test_located_rows_cannot_be_used_after_the_cache_moved_on(self, kind):
        cache = make(kind, ArraySource(), capacity_rows=16)
        rows_U = np.arange(3)
        for move_on in (
            lambda: cache.fetch(rows_U),
            lambda: cache.refresh(rows_U, cache.source.stored_VE[:3]),
            cache.drop,
        ):
            located = cache.fetch(rows_U)
            move_on()
            with pytest.raises(AssertionError, match="located before"):
                cache.gather(located, np.arange(3))
            with pytest.raises(AssertionError, match="located before"):
                cache.update(located, add, np.ones((3, D + K), np.float32))

    def test_gather_returns_a_tensor_of_its_own(self, kind):
        cache = make(kind, ArraySource(), capacity_rows=16)
        out_ND = cache.gather(cache.fetch(np.arange(3)), np.array([2, 0, 2, 1]))
        assert out_ND.shape == (4, D)
        assert out_ND.is_contiguous()
        out_ND.fill_(7)
        assert newest(cache).tobytes() == cache.source.stored_VE.tobytes()

    def test_write_back_is_ascending_and_in_bounded_batches(self, kind, monkeypatch):
        monkeypatch.setattr(row_cache, "APPEND_BYTES", 5 * 4 * (D + K) + 3)
        cache = make(kind, ArraySource(), capacity_rows=64)
        rows_U = np.random.default_rng(0).permutation(V)[:17]
        cache.update(cache.fetch(rows_U), add, np.ones((17, D + K), np.float32))
        cache.write_back()
        appended = [rows for name, rows in cache.source.calls if name == "append"]
        assert [rows.size for rows in appended] == [5, 5, 5, 2]
        assert list(np.concatenate(appended)) == sorted(rows_U)

    def test_wrong_arguments_say_so(self, kind):
        for options, message in [
            ({}, "either budget_bytes or capacity_rows"),
            ({"budget_bytes": 9, "capacity_rows": 9}, "either budget_bytes or capacity_rows"),
            ({"budget_bytes": 0}, "budget_bytes must be at least 1, not 0"),
            ({"capacity_rows": 9, "ways": 0}, "ways must be at least 1, not 0"),
        ]:
            with pytest.raises(InvalidArgument, match=message):
                make(kind, ArraySource(), **options)


def assert_equal_caches(host, device):
    assert newest(device).tobytes() == newest(host).tobytes()
    assert device._dirty_S.tobytes() == host._dirty_S.tobytes()
    for name in ("loaded", "key", "score"):
        assert hasattr(host.index, name) == hasattr(device.index, name)
        if hasattr(host.index, name):
            np.testing.assert_array_equal(getattr(device.index, name), getattr(host.index, name))
    assert {name: device.stats()[name] for name in host.stats()} == host.stats()
    assert [(name, rows.tolist()) for name, rows in device.source.calls] == [
        (name, rows.tolist()) for name, rows in host.source.calls
    ]


def on_both(caches, action):
    """The action on each cache; its results, or the errors where both raised."""
    outcomes = []
    for cache in caches:
        try:
            outcomes.append(action(cache))
        except SourceFailed as failed:
            outcomes.append(failed)
    assert isinstance(outcomes[0], SourceFailed) == isinstance(outcomes[1], SourceFailed)
    return outcomes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fail_at", [(), range(3, 400, 7)])
@pytest.mark.parametrize("capacity_rows", CAPACITIES)
def test_it_equals_the_host_cache_step_by_step(capacity_rows, fail_at, device):
    """Slots, scores, dirty flags, counters, and every call of the source with its rows."""
    caches = [make(kind, ArraySource(fail_at=fail_at), capacity_rows=capacity_rows) for kind in ("host", device)]
    rng = np.random.default_rng(1)
    for _ in range(100):
        rows_U, action = random_rows(rng), rng.random()
        options = {"protect_step": max(1, caches[0].step - int(rng.integers(0, 3))), "count": bool(rng.random() < 0.8)}
        if action < 0.85:
            located = on_both(caches, lambda cache, rows=rows_U, options=options: cache.fetch(rows, **options))
            assert_equal_caches(*caches)
            if isinstance(located[0], SourceFailed):
                continue
            np.testing.assert_array_equal(located[1].slots_U, located[0].slots_U)
            assert located[1].past_PE.numpy().tobytes() == located[0].past_PE.numpy().tobytes()
            delta_UE = random_delta(rng, rows_U)
            if action < 0.6:
                place = dict(zip(caches, located, strict=True))
                on_both(caches, lambda cache, place=place, delta=delta_UE: cache.update(place[cache], add, delta))
        elif action < 0.92:
            on_both(caches, lambda cache: cache.write_back())
        elif action < 0.97:
            on_both(caches, lambda cache, rows=rows_U: cache.refresh(rows, cache.source.stored_VE[rows]))
        else:
            on_both(caches, lambda cache: cache.drop())
        assert_equal_caches(*caches)


@pytest.mark.parametrize("device", DEVICES)
def test_a_report_without_room_for_every_missed_row_is_read_again(device, monkeypatch):
    monkeypatch.setattr(device_report, "FIRST_REPORT_ROWS", 3)
    pair = Pair(make(device, ArraySource(), capacity_rows=64))
    play(pair, seed=0, steps=40)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capacity_rows", [16, V])
def test_a_batch_of_any_ids_needs_no_count_from_the_host(capacity_rows, device):
    cache = DeviceCache(ArraySource(), capacity_rows=capacity_rows, device=device)
    ids_N = np.array([7, 3, 7, 190, 3, 3])
    batch = group(torch.from_numpy(ids_N).to(device), V)
    located = cache.fetch(batch)
    assert located.rows_U.tolist() == [7, 3, 190]
    out_ND = cache.gather(located, batch.inverse_N).cpu().numpy()
    assert out_ND.tobytes() == cache.source.stored_VE[ids_N, :D].tobytes()
    cache._check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capacity_rows", [16, V])
@pytest.mark.parametrize("ids", [[1, V, 5], [-1, 3], [2, 3, 1 << 40, -5], [-(1 << 63)]])
def test_an_id_out_of_range_raises_and_changes_nothing(capacity_rows, ids, device):
    cache = make(device, ArraySource(), capacity_rows=capacity_rows)
    cache.fetch(np.arange(10))
    before = cache.index, cache.step, cache.stats()["hits"]
    with pytest.raises(RowOutOfRange) as on_host:
        check_range(np.array(ids), V)
    with pytest.raises(RowOutOfRange) as raised:
        cache.device_cache.fetch(group(torch.tensor(ids, device=device), V))
    assert str(raised.value) == str(on_host.value)
    for name, array in vars(before[0]).items():
        np.testing.assert_array_equal(getattr(cache.index, name), array)
    assert (cache.step, cache.stats()["hits"]) == before[1:]
    assert cache.fetch(np.arange(10)).slots_U.max() < capacity_rows


@pytest.mark.parametrize("device", DEVICES)
def test_only_missed_ids_and_leaving_rows_cross(device):
    cache = make(device, ArraySource(), capacity_rows=16)
    row_bytes = 4 * (D + K)
    cache.update(cache.fetch(np.arange(16)), add, np.ones((16, D + K), np.float32))
    before = cache.device_cache.stats()
    assert before["bytes_up"] == 16 * row_bytes
    cache.fetch(np.arange(16))
    hit = cache.device_cache.stats()
    assert hit["bytes_up"] == before["bytes_up"]
    assert hit["bytes_down"] - before["bytes_down"] == 8 * (4 + 16)  # the report, with room for all to miss
    cache.fetch(np.array([100, 101]))
    missed = cache.device_cache.stats()
    assert missed["bytes_up"] - hit["bytes_up"] == 2 * row_bytes
    assert missed["bytes_down"] - hit["bytes_down"] == 8 * (4 + 2) + 8 * (2 * 2 + 1) + 2 * row_bytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("budget_bytes", [1, 500, 3_000, 4_421, 4_422, 10_000])
def test_memory_stays_within_the_budget(budget_bytes, device):
    cache = DeviceCache(ArraySource(), budget_bytes=budget_bytes, device=device)
    index = cache.index
    held = [
        cache._values,
        cache._dirty,
        *(getattr(index, n) for n in ("_key", "_score", "_loaded") if hasattr(index, n)),
    ]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert taken <= budget_bytes or cache.num_slots == 1
    assert (cache.num_slots == V) == (budget_bytes >= 4_422)  # 22 bytes a row, and one slot more


def test_a_large_budget_is_used_to_98_percent():
    cache = DeviceCache(ArraySource(100_000), budget_bytes=1 << 20, device="cpu")
    assert 0.98 * (1 << 20) <= cache.stats()["capacity_bytes"] <= 1 << 20


@pytest.mark.parametrize("device", DEVICES)
def test_an_interrupted_copy_into_the_slots_leaves_no_row_that_is_not_there(device, monkeypatch):
    cache = make(device, ArraySource(), capacity_rows=3)
    cache.update(cache.fetch(np.arange(3)), add, np.ones((3, D + K), np.float32))
    expected_VE = newest(cache)

    def interrupted(slots_M, values_ME):
        cache.device_cache.values_SE.fill_(float("nan"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache.device_cache, "_put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.fetch(np.arange(10, 13))
    cache._check()
    assert newest(cache).tobytes() == expected_VE.tobytes()


def test_a_device_that_is_not_there_says_so():
    with pytest.raises(InvalidArgument, match="'meta' is not supported"):
        DeviceCache(ArraySource(), capacity_rows=9, device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidArgument, match="needs CUDA, and torch finds none here"):
            DeviceCache(ArraySource(), capacity_rows=9, device="cuda")
