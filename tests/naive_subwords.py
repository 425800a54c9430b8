"""Slow twins of the n-gram rules, of MurmurHash, and of the hashed vocabularies: Python integers, bytes and lists."""

M32, M64 = (1 << 32) - 1, (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def characters(word: bytes) -> list[bytes]:
    """A byte that is no UTF-8 continuation, with the continuations after it; leading continuations are nothing."""
    out: list[bytes] = []
    for byte in word:
        if byte & 0xC0 != 0x80:
            out.append(bytes([byte]))
        elif out:
            out[-1] += bytes([byte])
    return out


def fnv32(data: bytes) -> int:
    state = 2166136261
    for byte in data:
        signed = byte - 256 if byte >= 128 else byte
        state = ((state ^ (signed & M32)) * 16777619) & M32
    return state


def fnv64(data: bytes) -> int:
    state = 0xCBF29CE484222325
    for byte in data:
        state = ((state ^ byte) * 0x100000001B3) & M64
    return state


def ngrams_from_left(chars: list[bytes], minn: int, maxn: int):
    """(index of the first character, n, bytes), by first character and then by length."""
    for i in range(len(chars)):
        for n in range(1, maxn + 1):
            if i + n <= len(chars) and n >= minn:
                yield i, n, b"".join(chars[i : i + n])


def fasttext_buckets(word: bytes, minn: int, maxn: int, bucket: int, edges: bool = False) -> list[int]:
    if bucket == 0 or (not edges and word == b"</s>"):
        return []
    chars = characters(b"<" + word + b">")
    out = []
    for i, n, gram in ngrams_from_left(chars, minn, maxn):
        if not edges and n == 1 and i in (0, len(chars) - 1):
            continue
        out.append(fnv32(gram) % bucket)
    return out


def finalfusion_buckets(word: str, minn: int, maxn: int, exponent: int) -> list[int]:
    padded = f"<{word}>"
    out = []
    for i in range(len(padded)):
        for n in range(maxn, minn - 1, -1):
            if i + n <= len(padded):
                data = n.to_bytes(8, "little") + padded[i : i + n].encode("utf-32-le")
                out.append(fnv64(data) & ((1 << exponent) - 1))
    return out


def floret_rows(word: str, minn: int, maxn: int, hashes: int, seed: int, num_rows: int, bow="<", eow=">") -> list[int]:
    if not word:
        return []
    padded = bow + word + eow
    grams = [padded]
    for n in range(max(minn, 1), maxn + 1):
        grams += [padded[i : i + n] for i in range(len(padded) - n + 1)]
    out = []
    for gram in grams:
        low, high = murmur128(gram.encode(), seed)
        out += [part % num_rows for part in (low & M32, low >> 32, high & M32, high >> 32)[:hashes]]
    return out


def rows_of(settings: dict, words: list[bytes], word_rows: list[int]) -> list[list[int]]:
    """The rows of each word."""
    out = []
    for word, own in zip(words, word_rows, strict=True):
        kind, minn, maxn, first = settings["kind"], settings["minn"], settings["maxn"], settings["first_row"]
        rows = [] if own < 0 or kind == "floret" else [own]
        if kind == "fasttext":
            buckets = fasttext_buckets(word, minn, maxn, settings["bucket"])
            if settings.get("pruned") is not None:
                places = {bucket: place for place, bucket in enumerate(settings["pruned"])}
                buckets = [places[b] for b in buckets if b in places]
        elif kind == "floret":
            s = settings
            args = (s["hash_count"], s["hash_seed"], s["num_rows"], s["bow"], s["eow"])
            buckets = floret_rows(word.decode(), minn, maxn, *args)
        elif rows:
            buckets = []
        elif kind == "finalfusion":
            buckets = finalfusion_buckets(word.decode(), minn, maxn, settings["exponent"])
        else:
            buckets = fasttext_buckets(word, minn, maxn, settings["bucket"], edges=True)
        out.append(rows + [first + bucket for bucket in buckets])
    return out


# --- MurmurHash


def murmur64a(data: bytes, seed: int) -> int:
    m = 0xC6A4A7935BD1E995
    h = seed ^ (len(data) * m & M64)
    whole = len(data) // 8 * 8
    for at in range(0, whole, 8):
        k = int.from_bytes(data[at : at + 8], "little") * m & M64
        k = (k ^ (k >> 47)) * m & M64
        h = (h ^ k) * m & M64
    if data[whole:]:
        h = (h ^ int.from_bytes(data[whole:], "little")) * m & M64
    h = (h ^ (h >> 47)) * m & M64
    return h ^ (h >> 47)


def murmur128(data: bytes, seed: int) -> tuple[int, int]:
    c1, c2 = 0x87C37B91114253D5, 0x4CF5AD432745937F

    def rotate(x, bits):
        return ((x << bits) | (x >> (64 - bits))) & M64

    def spread_one(k):
        return rotate(k * c1 & M64, 31) * c2 & M64

    def spread_two(k):
        return rotate(k * c2 & M64, 33) * c1 & M64

    def finish(k):
        k = (k ^ (k >> 33)) * 0xFF51AFD7ED558CCD & M64
        k = (k ^ (k >> 33)) * 0xC4CEB9FE1A85EC53 & M64
        return k ^ (k >> 33)

    h1 = h2 = seed
    whole = len(data) // 16 * 16
    for at in range(0, whole, 16):
        h1 ^= spread_one(int.from_bytes(data[at : at + 8], "little"))
        h1 = ((rotate(h1, 27) + h2) * 5 + 0x52DCE729) & M64
        h2 ^= spread_two(int.from_bytes(data[at + 8 : at + 16], "little"))
        h2 = ((rotate(h2, 31) + h1) * 5 + 0x38495AB5) & M64
    tail = data[whole:]
    h2 ^= spread_two(int.from_bytes(tail[8:], "little"))
    h1 ^= spread_one(int.from_bytes(tail[:8], "little"))
    h1, h2 = h1 ^ len(data), h2 ^ len(data)
    h1 = (h1 + h2) & M64
    h2 = (h2 + h1) & M64
    h1, h2 = finish(h1), finish(h2)
    h1 = (h1 + h2) & M64
    return h1, (h2 + h1) & M64


# --- hashed vocabularies


def mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def fold(state: int, x: int) -> int:
    return mix64(((state + GOLDEN) & M64) ^ (x & M64))


def hash_token(token: bytes) -> int:
    found = (len(token) * GOLDEN) & M64
    for at in range(0, len(token), 8):
        found = mix64(found ^ int.from_bytes(token[at : at + 8], "little"))
    return mix64(found)


def hashed_rows(hashes: list[int], num_rows: int, num_hashes: int, first_row: int, seed: int) -> list[list[int]]:
    keys = [fold(fold(0, seed), k) for k in range(num_hashes)]
    return [[first_row + mix64((h & M64) ^ key) % num_rows for key in keys] for h in hashes]


def ngram_rows(sequences, sizes, orders, heads, seed=0, pad=0, layer=0):
    """Nested lists: sequence, position, column."""
    start = fold(fold(0, seed), layer)
    out = []
    for ids in sequences:
        rows_of_sequence = []
        for place in range(len(ids)):
            rows, first, column = [], 0, 0
            for order in orders:
                state = start
                for back in range(order):
                    state = fold(state, ids[place - back] if back <= place else pad)
                for head in range(heads):
                    rows.append(first + mix64(state ^ fold(fold(start, order), head)) % sizes[column])
                    first += sizes[column]
                    column += 1
            rows_of_sequence.append(rows)
        out.append(rows_of_sequence)
    return out
