"""Slow twins of the kernels that cut binary files: entries of dictionaries, rows of product quantisers."""

import numpy as np


def cut_ended(raw: bytes, most: int, tail_bytes: int):
    """(tokens, kinds, bytes used) of the whole entries."""
    tokens, kinds, used = [], [], 0
    while len(tokens) < most and b"\0" in raw[used:]:
        stop = raw.index(b"\0", used)
        if stop + 1 + tail_bytes > len(raw):
            break
        tokens.append(raw[used:stop])
        kinds.append(raw[stop + tail_bytes])
        used = stop + 1 + tail_bytes
    return tokens, kinds, used


def cut_counted(raw: bytes, most: int):
    """(tokens, bytes used) of the whole entries."""
    tokens, used = [], 0
    while len(tokens) < most and len(raw) - used >= 4:
        length = int.from_bytes(raw[used : used + 4], "little")
        if len(raw) - used - 4 < length:
            break
        tokens.append(raw[used + 4 : used + 4 + length])
        used += 4 + length
    return tokens, used


def decode_rows(code_MQ, piece_F, choices, piece_dim, dim):
    out_MD = np.zeros((len(code_MQ), dim), np.float32)
    for m, codes in enumerate(code_MQ):
        pieces = []
        for q, code in enumerate(codes):
            width = min(piece_dim, dim - q * piece_dim)
            table = piece_F[q * piece_dim * choices :][: width * choices].reshape(choices, width)
            pieces.append(table[code])
        out_MD[m] = np.concatenate(pieces)
    return out_MD
