"""A module for `--import`: the process of rank 1 has another learning rate, folder or data, as DIFFERING says."""

import dataclasses
import os

import training.trainer
from training.trainer import Trainer

DIFFERING = os.environ["DIFFERING"]
init, prepare = Trainer.__init__, training.trainer.prepare


def other_settings(self, run, stop):
    """The trainer of a machine with another configuration, or another disk under the same name."""
    if DIFFERING == "optim.lr":
        run.config.optim.lr = 0.5
    if DIFFERING == "out":
        run.out = run.out / "elsewhere"
    init(self, run, stop)


def other_data(config):
    """The tokens of a machine that prepared others."""
    return dataclasses.replace(prepare(config), fingerprint="0" * 64)


if os.environ["RANK"] == "1":
    Trainer.__init__ = other_settings
    if DIFFERING == "data":
        training.trainer.prepare = other_data
