"""The recurrence from chunk to chunk, in about 2·√N parallel steps over N chunks instead of N in a row.

Blocks of √N chunks run side by side, each from zero; then the state that enters each block is found, block after
block; then every chunk of a block adds its share of it. Products of λ are formed forwards only, never divided.
"""

import itertools
import math

import torch
from torch import Tensor


def scan(update: Tensor, carry: Tensor, start: Tensor | None, sequence: Tensor | None, reverse: bool = False) -> Tensor:
    """What arrives at each chunk: `start` at the first one of a sequence, else `carry · arrived + update` one before.

    Args:
        update: (B, H, N, D, E).
        carry: (H, N, 1, 1).
        start: (sequences, H, D, E), or None for zeros.
        sequence: (N,) sequence of each chunk in a batch of one; None means that each row is one sequence.
        reverse: walk from the right, where a sequence begins with its last chunk.

    Returns:
        (B, H, N, D, E).
    """
    chunks = update.shape[2]
    size = chunks if chunks <= 16 else math.isqrt(chunks - 1) + 1  # chunks of a block
    blocks = -(-chunks // size) if chunks else 0
    arrived = torch.empty_like(update)
    share = torch.empty_like(carry)  # what of the state that enters a block is left at a chunk: (H, N, 1, 1)
    state = torch.zeros_like(update[:, :, :blocks])  # of each block, walking: (B, H, blocks, D, E)
    left = torch.ones_like(carry[:, :blocks])
    if start is not None and sequence is None and chunks:
        state[:, :, -1 if reverse else 0] = start
    begins = None if sequence is None else _begins(sequence, reverse)
    for place in _walk(size if chunks else 0, reverse):
        column = slice(place, None, size)  # this place in every block; the last block may be shorter
        here = slice(len(range(place, chunks, size)))
        if begins is not None and sequence is not None:
            begin = begins[column]
            fresh = 0.0 if start is None else start[sequence[column]].transpose(0, 1)[None]
            state[:, :, here] = torch.where(begin, fresh, state[:, :, here])
            left[:, here] = left[:, here].masked_fill(begin, 0)
        arrived[:, :, column] = state[:, :, here]
        share[:, column] = left[:, here]
        torch.addcmul(update[:, :, column], state[:, :, here], carry[:, column], out=state[:, :, here])
        left[:, here] *= carry[:, column]
    if blocks > 1:
        _add_entering(arrived, share, _entering(state, left, reverse), size, isolate=begins is not None)
    return arrived


def _walk(count: int, reverse: bool) -> range:
    return range(count - 1, -1, -1) if reverse else range(count)


def _begins(sequence: Tensor, reverse: bool) -> Tensor:
    """Whether a sequence begins at a chunk: (N, 1, 1)."""
    change, edge = sequence.diff() != 0, torch.ones_like(sequence[:1], dtype=torch.bool)
    return torch.cat([change, edge] if reverse else [edge, change])[:, None, None]


def _entering(state: Tensor, left: Tensor, reverse: bool) -> Tensor:
    """The state that enters each block, from what the blocks made of zero and what they leave of what enters."""
    entering = torch.zeros_like(state)
    order = list(_walk(state.shape[2], reverse))
    for block, following in itertools.pairwise(order):
        kept = torch.where(left[:, block] > 0, entering[:, :, block], 0.0)
        entering[:, :, following] = torch.addcmul(state[:, :, block], kept, left[:, block])
    return entering


def _add_entering(arrived: Tensor, share: Tensor, entering: Tensor, size: int, isolate: bool) -> None:
    """Add each chunk's share of what enters its block; `isolate` keeps NaN from passing where the share is zero."""
    for place in range(size):
        column = slice(place, None, size)
        part = share[:, column]
        value = entering[:, :, : part.shape[1]]
        arrived[:, :, column].addcmul_(torch.where(part > 0, value, 0.0) if isolate else value, part)
