"""Slow twins of bulk writing: numpy and Python only."""

import naive
import numpy as np


def seal_next(first_row, words_MX, tail_T, keys_W, records_MW):
    salt = int(keys_W[-1])
    for m, words in enumerate(words_MX):
        whole = [*words.tolist(), *tail_T.tolist()]
        total = sum(int(key) * word for key, word in zip(keys_W, whole, strict=False)) % (1 << 64)
        check = naive.mix64(naive.mix64((first_row + m) ^ salt) ^ total) >> 32
        records_MW[m] = [*whole, check or 1]


def clear_unwritten(written_M, records_MW):
    for m, is_written in enumerate(written_M):
        if not is_written:
            records_MW[m] = 0


class Rows:
    """What a bulk table should hold: `values_VE`, initial values where `is_written` is False."""

    def __init__(self):
        self.parts, self.written = [], []

    def append(self, values_ME, written_M=None):
        self.parts.append(np.asarray(values_ME, np.float32))
        self.written.append(np.ones(len(values_ME), bool) if written_M is None else written_M)

    def skip(self, count, width):
        self.append(np.zeros((count, width), np.float32), np.zeros(count, bool))

    def values(self, spec):
        values_VE = naive.fill_initial(spec, np.arange(spec.num_rows))
        if self.parts:
            written, given = np.concatenate(self.written), np.concatenate(self.parts)
            values_VE[: len(given)][written] = given[written]
        return values_VE
