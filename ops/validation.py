"""Checks of the operators' arguments: what a good call is, and what a bad one is told."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .numerics import compute_type

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, same_length: bool) -> None:
    """Check ranks, types, devices, batch, heads, lengths and key widths of q, k and v.

    Raises TypeError for a wrong kind, ValueError for a wrong shape; both name the argument.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, "a tensor")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dims (batch, heads, tokens, width), got shape {tuple(x.shape)}")
        if x.dtype not in FLOAT_TYPES:
            raise TypeError(f"{name}: expected one of {_names(FLOAT_TYPES)}, got {x.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's type {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected q's batch size {q.shape[0]}, got {x.shape[0]}")
        if x.shape[1] != q.shape[1] and (x.shape[1] == 0 or q.shape[1] % x.shape[1]):
            raise ValueError(f"{name}: expected a number of heads that divides q's {q.shape[1]}, got {x.shape[1]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected q's width {q.shape[3]}, got {k.shape[3]}")
    if same_length and k.shape[2] != q.shape[2]:
        raise ValueError(f"k: expected q's {q.shape[2]} tokens, got {k.shape[2]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v: expected k's {k.shape[2]} tokens, got {v.shape[2]}")


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Refuse tangents of forward-mode differentiation: only the backward pass is written, they would become zero."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError("forward-mode derivatives (jvp) are not available: expected a call without tangents")


def check_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Check that a mask is (B|1, H|1, Lq, Lk), of q's type, float32 or bool, on q's device."""
    if mask is None:
        return
    _check_tensor("mask", mask, "a tensor or None")
    if mask.dtype not in (q.dtype, torch.float32, torch.bool):
        others = "torch.bool" if q.dtype == torch.float32 else "torch.float32 or torch.bool"
        raise TypeError(f"mask: expected q's type {q.dtype} or {others}, got {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"mask: expected q's device {q.device}, got {mask.device}")
    expected = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    fits = mask.dim() == 4 and mask.shape[2:] == expected[2:]
    if not fits or mask.shape[0] not in (1, expected[0]) or mask.shape[1] not in (1, expected[1]):
        raise ValueError(
            f"mask: expected shape ({expected[0]} or 1, {expected[1]} or 1, {expected[2]}, {expected[3]}),"
            f" got {tuple(mask.shape)}"
        )


def check_log_decay(log_decay: Tensor | None, q: Tensor) -> None:
    """Check that log_decay is (H,), float32 (or q's float64), on q's device, and on a CPU that it is ≤ 0."""
    if log_decay is None:
        return
    _check_tensor("log_decay", log_decay, "a tensor or None")
    if log_decay.dtype not in (torch.float32, compute_type(q.dtype)):
        raise TypeError(f"log_decay: expected torch.float32, got {log_decay.dtype}")
    if log_decay.shape != (q.shape[1],):
        raise ValueError(f"log_decay: expected shape ({q.shape[1]},), one value a head, got {tuple(log_decay.shape)}")
    if log_decay.device != q.device:
        raise ValueError(f"log_decay: expected q's device {q.device}, got {log_decay.device}")
    if _readable(log_decay) and not bool((log_decay <= 0).all()):
        raise ValueError(f"log_decay: expected values ≤ 0, got {_start(log_decay.tolist())}")


def check_cu_seqlens(cu_seqlens: Tensor | None, q: Tensor) -> None:
    """Check that cu_seqlens is (N+1,) int32 on q's device with B = 1, and on a CPU that it rises from 0 to T."""
    if cu_seqlens is None:
        return
    _check_tensor("cu_seqlens", cu_seqlens, "a tensor or None")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: expected q's device {q.device}, got {cu_seqlens.device}")
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens: expected packed sequences in a batch of 1, got a batch of {q.shape[0]}")
    if _readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != q.shape[2] or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens: expected values rising from 0 to {q.shape[2]} tokens, got {_start(bounds)}")


def check_state(state: Tensor | None, name: str, q: Tensor, v: Tensor, num_sequences: int) -> None:
    """Check that a recurrent state is (sequences, H, D, E), float32 (float64 for float64), on q's device."""
    if state is None:
        return
    _check_tensor(name, state, "a tensor or None")
    if state.dtype != compute_type(q.dtype):
        raise TypeError(f"{name}: expected {compute_type(q.dtype)}, got {state.dtype}")
    expected = (num_sequences, q.shape[1], q.shape[3], v.shape[3])
    if state.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(state.shape)}")
    if state.device != q.device:
        raise ValueError(f"{name}: expected q's device {q.device}, got {state.device}")


def check_choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    """Check that an option is one of its valid values."""
    if value not in valid:
        raise ValueError(f"{name}: expected one of {', '.join(valid)}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Check that an option is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def _check_tensor(name: str, x: object, expected: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if x.is_nested else x.layout}")


def _readable(x: Tensor) -> bool:
    """Whether values can be read without stalling a GPU, breaking a compiled graph or asking a fake tensor."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)


def _start(values: list[float]) -> str:
    """The values of a list, of a long one the first."""
    return str(values) if len(values) <= 16 else f"{str(values[:16])[:-1]}, … {len(values)} values]"


def _names(types: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(t).removeprefix("torch.") for t in types)
