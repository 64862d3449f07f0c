"""Lightning attention: causal linear attention with a decay per head, in time and memory linear in the length."""

from typing import Any

import torch
from torch import Tensor

from .chunkwise import backward as chunkwise_backward
from .chunkwise import forward as chunkwise_forward
from .decay import step_factors
from .lightning_cuda import as_kept, empty_kept
from .lightning_cuda import backward as cuda_backward
from .lightning_cuda import decay_gradient as cuda_decay_gradient
from .lightning_cuda import forward as cuda_forward
from .lightning_cuda import step as cuda_step
from .lightning_cuda import unavailable_reason as cuda_unavailable_reason
from .numerics import autocast, compute_type, expand_heads, no_autocast
from .validation import (
    check_choice,
    check_cu_seqlens,
    check_flag,
    check_log_decay,
    check_qkv,
    check_state,
    refuse_forward_mode,
)

BACKENDS = ("auto", "torch", "cuda")
# A copy of this file that travels with a checkpoint registers operators of its own. Their names must change with their
# arguments: torch keeps compiled graphs on disk by the name alone.
_NAMESPACE = "".join(c if c.isalnum() else "_" for c in __name__)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    qk_norm: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention with decay: `S_t = λ S_{t-1} + k_tᵀ v_t`, `o_t = q_t S_t`, λ = exp(log_decay).

    Args:
        q: queries (B, H, T, D), float32, bfloat16, float16 or float64, any strides.
        k: keys (B, G, T, D), G a divisor of H.
        v: values (B, G, T, E); its number of heads may differ from k's.
        log_decay: (H,) float32, ≤ 0; None means no decay.
        qk_norm: divide q and k by their length.
        initial_state: state before the first token, (B, H, D, E) float32, or (N, H, D, E) with `cu_seqlens`.
        output_final_state: also return the state after the last token.
        cu_seqlens: (N+1,) int32, bounds of N sequences packed in a batch of one; each starts from its own state.
        backend: "torch", "cuda", or "auto" for the fastest that takes the call.

    Returns:
        o (B, H, T, E) in v's type, and with `output_final_state` the state, float32 (float64 for float64).

    Gradients flow to q, k, v, log_decay and initial_state, once: a second or a forward-mode derivative is an error, and
    so is `torch.func.grad`. Under autocast q, k and v are cast to its type. On a GPU the values of log_decay and
    cu_seqlens are not read, since that would stall it: a positive log_decay, and bounds that do not rise from 0 to T,
    give NaN there.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Qin et al. 2024, "Lightning Attention-2", arXiv:2401.04658.
    """
    check_choice("backend", backend, BACKENDS)
    check_flag("qk_norm", qk_norm)
    check_flag("output_final_state", output_final_state)
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v, same_length=True)
    check_log_decay(log_decay, q)
    log_decay = None if log_decay is None else log_decay.contiguous()
    check_cu_seqlens(cu_seqlens, q)
    check_state(initial_state, "initial_state", q, v, q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
    refuse_forward_mode(q, k, v, log_decay, initial_state)
    reason = None if backend == "torch" else cuda_unavailable_reason(q, v)
    if backend == "cuda" and reason is not None:
        raise ValueError(f"backend: 'cuda' can't take this call: {reason}")
    kernels = backend != "torch" and reason is None
    o, state, *_ = _forward(q, k, v, log_decay, initial_state, cu_seqlens, qk_norm, output_final_state, kernels)
    return (o, state) if output_final_state else o


def lightning_attention_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    """One token of lightning attention: updates `state` in place and returns its output; no gradients.

    Args:
        q: query (B, H, 1, D).
        k: key (B, G, 1, D), G a divisor of H.
        v: value (B, G, 1, E).
        log_decay: (H,) float32, ≤ 0, or None.
        state: (B, H, D, E) float32 (float64 for float64), without gradient; becomes `λ S + kᵀ v`.

    Returns:
        o (B, H, 1, E) in v's type.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v, same_length=True)
    if q.shape[2] != 1:
        raise ValueError(f"q: expected 1 token, got {q.shape[2]}")
    check_log_decay(log_decay, q)
    log_decay = None if log_decay is None else log_decay.contiguous()
    if state is None:
        raise TypeError("state: expected a tensor, got None")
    check_state(state, "state", q, v, q.shape[0])
    if state.requires_grad and torch.is_grad_enabled():
        raise ValueError("state: expected one without gradient, since it is changed in place, got requires_grad=True")
    if any(stride == 0 and size > 1 for stride, size in zip(state.stride(), state.shape, strict=True)):
        raise ValueError("state: expected memory for each value, since it is written to, got an expanded tensor")
    refuse_forward_mode(q, k, v, log_decay, state)
    with torch.no_grad():
        return _step(q, k, v, log_decay, state)


@torch.library.custom_op(f"{_NAMESPACE}::attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_norm: bool,
    with_state: bool,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the final state, and what the kernels keep for the backward pass.

    What there is not is an empty tensor: an operator's results can't be optional.
    """
    arguments = q, k, v, log_decay, initial_state, cu_seqlens, qk_norm
    kept = empty_kept(q, k, v, qk_norm) if kernels else None
    with no_autocast(q):
        if kernels and _has_elements(q, v):
            o, state = cuda_forward(*arguments, with_state, kept)
        else:
            o, state = chunkwise_forward(*arguments)
    state = state if with_state and state is not None else _nothing(q)
    return o, state, *(kept or (_nothing(q), _nothing(q)))


def _nothing(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=compute_type(q.dtype))


@_forward.register_fake
def _(q, k, v, log_decay, initial_state, cu_seqlens, qk_norm, with_state, kernels):  # type: ignore[no-untyped-def]
    state = _nothing(q)
    if with_state:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = state.new_empty((sequences, q.shape[1], q.shape[3], v.shape[3]))
    kept = empty_kept(q, k, v, qk_norm) if kernels else None
    return v.new_empty((*q.shape[:3], v.shape[3])), state, *(kept or (_nothing(q), _nothing(q)))


@torch.library.custom_op(f"{_NAMESPACE}::attention_backward", mutates_args=())
def _backward(
    grad_o: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept_1: Tensor,
    kept_2: Tensor,
    qk_norm: bool,
    decay_grad: bool,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and the initial state; the last two are empty where there is no such argument."""
    arguments = q, k, v, log_decay, initial_state, cu_seqlens, qk_norm
    grad_decay, grad_initial = None, None
    with no_autocast(q):
        if kernels and _has_elements(q, v):
            kept = as_kept(q, v, kept_1, kept_2)
            dq, dk, dv, grad_initial = cuda_backward(grad_o, grad_state, *arguments, kept)
            if decay_grad and log_decay is not None:
                grad_decay = cuda_decay_gradient(
                    grad_o, grad_state, q, k, v, log_decay, initial_state, cu_seqlens, qk_norm
                )
        else:
            if grad_state is None:
                sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
                grad_state = q.new_zeros((sequences, q.shape[1], q.shape[3], v.shape[3]), dtype=compute_type(q.dtype))
            dq, dk, dv, grad_decay, grad_initial = chunkwise_backward(grad_o, grad_state, *arguments, decay_grad)
    return (
        dq,
        dk,
        dv,
        grad_decay if decay_grad and grad_decay is not None else _nothing(q),
        grad_initial if initial_state is not None and grad_initial is not None else _nothing(q),
    )


def _has_elements(q: Tensor, v: Tensor) -> bool:
    return q.numel() > 0 and v.numel() > 0


@_backward.register_fake
def _(grad_o, grad_state, q, k, v, log_decay, initial_state, cu_seqlens, kept_1, kept_2, qk_norm, decay_grad, kernels):  # type: ignore[no-untyped-def]
    grads = (x.new_empty(x.shape) for x in (q, k, v))
    grad_decay = _nothing(q) if log_decay is None or not decay_grad else _nothing(q).new_empty(q.shape[1])
    return *grads, grad_decay, _nothing(q) if initial_state is None else initial_state.new_empty(initial_state.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.qk_norm, ctx.with_state, ctx.kernels = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_o: Tensor | None, grad_state: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: gradient checkpointing frees them at the first reading
    q, _, v, log_decay, initial_state = saved[:5]
    if grad_o is None:
        grad_o = v.new_zeros((*q.shape[:3], v.shape[3]))
    decay_grad = ctx.needs_input_grad[3]
    if not ctx.with_state:
        grad_state = None
    dq, dk, dv, grad_decay, grad_initial = _backward(grad_o, grad_state, *saved, ctx.qk_norm, decay_grad, ctx.kernels)
    grad_decay = None if log_decay is None or not decay_grad else grad_decay.to(log_decay.dtype)
    return dq, dk, dv, grad_decay, None if initial_state is None else grad_initial, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op(f"{_NAMESPACE}::step", mutates_args={"state"})
def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    aligned = state.is_contiguous() and state.data_ptr() % 16 == 0
    if _has_elements(q, v) and cuda_unavailable_reason(q, v) is None and aligned:
        return cuda_step(q, k, v, log_decay, state)
    wide = state.dtype
    k, v = (expand_heads(x, q.shape[1]).to(wide) for x in (k, v))
    new = k.mT * v  # (B, H, D, E)
    if log_decay is None:
        state.add_(new)
    else:
        keep, change = (x[:, None, None] for x in step_factors(log_decay.to(wide)))
        torch.addcmul(new.addcmul_(state, change), state, keep, out=state)
    with no_autocast(q):
        return (q.to(wide) @ state).to(q.dtype)


@_step.register_fake
def _(q, k, v, log_decay, state):  # type: ignore[no-untyped-def]
    return v.new_empty((*q.shape[:3], v.shape[3]))
