"""Lightning attention in chunks: every product batched over chunks, a scan carries the state.

Forward, for a chunk of n tokens, i and j counted from its start, S the state before it:
    o_i = Σ_{j ≤ i} λ^(i-j) (q_i·k_j) v_j + λ^(i+1) q_i S                              (1)
    S  ← λ^n S + Σ_j λ^(n-1-j) k_jᵀ v_j                                                (2)
Backward, with P = (q kᵀ) ⊙ M, A = (do vᵀ) ⊙ M, M[i, j] = λ^(i-j), and dS the gradient of the state after the chunk:
    dq_i = (A k)_i + λ^(i+1) do_i Sᵀ                                                   (3)
    dk_j = (Aᵀ q)_j + λ^(n-1-j) v_j dSᵀ                                                (4)
    dv_j = (Pᵀ do)_j + λ^(n-1-j) k_j dS                                                (5)
    dS  ← λ^n dS + Σ_i λ^(i+1) q_iᵀ do_i                                               (6)
    d log λ = Σ_ij (i-j) (q kᵀ ⊙ A)_ij + Σ_i (i+1) q_i·dq_i' + Σ_j (n-1-j) k_j·dk_j' + n λ^n ⟨S, dS⟩   (7)
where ' marks the second summand of (3) and (4). The states are recomputed in the backward pass: what it stores is
its inputs. Equations (1), (2): Qin et al. 2024, "Lightning Attention-2", arXiv:2401.04658.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .decay import causal_decay, powers
from .numerics import (
    compute_type,
    expand_heads,
    operand_type,
    product,
    sum_groups,
    unit_length,
    unit_length_backward,
)
from .scan import scan

LARGE = 2**21  # elements of q, over which a CPU takes one head at a time


class Layout(NamedTuple):
    """Where N chunks of C slots lie in the tokens, and which sequence each of them belongs to."""

    size: int  # C
    lengths: Tensor  # (N,) tokens in a chunk
    packed: "Packing | None"  # None: every row of the batch is one sequence, its slots are its tokens in order


class Packing(NamedTuple):
    """Where the chunks of packed sequences lie."""

    slots: Tensor  # (N·C,) token of each slot, T for an empty one
    sequence: Tensor  # (N,) sequence of a chunk
    first: Tensor  # (sequences,) first chunk of a sequence
    last: Tensor  # (sequences,) last chunk of a sequence
    empty: Tensor  # (sequences,) whether a sequence has no token
    valid: Tensor  # () whether the bounds rise from 0 to T


class Chunks(NamedTuple):
    """Inputs cut into chunks, ready for matrix products, and the powers of λ that weigh them."""

    q: Tensor  # (B, H, N, C, D)
    k: Tensor  # (B, H, N, C, D)
    v: Tensor  # (B, H, N, C, E)
    mask: Tensor  # (H, 1, C, C): λ^(i-j)
    read: Tensor  # (H, 1, C, 1): λ^(i+1)
    write: Tensor  # (H, N, C, 1): λ^(n-1-j)
    carry: Tensor  # (H, N, 1, 1): λ^n


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_norm: bool,
) -> tuple[Tensor, Tensor]:
    """Equations (1) and (2); returns o (B, H, T, E) in v's type and the final state (sequences, H, D, E)."""
    if not _head_by_head(q, v):
        return _forward(q, k, v, log_decay, initial_state, cu_seqlens, qk_norm)
    o = v.new_empty((*q.shape[:3], v.shape[3]))
    final = _new_state(q, v, cu_seqlens)
    for h in range(q.shape[1]):
        parts = _of_head(h, q, k, v, log_decay, initial_state)
        o[:, h : h + 1], final[:, h : h + 1] = _forward(*parts, cu_seqlens, qk_norm)
    return o, final


def backward(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_norm: bool,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Equations (3) to (7); returns the gradients of q, k, v, log_decay (H,) and the initial state.

    Without `decay_grad` equation (7) is left out, and zeros stand for its result.
    """
    if not _head_by_head(q, v):
        dq, dk, dv, grad_decay, grad_initial = _backward(
            grad_o, grad_state, q, k, v, log_decay, initial_state, cu_seqlens, qk_norm, decay_grad
        )
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), grad_decay, grad_initial
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, dtype=compute_type(x.dtype), memory_format=torch.contiguous_format) for x in (k, v))
    grad_decay = q.new_empty(q.shape[1], dtype=compute_type(q.dtype))
    grad_initial = _new_state(q, v, cu_seqlens)
    for h in range(q.shape[1]):
        here, parts = slice(h, h + 1), _of_head(h, q, k, v, log_decay, initial_state)
        dq[:, here], dk_h, dv_h, grad_decay[here], grad_initial[:, here] = _backward(
            grad_o[:, here], grad_state[:, here], *parts, cu_seqlens, qk_norm, decay_grad
        )
        dk[:, _shared(h, q, k)] += dk_h
        dv[:, _shared(h, q, v)] += dv_h
    return dq, dk.to(k.dtype), dv.to(v.dtype), grad_decay, grad_initial


def _new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return q.new_empty((sequences, q.shape[1], q.shape[3], v.shape[3]), dtype=compute_type(q.dtype))


def _head_by_head(q: Tensor, v: Tensor) -> bool:
    """Whether to take one head at a time: on a CPU, where large intermediate tensors cost more than their arithmetic.

    There the memory of each one over 32 MiB is mapped, and cleared page by page, again in every call.
    """
    return not q.is_cuda and q.shape[1] > 1 and q.shape[:3].numel() * max(q.shape[3], v.shape[3]) > LARGE


def _of_head(
    h: int, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments of one query head, with the key/value heads that it reads."""
    here = slice(h, h + 1)
    return (
        q[:, here],
        k[:, _shared(h, q, k)],
        v[:, _shared(h, q, v)],
        None if log_decay is None else log_decay[here],
        None if initial_state is None else initial_state[:, here],
    )


def _shared(h: int, q: Tensor, x: Tensor) -> slice:
    """Which key or value head query head h reads."""
    head = h * x.shape[1] // q.shape[1]
    return slice(head, head + 1)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_norm: bool,
) -> tuple[Tensor, Tensor]:
    layout = _layout(q, v, cu_seqlens)
    c = _chunks(q, k, v, log_decay, qk_norm, layout)
    scores = product(c.q, c.k.mT).mul_(c.mask).tril_()  # (B, H, N, C, C)
    # A masked score is 0, but 0 · NaN is NaN: what is not finite in v enters from its own token on, not before.
    o = product(scores.to(c.v.dtype), c.v.nan_to_num(0, 0, 0))  # (B, H, N, C, E)
    poison = (c.v @ c.v.new_zeros(c.v.shape[-1], 1)).cumsum(-2)  # (B, H, N, C, 1): 0, or NaN
    del scores
    states, update = _states(c, initial_state, layout)
    o.addcmul_(product(c.q, states.to(c.q.dtype)), c.read + poison)
    final = _leave(states, update, c.carry, initial_state, layout)
    return _unchunk(o, layout, q.shape[2]).to(v.dtype), final


def _backward(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_norm: bool,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = _layout(q, v, cu_seqlens)
    c = _chunks(q, k, v, log_decay, qk_norm, layout)
    do = _chunk(grad_o.to(c.v.dtype), layout)  # (B, H, N, C, E)
    states, _ = _states(c, initial_state, layout)
    update = product((c.q * c.read).to(do.dtype).mT, do)
    sequence = layout.packed and layout.packed.sequence
    grad_states = scan(update, c.carry, grad_state, sequence, reverse=True)  # of the state after each chunk
    grad_initial = _leave(grad_states, update, c.carry, grad_state, layout, reverse=True)
    del update

    qk = product(c.q, c.k.mT)
    a = product(do, c.v.mT).mul_(c.mask).tril_()
    dv = product((qk * c.mask).tril_().to(do.dtype).mT, do)
    grad_decay = _by_distance(qk, a) if decay_grad else qk.new_zeros(qk.shape[1])
    a = a.to(do.dtype)
    dq, dk = product(a, c.k), product(a.mT, c.q)
    del qk, a

    through = product(do, states.to(do.dtype).mT).mul_(c.read)  # second summand of (3)
    steps = torch.arange(1, layout.size + 1, device=q.device)[:, None]
    if decay_grad:
        grad_decay += (through * c.q * steps).sum((0, 2, 3, 4))
    dq += through
    narrow = grad_states.to(do.dtype)
    through = product(c.v, narrow.mT).mul_(c.write)  # second summand of (4)
    rest = (layout.lengths[:, None, None] - steps).clamp(min=0)
    if decay_grad:
        grad_decay += (through * c.k * rest).sum((0, 2, 3, 4))
    dk += through
    dv.addcmul_(product(c.k, narrow), c.write)
    if decay_grad:
        carried = (states * grad_states).sum((-2, -1)) * c.carry[..., 0, 0]  # (B, H, N)
        grad_decay += (carried * layout.lengths).sum((0, 2))

    dq, dk, dv = (_unchunk(x, layout, q.shape[2]) for x in (dq, dk, dv))
    dk, dv = sum_groups(dk, k.shape[1]), sum_groups(dv, v.shape[1])
    if qk_norm:
        dq, dk = unit_length_backward(dq, q), unit_length_backward(dk, k)
    return dq, dk, dv, grad_decay, grad_initial


def _layout(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Layout:
    """Lay every sequence out in chunks of its own; shapes depend on shapes only, so that no GPU value is read."""
    tokens = q.shape[2]
    size = _chunk_size(tokens, max(q.shape[3], v.shape[3]), q.is_cuda)
    if cu_seqlens is None:
        starts = torch.arange(0, tokens, size, device=q.device)
        return Layout(size, (tokens - starts).clamp(max=size), None)
    bounds = cu_seqlens.long()
    valid = (bounds[0] == 0) & (bounds[-1] == tokens) & (bounds.diff() >= 0).all()
    counts = (bounds.diff().clamp(min=0) + size - 1) // size  # chunks of a sequence
    ends = counts.cumsum(0)
    chunk = torch.arange(tokens // size + counts.shape[0], device=q.device)  # as many as there can be
    sequence = torch.searchsorted(ends, chunk, right=True).clamp(max=counts.shape[0] - 1)
    starts = bounds[sequence] + (chunk - (ends - counts)[sequence]) * size
    lengths = (bounds[sequence + 1] - starts).clamp(0, size)
    slot = torch.arange(size, device=q.device)
    slots = torch.where(slot < lengths[:, None], starts[:, None] + slot, tokens).flatten()
    # Bounds are not read, so wrong ones must stay inside memory until `valid` turns the result into NaN.
    slots = slots.clamp(0, tokens)
    first, last = (ends - counts).clamp(max=len(chunk) - 1), (ends - 1).clamp(0, len(chunk) - 1)
    return Layout(size, lengths, Packing(slots, sequence, first, last, counts == 0, valid))


def _chunk_size(tokens: int, width: int, on_gpu: bool) -> int:
    """Work inside a chunk grows with its size, traffic of states falls with it: the fastest by measurement.

    A GPU wants larger ones than a CPU, since it waits for every step of the scan.
    """
    if on_gpu:
        size = 128 if width <= 64 else 256
    else:
        size = 64 if width <= 128 else 128
    while size >= 2 * max(tokens, 16):
        size //= 2
    return size


def _chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, qk_norm: bool, layout: Layout) -> Chunks:
    wide = compute_type(q.dtype)
    operand = operand_type(q)
    if qk_norm:
        q, k = unit_length(q.to(wide)), unit_length(k.to(wide))
    heads = q.shape[1]
    k, v = expand_heads(k, heads), expand_heads(v, heads)
    q, k, v = (_chunk(x.to(operand), layout) for x in (q, k, v))
    log_decay = q.new_zeros(heads, dtype=wide) if log_decay is None else log_decay.to(wide)
    if layout.packed is not None:
        log_decay = torch.where(layout.packed.valid, log_decay, torch.nan)
    steps = torch.arange(layout.size, device=q.device)
    write = (layout.lengths[:, None] - 1 - steps).clamp(min=0)  # (N, C)
    return Chunks(
        q,
        k,
        v,
        mask=causal_decay(log_decay, layout.size)[:, None],
        read=powers(log_decay, steps + 1)[:, None, :, None],
        write=powers(log_decay, write)[..., None],
        carry=powers(log_decay, layout.lengths)[..., None, None],
    )


def _chunk(x: Tensor, layout: Layout) -> Tensor:
    """(B, H, T, D) to (B, H, N, C, D), empty slots zero."""
    if layout.packed is None:
        x = F.pad(x, (0, 0, 0, -x.shape[2] % layout.size))
    else:
        x = F.pad(x, (0, 0, 0, 1)).index_select(2, layout.packed.slots)
    return x.unflatten(2, (layout.lengths.shape[0], layout.size))


def _unchunk(x: Tensor, layout: Layout, tokens: int) -> Tensor:
    """(B, H, N, C, D) to (B, H, T, D); a token that `cu_seqlens` leaves out becomes NaN."""
    x = x.flatten(2, 3)
    if layout.packed is None:
        return x[:, :, :tokens].contiguous()
    out = x.new_full((*x.shape[:2], tokens + 1, x.shape[3]), torch.nan)
    return out.index_copy_(2, layout.packed.slots, x)[:, :, :tokens].contiguous()


def _states(c: Chunks, initial_state: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
    """State before each chunk and the second summand of (2): both (B, H, N, D, E)."""
    update = product((c.k * c.write).to(c.v.dtype).mT, c.v)
    return scan(update, c.carry, initial_state, layout.packed and layout.packed.sequence), update


def _leave(
    arrived: Tensor,
    update: Tensor,
    carry: Tensor,
    start: Tensor | None,
    layout: Layout,
    reverse: bool = False,
) -> Tensor:
    """What leaves each sequence after its chunks: (sequences, H, D, E); an empty sequence passes `start` on."""
    packed = layout.packed
    if packed is None:
        if arrived.shape[2] == 0:
            return torch.zeros_like(arrived[:, :, :0].sum(2)) if start is None else start.clone()
        n = 0 if reverse else -1
        return torch.addcmul(update[:, :, n], arrived[:, :, n], carry[:, n])
    outermost = packed.first if reverse else packed.last
    update, arrived = (x[0].index_select(1, outermost) for x in (update, arrived))  # (H, sequences, D, E)
    left = torch.addcmul(update, arrived, carry[:, outermost]).transpose(0, 1)
    passed = torch.zeros_like(left) if start is None else start
    return torch.where(packed.empty[:, None, None, None], passed, left).contiguous()


def _by_distance(qk: Tensor, a: Tensor) -> Tensor:
    """First summand of (7) for each head: (H,)."""
    i = torch.arange(qk.shape[-1], device=qk.device)
    return (qk * a).mul_(i[:, None] - i).sum((0, 2, 3, 4))
