"""What every operator computes with: types of sums and operands, products, unit length, shared heads, autocast."""

from typing import Any

import torch
from torch import Tensor

MIN_LENGTH = 1e-6  # vectors shorter than this are divided by it: the gradient stays finite at zero


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """Type of sums and states: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_type(x: Tensor) -> torch.dtype:
    """Type of what enters a product: x's own on a GPU; a CPU has no product of half types with float32 results."""
    return x.dtype if x.is_cuda else compute_type(x.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product with its sums and its result in float32 (float64 for float64)."""
    if a.dtype == compute_type(a.dtype):
        return a @ b
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32).unflatten(0, a.shape[:-2])


def unit_length(x: Tensor) -> Tensor:
    """Divide the vectors of the last dim by their length, in float32 (float64 for float64), in x's type."""
    wide = x.to(compute_type(x.dtype))
    scale, length = _length(wide)
    return (wide / scale / length).to(x.dtype)


def unit_length_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient through x / |x|: what is parallel to x goes, and the rest is divided by |x|."""
    x = x.to(grad.dtype)
    scale, length = _length(x)
    unit = x / scale / length
    parallel = (grad * unit).sum(-1, keepdim=True) * unit
    constant = scale * length <= MIN_LENGTH  # shorter vectors are divided by a constant
    return torch.where(constant, grad, grad - parallel) / scale / length


def _length(x: Tensor) -> tuple[Tensor, Tensor]:
    """Length of the vectors of the last dim, at least `MIN_LENGTH`, in two factors: (..., 1) each.

    The largest element is one of them: the square of a large number overflows. It is a constant to autograd, since a
    unit vector does not change with the scale that it is divided by on the way.
    """
    if x.shape[-1] == 0:
        return x.new_full((*x.shape[:-1], 1), MIN_LENGTH), x.new_ones(*x.shape[:-1], 1)
    scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=MIN_LENGTH)
    return scale, torch.linalg.vector_norm(x / scale, dim=-1, keepdim=True).clamp(min=1)


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """Repeat each of G key/value heads for its H / G query heads: (B, G, T, D) to (B, H, T, D)."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def sum_groups(x: Tensor, groups: int) -> Tensor:
    """Sum the gradients of the query heads that share a key/value head: (B, H, T, D) to (B, G, T, D)."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast to autocast's type where it is on, as it does for matrix products; what is no float stays.

    Where the first is float64 all stay, as they do in matrix products.
    """
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(x.to(dtype) if getattr(x, "dtype", None) in narrow else x for x in tensors)


def no_autocast(x: Tensor) -> torch.autocast:
    """Context for an operator's inside, where autocast would turn the float32 sums into half products."""
    return torch.autocast(x.device.type, enabled=False)
