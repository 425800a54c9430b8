"""Transfer: what comes down is what went up, and a host buffer waits for the copy it was last used for."""

import numpy as np
import pytest
import torch
from devices import DEVICES

from bigembed.cache.transfer import Transfer


class FakeEvent:
    def __init__(self, log, copy):
        self.log, self.copy, self.is_passed = log, copy, False

    def query(self):
        return self.is_passed

    def synchronize(self):
        if not self.is_passed:
            self.log.append(("wait", self.copy))
            self.is_passed = True


class FakeCopier:
    """Copies that are done only when somebody waits for them; writes down what happens."""

    def __init__(self):
        self.log, self.events, self.buffers = [], [], []

    def buffer(self, size_bytes):
        self.log.append(("buffer", size_bytes))
        self.buffers.append(torch.zeros(size_bytes, dtype=torch.uint8))
        return self.buffers[-1]

    def up(self, host):
        return host.clone(), self._start("up")

    def down(self, values, host):
        host.copy_(values)
        return self._start("down")

    def _start(self, name):
        self.events.append(FakeEvent(self.log, (name, len(self.events))))
        self.log.append(self.events[-1].copy)
        return self.events[-1]


def go_up(transfer, num_rows, fill):
    staged = transfer.stage(num_rows, 2)
    assert staged.shape == (num_rows, 2)
    assert staged.dtype == np.float32
    staged[...] = fill
    return transfer.upload()


def test_buffers_alternate_and_wait_for_their_last_copy_only():
    copier = FakeCopier()
    transfer = Transfer(torch.device("cpu"), copier)
    for fill in range(2):
        go_up(transfer, 4, fill)
    assert copier.log == [("buffer", 32), ("up", 0), ("buffer", 32), ("up", 1)]
    go_up(transfer, 4, 2)
    assert copier.log[4:] == [("wait", ("up", 0)), ("up", 2)]
    copier.events[1].is_passed = True
    go_up(transfer, 4, 3)
    assert copier.log[6:] == [("up", 3)], "a copy that is done needs no wait"
    assert transfer.stalls == 1


def test_a_buffer_grows_to_a_power_of_two_after_its_copy_is_done():
    copier = FakeCopier()
    transfer = Transfer(torch.device("cpu"), copier)
    for num_rows in (1, 1, 5, 4, 3):
        go_up(transfer, num_rows, 0)
    assert [entry for entry in copier.log if entry[0] == "buffer"] == [
        ("buffer", 8),
        ("buffer", 8),
        ("buffer", 64),
        ("buffer", 32),
    ]
    assert copier.log.index(("wait", ("up", 0))) < copier.log.index(("buffer", 64))
    assert transfer.buffer_bytes == 96


def test_a_stage_that_was_never_uploaded_blocks_nothing():
    copier = FakeCopier()
    transfer = Transfer(torch.device("cpu"), copier)
    transfer.stage(4, 2)  # the source failed
    for fill in range(2):
        go_up(transfer, 4, fill)
    assert not [entry for entry in copier.log if entry[0] == "wait"]
    with pytest.raises(AssertionError, match="nothing is staged"):
        transfer.upload()


def test_two_downloads_may_be_on_their_way():
    copier = FakeCopier()
    transfer = Transfer(torch.device("cpu"), copier)
    first = transfer.download(torch.tensor([1, 2, 3]))
    second = transfer.download(torch.tensor([[0.5]]))
    assert first.wait().tolist() == [1, 2, 3]
    assert ("wait", ("down", 1)) not in copier.log
    assert second.wait().tolist() == [[0.5]]
    third = transfer.download(torch.tensor([4]))
    assert second.wait().tolist() == [[0.5]]
    assert third.wait().tolist() == [4]
    assert transfer.stalls == 0
    transfer.download(torch.tensor([5]))
    transfer.download(torch.tensor([6]))
    assert (transfer.stalls, transfer.bytes_down) == (0, 24 + 4 + 8 + 8 + 8)


def test_up_and_down_do_not_wait_for_each_other():
    copier = FakeCopier()
    transfer = Transfer(torch.device("cpu"), copier)
    for fill in range(2):
        go_up(transfer, 2, fill)
    transfer.download(torch.zeros(3))
    transfer.download(torch.zeros(3))
    assert not [entry for entry in copier.log if entry[0] == "wait"]


@pytest.mark.parametrize("device", DEVICES)
def test_what_comes_down_is_what_went_up(device):
    transfer = Transfer(torch.device(device))
    rng, sent = np.random.default_rng(0), []
    for num_rows in (3, 1, 50, 7, 0, 50):
        rows = rng.standard_normal((num_rows, 4)).astype(np.float32)
        transfer.stage(num_rows, 4)[...] = rows
        sent.append((rows, transfer.upload()))
    for rows, values in sent:  # a tensor on the device is of its own, whatever its buffer was used for since
        assert values.device.type == device
        np.testing.assert_array_equal(transfer.download(values).wait(), rows)
    assert transfer.bytes_up == transfer.bytes_down == 4 * 4 * 111
