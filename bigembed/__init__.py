"""Embedding tables too large for RAM that train like torch.nn.Embedding."""

from bigembed import errors, init, optim
from bigembed.errors import BigembedError
from bigembed.nn.embedding import Embedding
from bigembed.storage.table import Table
from bigembed.threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = ["BigembedError", "Embedding", "Table", "errors", "get_num_threads", "init", "optim", "set_num_threads"]
