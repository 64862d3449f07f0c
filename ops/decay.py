"""Decay of the recurrent state: slopes of heads and layers, and powers of λ = exp(log_decay)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def powers(log_decay: Tensor, exponents: Tensor) -> Tensor:
    """λ^n for every head and exponent: log_decay (H,) ≤ 0, exponents of any shape, ≥ 0; returns (H, *exponents).

    Exponents are never negative: 1/λ^n overflows on long sequences. A positive log_decay gives NaN, so that a
    wrong value on a GPU, where reading it would stall the stream, can't go unnoticed.
    """
    valid = torch.where(log_decay <= 0, log_decay, torch.nan)
    valid = valid.clamp(min=torch.finfo(valid.dtype).min)  # -inf · 0 is NaN, and λ^0 is 1
    return torch.exp(valid.view(-1, *[1] * exponents.dim()) * exponents)


def step_factors(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """λ of one step in two parts, `λ S = keep · S + change · S`: log_decay (H,), returns two tensors (H,).

    A λ near 1 rounded to float32 is off by up to 3e-8, and a state multiplied by it 2,000 times by 6e-5. So keep is 1
    and change is λ - 1, to full precision; a strong decay is plain λ, since there 1 + (λ - 1) cancels.
    """
    valid = torch.where(log_decay <= 0, log_decay, torch.nan)
    weak = valid > -0.5
    return weak.to(valid.dtype), torch.where(weak, torch.expm1(valid), torch.exp(valid))


def causal_decay(log_decay: Tensor, length: int) -> Tensor:
    """The mask M[i, j] = λ^(i-j) for i ≥ j, else 0: log_decay (H,), returns (H, length, length)."""
    position = torch.arange(length, device=log_decay.device)
    distance = (position[:, None] - position).clamp(min=0)
    return powers(log_decay, distance.to(log_decay.dtype)).tril()


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """Slopes of H heads, (H,) float32: geometric from 2^(-8/H); for H not a power of two, filled from the next one.

    Made on the device: copying them there in every layer of a forward pass would stall a GPU.
    Source: Press et al. 2022, "Train Short, Test Long", arXiv:2108.12409, and its published code for other H.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    head = torch.arange(num_heads, dtype=torch.float32, device=device)
    exponent = torch.where(head < below, -8 * (head + 1), -4 * (2 * (head - below) + 1))
    return torch.exp2(exponent / below)


def layer_log_decay(
    num_heads: int,
    layer: int,
    num_layers: int,
    device: torch.device | str | None = None,
    slopes: Sequence[float] | None = None,
) -> Tensor:
    """Log-decay of the heads of layer l of N, (H,) float32: `-slope_h · (1 - l/(N-1) + 1e-5)`.

    The slopes are those of H heads, by default `alibi_slopes`. Deeper layers forget less. Source: Qin et al. 2023,
    "TransNormerLLM", arXiv:2307.14995, eq. 6, with the offset of its published code.
    """
    rate = 1 - layer / max(num_layers - 1, 1) + 1e-5
    if slopes is None:
        return -rate * alibi_slopes(num_heads, device)
    # Filled on the device, head by head: a copy of the list would stall a GPU in every layer of a forward pass.
    return -rate * torch.cat([torch.full((1,), slope, dtype=torch.float32, device=device) for slope in slopes])
