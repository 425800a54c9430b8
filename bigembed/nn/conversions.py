"""What code does to a Parameter, where the rows are on disk: `.to()` and its like, assignment to `weight`."""

from typing import Any, Never

from bigembed.cache.transfer import checked_device
from bigembed.errors import BigembedError
from bigembed.nn.weight import WeightUseError


class CannotConvert(BigembedError, TypeError):
    """`.half()`, `.to(dtype)` or `.to("meta")` of a module whose rows are on disk."""


def converted(module: Any, fn: Any) -> None:
    """What `.to()`, `.cuda()`, `.half()`, `share_memory()` and the like ask for: another device, and nothing else.

    Raises:
        CannotConvert: another dtype, or the meta device.
    """
    handle = module.trainable.handle
    moved = fn(handle.detach().clone())  # a clone: share_memory and others change what they get
    if moved.is_meta:
        raise CannotConvert(
            f"a module on {module.table.path} cannot go to the meta device: its rows are on disk and take no memory "
            "there. Leave it where it is."
        )
    if moved.dtype != handle.dtype:
        raise CannotConvert(
            f"a module on {module.table.path} holds {handle.dtype} on disk and cannot become {moved.dtype}. Convert "
            f"the other modules and cast its output (emb(ids).to({moved.dtype})), use torch.autocast, or take "
            f"emb.to_nn_embedding(dtype={moved.dtype}) where it fits in memory."
        )
    if moved.device != handle.device:
        module.trainable.move(device=checked_device(moved.device))


def refuse_weight(module: Any) -> Never:
    """Raises WeightUseError: `emb.weight = tensor`, which would replace the rows or tie them to another module."""
    raise WeightUseError(
        f"the weight of {module.table.path} is on disk and cannot be replaced by a tensor or shared with another "
        "module. To take a tensor's rows use emb.weight.copy_(tensor); to use the same rows twice, use the same "
        f"module, or {type(module).__name__}.open(emb.table)."
    )
