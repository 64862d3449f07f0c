"""Masked linear attention: attention without softmax under a mask of any values, `((q kᵀ) ⊙ mask) v`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .blockwise import (
    block_backward,
    block_forward,
    inplace_backward,
    inplace_forward,
    linear_backward,
    linear_forward,
    normal_backward,
    normal_forward,
    split_backward,
    split_forward,
)
from .masked_cuda import backward as kernels_backward
from .masked_cuda import forward as kernels_forward
from .masked_cuda import unavailable_reason as cuda_unavailable_reason
from .numerics import (
    autocast,
    expand_heads,
    no_autocast,
    operand_type,
    sum_groups,
    unit_length,
    unit_length_backward,
)
from .validation import check_choice, check_flag, check_mask, check_qkv, refuse_forward_mode

IMPLEMENTATIONS = ("auto", "normal", "split", "block", "inplace", "cuda")
_AUTO = "inplace"
_NAMESPACE = "".join(c if c.isalnum() else "_" for c in __name__)  # as that of lightning_attention.py
# The most scores in a block, over all rows and heads, and its largest size: by measurement. A CPU wants the scores in
# its cache, a GPU wants enough work in a launch.
_LIMITS = {"cpu": (2**21, 512), "cuda": (2**26, 2048)}
_FORWARD = {
    "split": split_forward,
    "block": block_forward,
    "inplace": inplace_forward,
}
_BACKWARD = {
    "split": split_backward,
    "block": block_backward,
    "inplace": inplace_backward,
}


def normal_linear_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`((q kᵀ) ⊙ mask) v` with the scores materialised: `flash_linear_attention` with implementation "normal".

    Without a mask there is nothing to materialise, and it is `q (kᵀ v)` as everywhere.
    """
    return flash_linear_attention(q, k, v, mask, implementation="normal")


def flash_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    qk_norm: bool = False,
    implementation: str = "auto",
    q_block_size: int | str = "auto",
    kv_block_size: int | str = "auto",
) -> Tensor:
    """Attention without softmax under a mask of any values, `((q kᵀ) ⊙ mask) v`, the scores never stored.

    Args:
        q: queries (B, H, Lq, D), float32, bfloat16, float16 or float64, any strides.
        k: keys (B, G, Lk, D), G a divisor of H.
        v: values (B, G, Lk, E); its number of heads may differ from k's.
        mask: (B or 1, H or 1, Lq, Lk), q's type, float32 or bool, any strides; None means all ones, computed as
            `q (kᵀ v)` by every implementation.
        qk_norm: divide q and k by their length.
        implementation: "normal" holds all scores; "split" (ragged blocks), "block" (padded ones) and "inplace" (into
            buffers made once) hold a block of them at a time; "cuda" is the kernel, "auto" the kernel where it can
            run, else "inplace".
        q_block_size: queries in a block, or "auto".
        kv_block_size: keys in a block, or "auto".

    Returns:
        o (B, H, Lq, E) in v's type; sums are kept in float32 (float64 for float64).

    Gradients flow to q, k, v and mask, once: a second or a forward-mode derivative is an error, and so is
    `torch.func.grad`. Under autocast q, k, v and a mask of floats are cast to its type, unless q is float64.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    check_flag("qk_norm", qk_norm)
    sizes = [
        _block_size(name, size) for name, size in (("q_block_size", q_block_size), ("kv_block_size", kv_block_size))
    ]
    q, k, v, mask = autocast(q, k, v, mask)
    check_qkv(q, k, v, same_length=False)
    check_mask(mask, q, k)
    refuse_forward_mode(q, k, v, mask)
    if implementation in ("cuda", "auto"):
        reason = cuda_unavailable_reason(q, v)
        if implementation == "cuda" and reason is not None:
            raise ValueError(f"implementation: 'cuda' can't take this call: {reason}")
        implementation = "cuda" if reason is None else _AUTO
    return _forward(q, k, v, mask, qk_norm, implementation, *sizes)


def _block_size(name: str, size: int | str) -> int | None:
    if size == "auto":
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name}: expected 'auto' or a whole number from 1, got {size!r}")
    return min(size, torch.iinfo(torch.int64).max)


@torch.library.custom_op(f"{_NAMESPACE}::masked_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    qk_norm: bool,
    implementation: str,
    q_block: int | None,
    kv_block: int | None,
) -> Tensor:
    if mask is not None and _by_kernels(q, v, mask, implementation):
        return kernels_forward(q, k, v, mask, qk_norm)
    dtype = v.dtype
    q, k, v = _prepare(q, k, v, qk_norm)
    with no_autocast(q):
        if mask is None:
            o = linear_forward(q, k, v)
        elif implementation not in _FORWARD or 0 in mask.shape:
            o = normal_forward(q, k, v, mask)
        else:
            o = _FORWARD[implementation](q, k, v, mask, *_block_sizes(q, k, q_block, kv_block))
    return o.to(dtype).contiguous()


@_forward.register_fake
def _(q, k, v, mask, qk_norm, implementation, q_block, kv_block):  # type: ignore[no-untyped-def]
    return v.new_empty((*q.shape[:3], v.shape[3]))


@torch.library.custom_op(f"{_NAMESPACE}::masked_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    wanted: list[bool],
    qk_norm: bool,
    implementation: str,
    q_block: int | None,
    kv_block: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and mask, (0,) for those that are not wanted."""
    if mask is not None and _by_kernels(q, v, mask, implementation):
        return _made(q, kernels_backward(do, q, k, v, mask, qk_norm, wanted))
    operands = _prepare(q, k, v, qk_norm)
    do, dmask_type = do.to(operands[0].dtype), mask.dtype if mask is not None and wanted[3] else None
    with no_autocast(q):
        if mask is None:
            grads = linear_backward(do, *operands)
        elif implementation not in _BACKWARD or 0 in mask.shape:
            grads = normal_backward(do, *operands, mask, dmask_type)
        else:
            sizes = _block_sizes(q, k, q_block, kv_block)
            grads = _BACKWARD[implementation](do, *operands, mask, dmask_type, *sizes)
    dq, dk, dv = grads[0], sum_groups(grads[1], k.shape[1]), sum_groups(grads[2], v.shape[1])
    if qk_norm:
        dq, dk = unit_length_backward(dq, q), unit_length_backward(dk, k)
    dq, dk, dv = (x.to(q.dtype).contiguous() for x in (dq, dk, dv))
    made = dq, dk, dv, grads[3]
    return _made(q, [x if want else None for x, want in zip(made, wanted, strict=True)])


@_backward.register_fake
def _(do, q, k, v, mask, wanted, qk_norm, implementation, q_block, kv_block):  # type: ignore[no-untyped-def]
    given = zip((q, k, v, mask), wanted, strict=True)
    return _made(q, [x.new_empty(x.shape) if want else None for x, want in given])


def _made(q: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What an operator can return: a tensor each."""
    dq, dk, dv, dmask = (q.new_empty(0) if x is None else x.contiguous() for x in grads)
    return dq, dk, dv, dmask


def _by_kernels(q: Tensor, v: Tensor, mask: Tensor, implementation: str) -> bool:
    """Whether the CUDA kernels do it: of empty tensors there is nothing for them."""
    return implementation == "cuda" and 0 not in (*mask.shape, *q.shape, *v.shape)


def _prepare(q: Tensor, k: Tensor, v: Tensor, qk_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """H heads everywhere, in the type of operands."""
    q, k, v = (expand_heads(x, q.shape[1]).to(operand_type(x)) for x in (q, k, v))
    return (unit_length(q), unit_length(k), v) if qk_norm else (q, k, v)


def _block_sizes(q: Tensor, k: Tensor, q_block: int | None, kv_block: int | None) -> tuple[int, int]:
    """Sizes of blocks, none longer than the tokens; None is a size that fits the machine."""
    scores, auto = _LIMITS.get(q.device.type, _LIMITS["cuda"])
    while auto > 128 and q.shape[0] * q.shape[1] * auto**2 > scores:
        auto //= 2
    return min(q_block or auto, q.shape[2]), min(kv_block or auto, k.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, mask)


def _differentiate(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    grads = _backward(do, *ctx.saved_tensors, wanted, *ctx.options)
    return *(x if want else None for x, want in zip(grads, wanted, strict=True)), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
