"""A device cache above a host cache equals a plain array, whatever the sizes, and loses nothing whatever fails."""

import numpy as np
import pytest
import torch
from cache_contract import ArraySource, D, K, Pair, SourceFailed, add, newest, play, random_rows, tiers
from devices import DEVICES

from bigembed.cache import row_cache
from bigembed.cache.tiers import HostTier

V = 200
SIZES = [(1, 1), (1, 64), (16, 3), (16, 32), (64, 16), (V, 16), (16, V), (V, V)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("device_rows", "host_rows"), SIZES)
def test_fuzz_against_its_twin(device_rows, host_rows, seed, device):
    pair = Pair(tiers(ArraySource(seed=seed), device_rows, host_rows, device))
    play(pair, seed, steps=60)
    pair.write_back()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how_often", [1, 3])
@pytest.mark.parametrize(("device_rows", "host_rows"), [(1, 1), (16, 3), (16, 32), (64, 16)])
def test_nothing_is_lost_when_the_source_fails_at_any_call(device_rows, host_rows, how_often, device, monkeypatch):
    monkeypatch.setattr(row_cache, "APPEND_BYTES", 7 * 4 * (D + K))
    call = 0
    while True:
        pair = Pair(tiers(ArraySource(fail_at=range(call, call + how_often)), device_rows, host_rows, device))
        play(pair, seed=5, steps=25)
        pair.write_back()
        if pair.failures == 0:
            break
        call += 1
    assert call > 10


def test_dirty_rows_move_down_one_tier_at_a_time():
    cache = tiers(ArraySource(), 4, 8)
    ones = np.ones((4, D + K), np.float32)
    cache.update(cache.fetch(np.arange(4)), add, ones)
    cache.update(cache.fetch(np.arange(10, 14)), add, ones)  # the first four go to the host cache
    assert cache.stats()["host"]["dirty_rows"] == 4
    assert not [name for name, _ in cache.source.calls if name == "append"]
    cache.fetch(np.arange(20, 28))  # host: 8 slots for 4 dirty rows from above, and for these
    assert [name for name, _ in cache.source.calls].count("append") == 1
    cache.write_back()
    assert cache.dirty_rows == cache.stats()["dirty_rows"] == 0


def test_a_row_that_is_dirty_in_both_is_served_from_the_device():
    cache = tiers(ArraySource(), 4, 64)
    ones = np.ones((1, D + K), np.float32)
    expected = cache.source.stored_VE[5] + np.float32(1) + np.float32(1)
    cache.update(cache.fetch(np.array([5])), add, ones)
    cache.fetch(np.arange(10, 14))  # row 5 goes down, dirty
    cache.update(cache.fetch(np.array([5])), add, ones)  # and up again
    assert cache.dirty_rows == 2
    assert newest(cache)[5].tobytes() == expected.tobytes()
    cache.write_back()
    assert cache.source.stored_VE[5].tobytes() == expected.tobytes()


class HostFuzz:
    """A HostTier and a plain array, each step done on both."""

    def __init__(self, capacity_rows, fail_at):
        self.tier = HostTier(ArraySource(fail_at=fail_at), capacity_rows=capacity_rows)
        self.newest_VE = self.tier.source.stored_VE.copy()
        self.failures = 0

    def until_it_works(self, action):
        for _ in range(10):
            try:
                action()
                break
            except SourceFailed:
                self.failures += 1
                self.check()
        self.check()

    def check(self):
        self.tier._check()
        assert newest(self.tier).tobytes() == self.newest_VE.tobytes()

    def append(self, rng):
        rows_M = np.sort(random_rows(rng))
        values_ME = rng.standard_normal((rows_M.size, D + K)).astype(np.float32)
        if rows_M.size:
            self.until_it_works(lambda: self.keep(rows_M, values_ME))

    def keep(self, rows_M, values_ME):
        self.tier.append_rows(rows_M, values_ME)
        self.newest_VE[rows_M] = values_ME  # only here: a call that raised has taken none of them

    def fetch(self, rng, fetch_rows):
        rows_M = np.sort(random_rows(rng))
        values_ME = np.full((rows_M.size, D + K), np.nan, np.float32)
        self.until_it_works(lambda: fetch_rows(rows_M, values_ME))
        assert values_ME.tobytes() == self.newest_VE[rows_M].tobytes()


@pytest.mark.parametrize("fail_at", [(), range(2, 500, 5)])
@pytest.mark.parametrize("capacity_rows", [1, 3, 16, 64, V])
def test_a_host_tier_is_a_row_source(capacity_rows, fail_at):
    fuzz, rng = HostFuzz(capacity_rows, fail_at), np.random.default_rng(0)
    for _ in range(120):
        action = rng.random()
        if action < 0.5:
            fuzz.append(rng)
        elif action < 0.85:
            fuzz.fetch(rng, fuzz.tier.fetch_rows)
        elif action < 0.95:
            before = fuzz.tier.stats()
            fuzz.fetch(rng, fuzz.tier.peek_rows)
            assert fuzz.tier.stats() == before
        else:
            fuzz.until_it_works(fuzz.tier.write_back)
            assert fuzz.tier.source.stored_VE.tobytes() == fuzz.newest_VE.tobytes()
    assert bool(fuzz.failures) == bool(fail_at)


def test_appended_rows_are_not_read_from_the_source():
    tier = HostTier(ArraySource(), capacity_rows=16)
    tier.append_rows(np.arange(10), np.ones((10, D + K), np.float32))
    assert tier.source.calls == []
    assert (tier.dirty_rows, tier.stats()["used_rows"]) == (10, 10)


def test_an_interrupted_append_leaves_no_row_that_is_not_there(monkeypatch):
    tier = HostTier(ArraySource(), capacity_rows=16)
    tier.append_rows(np.arange(4), np.ones((4, D + K), np.float32))
    expected_VE = newest(tier)

    def interrupted(slots_M, values_ME):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tier, "_put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tier.append_rows(np.arange(30), np.zeros((30, D + K), np.float32))
    tier._check()
    taken = tier.source.calls[-1][1]  # rows without room, which the source has
    expected_VE[taken] = 0
    assert newest(tier).tobytes() == expected_VE.tobytes()


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bytes_for_any_sizes(device):
    def train(device_rows, host_rows):
        pair = Pair(tiers(ArraySource(), device_rows, host_rows, device))
        rng = np.random.default_rng(0)
        for _ in range(20):
            pair.update(rng, pair.fetch(rng, random_rows(rng)))
        pair.write_back()
        return pair.cache.source.stored_VE.tobytes()

    assert len({train(*sizes) for sizes in SIZES}) == 1
    assert torch.get_default_dtype() == torch.float32
