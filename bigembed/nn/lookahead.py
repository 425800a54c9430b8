"""lookahead: a loader whose coming batches have their rows read while the model works on this one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch

from bigembed.errors import InvalidArgument, InvalidIds, RowOutOfRange

Batch = TypeVar("Batch")


class Lookahead(Generic[Batch]):
    """The batches of a loader, in order; the rows of the next `depth` ones are being read. Made by `lookahead`."""

    def __init__(self, loader: Iterable[Batch], ids_of: Mapping[Any, Callable[[Batch], Any]], depth: int) -> None:
        self._loader, self._ids_of, self._depth = loader, dict(ids_of), depth

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[Batch] = deque()
        for batch in self._loader:
            self._prefetch(batch)
            waiting.append(batch)
            if len(waiting) > self._depth:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    def _prefetch(self, batch: Batch) -> None:
        if self._depth == 0:
            return
        for module, ids_of_batch in self._ids_of.items():
            ids = ids_of_batch(batch)
            for part in [ids] if isinstance(ids, torch.Tensor) else ids:
                try:
                    module.prefetch(part)
                except (InvalidIds, RowOutOfRange):  # the lookup will say so, when it is this batch's turn
                    continue


def lookahead(
    loader: Iterable[Batch], ids_of_batch: Mapping[Any, Callable[[Batch], Any]], depth: int = 2
) -> Lookahead[Batch]:
    """Iterate over a loader's batches while the rows of the next ones are read in the background.

    Args:
        loader: any iterable of batches, such as a DataLoader; `depth` of them are held back.
        ids_of_batch: for each bigembed module a function from a batch to the ids it will look up: a tensor, or several.
        depth: how many batches ahead; 0 reads nothing ahead. Two hide the disk where a step takes as long as its reads;
            prefetch_bytes of the module bounds what they take.

    Returns:
        An iterable, which may be iterated again where the loader may, with the loader's `len`.

    Raises:
        InvalidArgument: depth is negative, or a key is no bigembed module.

    Example:
        >>> import torch, bigembed
        >>> emb = bigembed.Embedding(1_000_000, 8)
        >>> loader = [{"ids": torch.randint(0, 1_000_000, (4,))} for _ in range(3)]
        >>> for batch in bigembed.lookahead(loader, {emb: lambda batch: batch["ids"]}):
        ...     print(tuple(emb(batch["ids"]).shape))
        (4, 8)
        (4, 8)
        (4, 8)
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise InvalidArgument(f"depth must be a whole number of batches, at least 0, not {depth!r}.")
    for module, function in ids_of_batch.items():
        if not hasattr(module, "prefetch") or not callable(function):
            raise InvalidArgument(
                f"{type(module).__name__}: {type(function).__name__} is no bigembed module with a function from batch "
                "to ids. Use lookahead(loader, {emb: lambda batch: batch['ids']})."
            )
    return Lookahead(loader, ids_of_batch, depth)
