"""Lightning attention by the CUDA kernels: which passes make up forward and backward, and what each one is given.

With P = (q kᵀ) ⊙ M, M[i, j] = λ^(i-j) for j ≤ i, the operator is o = P v. One kernel computes it, and the gradients are
the same thing with other names:
    dq = ((do vᵀ) ⊙ M) k         a pass with do, v, k for q, k, v
    dv = Pᵀ do                   a pass from right to left with k, q, do
    dk = ((do vᵀ) ⊙ M)ᵀ q        a pass from right to left with v, do, q
Each of them carries a state, of which the gradient of the final state is the first value for dv and dk, and the last
value is the gradient of the initial state. In 2-byte types up to a width of 128 dv and dk are one pass, which carries
it once; wide heads (`is_wide`) take the kernels of `lightning_wide`. `csrc/README.md` has the equations.
"""

import functools
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import lightning_wide
from .kernels import Segments, cut, for_kernel, multiprocessors, padded_state, rows_contiguous, sum_groups, unit_length
from .lightning_wide import Prepared

MAX_WIDTH = 2048
CHUNK = 64  # tokens; kChunk of csrc/variant.cuh
FLOAT32_TILE = 128, 64  # kFloat32Tile of csrc/variants.h
NO_NORM, NORM_MEASURED, NORM_KEPT, NORM_VALUES = range(4)  # Norm of csrc/params.h


class Lengths(NamedTuple):
    """1 / |x| of vectors, (B, heads, T) float32 with T a multiple of 4, as the forward pass found them."""

    of_q: Tensor
    of_k: Tensor


def unavailable_reason(q: Tensor, v: Tensor, widest: int = MAX_WIDTH) -> str | None:
    """Why the kernels can't take a call with these q and v, or None; `widest`: heads that they take."""
    if not q.is_cuda:
        return f"q is on {q.device}, the kernels run on a CUDA GPU"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q is {str(q.dtype)[6:]}, the kernels take float32, bfloat16 and float16"
    if max(q.shape[3], v.shape[3]) > widest:
        return f"a head is {max(q.shape[3], v.shape[3])} wide, the kernels take up to {widest}"
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
        warnings.warn(f"the CUDA kernels can't be used: {reason}", stacklevel=2)
    return reason


def empty_kept(q: Tensor, k: Tensor, v: Tensor, qk_norm: bool) -> Lengths | Prepared | None:
    """Room for what the forward pass leaves to the backward pass, if anything."""
    if lightning_wide.is_wide(q, v):
        return lightning_wide.empty_prepared(q, v)
    alike = max(q.shape[3], v.shape[3]) <= 128 or min(q.shape[3], v.shape[3]) > 128
    if not (qk_norm and _norm_in_kernel(q, v) and alike):
        return None
    return Lengths(*(x.new_empty((*x.shape[:2], -(-x.shape[2] // 4) * 4), dtype=torch.float32) for x in (q, k)))


def as_kept(q: Tensor, v: Tensor, first: Tensor, second: Tensor) -> Lengths | Prepared | None:
    """The same, of two tensors that it became."""
    if first.numel() == 0:
        return None
    return Prepared(first, second) if lightning_wide.is_wide(q, v) else Lengths(first, second)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_norm: bool,
    with_state: bool,
    kept: Lengths | Prepared | None,
) -> tuple[Tensor, Tensor | None]:
    """o (B, H, T, E) in v's type and the final state (sequences, H, D, E) if asked for; see `lightning_attention`.

    `kept` is that of `empty_kept`, which this fills for `backward`.
    """
    widths = q.shape[3], v.shape[3]
    if qk_norm and not _norm_in_kernel(q, v):
        q, k, qk_norm = unit_length(q), unit_length(k), False
    q, k, v = (for_kernel(x) for x in (q, k, v))
    if initial_state is not None:
        initial_state = padded_state(initial_state, q, v)
    final = None
    if with_state:
        sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        final = q.new_empty((sequences, q.shape[1], q.shape[3], v.shape[3]), dtype=torch.float32)
    if isinstance(kept, Prepared):
        o = lightning_wide.forward(q, k, v, log_decay, initial_state, cu_seqlens, final, kept)
    else:
        norm = NORM_MEASURED if qk_norm else NO_NORM
        common = q.shape[1], log_decay, cu_seqlens, initial_state
        o = _attend(q, k, v, *common, final=final, norm=norm, lengths=kept or (None, None))
    if final is not None:
        final = final[..., : widths[0], : widths[1]].contiguous()
    return o[..., : widths[1]].contiguous(), final


def backward(
    grad_o: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_norm: bool,
    kept: Lengths | Prepared | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the initial state; `grad_state` None means zeros, `kept` comes from `forward`."""
    d, e, given_q, given_k = q.shape[3], v.shape[3], q, k
    lengths = kept if isinstance(kept, Lengths) else None
    if qk_norm and lengths is None:
        q, k = unit_length(q), unit_length(k)
    do, q, k, v = (for_kernel(x) for x in (grad_o, q, k, v))
    grad_initial = None
    if initial_state is not None:
        initial_state = padded_state(initial_state, q, v)
        grad_initial = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    if grad_state is not None:
        grad_state = padded_state(grad_state, q, v)
    heads = q.shape[1]
    of_q, of_k = lengths or (None, None)
    of_vectors, of_values = (NO_NORM, NO_NORM) if lengths is None else (NORM_KEPT, NORM_VALUES)
    common = heads, log_decay, cu_seqlens

    start = None if initial_state is None else initial_state.mT
    taken_through = False
    if isinstance(kept, Prepared):
        dq, dk, dv = lightning_wide.backward(
            do, grad_state, grad_initial, q, k, v, log_decay, initial_state, cu_seqlens, kept
        )
    elif k.dtype != torch.float32 and max(k.shape[3], v.shape[3]) <= 128:
        through = None if lengths is None else q
        dq = _attend(do, v, k, *common, start, norm=of_values, through=through, lengths=(of_q, of_k))
        dk, dv = _gradients_of_both(
            do, grad_state, grad_initial, q, k, v, log_decay, cu_seqlens, norm=of_vectors, lengths=(of_k, of_q)
        )
        taken_through = lengths is not None
    else:
        dq = _attend(do, v, k, *common, start, norm=of_values, lengths=(None, of_k))
        dv = _attend(
            k, q, do, *common, grad_state, final=grad_initial, reverse=True, norm=of_vectors, lengths=(of_k, of_q)
        )
        start = None if grad_state is None else grad_state.mT
        dk = _attend(v, do, q, *common, start, reverse=True, norm=of_values, lengths=(None, of_q))
    dk, dv = sum_groups(dk, k.shape[1]), sum_groups(dv, v.shape[1])

    dq, dk, dv = (x[..., :width] for x, width in ((dq, d), (dk, d), (dv, e)))
    if qk_norm and not taken_through:
        dq, dk = unit_length(given_q, dq), unit_length(given_k, dk)
    if grad_initial is not None:
        grad_initial = grad_initial[..., :d, :e].contiguous()
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), grad_initial


def decay_gradient(
    grad_o: Tensor,
    grad_state: Tensor | None,
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
    q, k, v, grad_o = (rows_contiguous(x) for x in (q, k, v, grad_o))
    segments = cut(q, -(-q.shape[2] // CHUNK) * CHUNK, q.shape[2], cu_seqlens)
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
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    torch.ops.transnormer_kernels.step(q, k, v, log_decay, state, o)
    return o


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
    *,
    final: Tensor | None = None,
    norm: int = NO_NORM,
    reverse: bool = False,
    through: Tensor | None = None,
    lengths: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """One pass: (B, heads, T, E) in v's type, taken through the unit length of `through`.

    `lengths`, of rows and of columns, are written where they are measured, and else read.
    """
    batch, tokens, width = q.shape[0], q.shape[2], v.shape[3]
    parts, _ = _parts(_tile(k, v), k, v)
    segments = _segments(k, v, heads, cu_seqlens)
    shape = (batch, heads, tokens, width)
    out = v.new_empty(shape) if parts == 1 else v.new_empty((parts, *shape), dtype=torch.float32)
    common = log_decay, initial, segments.table
    if k.dtype == torch.float32:
        carry = None
        if segments.number > 1:
            carry = k.new_empty((batch * segments.number, heads, k.shape[3], width))
            torch.ops.transnormer_kernels.states_float32(
                k, v, *common, carry, heads, segments.length, reverse, _exact()
            )
        torch.ops.transnormer_kernels.attend_float32(
            q, k, v, *common, carry, out, final, segments.length, reverse, _exact()
        )
    else:
        chain = _chain(k, v, heads, segments)
        torch.ops.transnormer_kernels.attend(
            q, k, v, through, *lengths, *common, *chain, out, None, final, segments.length, reverse, norm
        )
    if parts == 1:
        return out
    o = v.new_empty(shape)
    torch.ops.transnormer_kernels.combine(out, 0, o)
    return o


def _gradients_of_both(
    do: Tensor,
    grad_state: Tensor | None,
    grad_initial: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    norm: int,
    lengths: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, (B, H, T, D) and (B, H, T, E), in one pass from right to left.

    Of two neighbouring heads that share a key head and a value head there may be the sum: H is then half.
    """
    heads = q.shape[1]
    segments = _segments(k, v, heads, cu_seqlens)
    whole = segments.number == 1 and cu_seqlens is None
    paired = whole and _tile(k, v) == (128, 128) and all(heads // x.shape[1] % 2 == 0 for x in (k, v))
    shape = q.shape[0], heads // (2 if paired else 1), q.shape[2]
    dk, dv = k.new_empty((*shape, k.shape[3])), v.new_empty((*shape, v.shape[3]))
    chain = _chain(k, v, heads, segments)
    common = log_decay, grad_state, segments.table
    torch.ops.transnormer_kernels.attend(
        q, k, v, do, *lengths, *common, *chain, dv, dk, grad_initial, segments.length, True, norm
    )
    return dk, dv


def _chain(k: Tensor, v: Tensor, heads: int, segments: Segments) -> tuple[Tensor | None, Tensor | None]:
    """What blocks hand on from segment to segment, two states and 4 counts for each head and tile; or None."""
    if segments.number == 1:
        return None, None
    d, e = _tile(k, v)
    chains = math.prod(_parts((d, e), k, v)) * heads * (k.shape[0] if segments.table is None else 1)
    return k.new_empty(chains * 2 * d * e, dtype=torch.float32), k.new_zeros(chains * 4 + 1, dtype=torch.int32)


def _segments(k: Tensor, v: Tensor, heads: int, cu_seqlens: Tensor | None) -> Segments:
    """Cut the sequences of a pass so that its blocks fill the GPU."""
    tile = _tile(k, v)
    chains = k.shape[0] * heads * math.prod(_parts(tile, k, v))
    slots = multiprocessors(k.device) * (2 if tile == FLOAT32_TILE else 1)
    return cut(k, *_segment_length(chains, k.shape[2], slots), cu_seqlens)


def _tile(k: Tensor, v: Tensor) -> tuple[int, int]:
    """Tile of the state, of k's width and v's, that a block owns: `tile_of` of csrc/variants.h."""
    if k.dtype == torch.float32:
        return FLOAT32_TILE
    d, e = k.shape[3], v.shape[3]
    if max(d, e) <= 64:
        return 64, 64
    if d <= 128:
        return 128, 128
    return (192, 64) if d <= 192 else (256, 64)


def _parts(tile: tuple[int, int], k: Tensor, v: Tensor) -> tuple[int, int]:
    """Tiles along k's width and along v's."""
    return -(-k.shape[3] // tile[0]), -(-v.shape[3] // tile[1])


CUT = 1.7  # what a token of a cut sequence costs, of which keys and values are read twice, against one of a whole one
HANDING_ON = 150  # tokens that a block walks through in the time in which a state goes on to the next segment


@functools.cache
def _segment_length(chains: int, tokens: int, slots: int) -> tuple[int, int]:
    """Tokens of a segment, and of the longest packed sequence for which cutting does not pay.

    `chains`: heads and tiles of all rows; `slots`: blocks that run at a time. The fewest tokens that a block walks one
    after another count, or the time in which states are handed on along a sequence.
    """

    def walked(length: int) -> float:
        count = -(-tokens // length)
        rounds = -(-chains * count // slots)
        return rounds * length if count == 1 else max(rounds * length * CUT, count * HANDING_ON)

    def length_of(count: int) -> int:
        return -(-tokens // (count * CHUNK)) * CHUNK

    best = min(map(length_of, range(1, max(2 * slots // chains, 1) + 1)), key=walked)
    return best, int(walked(best))


def _norm_in_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether the forward pass divides q and k by their lengths: its blocks see whole vectors."""
    return q.dtype != torch.float32 and not lightning_wide.is_wide(q, v)


def _exact() -> bool:
    """Whether products of float32 are to be as exact as it is, or may be tf32."""
    return torch.get_float32_matmul_precision() == "highest"
