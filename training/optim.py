"""AdamW with weight decay on matrices only, and a learning rate that is a pure function of the step."""

import math

import torch

from training.config import OptimConfig
from training.errors import ConfigError


def parameter_groups(model: torch.nn.Module, weight_decay: float, learned_decay_lr_scale: float = 1.0) -> list[dict]:
    """Split the trained parameters of a model into matrices, which alone have weight decay, learned decays and others.

    Args:
        model: its tied parameters count once, frozen ones not at all; those whose last name is in its
            `no_weight_decay`, if it has one, are no matrices.
        weight_decay: decoupled decay of the matrices, per unit of learning rate.
        learned_decay_lr_scale: factor of the learning rate of the learned decays, every `decay_log`.

    Returns:
        The non-empty groups, in a form that torch optimizers take; `lr_scale` is the factor of a group's rate.
    """
    spared: set[str] = getattr(model, "no_weight_decay", set())
    groups: list[dict] = [
        {"params": [], "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": [], "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": [], "weight_decay": 0.0, "lr_scale": learned_decay_lr_scale},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            last = name.rpartition(".")[2]
            matrix = parameter.ndim == 2 and last not in spared
            groups[0 if matrix else 2 if last == "decay_log" else 1]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def build_optimizer(model: torch.nn.Module, config: OptimConfig, device: torch.device | str) -> torch.optim.AdamW:
    """Build AdamW for a model.

    Args:
        model: its parameters are already on `device`.
        config: rates, betas, epsilon and decay.
        device: where the model is; on "cuda" and "cpu" a step is one fused pass over the parameters.

    Returns:
        The optimizer, at the highest learning rate until `set_learning_rate` is called.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay, config.learned_decay_lr_scale),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=torch.device(device).type in ("cuda", "cpu"),
    )


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Return the learning rate of one update.

    Warm-up rises as (step + 1) / warmup_steps and reaches `lr` with its last update. "cosine" falls along half a
    cosine, "wsd" stays at `lr` and falls linearly over the last `decay_share` of the run; both reach `min_lr` with
    the last update.

    Args:
        step: updates done before this one; 0 is the first.
        config: the schedule.
        total_steps: updates of the whole run.

    Returns:
        The rate; `min_lr` for steps after the end.

    Raises:
        ConfigError: the schedule has no such name.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        remaining = (1 + math.cos(math.pi * _progress(step, config.warmup_steps, total_steps))) / 2
    elif config.schedule == "wsd":
        decay_start = total_steps - round(config.decay_share * total_steps)
        remaining = 1 - _progress(step, max(config.warmup_steps, decay_start), total_steps)
    else:
        raise ConfigError(f"optim.schedule: expected 'cosine' or 'wsd', got {config.schedule!r}")
    return config.min_lr + (config.lr - config.min_lr) * remaining


def _progress(step: int, start: int, end: int) -> float:
    """Return which share of the updates start … end - 1 is done once `step` is, from 0 to 1."""
    return min(max((step + 1 - start) / max(end - start, 1), 0.0), 1.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group of an optimizer to `lr` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
