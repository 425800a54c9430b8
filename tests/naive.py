"""Slow twins: each says in the plainest words what the fast thing of the same name computes. numpy and Python only."""

import numpy as np

ABSENT = -1
_M64 = (1 << 64) - 1

# --- hashing


def mix64(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _M64
    return x ^ (x >> 31)


def bucket(row, count):
    return ((mix64((int(row) * 0x9E3779B97F4A7C15) & _M64) >> 32) * count) >> 32


# --- grouping


def group_by_row(ids_N):
    places = {}
    inverse = [places.setdefault(int(row), len(places)) for row in ids_N]
    return np.array(list(places), np.int64), np.array(inverse, np.int64)


def sum_by_row(grad_ND, inverse_N, num_unique):
    sums_UD = np.zeros((num_unique, grad_ND.shape[1]), np.float32)
    for n, u in enumerate(inverse_N):
        sums_UD[u] = sums_UD[u] + grad_ND[n]
    return sums_UD


# --- rows


def gather(values_SE, past_PE, slots_U, inverse_N, dim):
    rows = np.concatenate([values_SE, past_PE])
    return np.array([rows[slots_U[u], :dim] for u in inverse_N], np.float32).reshape(len(inverse_N), dim)


def take_rows(values_SE, slots_M, out_ME):
    for m, slot in enumerate(slots_M):
        if slot != ABSENT:
            out_ME[m] = values_SE[slot]


def put_rows(values_SE, slots_M, rows_ME):
    for m, slot in enumerate(slots_M):
        if slot != ABSENT:
            values_SE[slot] = rows_ME[m]


def set_flags(flags_S, slots_M, value):
    before = flags_S.copy()
    for slot in slots_M:
        if slot != ABSENT and slot < len(flags_S):
            flags_S[slot] = value
    return int((flags_S != before).sum())


# --- cache


class SetIndex:
    """The admission order of the design, word for word, on lists."""

    def __init__(self, num_sets, ways):
        self.num_sets, self.ways = num_sets, ways
        self.clear()

    def clear(self):
        self.key = [[ABSENT] * self.ways for _ in range(self.num_sets)]
        self.score = [[0] * self.ways for _ in range(self.num_sets)]

    def find(self, rows_U):
        slots = []
        for row in rows_U:
            home = bucket(row, self.num_sets)
            found = [way for way in range(self.ways) if self.key[home][way] == row]
            slots.append(home * self.ways + found[0] if found else ABSENT)
        return slots

    def probe(self, rows_U, step):
        slots = self.find(rows_U)
        for slot in slots:
            if slot != ABSENT:
                self.score[slot // self.ways][slot % self.ways] = step
        return slots

    def admit(self, rows_M, step, protect_step):
        """(slot, victim, victim's score) of each row: the m-th miss of a set takes its m-th free way."""
        self._before = [list(ways) for ways in self.key], [list(ways) for ways in self.score]
        misses_of_set = {}
        for m, row in enumerate(rows_M):
            misses_of_set.setdefault(bucket(row, self.num_sets), []).append(m)
        admitted = [(ABSENT, ABSENT, 0)] * len(rows_M)
        for home, misses in misses_of_set.items():
            scores = self.score[home]
            free = [way for way in range(self.ways) if scores[way] < min(protect_step, step)]
            free.sort(key=lambda way, scores=scores: (scores[way], way))
            for m, way in zip(misses, list(free), strict=False):
                admitted[m] = (home * self.ways + way, self.key[home][way], scores[way])
            for m, way in zip(misses, list(free), strict=False):
                self.key[home][way], self.score[home][way] = int(rows_M[m]), step
        return admitted

    def undo(self):
        self.key, self.score = self._before

    def forget(self, slots):
        for slot in slots:
            self.key[slot // self.ways][slot % self.ways] = ABSENT
            self.score[slot // self.ways][slot % self.ways] = 0

    def rows_of(self, slots):
        return [self.key[slot // self.ways][slot % self.ways] for slot in slots]


class IdentityIndex:
    """The set of the rows that are loaded."""

    def __init__(self, num_rows):
        self.loaded = set()

    def find(self, rows_U):
        return [int(row) if row in self.loaded else ABSENT for row in rows_U]

    def admit(self, rows_M):
        self.loaded.update(int(row) for row in rows_M)

    def forget(self, slots):
        self.loaded.difference_update(int(slot) for slot in slots)


class RowCache:
    """No cache at all: the newest values of every row, and the stored ones."""

    def __init__(self, stored_VE):
        self.stored_VE, self.newest_VE = stored_VE.copy(), stored_VE.copy()

    def gather(self, rows_U, inverse_N, dim):
        return self.newest_VE[rows_U[inverse_N], :dim]

    def update(self, rows_U, delta_UE):
        self.newest_VE[rows_U] += delta_UE

    def write_back(self):
        self.stored_VE = self.newest_VE.copy()

    def refresh(self, rows_M, values_ME):
        self.stored_VE[rows_M] = self.newest_VE[rows_M] = values_ME
