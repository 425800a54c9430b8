"""state_dict of a module whose rows are on disk: it names a commit of a table, and loading it goes back there.

A module puts two tensors into a state_dict: its handle, and `table`, an int64 mark of the table's identity and of the
generation that held everything when it was taken. Rows are not in it. So the commit that `state_dict` makes is an
explicit one: it stays restorable until the next explicit commit, of which a later `state_dict` of changed rows is one.

So a state to go back to is loaded as it is, `model.load_state_dict(torch.load(file), strict=False)`: merged into a
fresh one, `model.state_dict() | torch.load(file)`, it comes too late where rows have changed, as the fresh one has
just taken its place. No rule could know that the fresh one is not the one to keep.
"""

import struct
import warnings
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bigembed.errors import BigembedError, PoisonedTable, StorageFailed
from bigembed.nn.weight import WeightView, row_blocks
from bigembed.storage.lifetime import open_tables
from bigembed.storage.superblock import Commit
from bigembed.storage.table import Table

KEY, PLAIN_KEY, HANDLE_KEY = "table", "weight", "handle"
MARK_VERSION = 1
_SALT = struct.Struct("<Q")


class CannotLoad(BigembedError, RuntimeError):
    """Why a table cannot go to a state; torch's load_state_dict lists its words and raises a RuntimeError for all."""


@dataclass(frozen=True)
class Mark:
    """A commit of a table, as six int64.

    Args:
        version: of this layout.
        salt: the table's 64 random bits, which a copy made by `copy_table` does not share.
        generation: the commit's number.
        moment: the bits of its time; tells commits of one number apart where a folder was copied and trained on.
        num_rows, dim: V and D, for messages.
    """

    version: int
    salt: int
    generation: int
    moment: int
    num_rows: int
    dim: int

    @classmethod
    def of(cls, table: Table, commit: Commit) -> "Mark":
        (salt,) = struct.unpack("<q", _SALT.pack(table.spec.salt))
        return cls(MARK_VERSION, salt, commit.number, _moment(commit), commit.num_rows, table.spec.dim)

    @classmethod
    def from_tensor(cls, given: Any) -> "Mark":
        """The mark that `to_tensor` wrote; CannotLoad if it is none."""
        if not isinstance(given, torch.Tensor) or given.dtype != torch.int64 or given.shape != (6,):
            what = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
            raise CannotLoad(
                f"expected 6 int64 that name a commit of a table, but received {what}. It must not be averaged, cast "
                "or otherwise changed"
            )
        mark = cls(*given.tolist())
        if mark.version != MARK_VERSION:
            raise CannotLoad(f"its layout is {mark.version}, this library reads {MARK_VERSION}: upgrade bigembed")
        return mark

    def to_tensor(self) -> torch.Tensor:
        return torch.tensor(astuple(self), dtype=torch.int64, device="cpu")

    def is_of(self, table: Table) -> bool:
        return _SALT.pack(table.spec.salt) == struct.pack("<q", self.salt)

    def held_by(self, commits: list[Commit]) -> Commit | None:
        """The commit whose rows are those of this mark: itself, or a rollback to it, which has its time."""
        for commit in reversed(commits):
            numbers = [commit.number] if commit.rollback_to is None else [commit.number, commit.parent]
            if self.generation in numbers and self.moment == _moment(commit):
                return commit
        return None


def _moment(commit: Commit) -> int:
    return int(np.float64(commit.time).view(np.int64))


class MarkOfTemporary(torch.Tensor):
    """A mark of a temporary table: good in this process; writing it to a file warns that the rows will be gone."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        warnings.warn(
            "the state_dict of a temporary table is being saved: it names the table and holds no rows, and the table "
            "goes with its module, so nothing will load this. Make the module with path=..., or save "
            "emb.to_nn_embedding().state_dict().",
            stacklevel=2,
        )
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> "MarkOfTemporary":
        return self.clone().as_subclass(MarkOfTemporary)


# -- out --------------------------------------------------------------------------------------------------------


def has_changes(table: Table) -> bool:
    """Whether rows or an optimizer's scalars have changed since the last commit; a reader changes nothing."""
    if table.mode == "r":
        return False
    dirty = table._cache.dirty_rows if table._cache is not None else 0
    return bool(dirty or table._uncommitted_rows or table.scalars != table.generations()[-1].scalars)


def taken_state(table: Table) -> torch.Tensor:
    """The mark of the table as it is now, committed explicitly where that is not done yet.

    Raises:
        DiskFull, StorageFailed: whatever a commit raises. ForkedTable: there are changes, made by the parent process.
    """
    with table.mutex:
        if table.mode == "r+" and (has_changes(table) or not table.generations()[-1].explicit):
            table.commit("state_dict")
        mark = Mark.of(table, table.generations()[-1]).to_tensor()
    return mark.as_subclass(MarkOfTemporary) if table.is_temporary else mark


# -- in ---------------------------------------------------------------------------------------------------------


def load_state(module: Any, state: dict[str, Any], prefix: str, errors: list[str]) -> bool:
    """Bring the module's table to what `state` holds for it: a mark, or the plain weight of an nn.Embedding.

    Args:
        state: may hold other keys. errors: what cannot be is told there, as torch does for any parameter.

    Returns:
        Whether there was anything for this module.
    """
    if prefix + KEY in state:
        key = prefix + KEY
        try:
            _go_back(module.table, module.weight, Mark.from_tensor(state[key]))
        except CannotLoad as error:
            errors.append(f'While loading the table named "{key}": {error}.')
        return True
    if prefix + PLAIN_KEY in state:
        _copy_plain(module.weight, prefix + PLAIN_KEY, state[prefix + PLAIN_KEY], errors)
        return True
    return False


def _go_back(table: Table, weight: WeightView, mark: Mark) -> None:
    if not mark.is_of(table):
        _copy_from_open_table(table, weight, mark)
        return
    with table.mutex:
        if table.mode == "r" and mark.held_by(table.generations()[-1:]) is None:
            table.refresh()
        commits = table.generations()
        target = mark.held_by(commits)
        if target is None:
            raise CannotLoad(
                f"generation {mark.generation} of {table.path} cannot be restored, it keeps "
                f"{sorted(commit.number for commit in commits)}: a table keeps its last explicit commit, of which "
                "state_dict() makes one where rows have changed: load a kept state as it is (strict=False where keys "
                "are missing), not merged into a new state_dict(). To keep several, copy the table "
                "(bigembed.copy_table)"
            )
        if target.number == table.generation:
            if has_changes(table):
                table.rollback()
        elif table.mode == "r":
            raise CannotLoad(
                f"{table.path} is open with mode='r' and at generation {table.generation}; generation "
                f"{mark.generation} can be restored where it is open with mode='r+'"
            )
        else:
            table.rollback(target.number)


def _copy_from_open_table(table: Table, weight: WeightView, mark: Mark) -> None:
    """Take the weights of another table, where it is open here and as it was then: models are copied so."""
    for source in open_tables():
        if isinstance(source, Table) and source.shape == table.shape and _is_at(source, mark):
            for first, last in row_blocks(*source.shape):
                weight[first:last] = source.read(np.arange(first, last))
            if not _is_at(source, mark):  # no lock is held: two threads may copy the other way round
                raise CannotLoad(f"{source.path} was changed by another thread while its rows were copied from it")
            return
    raise CannotLoad(
        f"it names generation {mark.generation} of another table of {mark.num_rows} x {mark.dim}, and this module is "
        f"on {table.path}, {table.shape[0]} x {table.shape[1]}. A state_dict holds no rows: open the table that it was "
        "taken from, or copy rows with emb.weight.copy_(other.weight), which happens by itself where a table of the "
        "same shape is open in this process and was not changed since"
    )


def _is_at(table: Table, mark: Mark) -> bool:
    """Whether the rows of an open table are those of the mark."""
    with table.mutex:
        return mark.is_of(table) and mark.held_by(table.generations()[-1:]) is not None and not has_changes(table)


def _copy_plain(weight: WeightView, key: str, given: Any, errors: list[str]) -> None:
    """Write a checkpoint's weight block by block; messages are torch's own."""
    if not torch.overrides.is_tensor_like(given):
        errors.append(
            f'While copying the parameter named "{key}", expected torch.Tensor or Tensor-like object from checkpoint '
            f"but received {type(given)}"
        )
    elif given.shape != weight.shape:
        errors.append(
            f"size mismatch for {key}: copying a param with shape {given.shape} from checkpoint, the shape in current "
            f"model is {weight.shape}."
        )
    else:
        try:
            with torch.no_grad():
                weight.copy_(given)
        except (StorageFailed, PoisonedTable):
            raise
        except Exception as error:  # as torch does
            errors.append(
                f'While copying the parameter named "{key}", whose dimensions in the model are {weight.size()} and '
                f"whose dimensions in the checkpoint are {given.size()}, an exception occurred : {error.args}."
            )


class TableState(nn.Module):
    """The state_dict of a TableModule: save and load as torch asks for them."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + KEY] = taken_state(self.table)  # type: ignore[arg-type]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # First all that is torch's: hooks, which may rename keys in state_dict, and what a subclass has beside rows.
        # The handle must stay the Parameter that it is.
        state_dict.pop(prefix + HANDLE_KEY, None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        is_loaded = load_state(self, state_dict, prefix, error_msgs)
        if strict:  # keys that a hook has renamed or brought back are in neither list
            _forget(missing_keys, prefix + HANDLE_KEY)
            if not is_loaded:
                missing_keys.append(prefix + PLAIN_KEY)
            else:
                _forget(unexpected_keys, prefix + (KEY if prefix + KEY in state_dict else PLAIN_KEY))


def _forget(keys: list[str], key: str) -> None:
    if key in keys:
        keys.remove(key)
