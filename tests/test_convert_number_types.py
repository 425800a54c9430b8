"""Number types against torch and NumPy: every float8 and bfloat16, and what is said of values that do not fit."""

import numpy as np
import pytest
import torch

from bigembed.convert.number_types import Losses, number_type, of_numpy

FLOAT8 = ["float8_e4m3fn", "float8_e5m2"]


def to_float32(values: np.ndarray, name: str) -> tuple[np.ndarray, Losses]:
    out, losses = np.full(values.shape, 7, np.float32), Losses()
    known = number_type(name)
    assert known is not None
    known.to_float32(values, out, losses)
    return out, losses


@pytest.mark.parametrize("name", FLOAT8)
def test_every_float8_is_what_torch_says(name: str) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(64, 4)
    expected = torch.from_numpy(codes).view(getattr(torch, name)).float().numpy()
    out, losses = to_float32(codes, name)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.signbit(out), np.signbit(expected))
    assert losses == Losses()


def test_every_bfloat16_and_float16_is_what_torch_says() -> None:
    codes = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 8)
    expected = torch.from_numpy(codes.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(to_float32(codes, "bfloat16")[0].view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(to_float32(codes.view(np.float16), "float16")[0], codes.view(np.float16))


@pytest.mark.parametrize("name", FLOAT8)
def test_many_rows_are_looked_up_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).integers(0, 256, (100, 3), dtype=np.uint8)
    whole = to_float32(codes, name)[0]
    monkeypatch.setattr("bigembed.convert.number_types.PIECE_VALUES", 10)
    np.testing.assert_array_equal(to_float32(codes, name)[0], whole)


def test_columns_may_come_first() -> None:
    values = np.random.default_rng(0).standard_normal((5, 7))
    np.testing.assert_array_equal(to_float32(values.T, "float64")[0], values.T.astype(np.float32))


def test_float64_that_fits_is_not_said_to_be_rounded() -> None:
    values = np.array([[0.0, -0.0, 1.5, np.inf, -np.inf, np.nan, 2.0**-149, 2.0**127]])
    out, losses = to_float32(values, "float64")
    np.testing.assert_array_equal(out, values.astype(np.float32))
    assert losses == Losses()
    assert losses.notes("float64") == []


def test_float64_losses_are_counted() -> None:
    out, losses = to_float32(np.array([[0.1, 1e39, -1e300, np.inf, np.nan]]), "float64")
    assert losses == Losses(rounded=True, overflowed=2)
    assert np.isinf(out[0, 1:4]).all()
    assert np.isnan(out[0, 4])
    rounded, overflowed = losses.notes("float64")
    assert rounded == "float64 values were rounded to float32."
    assert overflowed == "2 finite float64 values are beyond float32's range and became infinite."
    assert to_float32(np.array([[1e-60]]), "float64")[1].rounded


@pytest.mark.parametrize("name", ["int32", "int64", "uint32", "uint64"])
def test_integers_fit_when_their_bits_do(name: str) -> None:
    info = np.iinfo(name)
    exact = [0, 1, 1 << 24, (1 << 24) + 2, ((1 << 24) - 1) << (info.bits - 25), info.min]
    out, losses = to_float32(np.array([exact], name), name)
    assert [int(value) for value in out[0].astype(np.float64)] == exact
    assert losses == Losses()
    for inexact in ((1 << 24) + 1, info.max, (1 << 24) + 3):
        out, losses = to_float32(np.array([[inexact]], name), name)
        assert losses == Losses(rounded=True)
        assert out[0, 0] == np.float32(inexact)


@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "uint16"])
def test_small_integers_are_exact(name: str) -> None:
    info = np.iinfo(name)
    values = np.arange(info.min, info.max + 1, dtype=name).reshape(-1, 2)
    out, losses = to_float32(values, name)
    np.testing.assert_array_equal(out, values)
    assert losses == Losses()


def test_what_is_no_number_has_no_type() -> None:
    for dtype in ("?", "c8", "M8[s]", "O", "S3", "V2", "i4,f4", "U2"):
        assert of_numpy(np.dtype(dtype)) is None
    assert of_numpy(np.dtype(np.longdouble)) is None
    assert number_type("float8_e4m3fnuz") is None
    swapped = of_numpy(np.dtype(">f4"))
    assert swapped is not None
    assert not swapped.is_float32
    assert swapped.name == "float32"
