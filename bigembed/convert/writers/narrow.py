"""The number types that are written: float32 as it is, or rounded to 16 bits (to the nearest, ties to even)."""

import numpy as np

DTYPES = ("float32", "float16", "bfloat16")
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def narrowed(values_MD: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """The rows as little-endian numbers of a type, and how many finite ones became infinite.

    Args:
        values_MD: float32, C-contiguous.
        dtype: one of `DTYPES`; bfloat16 comes as uint16, which NumPy knows.
    """
    if dtype == "float16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            narrow_MD = values_MD.astype("<f2")
    elif dtype == "bfloat16":
        narrow_MD = _to_bfloat16(values_MD.view(np.uint32))
    else:
        return values_MD.astype("<f4", copy=False), 0
    infinite = 0x7C00 if dtype == "float16" else 0x7F80
    after = int(np.count_nonzero((narrow_MD.view(np.uint16) & 0x7FFF) == infinite))
    return narrow_MD, after and after - int(np.count_nonzero(np.isinf(values_MD)))


def _to_bfloat16(words_MD: np.ndarray) -> np.ndarray:
    """uint16: the upper halves, rounded; a NaN stays one, whatever its lower half was."""
    last_MD = (words_MD >> 16) & 1
    last_MD += words_MD
    last_MD += 0x7FFF
    last_MD >>= 16
    out_MD = last_MD.astype("<u2")
    nan_MD = (words_MD & 0x7FFFFFFF) > 0x7F800000
    if nan_MD.any():
        out_MD[nan_MD] = (words_MD[nan_MD] >> 16) | 0x40
    return out_MD
