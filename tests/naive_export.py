"""Slow twins of the kernels and of the search that exports and neighbours use; each equals its namesake exactly."""

import math

import numpy as np


def write_float(value):
    """A float32 as text: NumPy's shortest digits that give it back, positional from 1e-4 to below 1e16."""
    value = np.float32(value)
    if not np.isfinite(value):
        return "nan" if np.isnan(value) else ("-inf" if value < 0 else "inf")
    size = abs(float(value))
    if size == 0 or 1e-4 <= size < 1e16:
        return np.format_float_positional(value, unique=True, trim="0")
    return np.format_float_scientific(value, unique=True, trim="-", exp_digits=2)


def format_lines(values_MD, tokens):
    """The lines of all rows, one after the other."""
    return b"".join(
        token + b"".join(b" " + write_float(value).encode() for value in row_D) + b"\n"
        for token, row_D in zip(tokens, values_MD, strict=True)
    )


def first_refused(tokens, inside, first, last):
    """The first token with a byte where it may not stand, or -1."""
    for m, token in enumerate(tokens):
        if token and (set(token) & set(inside) or token[0] in first or token[-1] in last):
            return m
    return -1


def pack_records(tokens, numbers_MB):
    """Token, space, bytes of the numbers, for each row."""
    return b"".join(token + b" " + row_B.tobytes() for token, row_B in zip(tokens, numbers_MB, strict=True))


def squared_norm(values_D):
    total = 0.0
    for value in values_D.tolist():
        total += value * value
    return total


def unit_rows(values_MD):
    """(rows at unit length, which have one)."""
    unit_MD, usable_M = np.zeros_like(values_MD), np.zeros(len(values_MD), bool)
    for m, row_D in enumerate(values_MD):
        norm = math.sqrt(squared_norm(row_D))
        usable_M[m] = 0.0 < norm < math.inf
        if usable_M[m]:
            unit_MD[m] = [np.float32(value * (1.0 / norm)) for value in row_D.tolist()]
    return unit_MD, usable_M


def cosine(row_D, query_D):
    """The cosine in float64, summed in order, rounded to float32."""
    total = 0.0
    for one, other in zip(row_D.tolist(), query_D.tolist(), strict=True):
        total += one * other
    return np.float32(total / (math.sqrt(squared_norm(row_D)) * math.sqrt(squared_norm(query_D))))


def nearest(values_VD, queries_QD, count, exclude_rows=()):
    """Every row compared with every query: (rows_QC, similarity_QC), ties in order of the rows."""
    _, usable_V = unit_rows(values_VD)
    usable_V[list(exclude_rows)] = False
    rows = np.flatnonzero(usable_V).tolist()
    found = [sorted((-cosine(values_VD[row], query_D), row) for row in rows)[:count] for query_D in queries_QD]
    shape = len(queries_QD), min(count, len(rows))
    rows_QC = np.array([[row for _, row in one] for one in found], np.int64).reshape(shape)
    return rows_QC, np.array([[-negative for negative, _ in one] for one in found], np.float32).reshape(shape)
