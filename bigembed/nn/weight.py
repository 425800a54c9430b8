"""WeightView: what `module.weight` is where the weight is not in memory."""

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from bigembed import init
from bigembed.errors import BigembedError, InvalidArgument
from bigembed.optim.trainable import TrainableTable

STREAM_BYTES = 16 << 20
_OPERATORS = ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
IN_PLACE_OPERATORS = frozenset(["__setitem__", *(f"__i{name}__" for name in _OPERATORS)])


class WeightUseError(BigembedError, TypeError):
    """An operation on `weight` that would need the whole matrix in memory."""


class WeightAttributeError(WeightUseError, AttributeError):
    """As WeightUseError, for an attribute of a tensor."""


class RowsCopy(torch.Tensor):
    """Rows read from a table. In-place operations raise: they would change this copy, not the table.

    What leaves it is plain: a clone, a deep copy, what is pickled or saved. `nn.Parameter(weight[ids])` is a
    parameter of its own, which may be changed in place.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        target: Any = args[0] if args else next(iter(kwargs.values()), None)
        is_copy = isinstance(target, RowsCopy) and not getattr(target, "_is_param", False)
        in_place = name in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
        if is_copy and (in_place or kwargs.get("inplace")) and name != "requires_grad_":
            raise InvalidArgument(
                f"{name} would change a copy of the rows, not the table. Use weight[ids] = values (weight[ids] = 0.0 "
                "for zeros; the row padding_idx is zeros already after weight.normal_()), or clone() first."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            return _views_protected(result, target.untyped_storage().data_ptr()) if is_copy else result

    def _plain(self) -> torch.Tensor:
        plain = self.as_subclass(torch.Tensor)
        return nn.Parameter(plain.detach(), self.requires_grad) if getattr(self, "_is_param", False) else plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(self._plain(), memo)


def _views_protected(result: Any, memory: int) -> Any:
    """The result of an operation on a RowsCopy; views of the same memory are RowsCopy too."""
    if isinstance(result, tuple | list):
        return type(result)(_views_protected(part, memory) for part in result)
    is_view = type(result) is torch.Tensor and result.layout == torch.strided
    if is_view and result.untyped_storage().data_ptr() == memory:
        return result.as_subclass(RowsCopy)
    return result


def row_blocks(num_rows: int, dim: int) -> list[tuple[int, int]]:
    """(first, last) of stretches of rows, each of a size that may be in memory."""
    step = max(1, STREAM_BYTES // (4 * dim))
    return [(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]


def _new(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever torch's defaults are set to


class WeightView:
    """The weight matrix on disk, (V, D), by rows: `weight[ids]` reads, `weight[ids] = values` writes.

    Not a tensor: it never materialises unless asked for rows (`weight[:]` asks for all of them).
    """

    def __init__(self, trainable: TrainableTable) -> None:
        self._trainable = trainable

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._trainable.table.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 2

    ndim = property(dim)

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self._trainable.handle.device

    @property
    def requires_grad(self) -> bool:
        return self._trainable.handle.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> "WeightView":
        """Train the rows or leave them alone, for every module on the table."""
        self._trainable.handle.requires_grad_(requires_grad)
        return self

    @property
    def data(self) -> "WeightView":
        return self

    @data.setter
    def data(self, values: Any) -> None:
        self.copy_(values)

    def detach(self) -> "WeightView":
        return self

    def __repr__(self) -> str:
        table = self._trainable.table
        return f"WeightView of {table!r}; weight[ids] reads rows, weight[ids] = values writes them"

    # -- rows -----------------------------------------------------------------------------------------------

    def _rows(self, key: Any) -> np.ndarray:
        """The rows that an index means, as int64 of the index's shape; negative ones count from the end."""
        num_rows = self.shape[0]
        if isinstance(key, slice):
            return np.arange(*key.indices(num_rows))
        rows = np.asarray(key.cpu() if isinstance(key, torch.Tensor) else key)
        if isinstance(key, list) and not rows.size:
            rows = rows.astype(np.int64)  # an empty list has no dtype of its own
        if rows.dtype == np.bool_:
            if rows.shape != (num_rows,):
                raise InvalidArgument(f"a mask of shape {rows.shape} does not select from {num_rows} rows.")
            return np.flatnonzero(rows)
        if rows.dtype.kind == "i":
            rows = rows.astype(np.int64)
            rows[(rows < 0) & (rows >= -num_rows)] += num_rows
        return rows

    def __getitem__(self, key: Any) -> torch.Tensor:
        """A copy of rows, with the shape that a tensor's `weight[key]` would have; columns may follow a comma."""
        if isinstance(key, tuple) and len(key) != 2:
            raise InvalidArgument(f"weight has 2 dimensions, {len(key)} indices were given; use weight[rows, columns].")
        key, columns = key if isinstance(key, tuple) else (key, slice(None))
        rows = torch.from_numpy(self._trainable.table.read(self._rows(key)))[..., columns]
        return rows.to(self.device).as_subclass(RowsCopy)

    def __setitem__(self, key: Any, values: Any) -> None:
        """Write rows through to the table; uncommitted until `commit`."""
        if isinstance(key, tuple):
            raise InvalidArgument(
                "weight[rows, columns] = ... is not supported; write whole rows: weight[rows] = values."
            )
        rows = self._rows(key)
        is_tensor = isinstance(values, torch.Tensor)
        given = values.detach().to("cpu", torch.float32).numpy() if is_tensor else np.asarray(values, np.float32)
        wanted = (*rows.shape, self.shape[1])
        try:
            spread = np.broadcast_to(given, wanted)
        except ValueError as error:
            raise InvalidArgument(f"values have shape {given.shape}; {wanted} was expected.") from error
        self._trainable.table.write(rows.reshape(-1), spread.reshape(-1, self.shape[1]))

    # -- filling --------------------------------------------------------------------------------------------

    def normal_(self, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> "WeightView":
        """Every row from N(mean, std^2): free on a table without written rows, otherwise all are written.

        The table's padding row becomes zeros all the same.
        """
        return self._fill(init.normal(mean, std), lambda n: _new(n).normal_(mean, std, generator=generator))

    def uniform_(self, a: float = 0.0, b: float = 1.0, *, generator: Any = None) -> "WeightView":
        """Every row from the uniform distribution over [a, b); cost as `normal_`."""
        return self._fill(init.uniform(a, b), lambda n: _new(n).uniform_(a, b, generator=generator))

    def fill_(self, value: float) -> "WeightView":
        """Every value `value`; cost as `normal_`."""
        return self._fill(init.constant(value), lambda n: _new(n).fill_(float(value)))

    def zero_(self) -> "WeightView":
        """Every value 0; cost as `normal_`."""
        return self.fill_(0.0)

    def _fill(self, distribution: init.InitialValues, draw: Any) -> "WeightView":
        table = self._trainable.table
        padding_idx = table.spec.padding_idx
        if not table.has_rows:
            table.set_init(distribution, padding_idx)
            return self
        for first, last in self._blocks():
            drawn = draw((last - first, self.shape[1]))
            if padding_idx is not None and first <= padding_idx < last:
                drawn[padding_idx - first] = 0.0
            table.write(np.arange(first, last), drawn.numpy())
        return self

    def copy_(self, source: Any) -> "WeightView":
        """Write every row from a (V, D) tensor or array, a block at a time."""
        if tuple(source.shape) != tuple(self.shape):
            raise InvalidArgument(f"source has shape {tuple(source.shape)}; {tuple(self.shape)} was expected.")
        for first, last in self._blocks():
            self[first:last] = source[first:last]
        return self

    def _blocks(self) -> "list[tuple[int, int]]":
        return row_blocks(*self.shape)

    # -- not a tensor ---------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if getattr(func, "__module__", "") == "torch.nn.init":  # these end in normal_, uniform_, fill_ or zero_
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise WeightUseError(_needs_all(name))

    def _refuse(self, *_: Any) -> Any:
        raise WeightUseError(_needs_all("arithmetic"))

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = object.__hash__
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __neg__ = __iadd__ = __isub__ = __imul__ = __itruediv__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"'WeightView' object has no attribute {name!r}")
        if name == "is_meta":  # before it has changed anything
            raise WeightAttributeError(
                "nn.init.trunc_normal_ asks for is_meta and then draws the whole weight in memory, and this one is on "
                "disk. weight.normal_(mean, std) costs nothing on a new table; for values that are truncated, write "
                "them by blocks: weight[a:b] = nn.init.trunc_normal_(torch.empty(b - a, dim), std=std)."
            )
        raise WeightAttributeError(_needs_all(name))


def _needs_all(name: str) -> str:
    return (
        f"{name} needs the whole weight in memory, and this one is on disk. Look rows up with emb(ids) or "
        "emb.weight[ids]; for a small table emb.to_nn_embedding() gives a plain nn.Embedding."
    )
