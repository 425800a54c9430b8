"""Transfer: rows between host and device, through page-locked buffers, beside the computation.

The only user of torch.cuda. A copy up runs on a stream of its own, and the caller's stream waits for its event; so
does a copy down, after what the caller's stream has computed. The host waits for events only: before it reads what
came down, and before it uses a buffer again whose last copy still runs. On a CPU device the copies are plain.
"""

from typing import Protocol

import numpy as np
import torch

from bigembed.errors import InvalidArgument


class Event(Protocol):
    """Is passed when the copy it was recorded behind is done."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Copier(Protocol):
    """Host buffers and the two copies, as one kind of device has them."""

    def buffer(self, size_bytes: int) -> torch.Tensor:
        """A uint8 host tensor that the device can copy from and to."""

    def up(self, host: torch.Tensor) -> tuple[torch.Tensor, Event]:
        """A new tensor on the device with what is in `host`, which must stay until the event has passed."""

    def down(self, values: torch.Tensor, host: torch.Tensor) -> Event:
        """Copy to `host`; it may be read when the event has passed."""


class Transfer:
    """Copies up and down, each through two host buffers that are used in turn.

    The buffers grow to the next power of two of what they must hold. One thread at a time.

    Args:
        device: where "up" is. copier: how to copy; tests give their own.

    Raises:
        InvalidArgument: the device is no CPU and no CUDA device of this machine.
    """

    def __init__(self, device: torch.device, copier: Copier | None = None) -> None:
        self._copier = _copier_for(device) if copier is None else copier
        self._rising, self._falling = _Buffers(self._copier), _Buffers(self._copier)
        self._staged: torch.Tensor | None = None
        self.bytes_up = self.bytes_down = 0

    @property
    def stalls(self) -> int:
        """How often a buffer was needed again while its copy still ran."""
        return self._rising.stalls + self._falling.stalls

    @property
    def buffer_bytes(self) -> int:
        """Host memory of the buffers."""
        return self._rising.size_bytes + self._falling.size_bytes

    def stage(self, num_rows: int, width: int) -> np.ndarray:
        """A host array (num_rows, width) of float32 to fill and then `upload`."""
        self._staged = self._rising.take((num_rows, width), torch.float32)
        return self._staged.numpy()

    def upload(self) -> torch.Tensor:
        """What was staged, as a tensor on the device; the current stream waits for it, the host does not."""
        assert self._staged is not None, "nothing is staged"
        values, event = self._copier.up(self._staged)
        self._rising.guard(event)
        self.bytes_up += _size_bytes(self._staged)
        self._staged = None
        return values

    def download(self, values: torch.Tensor) -> "Download":
        """Start to copy a tensor down, after what the current stream has computed."""
        host = self._falling.take(tuple(values.shape), values.dtype)
        event = self._copier.down(values, host)
        self._falling.guard(event)
        self.bytes_down += _size_bytes(host)
        return Download(host, event)


class Download:
    """A copy on its way down."""

    def __init__(self, host: torch.Tensor, event: Event) -> None:
        self._host, self._event = host, event

    def wait(self) -> np.ndarray:
        """The values, when they are there; they stay until the second download after this one."""
        self._event.synchronize()
        return self._host.numpy()


class _Buffers:
    """Two host buffers in turn: one is handed out again only when the copy it was used for is done."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._buffers = [torch.empty(0, dtype=torch.uint8, device="cpu")] * 2
        self._events: list[Event | None] = [None, None]
        self._latest = 1
        self.stalls = 0

    @property
    def size_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        at = self._latest = 1 - self._latest
        event = self._events[at]
        if event is not None:
            self.stalls += not event.query()
            event.synchronize()
            self._events[at] = None
        needed = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if self._buffers[at].numel() < needed:
            with torch.inference_mode(False):  # it will be written outside of it too
                self._buffers[at] = self._copier.buffer(1 << (needed - 1).bit_length())
        return self._buffers[at][:needed].view(dtype).view(shape)

    def guard(self, event: Event) -> None:
        """The buffer taken last is in use until `event` has passed."""
        self._events[self._latest] = event


def _size_bytes(host: torch.Tensor) -> int:
    return host.numel() * host.element_size()


def checked_device(device: str | int | torch.device) -> torch.device:
    """A device that rows can be cached on, with its number where there may be several.

    Raises:
        InvalidArgument: it is no CPU and no CUDA device of this machine.
    """
    try:
        given = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"device={device!r} is no device: {error}. Use 'cpu' or 'cuda'.") from error
    if given.type == "cpu":
        return torch.device("cpu")
    if given.type != "cuda":
        raise InvalidArgument(f"device {str(given)!r} is not supported; rows are cached on 'cpu' or 'cuda'.")
    if not torch.cuda.is_available():
        raise InvalidArgument(f"device {str(given)!r} needs CUDA, and torch finds none here. Use device='cpu'.")
    number = torch.cuda.current_device() if given.index is None else given.index
    if number >= torch.cuda.device_count():
        raise InvalidArgument(f"device {str(given)!r} is not there; torch finds {torch.cuda.device_count()} of them.")
    return torch.device("cuda", number)


def _copier_for(device: torch.device) -> Copier:
    device = checked_device(device)
    return _PlainCopier() if device.type == "cpu" else _CudaCopier(device)


class _Passed:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _PlainCopier:
    """The device is the host: a copy is done when it returns."""

    def buffer(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")

    def up(self, host: torch.Tensor) -> tuple[torch.Tensor, Event]:
        return host.clone(), _Passed()

    def down(self, values: torch.Tensor, host: torch.Tensor) -> Event:
        host.copy_(values)
        return _Passed()


class _CudaCopier:
    """One stream up, one stream down, so that neither waits for the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def buffer(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def up(self, host: torch.Tensor) -> tuple[torch.Tensor, Event]:
        # Allocated on the side stream, so that the copy need not wait for what the caller's stream still computes;
        # record_stream keeps the memory from being given away before the caller's stream is done with it.
        event, current = torch.cuda.Event(), torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._up):
            values = host.to(self._device, non_blocking=True)
            event.record(self._up)
        current.wait_event(event)
        values.record_stream(current)
        return values, event

    def down(self, values: torch.Tensor, host: torch.Tensor) -> Event:
        event = torch.cuda.Event()
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            host.copy_(values, non_blocking=True)
            event.record(self._down)
        values.record_stream(self._down)
        return event
