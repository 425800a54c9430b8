"""What a user may choose for a module, checked before anything is made."""

import numbers
import os
import secrets
import tempfile
from typing import Any

import numpy as np
import torch

from bigembed.cache.stack import DEFAULT_PREFETCH_BYTES, CacheOptions
from bigembed.cache.transfer import checked_device
from bigembed.errors import InvalidArgument
from bigembed.storage.create import checked_integer

DEFAULT_CACHE_BYTES = 256 << 20
SMALL_TABLE_ROW_BYTES = 512  # beside a row's weights: state, and a quarter of the budget is enough index for every row


class InvalidEmbedding(InvalidArgument, AssertionError):
    """padding_idx is not a row, or given rows have the wrong shape (torch raises AssertionError for these)."""


class NotANumber(InvalidArgument, TypeError):
    """max_norm or norm_type is no number (torch raises TypeError for it, at the first lookup)."""


def check_dtype(dtype: Any) -> None:
    if dtype not in (None, torch.float32):
        raise InvalidArgument(f"dtype {dtype} is not supported; this version stores torch.float32.")


class NoMetaDevice(InvalidArgument):
    """A module was to be made on the meta device."""


def check_not_meta(device: Any) -> None:
    """Raises NoMetaDevice: device="meta", which stands for tensors without memory; a table needs none anyway."""
    if device is not None and str(device).split(":")[0] == "meta":
        raise NoMetaDevice(
            "device='meta' is for weights that shall take no memory yet, and a table takes none: its rows are on disk, "
            "and a row that was never written costs nothing. Leave device out, or name where the module shall run; "
            "to_empty() and .to() of the model around it work then."
        )


def checked_number(name: str, value: Any) -> float:
    """A number as torch's kernels take it: True is 1.0, a tensor of no dimension what it holds.

    Raises:
        NotANumber: it is none.
    """
    is_scalar = isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_complex()
    if not is_scalar and not isinstance(value, numbers.Real | np.bool_):
        raise NotANumber(f"{name} must be a number, not {value!r}. Use a float, or leave {name} out.")
    return float(value)


def check_norms(max_norm: Any, norm_type: Any) -> None:
    """Raises NotANumber: max_norm is neither None nor a number, or norm_type is none."""
    if max_norm is not None:
        checked_number("max_norm", max_norm)
        checked_number("norm_type", norm_type)


def checked_padding(padding_idx: int | None, num_rows: int) -> int | None:
    if padding_idx is None:
        return None
    if not -num_rows <= checked_integer("padding_idx", padding_idx) < num_rows:
        raise InvalidEmbedding(
            f"Padding_idx must be within num_embeddings: {padding_idx} is not a row of {num_rows} rows. Use "
            f"{-num_rows} to {num_rows - 1}, or None."
        )
    return padding_idx % num_rows


def checked_options(
    *,
    device: Any = None,
    cache_bytes: int | None = None,
    host_cache_bytes: int | None = None,
    prefetch_bytes: int = DEFAULT_PREFETCH_BYTES,
    policy: str = "lru",
    cache_rows: int | None = None,
    device_rows: int | None = None,
    table_bytes: int | None = None,
) -> CacheOptions:
    """The caches' options.

    Args:
        table_bytes: what holds the whole table; the default for the host is not more.

    Raises:
        InvalidArgument: one that cannot be, or a device that is not there.
    """
    place = checked_device("cpu" if device is None else device)
    has_device_tier = place.type != "cpu" or device_rows is not None
    given = _checked_bytes("cache_bytes", cache_bytes)
    host_bytes = _checked_bytes("host_cache_bytes", host_cache_bytes)
    if host_bytes is not None and not has_device_tier:
        raise InvalidArgument(
            f"host_cache_bytes={host_cache_bytes} is for the host's cache below a device's; on the cpu there is one "
            "cache: use cache_bytes."
        )
    if not has_device_tier:
        host_bytes = given
    if host_bytes is None:
        host_bytes = DEFAULT_CACHE_BYTES if table_bytes is None else min(DEFAULT_CACHE_BYTES, table_bytes + (1 << 20))
    prefetch_bytes = checked_integer("prefetch_bytes", prefetch_bytes)
    if prefetch_bytes < 0:
        raise InvalidArgument(f"prefetch_bytes must be at least 0, not {prefetch_bytes}.")
    return CacheOptions(host_bytes, prefetch_bytes, policy, cache_rows, place, given, device_rows)


def _checked_bytes(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    value = checked_integer(name, value)
    if value < 1:
        raise InvalidArgument(f"{name} must be positive, not {value}.")
    return value


def temporary_path() -> str:
    return os.path.join(tempfile.gettempdir(), f"bigembed-{secrets.token_hex(8)}")
