"""Slow twins of the vocabulary's kernels and of the vocabulary itself: dicts and bytes, nothing fast."""

import naive
import numpy as np

ABSENT = -1
_M64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15

# --- kernels: tokens are bytes here, and what is written is returned


def hash_of(token, seed):
    found = (seed ^ (len(token) * GOLDEN)) & _M64
    for at in range(0, len(token), 8):
        found = naive.mix64(found ^ int.from_bytes(token[at : at + 8], "little"))
    return naive.mix64(found)


def hash_tokens(tokens, seed=0):
    return [hash_of(token, seed) for token in tokens]


def hash_rows(rows, seed):
    return [naive.mix64(seed ^ ((int(row) * GOLDEN) & _M64)) for row in rows]


def home_of(token_hash, num_homes):
    return token_hash * num_homes >> 64


def encode_tokens(tokens):
    out = b""
    for token in tokens:
        rest = len(token)
        while rest >= 128:
            out += bytes([rest & 127 | 128])
            rest >>= 7
        out += bytes([rest]) + token
    return out


def read_tokens(content):
    """The tokens of a file, each with the offset of its length."""
    at, found = 0, []
    while at < len(content):
        begin, length, shift = at, 0, 0
        while True:
            length |= (content[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if content[at - 1] < 128:
                break
        found.append((begin, content[at : at + length]))
        at += length
    return found


def put_distinct(tokens):
    first = {}
    return [first.setdefault(token, m) for m, token in enumerate(tokens)]


def find_among(tokens, known):
    first = {}
    for k, token in enumerate(known):
        first.setdefault(token, k)
    return [first.get(token, ABSENT) for token in tokens]


def cut_at_line_ends(joined, count):
    tokens = joined.split(b"\n")
    return tokens if len(tokens) == count else None


# --- the vocabulary


class Vocabulary:
    """A list of (token, row) for each state there is: now, the last commit, the last explicit one."""

    def __init__(self, entries, num_rows):
        self.now = self.head = self.retained = (list(entries), num_rows)

    @property
    def entries(self):
        return self.now[0]

    @property
    def num_rows(self):
        return self.now[1]

    def rows(self, tokens, unknown=ABSENT):
        first = {}
        for token, row in self.entries:
            first.setdefault(token, row)
        return np.array([first.get(token, unknown) for token in tokens], np.int64)

    def tokens(self, rows):
        first = {}
        for token, row in self.entries:
            first.setdefault(row, token)
        return [first.get(int(row)) for row in rows]

    def add(self, tokens):
        entries, num_rows = list(self.entries), self.num_rows
        known = {token for token, _ in entries}
        for token in tokens:
            if token not in known:
                known.add(token)
                entries.append((token, num_rows))
                num_rows += 1
        self.now = (entries, num_rows)
        return self.rows(tokens)

    def grow(self, num_rows):
        self.now = (self.entries, num_rows)

    def commit(self, explicit=True):
        self.head = self.now
        if explicit:
            self.retained = self.now

    def rollback(self, to_retained):
        if to_retained:
            self.head = self.retained
        self.now = self.head
