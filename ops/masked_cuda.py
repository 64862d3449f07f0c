"""Masked linear attention by the CUDA kernels: which passes make up forward and backward, and what each one is given.

One kernel computes out = ((x yᵀ) ⊙ M) z, and without a softmax the gradients are the same thing with other names:
    o  = ((q kᵀ) ⊙ M) v
    dq = ((do vᵀ) ⊙ M) k
    dv = ((k qᵀ) ⊙ Mᵀ) do
    dk = ((v doᵀ) ⊙ Mᵀ) q         in 2-byte types with dv in one pass: both read q, do and the mask
Nothing is saved but the inputs, and no sum depends on the order in which blocks run. Wide heads and the mask's gradient
have kernels of their own. `csrc/README.md` has the equations.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import for_kernel, multiprocessors, rows_contiguous, sum_groups, unit_length
from .lightning_cuda import unavailable_reason as kernels_unavailable_reason
from .masked_wide import backward as wide_backward
from .masked_wide import forward as wide_forward
from .masked_wide import mask_gradient

MAX_WIDTH = 1024
NARROW = 128  # the widest head for which a block keeps all of a row's output; of float32 half of it
ROWS = 128  # of a tile of dk and dv: masked_tile of csrc/masked.h
MASK_TILE = 64  # kMaskTile of csrc/masked.h
SHARED = 4  # heads and rows of the batch that share a mask, from which on it is searched for tiles of zeros


def unavailable_reason(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels can't take a call with these q and v, or None."""
    return kernels_unavailable_reason(q, v, MAX_WIDTH)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, qk_norm: bool) -> Tensor:
    """o (B, H, Lq, E) in v's type; see `flash_linear_attention`."""
    width = v.shape[3]
    if qk_norm:
        q, k = unit_length(q), unit_length(k)
    operands = _Operands(q, k, v, mask)
    if operands.wide:
        o = wide_forward(operands.q, operands.k, operands.v, mask, operands.parts)
    else:
        o = operands.attend(operands.q, operands.k, operands.v)
    return o[..., :width].contiguous()


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, qk_norm: bool, wanted: list[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, v and mask, of those that are wanted."""
    given_q, given_k, widths = q, k, (q.shape[3], k.shape[3], v.shape[3])
    if qk_norm:
        q, k = unit_length(q), unit_length(k)
    operands = _Operands(q, k, v, mask, do)
    tensors = operands.do, operands.q, operands.k, operands.v
    if operands.wide:
        grads = wide_backward(*tensors, mask, operands.parts, (wanted[0], wanted[1], wanted[2]))
    else:
        grads = _narrow_backward(operands, wanted)
    dq, dk, dv = (None if x is None else x[..., :width] for x, width in zip(grads, widths, strict=True))
    if qk_norm:
        dq, dk = (None if grad is None else unit_length(x, grad) for x, grad in ((given_q, dq), (given_k, dk)))
    return [dq, dk, dv, operands.mask_gradient(mask) if wanted[3] else None]


class _Operands:
    """The tensors of a call as the kernels read them.

    Of float32, with products as exact as it is, three bfloat16 numbers for each; where tf32 is allowed, two of wide
    heads, and narrow ones as they are.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, do: Tensor | None = None) -> None:
        self.heads, self.groups, self.dtype = q.shape[1], (k.shape[1], v.shape[1]), q.dtype
        in_float32 = q.dtype == torch.float32
        self.wide = max(q.shape[3], v.shape[3]) > (NARROW // 2 if in_float32 else NARROW)
        self.parts = _parts(q, self.wide)
        self.tf32 = in_float32 and self.parts == 1
        self.q, self.k, self.v = (_operand(x, self.parts) for x in (q, k, v))
        self.do = q if do is None else _operand(do, self.parts)
        self.mask, self.used = (mask, None) if self.wide else _for_mask(mask, q)
        # What passes read rounded, and turned: y and z. The backward pass reads q and do in both places.
        first, second = ([self.k], [self.v]) if do is None else ([self.v, self.q, self.do], [self.k, self.q, self.do])
        self._reads = tuple({id(x) for x in tensors} for tensors in (first, second))
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, x: Tensor, y: Tensor, z: Tensor, *, transposed: bool = False, shares: int = 1) -> Tensor:
        """((x yᵀ) ⊙ M) z, or Mᵀ, (B, H / shares, rows, width), each the sum over `shares` heads."""
        out = z.new_empty((x.shape[0], self.heads // shares, x.shape[2], z.shape[3]), dtype=self.dtype)
        if self.tf32:
            y, z = self._rounded(y)[0], self._rounded(z)[1]
        torch.ops.transnormer_kernels.masked_attend(
            x, y, z, None, self.mask, self.used, out, None, self.heads, shares, self.parts, transposed
        )
        return out

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, heads, T, width) as products of tf32 read it, and as (B, heads, width, T and up to 7 more)."""
        if id(x) not in self._made:
            rounded = torch.empty_like(x, memory_format=torch.contiguous_format) if id(x) in self._reads[0] else None
            whole = -(-x.shape[2] // 8) * 8
            turned = x.new_empty((*x.shape[:2], x.shape[3], whole)) if id(x) in self._reads[1] else None
            torch.ops.transnormer_kernels.turn(x, turned, rounded)
            self._made[id(x)] = x if rounded is None else rounded, x if turned is None else turned
        return self._made[id(x)]

    def attend_both(self, shares: int) -> tuple[Tensor, Tensor]:
        """Gradients of k and v, of a 2-byte type, in one pass."""
        shape = self.q.shape[0], self.heads // shares, self.k.shape[2]
        dv, dk = (x.new_empty((*shape, x.shape[3])) for x in (self.v, self.k))
        torch.ops.transnormer_kernels.masked_attend(
            self.k, self.q, self.do, self.v, self.mask, self.used, dv, dk, self.heads, shares, self.parts, True
        )
        return dk, dv

    def mask_gradient(self, mask: Tensor) -> Tensor:
        parts = 2 if self.tf32 else self.parts
        tensors = self.do, self.q, self.k, self.v
        do, q, k, v = (_operand(x, parts) for x in tensors) if self.tf32 else tensors
        return mask_gradient(do, q, k, v, mask, parts)


def _narrow_backward(of: _Operands, wanted: list[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v with the operands' widths."""
    dq = of.attend(of.do, of.v, of.k) if wanted[0] else None
    shares = _shares(of.k, of.heads, *of.groups)
    dk = dv = None
    if wanted[1] and wanted[2] and of.dtype != torch.float32:
        dk, dv = of.attend_both(shares)
    else:
        dk = of.attend(of.v, of.do, of.q, transposed=True, shares=shares) if wanted[1] else None
        dv = of.attend(of.k, of.q, of.do, transposed=True, shares=shares) if wanted[2] else None
    dk, dv = (None if x is None else sum_groups(x, groups) for x, groups in zip((dk, dv), of.groups, strict=True))
    return dq, dk, dv


def _parts(q: Tensor, wide: bool) -> int:
    """Of how many bfloat16 numbers each value is made; 1 where it goes in as it is."""
    if q.dtype != torch.float32:
        return 1
    if torch.get_float32_matmul_precision() == "highest":
        return 3
    return 2 if wide else 1


def _operand(x: Tensor, parts: int) -> Tensor:
    """x as the kernels read it; with several parts (B, heads · parts, T, width)."""
    if parts > 1:
        x = rows_contiguous(x)
        out = x.new_empty((x.shape[0], x.shape[1] * parts, x.shape[2], -(-x.shape[3] // 8) * 8), dtype=torch.bfloat16)
        torch.ops.transnormer_kernels.split(x, out, parts)
        return out
    if x.dtype != torch.float32:
        return for_kernel(x)
    if more := -x.shape[3] % 4:
        x = F.pad(x, (0, more))
    return x if _whole(x) else x.clone(memory_format=torch.contiguous_format)


def _for_mask(mask: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
    """A mask as the kernels read it, a copy where need be, and of each of its tiles whether it is not all zero.

    The search reads the mask once, which pays where several heads share it or a copy is made anyway.
    """
    for dim in (0, 1):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    rows, columns = mask.shape[2:]
    dtype = q.dtype if mask.dtype == torch.bool else mask.dtype
    copy = None
    if mask.dtype == torch.bool or not _whole(mask):
        whole = 16 // dtype.itemsize
        copy = mask.new_empty((*mask.shape[:2], rows, -(-columns // whole) * whole), dtype=dtype)
    used = None
    if copy is not None or q.shape[0] * q.shape[1] >= SHARED * mask.shape[0] * mask.shape[1]:
        tiles = -(-rows // MASK_TILE), -(-columns // MASK_TILE)
        used = mask.new_empty((*mask.shape[:2], *tiles), dtype=torch.uint8)
        torch.ops.transnormer_kernels.prepare_mask(mask, copy, used)
    return mask if copy is None else copy[..., :columns], used


def _whole(x: Tensor) -> bool:
    """Whether the copy engine takes a mask, or float32: rows adjacent, 16-byte aligned, whole 16 bytes apart."""
    strides = [x.stride(i) * x.element_size() for i in range(3) if x.shape[i] > 1]
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in strides)


@functools.cache
def _shares_of(pairs: int, heads: int, tiles: int, group: int, slots: int) -> int:
    def rounds(shares: int) -> int:
        return -(-pairs * (heads // shares) * tiles // slots) * shares

    return min((n for n in range(group, 0, -1) if group % n == 0), key=rounds)


def _shares(k: Tensor, heads: int, groups_k: int, groups_v: int) -> int:
    """Neighbouring query heads whose gradients of k and v one block adds up: as many as leave nobody idle."""
    group = math.gcd(heads // groups_k, heads // groups_v)
    return _shares_of(k.shape[0], heads, -(-k.shape[2] // ROWS), group, multiprocessors(k.device))
