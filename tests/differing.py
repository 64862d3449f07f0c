"""A module for `--import`: the process of rank 1 has another learning rate, or other data, as DIFFERING says."""

import dataclasses
import os

import training.trainer
from training.trainer import Trainer

init, prepare = Trainer.__init__, training.trainer.prepare


def another_rate(self, run, stop):
    """The trainer of a machine with another configuration."""
    run.config.optim.lr = 0.5
    init(self, run, stop)


def other_data(config):
    """The tokens of a machine that prepared others."""
    return dataclasses.replace(prepare(config), fingerprint="0" * 64)


if os.environ["RANK"] == "1":
    if os.environ["DIFFERING"] == "optim.lr":
        Trainer.__init__ = another_rate
    else:
        training.trainer.prepare = other_data
