"""Writings of masked linear attention `((q kᵀ) ⊙ M) v`, one beside the other: the same maths, block by block.

No softmax: a block of scores is final as soon as it is computed, so nothing is rescaled and nothing is saved but the
inputs. Backward, with P = (q kᵀ) ⊙ M and A = (do vᵀ) ⊙ M:
    dv = Pᵀ do,   dq = A k,   dk = Aᵀ q,   dM = (do vᵀ) ⊙ (q kᵀ), summed over the dims that M broadcasts.   (1)
Without a mask the products reassociate and nothing grows with Lq · Lk:
    o = q S,   S = kᵀ v,   dq = do Sᵀ,   dS = qᵀ do,   dk = v dSᵀ,   dv = k dS.                             (2)
All tensors here have H heads and the type that sums are kept in.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def normal_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The scores of all queries and keys at once: (B, H, Lq, Lk) is held in memory."""
    return ((q @ k.mT) * mask) @ v


def normal_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, mask_grad: bool) -> Gradients:
    """Equations (1) on all queries and keys at once."""
    scores = q @ k.mT  # (B, H, Lq, Lk)
    a = do @ v.mT  # (B, H, Lq, Lk)
    dmask = (a * scores).sum_to_size(mask.shape) if mask_grad else None
    dv = (scores * mask).mT @ do
    a = a * mask
    return a @ k, a.mT @ q, dv, dmask


def split_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, q_block: int, kv_block: int) -> Tensor:
    """Ragged blocks by `torch.split`: no padding, the last block of each side is as long as it is."""
    blocks = []
    for qi, mi in zip(q.split(q_block, 2), mask.split(q_block, 2), strict=True):
        o = torch.zeros_like(qi[..., :1] * v[:, :, :1])  # (B, H, q_block, E)
        for kj, vj, mij in _keys(k, v, mi, kv_block):
            o += normal_forward(qi, kj, vj, mij)
        blocks.append(o)
    return torch.cat(blocks, dim=2)


def split_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    mask_grad: bool,
    q_block: int,
    kv_block: int,
) -> Gradients:
    """Equations (1) block by block, each block's part added to its rows of dq, dk, dv and dM."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dmask = torch.zeros_like(mask, dtype=q.dtype) if mask_grad else None
    rows = zip(q.split(q_block, 2), do.split(q_block, 2), mask.split(q_block, 2), strict=True)
    for i, (qi, doi, mi) in enumerate(rows):
        at_q = slice(i * q_block, i * q_block + qi.shape[2])
        for j, (kj, vj, mij) in enumerate(_keys(k, v, mi, kv_block)):
            at_k = slice(j * kv_block, j * kv_block + kj.shape[2])
            dqi, dkj, dvj, dmij = normal_backward(doi, qi, kj, vj, mij, mask_grad)
            dq[:, :, at_q] += dqi
            dk[:, :, at_k] += dkj
            dv[:, :, at_k] += dvj
            if dmask is not None and dmij is not None:
                dmask[:, :, at_q, at_k] = dmij
    return dq, dk, dv, dmask


def linear_forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Equations (2), forward: `q (kᵀ v)`."""
    return q @ (k.mT @ v)


def linear_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Equations (2), backward."""
    state, dstate = k.mT @ v, q.mT @ do  # (B, H, D, E)
    return do @ state.mT, v @ dstate.mT, k @ dstate, None


def _keys(k: Tensor, v: Tensor, mask: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(k.split(block, 2), v.split(block, 2), mask.split(block, 3), strict=True)
