"""What the CUDA kernels of narrow and of wide heads are called with, and small kernels that both use."""

import functools
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Segments(NamedTuple):
    """How sequences are cut so that all multiprocessors have work."""

    length: int  # tokens of a segment, a multiple of 64
    number: int  # of segments of a row of the batch
    table: Tensor | None  # of packed sequences: (segments + 1, 4) int32, Segment of csrc/params.h


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def cut(q: Tensor, length: int, whole: int, cu_seqlens: Tensor | None) -> Segments:
    """Segments of `length` tokens; packed sequences stay whole if none is longer than `whole`."""
    number = -(-q.shape[2] // length)
    if cu_seqlens is None:
        return Segments(length, number, None)
    table = torch.empty((number + len(cu_seqlens), 4), dtype=torch.int32, device=q.device)
    torch.ops.transnormer_kernels.plan(cu_seqlens.contiguous(), q.shape[2], length, whole, table)
    return Segments(length, number, table)


def sum_groups(x: Tensor, groups: int) -> Tensor:
    """As `sum_groups` of `numerics`, of a contiguous x."""
    if x.shape[1] == groups:
        return x
    out = x.new_empty((x.shape[0], groups, *x.shape[2:]))
    torch.ops.transnormer_kernels.combine(x.unflatten(1, (groups, -1)), 2, out)
    return out


def unit_length(x: Tensor, grad: Tensor | None = None) -> Tensor:
    """x / |x|, or what its gradient is to x; as `unit_length` and `unit_length_backward` of `numerics`."""
    x, out = rows_contiguous(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.ops.transnormer_kernels.unit_length(x, None if grad is None else rows_contiguous(grad), out)
    return out


def padded_width(x: Tensor) -> int:
    """The width that `for_kernel` gives x, of a 2-byte type, or has given it."""
    return -(-x.shape[3] // 8) * 8


def for_kernel(x: Tensor) -> Tensor:
    """x as the copy engine takes it: rows adjacent, of whole 16 bytes, 16-byte aligned; else a copy of it."""
    if x.dtype == torch.float32:
        return rows_contiguous(x)
    if more := padded_width(x) - x.shape[3]:
        x = F.pad(x, (0, more))
    whole = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and x.stride(2) != 0
    if whole and all(x.stride(i) * x.element_size() % 16 == 0 for i in range(3) if x.shape[i] > 1):
        return x
    warn_of_copy()
    return x.clone(memory_format=torch.contiguous_format)


def rows_contiguous(x: Tensor) -> Tensor:
    """x, or a copy of it: to PyTorch a last dim of one entry is contiguous whatever its stride."""
    return x if x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def warn_of_copy() -> None:
    """Said once: the copy costs as much as a pass."""
    warnings.warn(
        "lightning_attention copies an argument whose rows are not contiguous, 16-byte aligned and a multiple of 16"
        " bytes apart",
        stacklevel=2,
    )


def padded_state(state: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """A state (sequences, H, D, E) of the widths that q and v now have."""
    if state.shape[2:] == (q.shape[3], v.shape[3]):
        return state  # `pad` by nothing copies
    return F.pad(state, (0, v.shape[3] - state.shape[3], 0, q.shape[3] - state.shape[2]))
