"""A stranger's reader: a table on disk read with the standard library and numpy, from storage/README.md alone.

It shares no line with bigembed, so the two agree only where the specification says what both do. It reads a table
that nobody writes meanwhile, checks everything that there is to check, and is slow.
"""

import json
import os
import struct
import zlib
from collections import namedtuple

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
COLUMN_STEP = np.uint64(0xD1342543DE82EF95)
COMMIT_KEYS = {"number", "parent", "num_rows", "note", "time", "explicit", "scalars", "payload", "rollback_to"}

Facts = namedtuple("Facts", "attributes V D K R W salt state_K plain")
Frame = namedtuple("Frame", "kind rows records check_sum commit end chain")  # records: uint32 (n, W)
Segment = namedtuple("Segment", "path generation frames behind")  # generation None: torn header


class Damage(Exception):
    """The bytes contradict the specification."""


def need(condition, message):
    if not condition:
        raise Damage(message)


def read_table(path):
    """(facts, weight_VD, state_VK, commits): the table as of its last commit; the commits from the base's on."""
    need(not os.path.exists(os.path.join(path, "ready")), "state columns are being rewritten")
    facts = read_facts(path)
    superblock, written_C, sums_C = read_superblock(os.path.join(path, "superblock"))
    base, retained = superblock["base"], superblock["retained"]
    rows_of, commits = recover(read_segments(path, "journal", b"BEJOURNL", facts), base, facts)
    head = commits[-1]
    retained = next((c for c in reversed(commits[1:]) if c["explicit"]), retained)
    unfinished = head["rollback_to"] if head["number"] > base["number"] else None
    keep = retained["number"] if unfinished is None else unfinished
    undo = undo_records(read_segments(path, "undo", b"BEUNDO\0\0", facts), keep, facts)

    facts = facts._replace(V=head["num_rows"])
    records_VW = read_base(path, facts, superblock["suspect"], written_C, sums_C)
    if unfinished is None:
        changes = rows_of
    else:
        changes = {n: rows for n, rows in rows_of.items() if n <= unfinished}
        put(records_VW, undo)
    for number in sorted(changes):
        put(records_VW, changes[number])
    weight_VD, state_VK = values(records_VW, facts)
    return facts, weight_VD, state_VK, commits


def put(records_VW, rows_and_records):
    for rows, records in rows_and_records:
        inside = rows < len(records_VW)  # an unfinished rollback to fewer rows
        records_VW[rows[inside]] = records[inside]


# --- metadata and superblock


def read_facts(path):
    with open(os.path.join(path, "zarr.json")) as file:
        group = json.load(file)
    with open(os.path.join(path, "weight", "zarr.json")) as file:
        array = json.load(file)
    a = group["attributes"]["bigembed"]
    need(a["format_version"] == 1, "a newer format")
    need(a["dtype"] == "float32", "another dtype")
    state_K = [block["initial"] for block in a["state"] for _ in range(block["width"])]
    width = a["dim"] + len(state_K) + 1
    need((group["zarr_format"], group["node_type"]) == (3, "group"), "not a Zarr group")
    need((array["zarr_format"], array["node_type"]) == (3, "array"), "not a Zarr array")
    need(array["data_type"] == "float32" and array["fill_value"] == 0, "another data type or fill value")
    need(array["shape"][1:] == [a["dim"]], "another number of columns")
    need(array["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}], "other codecs")
    encoding = {"name": "default", "configuration": {"separator": "."}}
    need(array["chunk_key_encoding"] == encoding, "other names of chunks")
    grid = {"name": "regular", "configuration": {"chunk_shape": [a["chunk_rows"], width]}}
    need(array["chunk_grid"] == grid, "other chunks")
    plain = a.get("plain", False)
    salt = int(a["salt"], 16)
    return Facts(a, a["num_rows"], a["dim"], len(state_K), a["chunk_rows"], width, salt, state_K, plain)


def read_superblock(path):
    with open(path, "rb") as file:
        content = file.read()
    need(content[:8] == b"BESUPER1", "superblock: magic")
    need(struct.unpack("<I", content[-4:])[0] == zlib.crc32(content[:-4]), "superblock: crc32")
    (length,) = struct.unpack("<I", content[8:12])
    facts = json.loads(content[12 : 12 + length])
    chunks = facts["num_chunks"]
    need(len(content) == 12 + length + 16 * chunks + 4, "superblock: length")
    need(set(facts["base"]) == set(facts["retained"]) == COMMIT_KEYS, "superblock: keys of a commit")
    need(facts["suspect"] in ("", "merge", "all"), "superblock: suspect")
    written_C = np.frombuffer(content, "<i8", chunks, 12 + length)
    sums_C = np.frombuffer(content, "<u8", chunks, 12 + length + 8 * chunks)
    return facts, written_C, sums_C


# --- base


def read_base(path, facts, suspect, written_C, sums_C):
    """uint32 (V, W): the records of the base."""
    records_VW = np.zeros((facts.V, facts.W), np.uint32)
    for chunk in range(max(-(-facts.V // facts.R), len(written_C))):
        expected = (int(written_C[chunk]), int(sums_C[chunk])) if chunk < len(written_C) else (0, 0)
        name = os.path.join(path, "weight", f"c.{chunk}.0")
        if not os.path.exists(name):
            need(expected[0] == 0, f"chunk {chunk} is missing")
            continue
        need(os.path.getsize(name) == facts.R * 4 * facts.W, f"chunk {chunk} has another size")
        first = chunk * facts.R
        records = np.fromfile(name, "<u4").reshape(facts.R, facts.W)
        check_records(np.arange(first, first + facts.R), records, facts, may_be_zero=True)
        if suspect == "":
            check = records[:, -1].astype(np.uint64)
            found = (int(np.count_nonzero(check)), int(check.sum(dtype=np.uint64)))
            need(found == expected, f"chunk {chunk} sums to {found}, not {expected}")
        records_VW[first : first + facts.R] = records[: max(0, facts.V - first)]
    return records_VW


# --- segments


def read_segments(path, folder, magic, facts):
    folder = os.path.join(path, folder)
    names = sorted(name for name in os.listdir(folder) if len(name) == 16 and name.isdigit())
    return [read_segment(os.path.join(folder, name), magic, int(name), facts) for name in names]


def read_segment(path, magic, sequence, facts):
    with open(path, "rb") as file:
        content = file.read()
    if len(content) < 64 or struct.unpack_from("<I", content, 56)[0] != zlib.crc32(content[:56]):
        return Segment(path, None, [], behind(content, 64, None, facts))
    found, version, record_bytes, number, salt, generation, table_salt = struct.unpack_from("<8sIIQQQQ", content)
    need(version == 1 or found != magic, f"{path}: a newer format")
    given = (found, record_bytes, number, table_salt)
    need(given == (magic, 4 * facts.W, sequence, facts.salt), f"{path}: another table's")
    frames, at, chain = [], 64, zlib.crc32(content[:56])
    while (frame := frame_at(content, at, salt, chain, facts)) is not None:
        frames.append(frame)
        at, chain = frame.end, frame.chain
    return Segment(path, generation, frames, behind(content, at, salt, facts))


def frame_at(content, at, salt, chain, facts):
    """The frame that starts at a byte, or None; `salt` or `chain` None: any will do."""
    if at + 40 > len(content):
        return None
    kind, zero, frame_salt, count, check_sum, own, chained = struct.unpack_from("<4sIQQQII", content, at)
    if kind not in (b"ROWS", b"NULL", b"CMIT") or zero or salt not in (None, frame_salt):
        return None
    records_at = at + 40 + (count if kind == b"CMIT" else 8 * count)
    last = records_at + (count * 4 * facts.W if kind == b"ROWS" else 0)
    if last > len(content):
        return None
    head, body = content[at : at + 32], content[at + 40 : records_at]
    if own != zlib.crc32(head + body) or (chain is not None and chained != zlib.crc32(head + body, chain)):
        return None
    rows = records = commit = None
    if kind == b"CMIT":
        commit = json.loads(body)
        need(set(commit) == COMMIT_KEYS, f"a commit with other keys: {commit}")
    else:
        rows, records = np.frombuffer(body, "<i8"), np.zeros((count, facts.W), np.uint32)
    if kind == b"ROWS":
        records = np.frombuffer(content, "<u4", count * facts.W, records_at).reshape(count, facts.W)
    return Frame(kind, rows, records, check_sum, commit, -(-last // 8) * 8, chained)


def behind(content, at, salt, facts):
    """The kinds of frames that look whole behind the last valid one."""
    frames = (frame_at(content, offset, salt, None, facts) for offset in range(at, len(content), 8))
    return {frame.kind for frame in frames if frame is not None}


def sound_rows(frame, num_rows, facts):
    """(rows, records) of a frame that counts, after its checks and its sum."""
    need(len(frame.rows) == 0 or 0 <= frame.rows.min() <= frame.rows.max() < num_rows, "a row outside the table")
    need((np.diff(frame.rows) > 0).all(), "a frame's rows do not ascend")
    if frame.kind == b"ROWS":
        check_records(frame.rows, frame.records, facts, may_be_zero=False)
    total = int(frame.records[:, -1].sum(dtype=np.uint64))
    need(total == frame.check_sum, "a frame's records are not those that were written")
    return frame.rows, frame.records


def recover(segments, base, facts):
    """({generation: [(rows, records)]} of the commits above the base, [base, *those commits])."""
    changes, commits = {}, [base]
    for segment in segments:
        need(b"CMIT" not in segment.behind, f"{segment.path}: damage before a commit")
        waiting = []
        for frame in segment.frames:
            need(frame.kind != b"NULL", f"{segment.path}: a NULL frame in a journal")
            if frame.commit is None:
                waiting.append(frame)
                continue
            if frame.commit["number"] > base["number"]:
                need(segment.generation <= commits[-1]["number"], f"the segment before {segment.path} is missing")
                need(frame.commit["number"] > commits[-1]["number"], f"{segment.path}: generations out of order")
                found = [sound_rows(rows, frame.commit["num_rows"], facts) for rows in waiting]
                changes[frame.commit["number"]] = found
                commits.append(frame.commit)
            waiting = []
    return changes, commits


def undo_records(segments, generation, facts):
    """[(rows, records)] that bring the base to a generation."""
    kept = []
    for segment in segments:
        if segment.generation != generation:
            continue
        need(not segment.behind & {b"ROWS", b"NULL"}, f"{segment.path}: damage before a frame")
        need(all(frame.commit is None for frame in segment.frames), f"{segment.path}: a commit in undo")
        kept += [sound_rows(frame, 1 << 63, facts) for frame in segment.frames]
    rows = np.concatenate([np.empty(0, np.int64)] + [rows for rows, _ in kept])
    need(len(np.unique(rows)) == len(rows), "undo keeps a row twice")
    return kept


# --- records


def check_records(rows_M, records_MW, facts, may_be_zero):
    bad = records_MW[:, -1] != checks(rows_M.astype(np.uint64), records_MW[:, :-1], facts.salt)
    if may_be_zero:
        bad &= records_MW.any(axis=1)
    need(not bad.any(), f"damaged rows {rows_M[bad][:5]}")


def mix64(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def checks(rows_M, words_ME, salt):
    ordinals_E = np.arange(1, words_ME.shape[1] + 1, dtype=np.uint64)
    keys_E = mix64(np.array([salt], np.uint64) + ordinals_E * GOLDEN) | np.uint64(1)
    total_M = (words_ME * keys_E).sum(axis=1, dtype=np.uint64)
    check_M = mix64(mix64(rows_M ^ np.uint64(salt)) ^ total_M) >> np.uint64(32)
    return np.where(check_M == 0, np.uint64(1), check_M).astype(np.uint32)


def values(records_VW, facts):
    """(weight_VD, state_VK) with initial values where nothing was written."""
    rows_VE = np.ascontiguousarray(records_VW[:, :-1]).view(np.float32)
    never = np.flatnonzero(records_VW[:, -1] == 0)
    rows_VE[never, : facts.D] = initial_weights(never, facts)
    rows_VE[never, facts.D :] = np.array(facts.state_K, np.float32)
    return rows_VE[:, : facts.D], rows_VE[:, facts.D :]


# --- initial values


def initial_weights(rows_M, facts):
    init, padding_idx = facts.attributes["init"], facts.attributes["padding_idx"]
    need(init["version"] == 1, "a newer generator")
    if init["kind"] == "constant":
        weight_MD = np.full((len(rows_M), facts.D), init["a"])
    else:
        p_MD = uniform_01(facts.attributes["seed"], rows_M, facts.D)
        if init["kind"] == "uniform":
            weight_MD = init["a"] + (init["b"] - init["a"]) * p_MD
        else:
            need(init["kind"] == "normal", f"an unknown distribution: {init}")
            weight_MD = init["a"] + init["b"] * quantile(p_MD)
    weight_MD[rows_M == padding_idx] = 0.0
    return weight_MD.astype(np.float32)


def uniform_01(seed, rows_M, dim):
    row_mix_M = mix64(mix64(np.array([seed], np.uint64)) + rows_M.astype(np.uint64) * GOLDEN)
    columns_D = np.arange(1, dim + 1, dtype=np.uint64) * COLUMN_STEP
    bits_MD = mix64(row_mix_M[:, None] + columns_D)
    return ((bits_MD >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def log_01(p):
    bits = p.view(np.uint64)
    exponent = (bits >> np.uint64(52)).astype(np.int64) - 1022
    m = (bits & np.uint64(0x000FFFFFFFFFFFFF) | np.uint64(0x3FE0000000000000)).view(np.float64)
    low = m < 0.7071067811865476
    m = np.where(low, m * 2.0, m)
    exponent = np.where(low, exponent - 1, exponent)
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    total = np.zeros_like(p)
    for k in range(10, -1, -1):
        total = total * t + 1.0 / (2.0 * k + 1.0)
    return exponent * 0.6931471805599453 + 2.0 * s * total


MIDDLE = (
    (2509.0809287301227, 33430.575583588128, 67265.770927008700, 45921.953931549871),
    (13731.693765509461, 1971.5909503065514, 133.14166789178438, 3.3871328727963667),
    (5226.4952788528546, 28729.085735721943, 39307.895800092711, 21213.794301586596),
    (5394.1960214247511, 687.18700749205790, 42.313330701600911, 1.0),
)
NEAR_TAIL = (
    (7.7454501427834141e-4, 0.022723844989269184, 0.24178072517745061, 1.2704582524523684),
    (3.6478483247632045, 5.7694972214606914, 4.6303378461565453, 1.4234371107496836),
    (1.0507500716444169e-9, 5.4759380849953450e-4, 0.015198666563616457, 0.14810397642748008),
    (0.68976733498510000, 1.6763848301838038, 2.0531916266377588, 1.0),
)
FAR_TAIL = (
    (2.0103343992922881e-7, 2.7115555687434876e-5, 0.0012426609473880784, 0.026532189526576123),
    (0.29656057182850489, 1.7848265399172913, 5.4637849111641144, 6.6579046435011038),
    (2.0442631033899397e-15, 1.4215117583164459e-7, 1.8463183175100547e-5, 7.8686913114561326e-4),
    (0.014875361290850615, 0.13692988092273581, 0.59983220655588794, 1.0),
)


def horner(coefficients, r):
    value = coefficients[0]
    for c in coefficients[1:]:
        value = value * r + c
    return value


def ratio(table, r, factor):
    return factor * horner(table[0] + table[1], r) / horner(table[2] + table[3], r)


def quantile(p):
    q = p - 0.5
    is_middle = np.abs(q) <= 0.425
    root = np.sqrt(-log_01(np.where(is_middle, 0.25, np.where(q < 0.0, p, 1.0 - p))))
    sign = np.where(q < 0.0, -1.0, 1.0)
    tails = np.where(root <= 5.0, ratio(NEAR_TAIL, root - 1.6, sign), ratio(FAR_TAIL, root - 5.0, sign))
    return np.where(is_middle, ratio(MIDDLE, 0.180625 - q * q, q), tails)
