"""Number types of files, and how their values become float32: exactly where it can hold them, counted where not."""

from dataclasses import dataclass

import numpy as np

PIECE_VALUES = 1 << 16  # values looked up at once: their indices stay in the processor's cache


@dataclass
class Losses:
    """What float32 could not hold of the values read so far.

    Args:
        rounded: some value became the nearest float32.
        overflowed: finite values beyond float32's range, which became infinite.
    """

    rounded: bool = False
    overflowed: int = 0

    def notes(self, name: str) -> list[str]:
        """What a user should be told; empty where every value is exact."""
        found = [f"{name} values were rounded to float32."] if self.rounded else []
        if self.overflowed:
            found.append(f"{self.overflowed} finite {name} values are beyond float32's range and became infinite.")
        return found


@dataclass(frozen=True)
class NumberType:
    """How one value lies in a file.

    Args:
        name: as the table's attributes say it, such as "bfloat16".
        stored: the bytes of one value as NumPy reads them: the type itself, or unsigned integers where NumPy has none.
    """

    name: str
    stored: np.dtype

    @property
    def is_float(self) -> bool:
        return "float" in self.name

    @property
    def is_float32(self) -> bool:
        """Values may be read straight into a float32 array."""
        return self.stored == np.dtype(np.float32)

    def to_float32(self, values: np.ndarray, out: np.ndarray, losses: Losses) -> None:
        """out = values as float32, of the same shape; NaN stays NaN. `out` is C-contiguous."""
        if self.name == "bfloat16":
            words = out.view(np.uint32)
            np.copyto(words, values)
            np.left_shift(words, 16, out=words)
        elif self.name.startswith("float8"):
            _look_up(_float8_values(self.name), values, out)
        elif self.stored.kind == "f" and self.stored.itemsize > 4:
            with np.errstate(all="ignore"):
                np.copyto(out, values, casting="same_kind")
            _count_losses(values, out, losses)
        else:
            np.copyto(out, values, casting="same_kind")
            if self.stored.kind in "iu" and self.stored.itemsize > 2 and not losses.rounded:
                losses.rounded = not _fit_float32(values)


def number_type(name: str) -> NumberType | None:
    """The type of a name such as "float16"; None for one that cannot be read."""
    return _TYPES.get(name)


def of_numpy(dtype: np.dtype) -> NumberType | None:
    """The type of NumPy's numbers in any byte order; None for what is not among them (complex, objects, dates)."""
    known = _TYPES.get(dtype.name) if dtype.kind in "fiu" else None
    return None if known is None else NumberType(known.name, dtype)


_SPECIAL = {"bfloat16": "<u2", "float8_e4m3fn": "u1", "float8_e5m2": "u1"}
_NUMPY = ["float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))]
_TYPES = {name: NumberType(name, np.dtype(name).newbyteorder("<")) for name in _NUMPY}
_TYPES |= {name: NumberType(name, np.dtype(stored)) for name, stored in _SPECIAL.items()}


def _float8_values(name: str) -> np.ndarray:
    """The values of all 256 bytes: sign, exponent, mantissa.

    e5m2 has infinities and NaNs as IEEE types do; e4m3fn has no infinity, and one NaN of each sign.
    Source: Micikevicius et al., FP8 formats for deep learning (2022), table 1.
    """
    mantissa_bits, bias = (3, 7) if name == "float8_e4m3fn" else (2, 15)
    byte_B = np.arange(256)
    exponent_B = (byte_B >> mantissa_bits) & (0x7F >> mantissa_bits)
    mantissa_B = byte_B & ((1 << mantissa_bits) - 1)
    is_normal_B = exponent_B > 0
    fraction_B = mantissa_B / (1 << mantissa_bits) + is_normal_B
    value_B = np.ldexp(fraction_B, np.maximum(exponent_B, 1) - bias)
    if name == "float8_e4m3fn":
        value_B[(byte_B & 0x7F) == 0x7F] = np.nan
    else:
        top_B = exponent_B == 31
        value_B[top_B] = np.where(mantissa_B[top_B] == 0, np.inf, np.nan)
    return np.copysign(value_B, np.where(byte_B & 0x80, -1.0, 1.0)).astype(np.float32)


def _look_up(value_B: np.ndarray, codes: np.ndarray, out: np.ndarray) -> None:
    step = max(1, PIECE_VALUES // max(1, codes[:1].size))
    for start in range(0, len(codes), step):
        np.take(value_B, codes[start : start + step], out=out[start : start + step], mode="clip")


def _count_losses(values: np.ndarray, out: np.ndarray, losses: Losses) -> None:
    infinite = np.isinf(out)
    if infinite.any():
        losses.overflowed += int(np.isfinite(values[infinite]).sum())
    if not losses.rounded:
        losses.rounded = bool(((values != out) & ~infinite & ~np.isnan(out)).any())


def _fit_float32(values: np.ndarray) -> bool:
    """Every integer is a float32: from its highest to its lowest set bit there are at most 24."""
    if values.size == 0 or (values.max() <= 1 << 24 and values.min() >= -(1 << 24)):
        return True
    is_signed = values.dtype.kind == "i"  # widened first: the lowest int32 has no positive twin
    size = np.abs(values.astype(np.int64)).astype(np.uint64) if is_signed else values.astype(np.uint64)
    lowest_bit = size & (~size + np.uint64(1))
    return bool(((size >> np.uint64(24) < lowest_bit) | (size == 0)).all())
