"""Candidates: which of the tensors in a file is the table that was meant."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from bigembed.convert.number_types import number_type
from bigembed.errors import BadSource, InvalidArgument

LISTED = 20

# Last words of the names that models give to their input embedding, as "model.embed_tokens.weight".
KNOWN = re.compile(
    r"(?:^|.*[./])(?:embed_tokens|wte|word_embeddings?|tok_embeddings|token_embeddings?|token_embd|embed_in|shared"
    r"|embeddings?)(?:[./]weight|:0)?"
)
# Words before the number of a part of one table, as "ngram_embedding.shard_12.weight". Repeated layers have others.
PART_WORDS = ("_part_", "_parts_", "_partition_", "_partitions_", "_chunk_", "_chunks_", "_shard_", "_shards_")
SCALE = re.compile(r".*[._](?:scale|scales|scale_inv)")


@dataclass(frozen=True)
class Candidate:
    """A tensor, dataset, array or column that might be the table.

    Args:
        name: as the user would say it.
        shape: its dimensions; -1 for one that only reading tells.
        dtype: its number type's name, which may be one that cannot be read.
        members: names of the tensors it is joined from, in order of the rows; empty for a single one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    members: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        return KNOWN.fullmatch(self.name) is not None

    def __str__(self) -> str:
        shape = ", ".join("?" if size < 0 else str(size) for size in self.shape)
        return f"{self.name}  ({shape})  {self.dtype}" + (f"  in {len(self.members)} tensors" if self.members else "")


def choose(
    path: str,
    candidates: Sequence[Candidate],
    wanted: str | None,
    joined: Sequence[Candidate] = (),
    readable: Sequence[str] = (),
) -> Candidate:
    """The candidate that is named; else the known input embedding, else the only table there is.

    Args:
        path: of the file, for messages.
        candidates: single tensors, of any shape and dtype.
        wanted: the name that the user gave; one of a tensor or of `joined`.
        joined: tables split over several of the candidates, see `join_numbered`.
        readable: names of dtypes that can be read beside those of number_types.

    Raises:
        InvalidArgument: no such name, or several tables and no way to tell; lists them.
        BadSource: there is nothing that could be a table; or the one named is none.
    """
    if wanted is not None:
        return _named(path, [*candidates, *joined], wanted, readable)
    tables = [each for each in candidates if _why_not(each, readable) is None and not SCALE.fullmatch(each.name)]
    tables = [each for each in tables if _is_float(each, readable)] or tables
    known = _without_tied([each for each in tables if each.is_known])
    if len(known) == 1:
        return known[0]
    in_group = {member for group in joined for member in group.members}
    folded = [*joined, *(each for each in tables if each.name not in in_group)]
    if len(folded) == 1 and (not folded[0].members or is_split_table(folded[0])):
        return folded[0]
    if not folded:
        raise BadSource(
            f"{path}: nothing in it is a table of two dimensions and a number type that can be read; it holds:\n"
            + _listing(candidates)
        )
    reason = "several have the name of an input embedding" if known else "none has the name of an input embedding"
    raise InvalidArgument(
        f"{path} holds {len(folded)} possible tables, and {reason}. Say which one with --tensor NAME (tensor=NAME in "
        f"Python):\n" + _listing([*known, *(each for each in folded if each not in known)])
    )


def join_numbered(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Tables that are split over tensors whose names vary in one number, with `*` in its place.

    Their numbers begin at 0 or 1 and leave none out, they have two dimensions, the same columns and dtype. A name with
    several numbers goes to its largest group.
    """
    groups: dict[str, list[tuple[int, Candidate]]] = defaultdict(list)
    for each in candidates:
        if _why_not(each) is None and not SCALE.fullmatch(each.name):
            for digits in re.finditer(r"\d+", each.name):
                pattern = each.name[: digits.start()] + "*" + each.name[digits.end() :]
                groups[pattern].append((int(digits.group()[:18]), each))
    taken: set[str] = set()
    joined = []
    for pattern in sorted(groups, key=lambda pattern: -len(groups[pattern])):
        ordered = sorted(groups[pattern], key=lambda pair: pair[0])
        members = [each for _, each in ordered]
        if _belong_together([n for n, _ in ordered], members) and not taken & {each.name for each in members}:
            names = tuple(each.name for each in members)
            shape = (sum(each.shape[0] for each in members), members[0].shape[1])
            joined.append(Candidate(pattern, shape, members[0].dtype, names))
            taken.update(names)
    return joined


def is_split_table(group: Candidate) -> bool:
    """The name before the number says that each tensor is a part of one table, not a layer of its own."""
    if KNOWN.fullmatch(group.name.removesuffix(".*")):
        return True
    before = "_" + re.sub(r"[^a-z]+", "_", group.name.split("*")[0].lower()).rstrip("_") + "_"
    return before.endswith(PART_WORDS)


def note_of_choice(chosen: Candidate, candidates: Sequence[Candidate], wanted: str | None) -> list[str]:
    """What a user should be told who did not say which of several tables was meant."""
    count = sum(len(each.shape) == 2 and not SCALE.fullmatch(each.name) for each in candidates)
    if wanted is not None or chosen.members or count == 1:
        return []
    return [f"{chosen.name} was taken, one of {count} tables in it; --tensor NAME takes another."]


def _belong_together(numbers: list[int], members: list[Candidate]) -> bool:
    return (
        len(members) > 1
        and numbers[0] in (0, 1)
        and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        and len({(each.shape[1], each.dtype) for each in members}) == 1
    )


def _named(path: str, candidates: list[Candidate], wanted: str, readable: Sequence[str]) -> Candidate:
    for each in candidates:
        if each.name == wanted:
            reason = _why_not(each, readable)
            if reason is not None:
                raise BadSource(f"{path}: {each.name} cannot be a table: {reason}.")
            return each
    gap = " (tensors are joined when * stands for numbers from 0 or 1 on without a gap)" if "*" in wanted else ""
    raise InvalidArgument(f"{path} holds no {wanted!r}{gap}; it holds:\n" + _listing(candidates))


def _why_not(each: Candidate, readable: Sequence[str] = ()) -> str | None:
    if len(each.shape) != 2:
        return f"its shape is {each.shape}, but a table has two dimensions, rows and columns"
    if number_type(each.dtype) is None and each.dtype not in readable:
        return f"its values are {each.dtype}, which are not numbers that can be read"
    return None


def _is_float(each: Candidate, readable: Sequence[str]) -> bool:
    known = number_type(each.dtype)
    return known.is_float if known is not None else each.dtype in readable


def _without_tied(known: list[Candidate]) -> list[Candidate]:
    """Models that share one embedding between encoder and decoder also store it under both their names."""
    shared = [each for each in known if re.fullmatch(r"(?:.*[./])?shared[./]weight", each.name)]
    return shared if len(shared) == 1 and len({each.shape for each in known}) == 1 else known


def _listing(candidates: Sequence[Candidate]) -> str:
    """One a line, what looks like an embedding first."""
    ordered = sorted(candidates, key=lambda each: "emb" not in each.name.lower())
    rest = len(ordered) - LISTED
    lines = [f"  {each}" for each in ordered[:LISTED]]
    return "\n".join([*lines, f"  and {rest} more"] if rest > 0 else lines or ["  nothing"])
