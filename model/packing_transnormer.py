"""Sequences inside a batch: from padding masks, packed documents and position ids to one layout for the operator."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packing(NamedTuple):
    """How the B·T tokens of a batch lie as sequences, in a batch of one.

    Args:
        cu_seqlens: (sequences + 1,) int32, their bounds.
        order: (B·T,) token at each place, or None when the tokens lie in order already.
        padded: sequences come in pairs, the tokens of a row and then its padding, which has a state of its own.
    """

    cu_seqlens: Tensor
    order: Tensor | None = None
    padded: bool = False

    def pack(self, x: Tensor) -> Tensor:
        """(B, H, T, D) to (1, H, B·T, D), sequences one after the other."""
        x = x.transpose(0, 1).flatten(1, 2)[None]
        return x if self.order is None else x.index_select(2, self.order)

    def unpack(self, x: Tensor, batch: int) -> Tensor:
        """(1, H, B·T, D) back to (B, H, T, D)."""
        x = x[0] if self.order is None else torch.empty_like(x[0]).index_copy_(1, self.order, x[0])
        return x.unflatten(1, (batch, -1)).transpose(0, 1)

    def documents(self, tokens: int) -> Tensor:
        """Index of the document of each token, of packed documents that lie in order: (1, T)."""
        place = torch.arange(tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        return (torch.searchsorted(self.cu_seqlens, place, right=True) - 1)[None]

    def positions(self, tokens: int) -> Tensor:
        """Positions of packed documents that lie in order, each from zero: (1, T)."""
        place = torch.arange(tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        return place - self.cu_seqlens[self.documents(tokens)]

    def pack_state(self, state: Tensor | None) -> Tensor | None:
        """States of the rows to states of the sequences: padding starts from zero."""
        if state is None or not self.padded:
            return state
        return torch.stack([state, torch.zeros_like(state)], dim=1).flatten(0, 1)

    def unpack_state(self, state: Tensor) -> Tensor:
        """States of the sequences to states of the rows."""
        return state[::2] if self.padded else state


def from_attention_mask(valid: Tensor) -> Packing:
    """Packing of padded rows: valid (B, T) bool. A padded position neither writes nor decays, wherever it stands."""
    batch, tokens = valid.shape
    order = valid.logical_not().to(torch.int8).argsort(dim=1, stable=True)  # the tokens of a row, then its padding
    order = order + torch.arange(batch, device=valid.device)[:, None] * tokens
    count = valid.sum(1)
    lengths = torch.stack([count, tokens - count], dim=1).flatten()
    return Packing(_bounds(lengths), order.flatten(), padded=True)


def from_position_ids(position_ids: Tensor) -> Packing | None:
    """Packing of documents whose positions start again, (B, T); None when every row is one sequence."""
    starts = position_ids.diff(dim=1) != 1
    if not bool(starts.any()):
        return None
    starts = F.pad(starts, (1, 0), value=True).flatten()  # every row starts a sequence
    edges = starts.nonzero()[:, 0]
    lengths = torch.cat([edges, edges.new_tensor([starts.numel()])]).diff()
    return Packing(_bounds(lengths))


def from_cu_seqlens(cu_seqlens: Tensor, batch: int, device: torch.device) -> Packing:
    """Packing of documents by their bounds, as the library's packed collators pass them."""
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q: expected packed documents in a batch of 1, got a batch of {batch}")
    return Packing(cu_seqlens.to(device, torch.int32))


def _bounds(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
