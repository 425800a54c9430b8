"""Embedding tables too large for RAM that train like torch.nn.Embedding."""

import importlib
from typing import TYPE_CHECKING, Any

from bigembed import errors, init
from bigembed.errors import BigembedError
from bigembed.storage.table import Table
from bigembed.threads import get_num_threads, set_num_threads

if TYPE_CHECKING:
    from bigembed import optim
    from bigembed.convert.converter import convert as convert_file
    from bigembed.convert.export import export as export_file
    from bigembed.convert.nearest import nearest
    from bigembed.nn.embedding import Embedding
    from bigembed.nn.embedding_bag import EmbeddingBag
    from bigembed.nn.lookahead import lookahead
    from bigembed.storage.copy import copy_table
    from bigembed.vocab.hashed import HashBuckets, HashVocab, NgramHash
    from bigembed.vocab.vocabulary import Vocabulary

__version__ = "0.1.0"

__all__ = [
    "BigembedError",
    "Embedding",
    "EmbeddingBag",
    "HashBuckets",
    "HashVocab",
    "NgramHash",
    "Table",
    "Vocabulary",
    "convert_file",
    "copy_table",
    "errors",
    "export_file",
    "get_num_threads",
    "init",
    "lookahead",
    "nearest",
    "optim",
    "set_num_threads",
]

# What needs torch (seconds to import) or readers of many formats comes when it is asked for.
_ON_DEMAND = {
    "convert_file": ("bigembed.convert.converter", "convert"),
    "copy_table": ("bigembed.storage.copy", "copy_table"),
    "export_file": ("bigembed.convert.export", "export"),
    "HashBuckets": ("bigembed.vocab.hashed", "HashBuckets"),
    "HashVocab": ("bigembed.vocab.hashed", "HashVocab"),
    "NgramHash": ("bigembed.vocab.hashed", "NgramHash"),
    "Vocabulary": ("bigembed.vocab.vocabulary", "Vocabulary"),
    "Embedding": ("bigembed.nn.embedding", "Embedding"),
    "EmbeddingBag": ("bigembed.nn.embedding_bag", "EmbeddingBag"),
    "lookahead": ("bigembed.nn.lookahead", "lookahead"),
    "nearest": ("bigembed.convert.nearest", "nearest"),
    "optim": ("bigembed.optim", None),
}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'bigembed' has no attribute {name!r}")
    module_name, attribute = _ON_DEMAND[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value
