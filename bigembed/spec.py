"""TableSpec: the frozen facts of a table, and the layout of its records. No I/O.

A record is the bytes of one row on disk, in little-endian 32-bit words:

    | weight: D float32 | state: K float32 | check: uint32 |

W = D + K + 1 words. The Zarr array has shape (V, D) and chunk shape (R, W): the columns from D to W are padding
to a Zarr reader. In memory a row is E = D + K float32 values, weight first.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from bigembed.errors import InvalidArgument, NewerFormat, NotATable
from bigembed.init import InitialValues, normal

FORMAT_VERSION = 1
INIT_VERSION = 1  # of the generator in kernels/initial.py
MAX_ROWS = 1 << 48
MAX_WORDS = 1 << 24
MIN_CHUNK_ROWS = 4096
CHUNK_FILE_BYTES = 128 << 20  # default chunk files are between half of this and this


@dataclass(frozen=True)
class StateColumns:
    """One named block of a record's state: `width` float32 columns that start at `initial`."""

    name: str
    width: int
    initial: float = 0.0


@dataclass(frozen=True)
class TableSpec:
    """What never changes while a table is open, except through `grow` and the widening of its records.

    Args:
        num_rows: V, the number of rows.
        dim: D, the number of weight columns.
        state: the blocks of state columns, K columns together.
        owner: the optimizer rule that the state belongs to; None while the columns are only reserved.
        init: what a never-written row holds.
        seed: with the row number it decides the initial values; 0 <= seed < 2**63.
        salt: 64 random bits that go into every check, so that another table's records never pass.
        chunk_rows: R, rows in a chunk file, a power of two >= 4096.
        padding_idx: this row starts as zeros; None for no such row.
        attributes: what else the group's attributes hold (where the table was converted from, ...).
    """

    num_rows: int
    dim: int
    state: tuple[StateColumns, ...] = ()
    owner: str | None = None
    init: InitialValues = field(default_factory=normal)
    seed: int = 0
    salt: int = 0
    chunk_rows: int = MIN_CHUNK_ROWS
    padding_idx: int | None = None
    dtype: str = "float32"
    attributes: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.num_rows <= MAX_ROWS:
            raise InvalidArgument(f"num_rows must be between 1 and 2**48, not {self.num_rows}.")
        if self.dtype != "float32":
            raise InvalidArgument(f"dtype {self.dtype!r} is not supported; this version stores float32.")
        if self.dim < 1 or any(block.width < 1 for block in self.state) or self.record_words > MAX_WORDS:
            raise InvalidArgument(
                f"dim {self.dim} with {self.state_dim} state columns: a record needs at least one weight and "
                f"at most {MAX_WORDS} words."
            )
        if self.chunk_rows < MIN_CHUNK_ROWS or self.chunk_rows & (self.chunk_rows - 1):
            raise InvalidArgument(
                f"chunk_rows must be a power of two of at least {MIN_CHUNK_ROWS}, not {self.chunk_rows}."
            )
        if not 0 <= self.seed < 1 << 63:
            raise InvalidArgument(f"seed must be at least 0 and below 2**63, not {self.seed}.")
        if self.padding_idx is not None and not 0 <= self.padding_idx < self.num_rows:
            raise InvalidArgument(f"padding_idx {self.padding_idx} is not a row of {self.num_rows} rows.")

    @property
    def state_dim(self) -> int:
        """K."""
        return sum(block.width for block in self.state)

    @property
    def row_width(self) -> int:
        """E = D + K: float32 values of a row in memory."""
        return self.dim + self.state_dim

    @property
    def record_words(self) -> int:
        """W = D + K + 1: 32-bit words of a record."""
        return self.row_width + 1

    @property
    def record_bytes(self) -> int:
        return 4 * self.record_words

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * self.record_bytes

    @property
    def num_chunks(self) -> int:
        return -(-self.num_rows // self.chunk_rows)

    def locate(self, rows_M: Any) -> tuple[Any, Any]:
        """(chunk, byte offset in its file) of each row's record."""
        chunk_M = rows_M // self.chunk_rows
        return chunk_M, (rows_M - chunk_M * self.chunk_rows) * self.record_bytes

    @property
    def logical_bytes(self) -> int:
        """V * D * 4: what the weights alone would take in memory."""
        return self.num_rows * self.dim * 4

    @property
    def state_initial(self) -> list[float]:
        """The K initial state values."""
        return [block.initial for block in self.state for _ in range(block.width)]

    def with_state(self, owner: str | None, state: tuple[StateColumns, ...]) -> "TableSpec":
        """This spec with other state columns; chunk_rows stays, so rows keep their chunk."""
        return replace(self, owner=owner, state=state)

    def to_attributes(self) -> dict[str, Any]:
        """The JSON object stored under "bigembed" in the Zarr group's attributes."""
        return {
            "format_version": FORMAT_VERSION,
            "num_rows": self.num_rows,
            "dim": self.dim,
            "dtype": self.dtype,
            "state": [{"name": b.name, "width": b.width, "initial": b.initial} for b in self.state],
            "owner": self.owner,
            "init": {"kind": self.init.kind, "a": self.init.a, "b": self.init.b, "version": INIT_VERSION},
            "seed": self.seed,
            "salt": f"{self.salt:016x}",
            "chunk_rows": self.chunk_rows,
            "padding_idx": self.padding_idx,
            **self.attributes,
        }

    @classmethod
    def from_attributes(cls, attributes: Any, where: str) -> "TableSpec":
        """The spec that `to_attributes` wrote; NotATable or NewerFormat (naming `where`) if it is none."""
        if not isinstance(attributes, dict) or "format_version" not in attributes:
            raise NotATable(
                f"{where} has no 'bigembed' attributes, so it is not a bigembed table. Create one with Table.create."
            )
        version = attributes["format_version"]
        if not isinstance(version, int) or version < 1:
            raise NotATable(f"{where}: format_version is {version!r}, not a positive integer.")
        if version > FORMAT_VERSION:
            raise NewerFormat(
                f"{where} has format version {version}, this library reads up to {FORMAT_VERSION}. Upgrade bigembed."
            )
        known = dict(attributes)
        try:
            init = known.pop("init")
            if init["version"] != INIT_VERSION:
                raise NewerFormat(
                    f"{where}: generator {init['version']} of initial values is unknown; upgrade bigembed."
                )
            spec = cls(
                num_rows=_integer(known.pop("num_rows")),
                dim=_integer(known.pop("dim")),
                dtype=known.pop("dtype"),
                state=tuple(
                    StateColumns(str(b["name"]), _integer(b["width"]), float(b["initial"])) for b in known.pop("state")
                ),
                owner=known.pop("owner"),
                init=InitialValues(init["kind"], float(init["a"]), float(init["b"])),
                seed=_integer(known.pop("seed")),
                salt=int(known.pop("salt"), 16),
                chunk_rows=_integer(known.pop("chunk_rows")),
                padding_idx=None if known["padding_idx"] is None else _integer(known["padding_idx"]),
            )
        except NewerFormat:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise NotATable(f"{where}: the table's attributes are not valid ({error!r}).") from error
        del known["padding_idx"], known["format_version"]
        return replace(spec, attributes=known)


def default_chunk_rows(num_rows: int, record_bytes: int) -> int:
    """The largest power of two of rows that keeps a chunk file within 128 MiB, and no more than the table needs."""
    rows = MIN_CHUNK_ROWS
    while 2 * rows * record_bytes <= CHUNK_FILE_BYTES and rows < num_rows:
        rows *= 2
    return rows


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not an integer")
    return value
