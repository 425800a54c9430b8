"""What torch can ask of a lookup and cannot have: torch.func, torch.autograd.grad of a table, second derivatives.

Each is refused with the reason, where torch itself would fail without one, or silently give zeros.
"""

from collections.abc import Callable
from typing import Any, Never

import torch
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from bigembed.errors import BigembedError


class NotAPureFunction(BigembedError, RuntimeError):
    """A lookup inside of torch.func.grad, vmap and the like (torch raises RuntimeError for what they cannot take)."""


def check_handle(module: Any) -> None:
    """Raises NotAPureFunction: torch.func.functional_call has put another tensor in the handle's place."""
    if module._parameters.get("handle") is not module.trainable.handle:
        raise NotAPureFunction(
            "functional_call put another tensor in the place of a table's handle; the gradient would go to the table "
            "all the same. Leave the handle out of the parameters, or call the module as it is."
        )


def check_traced() -> None:
    """Raises NotAPureFunction: torch.jit.trace or make_fx would take the rows of this call for constants."""
    if torch._C._is_tracing() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        raise NotAPureFunction(
            "torch.jit.trace and make_fx record tensor operations, and a lookup reads a table on disk: its rows would "
            "be constants in the trace, the same for any ids. Trace what follows the lookup, with rows = emb(ids) as "
            "its input; or use torch.compile or torch.export, which keep the lookup; or trace emb.to_nn_embedding()."
        )


def refuse_script() -> Never:
    """Raises NotAPureFunction: torch.jit.script of a model that holds a table."""
    raise NotAPureFunction(
        "torch.jit.script compiles Python to tensor operations, and a lookup reads a table on disk. Script what "
        "follows the lookup, with rows = emb(ids) as its input; or use torch.compile or torch.export, which keep the "
        "lookup; or script a model with emb.to_nn_embedding()."
    )


class HookOnHandle(BigembedError, RuntimeError):
    """`register_hook` on a table's handle, which sees no gradient of rows."""


def check_hooks(handle: torch.Tensor) -> None:
    """Raises HookOnHandle: a hook would be given the handle's 0, and what it returns would reach no row."""
    if handle._backward_hooks:
        raise HookOnHandle(
            "a hook is registered on a table's handle (register_hook on a parameter of the model), but the gradient of "
            "rows does not pass there: the hook would see a 0, and what it returns would change no row. Register it on "
            "what is looked up (rows = emb(ids); rows.register_hook(...)), which sees each row's gradient; or use "
            "register_post_accumulate_grad_hook, which runs when the handle's grad is the norm of the pending gradient."
        )


class NoSuchDerivative(BigembedError, RuntimeError):
    """A table's gradient was asked for as a tensor, or was to be differentiated."""


def are_active() -> bool:
    """Whether a transform of torch.func is running its function."""
    return bool(torch._C._are_functorch_transforms_active())


def look_up_constants(look_up: Callable[[torch.Tensor], torch.Tensor], ids: Any, needs_grad: bool) -> torch.Tensor:
    """`look_up(ids)` inside of a transform, which sees constants.

    Args:
        look_up: as outside of any transform. needs_grad: whether the table trains.

    Raises:
        NotAPureFunction: the table trains, or the transform maps over the ids.
    """
    check_transforms(ids, needs_grad)
    while isinstance(ids, torch.Tensor) and functorch.is_gradtrackingtensor(ids):
        ids = functorch.get_unwrapped(ids)
    with temporarily_clear_interpreter_stack():
        return look_up(ids)


def check_transforms(ids: Any, needs_grad: bool) -> None:
    """Raises NotAPureFunction: a transform of torch.func would have to see through the lookup."""
    if not are_active():
        return
    if needs_grad or (isinstance(ids, torch.Tensor) and functorch.is_batchedtensor(ids)):
        raise NotAPureFunction(
            "torch.func (grad, vjp, jvp, vmap, ...) needs a pure function of tensors, but this lookup reads a table on "
            "disk and keeps its gradient there. Look the rows up outside (rows = emb(ids)) and transform what follows; "
            "or call loss.backward(), as usual; or freeze the table with emb.requires_grad_(False)."
        )


def check_backward(handle_node: Any) -> None:
    """For a lookup's backward. Raises NoSuchDerivative: torch.autograd.grad was asked for the handle's gradient.

    It would be 0, and nothing would be pending. Raises HookOnHandle: see `check_hooks`.

    Args:
        handle_node: what accumulates the handle's gradient, in `ctx.next_functions`.
    """
    check_hooks(handle_node.variable)
    try:
        torch._C._will_engine_execute_node(handle_node)  # torch's own test raises for a leaf in autograd.grad
    except RuntimeError as error:
        raise NoSuchDerivative(
            "torch.autograd.grad was asked for the gradient of a table. It is kept by row with the table, not "
            "returned: call loss.backward(), then opt.step() or emb.pending_gradient(). Of rows = emb(ids) it may be "
            "asked for."
        ) from error


class FirstDerivative(torch.autograd.Function):
    """The 0 that a lookup's backward returns under create_graph=True; differentiating it is refused."""

    @staticmethod
    def forward(ctx: Any, zero: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return zero.view_as(zero)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NoSuchDerivative(
            "the gradient of a table cannot be differentiated: it is kept by row with the table, outside of the graph. "
            "A penalty on the gradient of rows works: rows = emb(ids), then torch.autograd.grad(loss, rows, "
            "create_graph=True)."
        )


def handle_gradient(grad: torch.Tensor) -> torch.Tensor:
    """The handle's gradient, the 0 that says that `grad` has arrived."""
    zero = torch.zeros(1, dtype=torch.float32, device=grad.device)
    return FirstDerivative.apply(zero, grad) if torch.is_grad_enabled() and grad.requires_grad else zero
