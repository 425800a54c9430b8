"""Checks at the border: the bags of ids that a user passes to an EmbeddingBag, in any of torch's forms."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bigembed.errors import InvalidArgument, InvalidIds, RowOutOfRange
from bigembed.nn.ids import IdsNotTensor, checked_ids, ids_on
from bigembed.optim.trainable import TrainableTable

MODES = ("sum", "mean", "max")


class InvalidBags(InvalidArgument):
    """Ids, offsets and weights do not fit together, or the mode does not allow what was asked."""


class InvalidOffsets(InvalidBags, RuntimeError):
    """Offsets do not cut the ids into bags (torch raises RuntimeError for what they hold)."""


class InvalidWeights(InvalidBags, RuntimeError):
    """per_sample_weights have the wrong dtype (torch raises RuntimeError for this)."""


class WeightsNeedSum(InvalidBags, NotImplementedError):
    """per_sample_weights with a mode other than "sum" (torch raises NotImplementedError for this)."""


class InvalidNested(InvalidBags, AttributeError):
    """A nested tensor of the old layout (torch raises AttributeError for this)."""


class BagsNotTensors(IdsNotTensor, AttributeError):
    """Ids, offsets or weights are a list or an array (torch raises AttributeError for this)."""


class RowOutOfBags(RowOutOfRange, RuntimeError):
    """An id of a bag is no row (torch raises RuntimeError here, and IndexError for nn.Embedding)."""


@dataclass(frozen=True)
class Bags:
    """Bag b is the positions from starts_B1[b] (inclusive) to starts_B1[b + 1] (exclusive).

    ids_N: as `TrainableTable.look_up` takes them: a checked int64 array, or with a device tier a tensor there.
    starts_B1: int64, on the host, ascending from 0 to N.
    factor_N: float32, what each position's row is multiplied by, part of the graph; None is 1 for all.
    """

    ids_N: Any
    starts_B1: np.ndarray
    factor_N: torch.Tensor | None

    def without(self, row: int) -> "Bags":
        """The same bags with the positions of this row left out. Waits for the device."""
        kept_K = _tensor(self.ids_N != row).nonzero().squeeze(1)
        if kept_K.numel() == len(self.ids_N):
            return self
        starts_B1 = np.searchsorted(kept_K.cpu().numpy(), self.starts_B1)
        ids_K = self.ids_N[kept_K if isinstance(self.ids_N, torch.Tensor) else kept_K.numpy()]
        return Bags(ids_K, starts_B1, None if self.factor_N is None else self.factor_N[kept_K])


def _tensor(given: Any) -> torch.Tensor:
    """An array, or a tensor, as a tensor where it is, whatever torch's default device is."""
    return torch.from_numpy(given) if isinstance(given, np.ndarray) else given


def check_mode(mode: str, scale_grad_by_freq: bool, sparse: bool) -> None:
    """Raises InvalidBags: no mode of torch's, or one that does not go with the rest."""
    if mode not in MODES:
        raise InvalidBags(f"mode has to be one of sum, mean or max, not {mode!r}.")
    if mode == "max" and scale_grad_by_freq:
        raise InvalidBags(
            "max mode does not support scaling the gradient by the frequency; use scale_grad_by_freq=False."
        )
    if mode == "max" and sparse:
        raise InvalidBags("max mode does not support sparse weights; use sparse=False (gradients are by row anyway).")


def checked_bags(
    trainable: TrainableTable,
    ids: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    mode: str,
    include_last_offset: bool,
) -> Bags:
    """The bags that `torch.nn.functional.embedding_bag` makes of these.

    Raises:
        BagsNotTensors, InvalidBags and its kinds, InvalidIds: with torch's builtin type for each.
        RowOutOfBags: an id, except with a device tier, where the lookup finds it.
    """
    for name, given in (("input", ids), ("offsets", offsets), ("per_sample_weights", weights)):
        if not isinstance(given, torch.Tensor) and (given is not None or name == "input"):
            raise BagsNotTensors(f"{name} must be a tensor, not {type(given).__name__}. Use torch.tensor({name}).")
    if weights is not None:
        check_weights(ids, weights, mode)
    if ids.is_nested and ids.dim() == 2:
        values, starts_B1, weights = _of_nested(ids, weights)
    elif ids.dim() == 2:
        values, starts_B1 = ids, _of_lines(ids, offsets)
    elif ids.dim() == 1:
        values, starts_B1 = ids, _of_offsets(ids, offsets, include_last_offset)
    else:
        raise InvalidBags(f"input has to be a 1D or 2D tensor, not one of {ids.dim()} dimensions. Reshape it to 2D.")
    dtype = values.dtype if offsets is None or ids.is_nested else torch.promote_types(values.dtype, offsets.dtype)
    if dtype not in (torch.int32, torch.int64):
        raise InvalidIds(
            f"input has dtype {ids.dtype}{'' if offsets is None else f' and offsets {offsets.dtype}'}; int64 or int32 "
            "is needed. Convert them with .long() if they are whole."
        )
    end = int(starts_B1[-1])
    values_N = values.detach().reshape(-1)[:end].to(torch.int64)
    if weights is not None:
        weights = weights.reshape(-1)[:end].to(trainable.device)
    return Bags(_checked(trainable, values_N), starts_B1, weights)


def _checked(trainable: TrainableTable, ids_N: torch.Tensor) -> Any:
    if trainable.has_device_tier:
        return ids_on(trainable.device, ids_N)
    return _checked_on_host(ids_N, trainable.table.shape[0])


def _checked_on_host(ids_N: torch.Tensor, num_rows: int) -> np.ndarray:
    try:
        return checked_ids(ids_N, num_rows)
    except RowOutOfRange as error:
        raise RowOutOfBags(str(error)) from None


@contextlib.contextmanager
def out_of_bags(bags: Bags, num_rows: int) -> Iterator[None]:
    """An id that a device's lookup refuses is said to be where the user has it, padding or not."""
    try:
        yield
    except RowOutOfRange as error:
        _checked_on_host(_tensor(bags.ids_N).cpu(), num_rows)
        raise RowOutOfBags(str(error)) from error


def check_weights(ids: torch.Tensor, weights: torch.Tensor, mode: str) -> None:
    """Raises InvalidBags, WeightsNeedSum, InvalidWeights: another shape, mode or dtype than per_sample_weights need."""
    if ids.size() != weights.size():
        raise InvalidBags(
            f"per_sample_weights have shape {tuple(weights.shape)}; they need that of the input, {tuple(ids.shape)}"
            + (", and its offsets: torch.nested.nested_tensor_from_jagged(w, ids.offsets())." if ids.is_nested else ".")
        )
    if mode != "sum":
        raise WeightsNeedSum(
            f"per_sample_weights are only supported for mode='sum', not {mode!r}. Leave them out, or use mode='sum' "
            "and divide by the sum of the weights yourself."
        )
    if weights.dtype != torch.float32:
        raise InvalidWeights(f"per_sample_weights have dtype {weights.dtype}; torch.float32 is needed. Use .float().")


def _of_nested(
    given: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor | None]:
    """(ids, starts, weights) of a jagged tensor, whose weights have the same offsets, or their size would differ."""
    ids: Any = given  # torch's types do not know what a jagged tensor can do
    if ids.layout != torch.jagged:
        raise InvalidNested(f"the nested input has layout {ids.layout}. Make it with layout=torch.jagged.")
    if ids.lengths() is not None:  # with gaps between the bags
        ids = ids.contiguous()
        weights = None if weights is None else weights.contiguous()
    starts_B1 = ids.offsets().to("cpu", torch.int64).numpy()
    return ids.values(), starts_B1, None if weights is None else weights.values()


def _of_lines(ids: torch.Tensor, offsets: torch.Tensor | None) -> np.ndarray:
    """Starts of bags of one length."""
    if offsets is not None:
        raise InvalidBags("if input is 2D, then offsets has to be None: each line is a bag. Flatten it to use offsets.")
    return np.arange(ids.shape[0] + 1, dtype=np.int64) * ids.shape[1]


def _of_offsets(ids: torch.Tensor, offsets: torch.Tensor | None, include_last_offset: bool) -> np.ndarray:
    if offsets is None or offsets.dim() != 1:
        given = "None" if offsets is None else f"one of {offsets.dim()} dimensions"
        raise InvalidBags(
            f"offsets has to be a 1D tensor where input is 1D, not {given}. Use torch.tensor([0]) for one bag."
        )
    if offsets.is_floating_point() or offsets.is_complex():
        raise InvalidIds(f"offsets have dtype {offsets.dtype}; int64 or int32 is needed. Convert them with .long().")
    starts_B = offsets.detach().to("cpu", torch.int64).numpy()
    if include_last_offset and not starts_B.size:
        raise InvalidOffsets(
            "include_last_offset=True needs at least 1 offset, the end of the last bag; there is none."
        )
    num_ids = ids.shape[0]
    if starts_B.size and starts_B[0] != 0:
        raise InvalidOffsets(f"offsets[0] has to be 0, where the first bag starts, not {starts_B[0]}.")
    falls = np.flatnonzero(starts_B[1:] < starts_B[:-1])  # differences may overflow
    if falls.size:
        at = int(falls[0]) + 1
        raise InvalidOffsets(
            f"offsets[{at}] is {starts_B[at]}, below the {starts_B[at - 1]} before it; bags follow each other."
        )
    if starts_B.size and starts_B[-1] > num_ids:
        raise InvalidOffsets(
            f"offsets[-1] is {starts_B[-1]}, but there are {num_ids} ids; it may be at most {num_ids}."
        )
    if include_last_offset:
        return np.array(starts_B)
    return np.append(starts_B, num_ids) if starts_B.size else np.zeros(1, np.int64)
