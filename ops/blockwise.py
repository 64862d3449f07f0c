"""Writings of masked linear attention `((q kᵀ) ⊙ M) v`, one beside the other: the same maths, block by block.

No softmax: a block of scores is final as soon as it is computed, so nothing is rescaled and nothing is saved but the
inputs. Backward, with P = (q kᵀ) ⊙ M and A = (do vᵀ) ⊙ M:
    dv = Pᵀ do,   dq = A k,   dk = Aᵀ q,   dM = (do vᵀ) ⊙ (q kᵀ), summed over the dims that M broadcasts.   (1)
Without a mask the products reassociate and nothing grows with Lq · Lk:
    o = q S,   S = kᵀ v,   dq = do Sᵀ,   dS = qᵀ do,   dk = v dSᵀ,   dv = k dS.                             (2)
Here q (B, H, Lq, D), k (B, H, Lk, D), v (B, H, Lk, E) and do (B, H, Lq, E) have the type of operands, the mask
(B|1, H|1, Lq, Lk) any; results have the type of sums, except that dM has the type that the caller names.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import compute_type, product

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def normal_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The scores of all queries and keys at once: (B, H, Lq, Lk) is held in memory."""
    scores = product(q, k.mT)  # (B, H, Lq, Lk)
    return product(_weighed(scores, mask, q.dtype), v)


def normal_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dmask_type: torch.dtype | None
) -> Gradients:
    """Equations (1) on all queries and keys at once; without a `dmask_type` the mask's gradient is left out."""
    scores, a = product(q, k.mT), product(do, v.mT)  # (B, H, Lq, Lk)
    dmask = None if dmask_type is None else (a * scores).sum_to_size(mask.shape).to(dmask_type)
    p = _weighed(scores, mask, q.dtype)
    dv = product(p.mT, do)
    del scores, p
    a = _weighed(a, mask, q.dtype)
    return product(a, k), product(a.mT, q), dv, dmask


def _weighed(scores: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """scores ⊙ M as an operand of the next product, in place of the scores where the type is theirs."""
    out = scores if scores.dtype == dtype else torch.empty_like(scores, dtype=dtype)
    return torch.mul(scores, mask, out=out)


def split_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, q_block: int, kv_block: int) -> Tensor:
    """Ragged blocks by `torch.split`: no padding, the last block of each side is as long as it is."""
    o = _sums_like(q, width=v.shape[3])
    for oi, qi, mi in zip(*(x.split(q_block, 2) for x in (o, q, mask)), strict=True):
        for kj, vj, mij in zip(k.split(kv_block, 2), v.split(kv_block, 2), mi.split(kv_block, 3), strict=True):
            oi += normal_forward(qi, kj, vj, mij)
    return o


def split_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dmask_type: torch.dtype | None,
    q_block: int,
    kv_block: int,
) -> Gradients:
    """Equations (1) block by block: the gradients are split like their tensors, each block adds to its rows."""
    dq, dk, dv = (_sums_like(x) for x in (q, k, v))
    dmask = mask if dmask_type is None else mask.new_empty(mask.shape, dtype=dmask_type)
    for doi, qi, mi, dqi, dmi in zip(*(x.split(q_block, 2) for x in (do, q, mask, dq, dmask)), strict=True):
        columns = zip(*(x.split(kv_block, 2) for x in (k, v, dk, dv)), strict=True)
        masks = zip(mi.split(kv_block, 3), dmi.split(kv_block, 3), strict=True)
        for (kj, vj, dkj, dvj), (mij, dmij) in zip(columns, masks, strict=True):
            parts = normal_backward(doi, qi, kj, vj, mij, dmask_type)
            dqi += parts[0]
            dkj += parts[1]
            dvj += parts[2]
            if parts[3] is not None:
                dmij.copy_(parts[3])
    return dq, dk, dv, None if dmask_type is None else dmask


def block_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, q_block: int, kv_block: int) -> Tensor:
    """Indexed blocks of one size: lengths are padded with zeros to whole blocks, and the result is cut back."""
    tokens = q.shape[2]
    q, k, v = _padded(q, q_block), _padded(k, kv_block), _padded(v, kv_block)  # (B, H, blocks, size, width)
    o = _sums_like(q, width=v.shape[-1])
    for i in range(q.shape[2]):
        for j in range(k.shape[2]):
            o[:, :, i] += normal_forward(q[:, :, i], k[:, :, j], v[:, :, j], _mask_block(mask, i, j, q_block, kv_block))
    return o.flatten(2, 3)[:, :, :tokens]


def block_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dmask_type: torch.dtype | None,
    q_block: int,
    kv_block: int,
) -> Gradients:
    """Equations (1) for block i of the queries and block j of the keys; what padding added is cut off."""
    rows, columns = q.shape[2], k.shape[2]
    do, q, k, v = _padded(do, q_block), _padded(q, q_block), _padded(k, kv_block), _padded(v, kv_block)
    dq, dk, dv = (_sums_like(x) for x in (q, k, v))
    dmask = None if dmask_type is None else mask.new_empty(mask.shape, dtype=dmask_type)
    for i in range(q.shape[2]):
        for j in range(k.shape[2]):
            mij = _mask_block(mask, i, j, q_block, kv_block)
            parts = normal_backward(do[:, :, i], q[:, :, i], k[:, :, j], v[:, :, j], mij, dmask_type)
            dq[:, :, i] += parts[0]
            dk[:, :, j] += parts[1]
            dv[:, :, j] += parts[2]
            if dmask is not None and parts[3] is not None:
                here = dmask[:, :, i * q_block : (i + 1) * q_block, j * kv_block : (j + 1) * kv_block]
                here.copy_(parts[3][:, :, : here.shape[2], : here.shape[3]])
    dq, dk, dv = (x.flatten(2, 3) for x in (dq, dk, dv))
    return dq[:, :, :rows], dk[:, :, :columns], dv[:, :, :columns], dmask


def inplace_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, q_block: int, kv_block: int) -> Tensor:
    """Every buffer is allocated before the loop, every product is written into one of them."""
    buffers = _Buffers(("scores",), q, mask, q_block, kv_block, q_block * v.shape[3])
    o = _sums_like(q, width=v.shape[3])
    q, k, v, o_rows = (x.contiguous().flatten(0, 1) for x in (q, k, v, o))  # (B·H, tokens, width)
    for rows, columns in _blocks(mask, q_block, kv_block):
        scores = buffers.product("scores", q[:, rows], k[:, columns].mT)
        p = buffers.weighed(scores, mask[:, :, rows, columns])
        o_rows[:, rows].add_(buffers.product("part", p, v[:, columns]))
    return o


def inplace_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dmask_type: torch.dtype | None,
    q_block: int,
    kv_block: int,
) -> Gradients:
    """Equations (1), each product in a buffer that was there before the loop and serves every block."""
    width = max(q_block * q.shape[3], kv_block * k.shape[3], kv_block * v.shape[3])
    names = ("scores", "a") if dmask_type is None else ("scores", "a", "terms")
    buffers = _Buffers(names, q, mask, q_block, kv_block, width)
    dq, dk, dv = (_sums_like(x) for x in (q, k, v))
    dmask = None if dmask_type is None else mask.new_empty(mask.shape, dtype=dmask_type)
    every = (do, q, k, v, dq, dk, dv)  # a product would copy what has strides of zero, block by block
    do, q, k, v, dq_rows, dk_rows, dv_rows = (x.contiguous().flatten(0, 1) for x in every)
    for rows, columns in _blocks(mask, q_block, kv_block):
        doi, qi, kj, vj, mij = do[:, rows], q[:, rows], k[:, columns], v[:, columns], mask[:, :, rows, columns]
        scores, a = buffers.product("scores", qi, kj.mT), buffers.product("a", doi, vj.mT)
        if dmask is not None:
            dmask[:, :, rows, columns].copy_(buffers.summed(a, scores, mij))
        p = buffers.weighed(scores, mij)
        dv_rows[:, columns].add_(buffers.product("part", p.mT, doi))
        a = buffers.weighed(a, mij)
        dq_rows[:, rows].add_(buffers.product("part", a, kj))
        dk_rows[:, columns].add_(buffers.product("part", a.mT, qi))
    return dq, dk, dv, dmask


class _Buffers:
    """Memory for the products of one block, handed out in the shape of the block at hand."""

    def __init__(
        self, scores: tuple[str, ...], q: Tensor, mask: Tensor, q_block: int, kv_block: int, width: int
    ) -> None:
        self.heads = q.shape[:2]
        wide, block = compute_type(q.dtype), self.heads.numel() * q_block * kv_block
        self.memory = {name: q.new_empty(block, dtype=wide) for name in scores}
        self.memory["operand"] = self.memory["scores"] if q.dtype == wide else q.new_empty(block)
        self.memory["part"] = q.new_empty(self.heads.numel() * width, dtype=wide)
        self.memory["mask"] = q.new_empty(mask.shape[:2].numel() * q_block * kv_block, dtype=wide)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.memory[name][: math.prod(shape)].view(shape)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a b (B·H, rows, columns) with sums in float32, written into a buffer."""
        out = self.take(name, (a.shape[0], a.shape[1], b.shape[2]))
        if a.dtype == out.dtype:
            return torch.bmm(a, b, out=out)
        return torch.bmm(a, b, out_dtype=out.dtype, out=out)

    def weighed(self, scores: Tensor, mask: Tensor) -> Tensor:
        """scores ⊙ M as an operand of the next product."""
        if mask.dtype != scores.dtype:  # PyTorch would allocate the conversion
            mask = self.take("mask", mask.shape).copy_(mask)
        out = scores if self.memory["operand"].dtype == scores.dtype else self.take("operand", scores.shape)
        torch.mul(scores.unflatten(0, self.heads), mask, out=out.unflatten(0, self.heads))
        return out

    def summed(self, a: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        """a ⊙ scores, summed over the dims that the mask broadcasts."""
        terms = torch.mul(a, scores, out=self.take("terms", a.shape)).unflatten(0, self.heads)
        dims = [dim for dim in (0, 1) if mask.shape[dim] == 1]
        return torch.sum(terms, dims, keepdim=True, out=self.take("mask", mask.shape)) if dims else terms


def _blocks(mask: Tensor, q_block: int, kv_block: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each block of the mask."""
    for i in range(0, mask.shape[2], q_block):
        for j in range(0, mask.shape[3], kv_block):
            yield slice(i, i + q_block), slice(j, j + kv_block)


def linear_forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Equations (2), forward: `q (kᵀ v)`."""
    return product(q, product(k.mT, v).to(q.dtype))


def linear_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Equations (2), backward."""
    state, dstate = (x.to(q.dtype) for x in (product(k.mT, v), product(q.mT, do)))  # (B, H, D, E)
    return product(do, state.mT), product(v, dstate.mT), product(k, dstate), None


def _sums_like(x: Tensor, width: int | None = None) -> Tensor:
    """Zeros to add up results in: x's shape, or with another last dim, and the type of sums."""
    return x.new_zeros((*x.shape[:-1], x.shape[-1] if width is None else width), dtype=compute_type(x.dtype))


def _padded(x: Tensor, block: int) -> Tensor:
    """(B, H, L, D) to (B, H, blocks, block, D), zeros after the end."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def _mask_block(mask: Tensor, i: int, j: int, q_block: int, kv_block: int) -> Tensor:
    """Block (i, j) of the mask in full size: a padded copy of the whole mask would be as large as the scores."""
    here = mask[:, :, i * q_block : (i + 1) * q_block, j * kv_block : (j + 1) * kv_block]
    missing = q_block - here.shape[2], kv_block - here.shape[3]
    return F.pad(here, (0, missing[1], 0, missing[0])) if any(missing) else here
