"""The definitions of truth: linear attention written for reading, one token or one matrix at a time.

Every function computes in float64 for float64 inputs and in float32 otherwise, and returns that type.
Shapes: q (B, H, T, D), k (B, G, T, D), v (B, G, T, E); states (B, H, D, E), or (N, H, D, E) with `cu_seqlens`.
"""

import itertools

import torch
from torch import Tensor

from .decay import causal_decay
from .numerics import compute_type, expand_heads, unit_length


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, qk_norm: bool = False) -> Tensor:
    """Masked linear attention `((q kᵀ) ⊙ mask) v`, the scores materialised; no mask means all ones.

    Shapes: q (B, H, Lq, D), k (B, G, Lk, D), v (B, G, Lk, E), mask (B|1, H|1, Lq, Lk); returns (B, H, Lq, E).
    """
    q, k, v = _prepare(q, k, v, qk_norm)
    scores = q @ k.mT  # (B, H, Lq, Lk)
    if mask is not None:
        scores = scores * mask
    return scores @ v


def quadratic(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, qk_norm: bool = False) -> Tensor:
    """Lightning attention by its mask `M[i, j] = exp(log_decay · (i - j))` for i ≥ j; returns (B, H, T, E)."""
    if log_decay is None:
        log_decay = q.new_zeros(q.shape[1])
    mask = causal_decay(log_decay.to(compute_type(q.dtype)), q.shape[2])  # (H, T, T)
    return masked(q, k, v, mask[None], qk_norm)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    qk_norm: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lightning attention by its recurrence `S_t = λ S_{t-1} + k_tᵀ v_t`, `o_t = q_t S_t`.

    Returns (o (B, H, T, E), final state).
    """
    if cu_seqlens is not None:
        return _by_sequence(recurrent, q, k, v, log_decay, qk_norm, initial_state, cu_seqlens)
    q, k, v = _prepare(q, k, v, qk_norm)
    decay, state = _decay_and_state(q, v, log_decay, initial_state)
    outputs = []
    for t in range(q.shape[2]):
        state = decay * state + k[:, :, t, :, None] * v[:, :, t, None, :]  # (B, H, D, E)
        outputs.append((q[:, :, t, None, :] @ state).squeeze(2))
    o = torch.stack(outputs, dim=2) if outputs else torch.zeros_like(q @ state)
    return o, state


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    qk_norm: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Lightning attention by chunks: masked inside a chunk, through the state from chunk to chunk.

    With n tokens in a chunk and i, j counted from its start:
    `o_i = Σ_{j ≤ i} λ^(i-j) (q_i·k_j) v_j + λ^(i+1) q_i S` and `S ← λ^n S + Σ_j λ^(n-1-j) k_jᵀ v_j`.
    Returns (o (B, H, T, E), final state). Source: Qin et al. 2024, "Lightning Attention-2", arXiv:2401.04658.
    """
    if cu_seqlens is not None:
        return _by_sequence(chunkwise, q, k, v, log_decay, qk_norm, initial_state, cu_seqlens)
    q, k, v = _prepare(q, k, v, qk_norm)
    decay, state = _decay_and_state(q, v, log_decay, initial_state)
    if log_decay is None:
        log_decay = q.new_zeros(q.shape[1])
    outputs = [torch.zeros_like(q[:, :, :0] @ state)]
    for start in range(0, q.shape[2], chunk_size):
        qc, kc, vc = (x[:, :, start : start + chunk_size] for x in (q, k, v))
        n = qc.shape[2]
        steps = torch.arange(n, device=q.device, dtype=q.dtype)[:, None]  # (n, 1)
        inside = quadratic(qc, kc, vc, log_decay)
        outputs.append(inside + decay ** (steps + 1) * (qc @ state))
        state = decay**n * state + (kc * decay ** (n - 1 - steps)).mT @ vc
    return torch.cat(outputs, dim=2), state


def _prepare(q: Tensor, k: Tensor, v: Tensor, qk_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.to(compute_type(q.dtype)) for x in (q, k, v))
    if qk_norm:
        q, k = unit_length(q), unit_length(k)
    return q, expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])


def _decay_and_state(
    q: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    decay = q.new_ones(q.shape[1]) if log_decay is None else log_decay.to(q.dtype).exp()
    if initial_state is None:
        state = q.new_zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3])
    else:
        state = initial_state.to(q.dtype)
    return decay[:, None, None], state  # (H, 1, 1), (B, H, D, E)


def _by_sequence(definition, q, k, v, log_decay, qk_norm, initial_state, cu_seqlens):  # type: ignore[no-untyped-def]
    """Apply a definition to each packed sequence alone and join the outputs and states."""
    bounds = cu_seqlens.tolist()
    results = []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        state = None if initial_state is None else initial_state[n : n + 1]
        parts = (x[:, :, start:end] for x in (q, k, v))
        results.append(definition(*parts, log_decay, qk_norm, state))
    return torch.cat([o for o, _ in results], dim=2), torch.cat([state for _, state in results])
