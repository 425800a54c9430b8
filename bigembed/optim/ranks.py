"""Several processes under torch.distributed: a table of each one would go its own way."""

import torch

from bigembed.errors import BigembedError
from bigembed.optim.trainable import TrainableTable


class RanksWouldDiverge(BigembedError, RuntimeError):
    """A step under torch.distributed on a table that was not declared rank-local."""


def check_ranks(trainable: TrainableTable) -> None:
    """Raises RanksWouldDiverge: there are several ranks, and the table was not declared to be of this one alone."""
    distributed = torch.distributed
    if trainable.rank_local or not (distributed.is_available() and distributed.is_initialized()):
        return
    ranks = distributed.get_world_size()
    if ranks > 1:
        raise RanksWouldDiverge(
            f"torch.distributed runs {ranks} ranks, and a step would change {trainable.table.path} on rank "
            f"{distributed.get_rank()} alone: gradients of tables are not exchanged, so replicas would diverge. Freeze "
            "the table, or train it on one rank and look rows up there; where each rank shall have a table of its own "
            "(a partition of the rows, say), declare it: Embedding(..., rank_local=True)."
        )
