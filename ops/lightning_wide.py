"""Lightning attention of wide heads by the CUDA kernels, in the 2-byte types: states and scores first, then outputs.

The state of a wide head fills several multiprocessors, so no block can keep it and make outputs from it. Chunks are
therefore long, and what passes between them goes through memory, in the inputs' type:

    prepare   states before each chunk, and the masked scores inside of it
    outputs   o = r (q S) + P v, and the like for gradients, as products of large tiles

The backward pass prepares the same of gradients, and reads what the forward pass has left. `csrc/README.md` has the
equations and what bounds each kernel.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import cut, multiprocessors, padded_width, sum_groups

NARROW = 256  # the widest head for which one block keeps all of the keys' side of the state
SQUARE, LONG = (192, 192), (128, 256)  # kSquareTile and kLongTile of csrc/wide.h
CHUNKS = {SQUARE: 384, LONG: 512}  # tokens: whole tiles of scores; states take D / 384 or D / 512 of what q takes
ONE_CHUNK = 2048  # tokens that may be one chunk: kMostChunk of csrc/wide.h


class Prepared(NamedTuple):
    """What outputs are made of, in the inputs' type."""

    scores: Tensor  # (B, H, T, chunk)
    states: Tensor  # (B × chunks of T tokens, H, D, E), or (0,) where one chunk is enough


def is_wide(q: Tensor, v: Tensor) -> bool:
    """Whether these kernels take heads of q and v.

    A block of the narrow ones keeps up to 256 × 64 values of the state. Wider keys would take several, which make the
    same scores, and whose outputs would have to be added up; wider values, as many blocks that read the same keys.
    """
    return q.dtype in (torch.bfloat16, torch.float16) and max(q.shape[3], v.shape[3]) > NARROW


def empty_prepared(q: Tensor, v: Tensor) -> Prepared:
    """Room for what `forward` prepares."""
    batch, heads, tokens, _ = q.shape
    chunk, d, e = _chunk(q, v), padded_width(q), padded_width(v)
    chunks = -(-tokens // chunk)
    states = (batch * chunks, heads, d, e) if chunks > 1 else (0,)
    return Prepared(q.new_empty((batch, heads, tokens, chunk)), q.new_empty(states))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    final: Tensor | None,
    prepared: Prepared,
) -> Tensor:
    """o (B, H, T, E); fills `final` and `prepared`. Tensors are as `for_kernel` makes them."""
    chunk, rows = _chunk(q, v), _tile(q, v)[0]
    table = cut(q, chunk, chunk, cu_seqlens).table
    ticket = _prepare(k, v, q, k, log_decay, initial, cu_seqlens, table, final, prepared, reverse=False)
    out = v.new_empty((*q.shape[:3], v.shape[3]))
    torch.ops.transnormer_kernels.wide_forward(
        q, v, log_decay, table, _states(prepared), _rounded(initial, q), prepared.scores, out, ticket, chunk, rows
    )
    return out


def backward(
    do: Tensor,
    grad_state: Tensor | None,
    grad_initial: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    prepared: Prepared,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; fills `grad_initial`."""
    chunk, rows = _chunk(q, v), _tile(q, v)[0]
    table = cut(q, chunk, chunk, cu_seqlens).table
    of_grads = empty_prepared(q, v)
    ticket = _prepare(q, do, do, v, log_decay, grad_state, cu_seqlens, table, grad_initial, of_grads, reverse=True)
    dq, dk, dv = (x.new_empty((*q.shape[:3], x.shape[3])) for x in (q, k, v))
    torch.ops.transnormer_kernels.wide_backward(
        do, q, k, v, log_decay, table, _states(prepared), _rounded(initial, q), prepared.scores, _states(of_grads),
        _rounded(grad_state, q), of_grads.scores, dq, dk, dv, ticket, chunk, rows,
    )  # fmt: skip
    return dq, sum_groups(dk, k.shape[1]), sum_groups(dv, v.shape[1])


def _prepare(
    a: Tensor,
    b: Tensor,
    rows: Tensor,
    columns: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    table: Tensor | None,
    final: Tensor | None,
    prepared: Prepared,
    *,
    reverse: bool,
) -> Tensor:
    """States that gain aᵀ b for each token, and scores of rows and columns. Returns the ticket for outputs."""
    batch, tokens, heads = a.shape[0], a.shape[2], prepared.scores.shape[1]
    chunk, (tile_rows, tile_columns) = _chunk(a, b), _tile(a, b)
    tiles = -(-a.shape[3] // tile_rows) * -(-b.shape[3] // tile_columns)
    segments = cut(a, *_segment_length(batch * heads * tiles, tokens, chunk, multiprocessors(a.device)), cu_seqlens)
    carry = None
    if segments.number > 1:
        carry = a.new_empty((batch * segments.number, heads, a.shape[3], b.shape[3]), dtype=torch.float32)
    ticket = a.new_empty(1, dtype=torch.int32)
    torch.ops.transnormer_kernels.wide_prepare(
        a, b, rows, columns, log_decay, initial, segments.table, table, carry, _states(prepared), prepared.scores,
        final, ticket, segments.length, chunk, tile_rows, reverse,
    )  # fmt: skip
    return ticket


def _states(prepared: Prepared) -> Tensor | None:
    return prepared.states if prepared.states.numel() > 0 else None


def _rounded(state: Tensor | None, like: Tensor) -> Tensor | None:
    """A state as outputs read it."""
    return None if state is None else state.to(like.dtype, memory_format=torch.contiguous_format)


def _tile(q: Tensor, v: Tensor) -> tuple[int, int]:
    """Rows and columns of the tiles of products: those of which the state's are padded less."""

    def padded(tile: tuple[int, int]) -> int:
        return -(-q.shape[3] // tile[0]) * tile[0] * -(-v.shape[3] // tile[1]) * tile[1]

    return min(SQUARE, LONG, key=padded)


def _chunk(q: Tensor, v: Tensor) -> int:
    """Tokens of a chunk: all, while scores of all take no more than states, T (D + E) products a token for 4 D E."""
    tokens, d, e = q.shape[2], padded_width(q), padded_width(v)
    alone = tokens <= ONE_CHUNK and tokens * (d + e) <= 4 * d * e
    all_tokens = max(-(-tokens // 64), 1) * 64
    return all_tokens if alone else min(CHUNKS[_tile(q, v)], all_tokens)


CUTTING = 256  # tokens that a block walks through in the time in which the states of segments are added up


@functools.cache
def _segment_length(chains: int, tokens: int, chunk: int, slots: int) -> tuple[int, int]:
    """Tokens of a segment, and of the longest packed sequence for which cutting does not pay.

    `chains`: heads and tiles of all rows; `slots`: blocks that run at a time. All segments of a cut sequence but the
    last are walked over twice: to find the state after each (of the first with the initial state, of others with
    none, which are then added up), and with the state before it.
    """

    def walked(length: int) -> int:
        count = -(-tokens // length)
        if count == 1:
            return -(-chains // slots) * length
        return (-(-chains * count // slots) + -(-chains * (count - 1) // slots)) * length + CUTTING

    def length_of(count: int) -> int:
        return -(-tokens // (count * chunk)) * chunk

    best = min(map(length_of, range(1, max(2 * slots // chains, 1) + 1)), key=walked)
    return best, walked(best)
