"""A module for `--import` that makes one number of one rank NaN: POISON is "what:rank:step,step"."""

import os

import torch

from training.trainer import Trainer

WHAT, RANK, STEPS = os.environ["POISON"].split(":")
accumulate, train_step = Trainer._accumulate_gradients, Trainer.train_step


def poison_weight(weight):
    """A number of this process's share of a weight."""
    share = (weight if weight.numel() else weight.ds_tensor).detach()
    getattr(share, "_local_tensor", share)[0] = torch.nan


def poisoned(self, batch):
    """The gradients of a step, with the poison in it, as often as they are asked for."""
    if self.processes.rank != int(RANK) or str(self.step + 1) not in STEPS.split(","):
        return accumulate(self, batch)
    if WHAT == "weight":
        poison_weight(self.module.lm_head.weight)
    handles = []

    def poison_gradient(module, inputs):
        """FSDP2 and ZeRO-3 have the whole weight only while the module is at work."""
        handles.append(module.weight.register_hook(lambda gradient: gradient * torch.nan))

    if WHAT == "loss":
        handles.append(self.module.lm_head.register_forward_hook(lambda module, inputs, logits: logits * torch.nan))
    if WHAT == "gradient":
        handles.append(self.module.lm_head.register_forward_pre_hook(poison_gradient, prepend=True))
    try:
        return accumulate(self, batch)
    finally:
        for handle in handles:
            handle.remove()


def poisoned_update(self):
    """A step after which a weight is NaN."""
    train_step(self)
    if self.processes.rank == int(RANK) and str(self.step) in STEPS.split(","):
        poison_weight(self.module.lm_head.weight)


Trainer._accumulate_gradients = poisoned
if WHAT == "update":
    Trainer.train_step = poisoned_update
