"""Lightning attention by the CUDA kernels: which passes make up forward and backward, and what each one is given.

With P = (q kᵀ) ⊙ M, M[i, j] = λ^(i-j) for j ≤ i, the operator is o = P v. One kernel computes it, and the gradients are
the same thing with other names:
    dq = ((do vᵀ) ⊙ M) k         a pass with do, v, k for q, k, v
    dv = Pᵀ do                   a pass from right to left with k, q, do
    dk = ((do vᵀ) ⊙ M)ᵀ q        a pass from right to left with v, do, q
Each of them carries a state, of which the gradient of the final state is the first value for dv and dk, and the last
value is the gradient of the initial state. `csrc/README.md` has the equations.
"""

import functools
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import unit_length, unit_length_backward

MAX_WIDTH = 1024
CHUNK = 64  # tokens; kChunk of csrc/variant.cuh
FLOAT32_TILE = 128, 64  # kFloat32Tile of csrc/variants.h
NO_NORM, NORM_QUERIES_AND_KEYS, NORM_VALUES = 0, 1, 2  # Norm of csrc/params.h


class Segments(NamedTuple):
    """How sequences are cut so that all multiprocessors have work."""

    length: int  # tokens of a segment, a multiple of `CHUNK`
    number: int  # of segments of a row of the batch
    table: Tensor | None  # of packed sequences: (segments + 1, 4) int32, Segment of csrc/params.h


def unavailable_reason(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels can't take a call with these q and v, or None."""
    if not q.is_cuda:
        return f"q is on {q.device}, the kernels run on a CUDA GPU"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q is {str(q.dtype)[6:]}, the kernels take float32, bfloat16 and float16"
    if max(q.shape[3], v.shape[3]) > MAX_WIDTH:
        return f"a head is {max(q.shape[3], v.shape[3])} wide, the kernels take up to {MAX_WIDTH}"
    return library_unavailable_reason(q.device.index)


@torch.compiler.assume_constant_result
def library_unavailable_reason(device: int) -> str | None:
    """Why the kernels can't run on a GPU, or None; a compiled graph takes it as it was when it was made."""
    return _library_unavailable_reason(device)


@functools.cache
def _library_unavailable_reason(device: int) -> str | None:
    """The same; says so once."""
    from .extension import unavailable_reason as unbuilt_reason

    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (9, 0):
        reason = unbuilt_reason()
    else:
        reason = f"the GPU has compute capability {major}.{minor}, the kernels are written for 9.0 (Hopper)"
    if reason is not None:
        warnings.warn(f"the CUDA kernels can't be used, PyTorch's operators are: {reason}", stacklevel=2)
    return reason


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_norm: bool,
) -> tuple[Tensor, Tensor]:
    """o (B, H, T, E) in v's type and the final state (sequences, H, D, E); see `lightning_attention`."""
    widths = q.shape[3], v.shape[3]
    if qk_norm and not _norm_in_kernel(q, 256):
        q, k, qk_norm = unit_length(q), unit_length(k), False
    q, k, v = (_for_kernel(x) for x in (q, k, v))
    if initial_state is not None:
        initial_state = _padded_state(initial_state, q, v)
    segments = _segments(q, v, cu_seqlens)
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    final = q.new_empty((sequences, q.shape[1], q.shape[3], v.shape[3]), dtype=torch.float32)
    norm = NORM_QUERIES_AND_KEYS if qk_norm else NO_NORM
    carry = _carry(k, v, q.shape[1], log_decay, initial_state, segments, norm=norm)
    o = _attend(q, k, v, q.shape[1], log_decay, initial_state, carry, segments, final=final, norm=norm)
    return o[..., : widths[1]].contiguous(), final[..., : widths[0], : widths[1]].contiguous()


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state."""
    d, e, wide_q, wide_k = q.shape[3], v.shape[3], q, k
    norm_outside = qk_norm and not _norm_in_kernel(q, 128)
    if norm_outside:
        q, k, qk_norm = unit_length(q), unit_length(k), False
    do, q, k, v = (_for_kernel(x) for x in (grad_o, q, k, v))
    if initial_state is not None:
        initial_state = _padded_state(initial_state, q, v)
    grad_state = _padded_state(grad_state, q, v)
    heads = q.shape[1]
    grad_initial = torch.empty_like(grad_state, memory_format=torch.contiguous_format)
    of_values, of_both = (NORM_VALUES, NORM_QUERIES_AND_KEYS) if qk_norm else (NO_NORM, NO_NORM)

    segments = _segments(do, k, cu_seqlens)
    start = None if initial_state is None else initial_state.mT
    carry = _carry(v, k, heads, log_decay, start, segments, norm=of_values)
    through = q if qk_norm else None
    dq = _attend(do, v, k, heads, log_decay, start, carry, segments, norm=of_values, through=through)

    segments = _segments(q, do, cu_seqlens)
    carry = _carry(q, do, heads, log_decay, grad_state, segments, norm=of_both, reverse=True)
    dv = _attend(
        k, q, do, heads, log_decay, grad_state, carry, segments,
        final=grad_initial, norm=of_both, reverse=True, groups=v.shape[1],
    )  # fmt: skip
    carry = None if carry is None else carry.mT
    through = k if qk_norm else None
    dk = _attend(
        v, do, q, heads, log_decay, grad_state.mT, carry, segments,
        norm=of_values, reverse=True, groups=k.shape[1], through=through,
    )  # fmt: skip

    dq, dk, dv = (x[..., :width] for x, width in ((dq, d), (dk, d), (dv, e)))
    if norm_outside:
        dq, dk = (unit_length_backward(dx.float(), x).to(x.dtype) for dx, x in ((dq, wide_q), (dk, wide_k)))
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), grad_initial[..., :d, :e].contiguous()


def decay_gradient(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_norm: bool,
) -> Tensor:
    """Gradient of log_decay, (H,): one more pass, whose output is the derivative of o by log λ."""
    if qk_norm:
        q, k = unit_length(q), unit_length(k)
    q, k, v, grad_o = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, grad_o))
    segments = _cut(q, -(-q.shape[2] // CHUNK) * CHUNK, cu_seqlens)
    slots = q.shape[0] if segments.table is None else len(segments.table) - 1
    parts_of_d, parts_of_e = _parts(FLOAT32_TILE, q, v)
    parts = q.new_zeros((slots, q.shape[1], parts_of_d * parts_of_e), dtype=torch.float32)
    torch.ops.transnormer_kernels.decay_gradient(
        q, k, v, log_decay, initial_state, segments.table, grad_o, grad_state, parts, _exact()
    )
    return parts.sum((0, 2))


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    """One token; updates the state (B, H, D, E), contiguous float32, in place and returns o (B, H, 1, E)."""
    o = v.new_empty((*q.shape[:3], v.shape[3]))
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    torch.ops.transnormer_kernels.step(q, k, v, log_decay, state, o)
    return o


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    log_decay: Tensor | None,
    initial: Tensor | None,
    carry: Tensor | None,
    segments: Segments,
    *,
    final: Tensor | None = None,
    norm: int = NO_NORM,
    reverse: bool = False,
    groups: int | None = None,
    through: Tensor | None = None,
) -> Tensor:
    """One pass: (B, groups, T, E), summed over the heads of a group, and taken through the unit length of `through`."""
    groups = groups or heads
    batch, tokens, width = q.shape[0], q.shape[2], v.shape[3]
    parts, _ = _parts(_tile(k, v), k, v)
    o = v.new_empty((batch, groups, tokens, width))
    if parts == 1 and groups == heads:
        out = o
    else:
        out = v.new_empty((parts, batch, heads, tokens, width), dtype=torch.float32)
    torch.ops.transnormer_kernels.output(
        q, k, v, log_decay, initial, segments.table, carry, out, final, through if out is o else None, segments.length,
        reverse, norm, _exact(),
    )  # fmt: skip
    if out is not o:
        torch.ops.transnormer_kernels.combine(out, through, o)
    return o


def _carry(
    k: Tensor,
    v: Tensor,
    heads: int,
    log_decay: Tensor | None,
    initial: Tensor | None,
    segments: Segments,
    *,
    norm: int,
    reverse: bool = False,
) -> Tensor | None:
    """State after each segment, (B · segments, H, D, E), where sequences are cut."""
    if segments.number == 1:
        return None
    carry = k.new_empty((k.shape[0] * segments.number, heads, k.shape[3], v.shape[3]), dtype=torch.float32)
    torch.ops.transnormer_kernels.states(
        k, v, log_decay, initial, segments.table, carry, heads, segments.length, reverse, norm, _exact()
    )
    return carry


def _segments(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Segments:
    """Cut the sequences of a pass so that its blocks fill the GPU."""
    batch, heads, tokens, _ = q.shape
    tile = _tile(q, v)
    parts_of_d, parts_of_e = _parts(tile, q, v)
    resident = 2 if tile in (FLOAT32_TILE, (64, 64)) else 1  # blocks on a multiprocessor
    slots = torch.cuda.get_device_properties(q.device).multi_processor_count * resident
    return _cut(q, _segment_length(batch * heads * parts_of_d * parts_of_e, tokens, slots), cu_seqlens)


def _tile(k: Tensor, v: Tensor) -> tuple[int, int]:
    """Tile of the state, of k's width and v's, that a block owns: `tile_of` of csrc/variants.h."""
    if k.dtype == torch.float32:
        return FLOAT32_TILE
    if max(k.shape[3], v.shape[3]) <= 64:
        return 64, 64
    return (128, 128) if k.shape[3] <= 128 else (256, 64)


def _parts(tile: tuple[int, int], k: Tensor, v: Tensor) -> tuple[int, int]:
    """Tiles along k's width and along v's."""
    return -(-k.shape[3] // tile[0]), -(-v.shape[3] // tile[1])


def _cut(q: Tensor, length: int, cu_seqlens: Tensor | None) -> Segments:
    number = -(-q.shape[2] // length)
    if cu_seqlens is None:
        return Segments(length, number, None)
    table = torch.empty((number + len(cu_seqlens), 4), dtype=torch.int32, device=q.device)
    torch.ops.transnormer_kernels.plan(cu_seqlens.contiguous(), q.shape[2], length, table)
    return Segments(length, number, table)


@functools.cache
def _segment_length(pairs: int, tokens: int, slots: int) -> int:
    """Tokens of a segment, so that blocks which run at the same time walk the fewest tokens one after another."""

    def walked(count: int) -> float:
        length = -(-tokens // count)
        rounds = -(-pairs * count // slots)
        # Cut sequences are read once more for their states; a block costs about as much as some tokens to start.
        return rounds * (length * (1.4 if count > 1 else 1.0) + 128)

    best = min(range(1, max(1, min(64, tokens // 512)) + 1), key=walked)
    return -(-tokens // (best * CHUNK)) * CHUNK


def _norm_in_kernel(x: Tensor, widest: int) -> bool:
    """Whether a block sees whole vectors, up to the `widest`: it divides them by their length by itself then."""
    return x.dtype != torch.float32 and x.shape[3] <= widest


def _exact() -> bool:
    """Whether products of float32 are to be as exact as it is, or may be tf32."""
    return torch.get_float32_matmul_precision() == "highest"


def _for_kernel(x: Tensor) -> Tensor:
    """x as the copy engine takes it: rows adjacent, of whole 16 bytes, 16-byte aligned; else a copy of it."""
    if x.dtype == torch.float32:
        return x if x.stride(3) == 1 else x.contiguous()
    if x.shape[3] % 8:
        x = F.pad(x, (0, -x.shape[3] % 8))
    whole = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and x.stride(2) != 0
    if whole and all(x.stride(i) * x.element_size() % 16 == 0 for i in range(3) if x.shape[i] > 1):
        return x
    warn_of_copy()
    return x.contiguous() if x.stride(2) else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def warn_of_copy() -> None:
    """Said once: the copy costs as much as a pass."""
    warnings.warn(
        "lightning_attention copies an argument whose rows are not contiguous, 16-byte aligned and a multiple of 16"
        " bytes apart",
        stacklevel=2,
    )


def _padded_state(state: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """A state (sequences, H, D, E) of the widths that q and v now have."""
    if state.shape[2:] == (q.shape[3], v.shape[3]):
        return state  # `pad` by nothing copies
    return F.pad(state, (0, v.shape[3] - state.shape[3], 0, q.shape[3] - state.shape[2]))
