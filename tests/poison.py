"""A module for `--import` that makes one number of one rank NaN: POISON is "what:rank:step,step"."""

import os

import torch

from training.trainer import Trainer

WHAT, RANK, STEPS = os.environ["POISON"].split(":")
accumulate = Trainer._accumulate_gradients


def poisoned(self, batch):
    """The gradients of a step, with the poison in it, as often as they are asked for."""
    if self.processes.rank != int(RANK) or str(self.step + 1) not in STEPS.split(","):
        return accumulate(self, batch)
    if WHAT == "weight":
        weight = self.module.lm_head.weight.detach()
        getattr(weight, "_local_tensor", weight)[0] = torch.nan
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


Trainer._accumulate_gradients = poisoned
