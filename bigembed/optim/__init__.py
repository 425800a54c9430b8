"""Optimizers for tables: each is a torch.optim.Optimizer that takes modules instead of parameters."""

from bigembed.optim.adagrad import Adagrad
from bigembed.optim.adam import Adam
from bigembed.optim.rowwise_adagrad import RowwiseAdagrad
from bigembed.optim.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "RowwiseAdagrad"]
