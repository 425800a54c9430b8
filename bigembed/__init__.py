"""Embedding tables too large for RAM that train like torch.nn.Embedding."""

import importlib
from typing import TYPE_CHECKING, Any

from bigembed import errors, init
from bigembed.errors import BigembedError
from bigembed.storage.table import Table
from bigembed.threads import get_num_threads, set_num_threads

if TYPE_CHECKING:
    from bigembed import optim
    from bigembed.nn.embedding import Embedding
    from bigembed.nn.lookahead import lookahead

__version__ = "0.1.0"

__all__ = [
    "BigembedError",
    "Embedding",
    "Table",
    "errors",
    "get_num_threads",
    "init",
    "lookahead",
    "optim",
    "set_num_threads",
]

# What needs torch (seconds to import) comes when it is asked for: a Table and the command line do without.
_NEEDS_TORCH = {
    "Embedding": ("bigembed.nn.embedding", "Embedding"),
    "lookahead": ("bigembed.nn.lookahead", "lookahead"),
    "optim": ("bigembed.optim", None),
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module 'bigembed' has no attribute {name!r}")
    module_name, attribute = _NEEDS_TORCH[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value
