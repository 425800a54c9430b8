"""Optimizers for tables: each is a torch.optim.Optimizer that takes modules instead of parameters."""

from bigembed.optim.adagrad import Adagrad
from bigembed.optim.adam import Adam
from bigembed.optim.adamw import AdamW
from bigembed.optim.chained import Chained
from bigembed.optim.clip import clip_grad_norm_
from bigembed.optim.rowwise_adagrad import RowwiseAdagrad
from bigembed.optim.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Chained", "RowwiseAdagrad", "clip_grad_norm_"]
