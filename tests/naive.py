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


def sum_by_row(grad_XD, inverse_N, num_unique, source_N=None, factor_N=None, *, without=-1):
    sums_UD = np.zeros((num_unique, grad_XD.shape[1]), np.float32)
    for n, u in enumerate(inverse_N):
        grad_D = grad_XD[n if source_N is None else source_N[n]]
        if u != without:
            sums_UD[u] = sums_UD[u] + grad_D * np.float32(1.0 if factor_N is None else factor_N[n])
    return sums_UD


def square_by_block(sums_UD, block_rows=64):
    squares = []
    for first in range(0, len(sums_UD), block_rows):
        columns = [0.0] * sums_UD.shape[1]
        for row in sums_UD[first : first + block_rows].tolist():
            columns = [total + x * x for total, x in zip(columns, row, strict=True)]
        squares.append(sum(columns, 0.0))
    return np.array(squares, np.float64)


def sum_by_row_in_tree(grad_ND, inverse_N, num_unique):
    """Runs of at most 32 of a row's addends are added from 0.0 on; then runs of 32 sums; until one is left."""
    sums_UD = np.zeros((num_unique, grad_ND.shape[1]), np.float32)
    for u in range(num_unique):
        addends = [grad_ND[n] for n in np.flatnonzero(np.asarray(inverse_N) == u)]
        while addends:
            addends = [sum(addends[a : a + 32], np.zeros_like(addends[0])) for a in range(0, len(addends), 32)]
            if len(addends) == 1:
                sums_UD[u] = addends[0]
                break
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


# --- matching


def match(rows_M, others_L, usable_L):
    at = {int(row): place for place, row in enumerate(others_L) if usable_L[place]}
    return [at.get(int(row), ABSENT) for row in rows_M]


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


class PolicyIndex(SetIndex):
    """SetIndex with a policy that has queues: each set is a list of `QueuedRow`, oldest first."""

    def __init__(self, num_sets, ways, policy):
        self.policy = policy
        self.offered_rows = self.halved = self.entered = 0
        super().__init__(num_sets, ways)

    def clear(self):
        super().clear()
        self.queues = [[] for _ in range(self.num_sets)]
        self.ghosts = [[] for _ in range(self.num_sets)]  # newest last; None for one that came back
        self.hands = [None] * self.num_sets

    def probe(self, rows_U, step, count=True):
        slots = super().probe(rows_U, step)
        if count:
            for slot in slots:
                if slot != ABSENT:
                    self.row_at(slot).use()
        return slots

    def row_at(self, slot):
        return next(row for row in self.queues[slot // self.ways] if row.slot == slot)

    def admit(self, rows_M, step, protect_step):
        """(slot, victim, victim's score) of each row, one row after another, by the words of each policy's paper."""
        self._before = [list(ways) for ways in self.key], [list(ways) for ways in self.score]
        self._victims, self._halvings, admitted = [], 0, []
        for row in rows_M:
            home = bucket(row, self.num_sets)
            queue, scores, keys = self.queues[home], self.score[home], self.key[home]
            as_it_was = {entry.slot: vars(entry).copy() for entry in queue}
            for entry in queue:
                entry.is_free = scores[entry.slot % self.ways] < min(protect_step, step)
                entry.score = scores[entry.slot % self.ways]
            if ABSENT in keys:
                way = keys.index(ABSENT)
            elif any(entry.is_free for entry in queue):
                way = getattr(self, "evict_" + self.policy)(home, queue, step).slot % self.ways
                self._victims.append((home, as_it_was[home * self.ways + way]))
            else:
                admitted.append((ABSENT, ABSENT, 0))
                continue
            admitted.append((home * self.ways + way, keys[way], scores[way]))
            keys[way], scores[way] = int(row), step
            self.enter(home, QueuedRow(int(row), home * self.ways + way))
        self.offered_rows += len(rows_M)
        while self.halved < self.offered_rows // (self.num_sets * self.ways):
            self.halved += 1
            self._halvings += 1
            for queue in self.queues:
                for entry in queue:
                    entry.count //= 2
        return admitted

    def enter(self, home, entry):
        """A new row goes to the young end of its queue; with S3-FIFO, to that of M if the ghost knows it."""
        self.entered += 1
        entry.number = self.entered
        if self.policy == "s3fifo" and entry.row in self.ghosts[home]:
            entry.in_main = True
            self.ghosts[home] = [None if row == entry.row else row for row in self.ghosts[home]]
        self.queues[home].append(entry)

    def to_young_end(self, queue, entry):
        self.entered += 1
        entry.number = self.entered
        queue.remove(entry)
        queue.append(entry)

    def evict_lfu(self, home, queue, step):
        """Used least often, each count halved with every epoch; of those, least recently."""
        victim = min((e for e in queue if e.is_free), key=lambda e: (e.count, e.score, e.slot))
        queue.remove(victim)
        return victim

    def evict_next_use(self, home, queue, step):
        free = [entry for entry in queue if entry.is_free]
        unknown = [entry for entry in free if entry.next_step <= step]
        if unknown:
            victim = min(unknown, key=lambda e: (e.score, e.slot))
        else:
            victim = max(free, key=lambda e: (e.next_step, -e.slot))
        queue.remove(victim)
        return victim

    def evict_sieve(self, home, queue, step):
        """The hand goes from old to young, then again from the oldest, taking visited bits, to a row without one."""
        hand = self.hands[home] or queue[0]
        while hand.visited or not hand.is_free:
            if hand.is_free:
                hand.visited = False
            hand = self.younger(queue, hand) or queue[0]
        self.hands[home] = self.younger(queue, hand)
        queue.remove(hand)
        return hand

    def younger(self, queue, entry):
        place = queue.index(entry) + 1
        return queue[place] if place < len(queue) else None

    def evict_s3fifo(self, home, queue, step):
        """While S has its share, its tail leaves, or moves to M if used more than once; else the tail of M leaves."""
        small_ways = max(1, self.ways // 8)
        while True:
            small, main = [e for e in queue if not e.in_main], [e for e in queue if e.in_main]
            small_free, main_free = [e for e in small if e.is_free], [e for e in main if e.is_free]
            if small_free and (len(small) >= small_ways or not main_free):
                tail = small_free[0]
                if tail.frequency > 1:
                    tail.in_main, tail.frequency = True, 0
                    self.to_young_end(queue, tail)
                else:
                    queue.remove(tail)
                    ghost_rows = self.ways - small_ways
                    self.ghosts[home] = ([*self.ghosts[home], tail.row])[-ghost_rows:] if ghost_rows else []
                    return tail
            else:
                tail = main[0]
                if tail.is_free and tail.frequency == 0:
                    queue.remove(tail)
                    return tail
                tail.frequency -= tail.is_free
                self.to_young_end(queue, tail)

    def expect(self, rows_U, next_step_U):
        for slot, next_step in zip(self.find(rows_U), next_step_U, strict=True):
            if slot != ABSENT:
                self.row_at(slot).next_step = int(next_step)

    def undo(self):
        """Who is where, as before; a victim has its old place in the order of entry, and the hand is at the oldest."""
        for slot in range(self.num_sets * self.ways):
            home, way = divmod(slot, self.ways)
            if self.key[home][way] != self._before[0][home][way]:
                self.queues[home].remove(self.row_at(slot))
                self.hands[home] = None
        for home, facts in self._victims:
            entry = QueuedRow(0, 0)
            vars(entry).update(facts)
            entry.count >>= self._halvings
            self.queues[home].append(entry)
            self.queues[home].sort(key=lambda e: e.number)
        super().undo()

    def forget(self, slots):
        for slot in slots:
            home = slot // self.ways
            if self.key[home][slot % self.ways] != ABSENT:
                entry = self.row_at(slot)
                if self.hands[home] is entry:
                    self.hands[home] = self.younger(self.queues[home], entry)
                self.queues[home].remove(entry)
        super().forget(slots)

    def state(self):
        """What the policy knows, for a test to compare: each set's rows in order, and what belongs to them."""
        return [getattr(self, "_state_" + self.policy)(home) for home in range(self.num_sets)]

    def _state_lfu(self, home):
        return sorted((entry.slot, entry.count) for entry in self.queues[home])

    def _state_next_use(self, home):
        return sorted((entry.slot, entry.next_step) for entry in self.queues[home])

    def _state_sieve(self, home):
        queue = self.queues[home]
        hand = self.hands[home] or (queue[0] if queue else None)
        return [(entry.slot, entry.visited) for entry in queue], hand and hand.slot

    def _state_s3fifo(self, home):
        ghost_rows = self.ways - max(1, self.ways // 8)
        ghost = {row for row in self.ghosts[home] if row is not None} if ghost_rows else set()
        small = [(entry.slot, entry.frequency) for entry in self.queues[home] if not entry.in_main]
        return small, [(entry.slot, entry.frequency) for entry in self.queues[home] if entry.in_main], ghost


class QueuedRow:
    """A row in a set of `PolicyIndex`, and all that any policy may know of it."""

    def __init__(self, row, slot):
        self.row, self.slot = row, slot
        self.count, self.visited, self.frequency, self.in_main, self.next_step = 1, False, 0, False, 0

    def use(self):
        self.count, self.visited, self.frequency = self.count + 1, True, min(3, self.frequency + 1)


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


# --- initial values and records


def uniform_01(seed, rows_M, dim):
    mix = np.array([[mix64((mix64(seed) + int(row) * 0x9E3779B97F4A7C15) & _M64)] for row in rows_M], np.uint64)
    x = mix + np.arange(1, dim + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)  # modulo 2**64
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = (x ^ (x >> np.uint64(31))) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def log_01(p):
    m, exponent = np.frexp(p)
    low = m < np.sqrt(0.5)
    m, exponent = np.where(low, m * 2.0, m), exponent - low
    s = (m - 1.0) / (m + 1.0)
    return exponent * 0.6931471805599453 + 2.0 * s * _horner([1.0 / (2 * k + 1) for k in range(10, -1, -1)], s * s)


def _horner(coefficients, r):
    total = np.zeros_like(r)
    for c in coefficients:
        total = total * r + c
    return total


_CENTRE = (
    [
        2509.0809287301226727,
        33430.575583588128105,
        67265.770927008700853,
        45921.953931549871457,
        13731.693765509461125,
        1971.5909503065514427,
        133.14166789178437745,
        3.387132872796366608,
    ],
    [
        5226.495278852854561,
        28729.085735721942674,
        39307.89580009271061,
        21213.794301586595867,
        5394.1960214247511077,
        687.1870074920579083,
        42.313330701600911252,
        1.0,
    ],
)
_SHOULDER = (
    [
        7.7454501427834140764e-4,
        0.0227238449892691845833,
        0.24178072517745061177,
        1.27045825245236838258,
        3.64784832476320460504,
        5.7694972214606914055,
        4.6303378461565452959,
        1.42343711074968357734,
    ],
    [
        1.05075007164441684324e-9,
        5.475938084995344946e-4,
        0.0151986665636164571966,
        0.14810397642748007459,
        0.68976733498510000455,
        1.6763848301838038494,
        2.05319162663775882187,
        1.0,
    ],
)
_TAIL = (
    [
        2.01033439929228813265e-7,
        2.71155556874348757815e-5,
        0.0012426609473880784386,
        0.026532189526576123093,
        0.29656057182850489123,
        1.7848265399172913358,
        5.4637849111641143699,
        6.6579046435011037772,
    ],
    [
        2.04426310338993978564e-15,
        1.4215117583164458887e-7,
        1.8463183175100546818e-5,
        7.868691311456132591e-4,
        0.0148753612908506148525,
        0.13692988092273580531,
        0.59983220655588793769,
        1.0,
    ],
)


def normal_quantile(p):
    q = p - 0.5
    r = 0.180625 - q * q
    centre = q * _horner(_CENTRE[0], r) / _horner(_CENTRE[1], r)
    r = np.sqrt(-log_01(np.where(q < 0, p, 1.0 - p)))
    shoulder = _horner(_SHOULDER[0], r - 1.6) / _horner(_SHOULDER[1], r - 1.6)
    tail = _horner(_TAIL[0], r - 5.0) / _horner(_TAIL[1], r - 5.0)
    outer = np.where(r <= 5.0, shoulder, tail)
    return np.where(np.abs(q) <= 0.425, centre, np.where(q < 0, -outer, outer))


def fill_initial(spec, rows_M):
    """float32 (M, E): the initial weight and state of rows."""
    weight_MD = np.full((len(rows_M), spec.dim), spec.init.a)
    if spec.init.kind == "uniform":
        weight_MD += (spec.init.b - spec.init.a) * uniform_01(spec.seed, rows_M, spec.dim)
    elif spec.init.kind == "normal":
        weight_MD += spec.init.b * normal_quantile(uniform_01(spec.seed, rows_M, spec.dim))
    if spec.padding_idx is not None:
        weight_MD[np.asarray(rows_M) == spec.padding_idx] = 0.0
    state_MK = np.broadcast_to(np.array(spec.state_initial, np.float64), (len(rows_M), spec.state_dim))
    return np.concatenate([weight_MD, state_MK], axis=1).astype(np.float32)


def record_check(spec, row, words):
    """The check of one record, from its words before the check."""
    total = 0
    for w, word in enumerate(words):
        total += (mix64((spec.salt + (w + 1) * 0x9E3779B97F4A7C15) & _M64) | 1) * int(word)
    check = mix64(mix64(row ^ spec.salt) ^ (total & _M64)) >> 32
    return check or 1


# --- storage


class RowIndex:
    """A dict."""

    def __init__(self):
        self.places = {}

    def find(self, rows_M):
        return [self.places.get(int(row), -1) for row in rows_M]

    def put(self, rows_M, places_M):
        before = self.find(rows_M)
        self.places.update(zip(rows_M.tolist(), places_M.tolist(), strict=True))
        return before


class Table:
    """Every row's newest values, and those of the last commit and of the last explicit one, as plain arrays."""

    def __init__(self, spec, initial_VE):
        self.dim, self.initial_VE = spec.dim, initial_VE  # of as many rows as the table may ever have
        self.now_VE = self.initial_VE[: spec.num_rows].copy()
        self.head_VE = self.retained_VE = self.now_VE.copy()
        self.has_changes = False

    def write(self, rows_N, values_ND):
        for n, row in enumerate(rows_N):
            self.now_VE[row, : values_ND.shape[1]] = values_ND[n]
            self.has_changes = True

    def grow(self, num_rows):
        self.now_VE = np.concatenate([self.now_VE, self.initial_VE[len(self.now_VE) : num_rows]])
        self.has_changes = True

    def commit(self, explicit=True):
        self.head_VE, self.has_changes = self.now_VE.copy(), False
        if explicit:
            self.retained_VE = self.head_VE

    def rollback(self, to_retained):
        if to_retained:
            self.head_VE = self.retained_VE
        self.now_VE, self.has_changes = self.head_VE.copy(), False

    def set_state(self, state_initial):
        def with_state(values_VE):
            state_VK = np.broadcast_to(np.array(state_initial, np.float32), (len(values_VE), len(state_initial)))
            return np.concatenate([values_VE[:, : self.dim], state_VK], axis=1)

        self.initial_VE, self.now_VE = with_state(self.initial_VE), with_state(self.now_VE)
        self.commit()


# --- optimizer rules, in float32: row u is rows_SE[slots_U[u]], weight first; g is sums_UD[u] * scale


def sgd(rows_SE, slots_U, sums_UD, scale, lr):
    for slot, sum_D in zip(slots_U, sums_UD, strict=True):
        for d, g in enumerate(sum_D * np.float32(scale)):
            rows_SE[slot, d] -= np.float32(lr) * g


def adagrad(rows_SE, slots_U, sums_UD, scale, lr, eps):
    lr, eps, dim = np.float32(lr), np.float32(eps), sums_UD.shape[1]
    for slot, sum_D in zip(slots_U, sums_UD, strict=True):
        for d, g in enumerate(sum_D * np.float32(scale)):
            rows_SE[slot, dim + d] += g * g
            rows_SE[slot, d] -= lr * (g / (np.sqrt(rows_SE[slot, dim + d]) + eps))


def sum_in_halves(terms_D):
    terms = list(terms_D)
    while len(terms) > 1:
        half = (len(terms) + 1) // 2
        terms = [t + terms[half + d] if half + d < len(terms) else t for d, t in enumerate(terms[:half])]
    return terms[0] if terms else terms_D.dtype.type(0)


def rowwise_adagrad(rows_SE, slots_U, sums_UD, scale, lr, eps):
    lr, eps, dim = np.float32(lr), np.float32(eps), sums_UD.shape[1]
    for slot, sum_D in zip(slots_U, sums_UD, strict=True):
        g_D = sum_D * np.float32(scale)
        rows_SE[slot, dim] += sum_in_halves(g_D * g_D) / np.float32(dim)
        rate = lr / (np.sqrt(rows_SE[slot, dim]) + eps)
        for d, g in enumerate(g_D):
            rows_SE[slot, d] -= rate * g


def adam(rows_SE, slots_U, sums_UD, scale, rate, one_minus_beta1, one_minus_beta2, eps):
    rate, eps, dim = np.float32(rate), np.float32(eps), sums_UD.shape[1]
    for slot, sum_D in zip(slots_U, sums_UD, strict=True):
        for d, g in enumerate(sum_D * np.float32(scale)):
            m, v = rows_SE[slot, dim + d], rows_SE[slot, 2 * dim + d]
            m = m + (g - m) * np.float32(one_minus_beta1)
            v = v + (g * g - v) * np.float32(one_minus_beta2)
            rows_SE[slot, dim + d], rows_SE[slot, 2 * dim + d] = m, v
            rows_SE[slot, d] -= rate * (m / (np.sqrt(v) + eps))


def scale_rows(sums_UD, scale):
    for u in range(len(sums_UD)):
        sums_UD[u] = sums_UD[u] * np.float32(scale)


def row_squares(sums_UD):
    return np.array([sum_in_halves(row * row) for row in sums_UD.astype(np.float64)], np.float64)


# --- converting


def normalize_rows(values_MD):
    out_MD = values_MD.copy()
    for m, row in enumerate(values_MD.tolist()):
        total = 0.0
        for value in row:
            total += value * value
        if total > 0.0:
            out_MD[m] = [np.float32(np.float64(value) / np.sqrt(total)) for value in row]
    return out_MD


def survey_rows(values_MD):
    finite = [row for row in values_MD.tolist() if np.isfinite(row).all()]
    return len(values_MD) - len(finite), sum(sum(value * value for value in row) for row in finite)


def mean_of_parts(values_FD, start_N1):
    out_ND = np.zeros((len(start_N1) - 1, values_FD.shape[1]), np.float32)
    for n in range(len(out_ND)):
        first, last = start_N1[n], start_N1[n + 1]
        for f in range(first, last):
            out_ND[n] = out_ND[n] + values_FD[f]
        if last > first:
            out_ND[n] = out_ND[n] / np.float32(last - first)
    return out_ND
