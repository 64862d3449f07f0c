"""A module for `--import`: before step RAISING_STEP the process of rank RAISING_RANK fails by itself."""

import os

from training.trainer import Trainer

train_step = Trainer.train_step


def failing(self):
    """A step, or a defect."""
    if self.processes.rank == int(os.environ["RAISING_RANK"]) and self.step + 1 == int(os.environ["RAISING_STEP"]):
        raise ZeroDivisionError(f"a defect of rank {self.processes.rank}")
    train_step(self)


Trainer.train_step = failing
