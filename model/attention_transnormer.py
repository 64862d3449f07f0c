"""Attention of a TransNormer: what all kinds share, lightning attention, and masked attention.

Source: Qin et al. 2023, "TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer",
arXiv:2307.14995. Dims: B batch, H query heads, G key/value heads, T tokens, D head width, C hidden size.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .cache_transnormer import KeyValueLayer, RecurrentLayer
from .configuration_transnormer import TransnormerConfig
from .masks_transnormer import Pairs, relative_mask
from .packing_transnormer import Packing

try:  # in the repository the operators are a package; beside a checkpoint the same files lie flat
    from ops.decay import layer_log_decay, powers
    from ops.lightning_attention import lightning_attention, lightning_attention_step
    from ops.linear_attention import flash_linear_attention
    from ops.numerics import unit_length
except ImportError:
    from .decay import layer_log_decay, powers  # type: ignore[no-redef]
    from .lightning_attention import lightning_attention, lightning_attention_step  # type: ignore[no-redef]
    from .linear_attention import flash_linear_attention  # type: ignore[no-redef]
    from .numerics import unit_length  # type: ignore[no-redef]


class SimpleRMSNorm(nn.Module):
    """`x / rms(x)` over the last dim, computed in float32, without weights."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LinearizedRelativePosition(nn.Module):
    """LRPE: `x → [x cos(θt), x sin(θt)]`, so that the product of q at t and k at s sees `cos(θ(t - s))`.

    θ (H, 1, D) is learned, from `10000^(-2i / (H·D))` over all H·D channels. Source: Qin et al. 2023,
    "Linearized Relative Positional Encoding", arXiv:2307.09270.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        channel = torch.arange(self.theta.numel(), device=self.theta.device, dtype=torch.float32)
        init.copy_(self.theta, (10000 ** (-2 * channel / self.theta.numel())).view_as(self.theta))

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of θt for positions (B, T), in float32: (B, H, T, D)."""
        angle = self.theta.float() * position_ids[:, None, :, None]
        return angle.cos(), angle.sin()


class Attention(nn.Module, ABC):
    """Projections, positional encoding, the operator, norm over the joined heads, gate if any, output projection.

    Kinds differ in `attend` alone: the operator, and what it is told of the sequences in a batch.
    """

    def __init__(self, config: TransnormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        assert config.head_dim is not None  # the configuration fills in both
        assert config.num_key_value_heads is not None
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        query, key = self.num_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.widths = (query, key, key, *([query] if config.gate else []))  # q, k, v and the gate u
        self.qkvu_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(query, config.hidden_size, bias=False)
        self.norm = SimpleRMSNorm(config.rms_norm_eps)
        uses_lrpe = layer_idx in config.lrpe_layers
        self.lrpe = LinearizedRelativePosition(self.num_heads, self.head_dim) if uses_lrpe else None
        if config.decay == "learned":
            self.decay_log = nn.Parameter(torch.empty(self.num_heads))  # log(-log_decay), so that it stays ≤ 0
            self.reset_decay()

    def reset_parameters(self) -> None:
        """Initial values of what is no matrix of this module."""
        if self.config.decay == "learned":
            self.reset_decay()

    @torch.no_grad()
    def reset_decay(self) -> None:
        init.copy_(self.decay_log, (-self.fixed_log_decay(self.decay_log.device)).log())

    def fixed_log_decay(self, device: torch.device) -> Tensor:
        """Made anew in every pass: a buffer would survive neither the meta device nor a cast of the module."""
        layers, slopes = self.config.num_hidden_layers, self.config.decay_slopes
        return layer_log_decay(self.num_heads, self.layer_idx, layers, device, slopes)

    def log_decay(self, device: torch.device) -> Tensor | None:
        """Log-decay of each head, (H,) float32, or None without decay."""
        if self.config.decay == "none":
            return None
        if self.config.decay == "learned":
            return -self.decay_log.float().exp()
        return self.fixed_log_decay(device)

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        layout: Packing | Pairs | None = None,
        cache: RecurrentLayer | KeyValueLayer | None = None,
    ) -> Tensor:
        """hidden_states (B, T, C), position_ids (B, T); returns (B, T, C) and moves the cache on by T tokens."""
        q, k, v, *gate = self.qkvu_proj(hidden_states).split(self.widths, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        q, k = F.silu(q), F.silu(k)  # (B, H, T, D), (B, G, T, D)
        if self.lrpe is not None:
            q, k = self._encode_positions(q, k, *self.lrpe(position_ids))
        o = self.attend(q, k, v, layout, cache)  # (B, H, T, D)
        o = self.norm(o.transpose(1, 2).flatten(2))  # (B, T, H·D)
        return self.out_proj(o * gate[0] if gate else o)

    @staticmethod
    def _encode_positions(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """LRPE of q and k; k gets a copy for each query head, because θ differs between them: (B, H, T, 2D)."""
        k = k.expand_as(q) if k.shape[1] == 1 else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        q, k = (torch.cat([x * cos, x * sin], dim=-1).to(x.dtype) for x in (q, k))
        return q, k

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Any, cache: Any) -> Tensor:
        """The operator: q (B, H, T, D), k and v (B, G, T, D), with LRPE q and k (B, H, T, 2D); returns (B, H, T, D)."""


class LightningAttention(Attention):
    """Causal with decay, over a state of fixed size."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, cache: RecurrentLayer | None) -> Tensor:
        """The operator over one token, whole rows, or packed sequences; keeps the state in the cache."""
        batch, tokens = q.shape[0], q.shape[2]
        log_decay = self.log_decay(q.device)
        qk_norm = self.config.qk_norm == "l2"
        state = None if cache is None or cache.state is None else cache.state.to(q.device)
        inputs = [x for x in (q, k, v, log_decay, state) if x is not None]
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if cache is not None and state is not None and tokens == 1 and packing is None and not differentiable:
            if qk_norm:
                q, k = unit_length(q), unit_length(k)
            o = lightning_attention_step(q, k, v, log_decay, state)
            cache.store(state, tokens)
            return o
        if packing is not None:
            q, k, v = packing.pack(q), packing.pack(k), packing.pack(v)
            state = packing.pack_state(state)
        o, state = lightning_attention(
            q,
            k,
            v,
            log_decay,
            qk_norm=qk_norm,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=None if packing is None else packing.cu_seqlens,
        )
        if packing is not None:
            o, state = packing.unpack(o, batch), packing.unpack_state(state)
        if cache is not None:
            cache.store(state, tokens)
        return o


class MaskedAttention(Attention):
    """Under a mask of any weights, over all keys and values so far."""

    def __init__(self, config: TransnormerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.mask == "learned":
            self.mask_weights = nn.Parameter(torch.empty(self.num_heads, config.max_position_embeddings))  # (H, L)
            self.reset_mask()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.config.mask == "learned":
            self.reset_mask()

    @torch.no_grad()
    def reset_mask(self) -> None:
        init.copy_(self.mask_weights, self.decay_weights(self.mask_weights.shape[1], self.mask_weights.device))

    def decay_weights(self, length: int, device: torch.device) -> Tensor:
        """Decay of a key n tokens back for n < length: (H, length) float32."""
        log_decay = self.log_decay(device)
        if log_decay is None:
            return torch.ones(self.num_heads, length, device=device)
        return powers(log_decay, torch.arange(length, dtype=torch.float32, device=device))

    def mask(self, pairs: Pairs, dtype: torch.dtype) -> Tensor:
        """The mask of this layer, (B or 1, H or 1, Tq, Tk), bool or of a type."""
        if pairs.mask is not None:
            return pairs.mask if pairs.mask.dtype == torch.bool else pairs.mask.to(dtype)
        if self.config.mask == "learned":
            return relative_mask(self.mask_weights.float(), pairs, dtype)
        return relative_mask(self.decay_weights(pairs.allowed.shape[3], pairs.allowed.device), pairs, dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, cache: KeyValueLayer | None) -> Tensor:
        """The operator over all keys; those of new tokens go into the cache."""
        if cache is not None:
            k, v = cache.update(k, v)
        return flash_linear_attention(q, k, v, self.mask(pairs, q.dtype), qk_norm=self.config.qk_norm == "l2")


ATTENTIONS = {"lightning": LightningAttention, "masked": MaskedAttention}
