"""What a user can choose about a demo run, with the defaults of the command line. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoOptions:
    """A demo run.

    Args:
        rows: V of the table. dim: D.
        seconds: time to train, evaluation and the rest not counted. steps: train for so many steps instead.
        cache_bytes: memory for hot rows and the journal's index.
        path: where the table is made, and stays; None for a temporary folder.
        keep: keep the temporary folder too.
        text: files and folders; empty for the sources of Python's standard library.
        tokens: "bytes" or "words".
        batch: positions in a step.
        seed: decides the split of the text, the batches and the initial weights.
    """

    rows: int = 200_000_000
    dim: int = 64
    seconds: float = 40.0
    steps: int | None = None
    cache_bytes: int = 512 << 20
    path: str | None = None
    keep: bool = False
    text: tuple[str, ...] = ()
    tokens: str = "bytes"
    batch: int = 4096
    seed: int = 0
