"""A module for `--import`: a run on a CPU computes in float16 with a loss scale, which accelerate has on GPUs alone."""

import torch

from training.strategies import Strategy

open_accelerator = Strategy._open_accelerator


def scaled(self, **plugins):
    """The accelerator as it is for fp16 on a GPU."""
    accelerator = open_accelerator(self, **plugins)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


Strategy._open_accelerator = scaled
