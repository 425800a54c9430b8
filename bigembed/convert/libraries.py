"""Optional libraries: imported when a file needs them, and asked for by name where they are missing."""

import importlib
from typing import Any

from bigembed.errors import MissingLibrary


def load_library(name: str, format: str) -> Any:
    """The module `name`, which reads files of `format`.

    Raises:
        MissingLibrary: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        root = name.split(".")[0]
        raise MissingLibrary(
            f"{format} files are read with the library {root!r}, which cannot be imported ({error}). Install it with "
            "pip install 'bigembed[convert]'."
        ) from error
