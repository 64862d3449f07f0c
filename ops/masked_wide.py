"""Masked attention of wide heads by the CUDA kernels: scores of a slab go through memory, and are multiplied there.

A multiprocessor holds no output of a wide head, so blocks that make scores again for each part of it would make them
many times. Here they are made once, a slab at a time: those of a few pairs of batch and head, or of queries and keys
of one pair:

    scores     P = (q kᵀ) ⊙ mask, A = (do vᵀ) ⊙ mask
    products   o = P v, dq = A k, dk = Aᵀ q, dv = Pᵀ do

float32 goes in as bfloat16 parts that add up to it, (B, heads × parts, T, width), contiguous, the part as the inner of
the two; `parts` is their number, 2 or 3, and 1 for 2-byte types, which go in as `for_kernel` makes them.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import multiprocessors, sum_groups

SQUARE, LONG, OF_PARTS = (192, 192), (128, 256), (128, 128)  # kSquareTile, kLongTile, kPartsTile of csrc/
SLAB_BYTES = 32 * 2**20, 64 * 2**20, 128 * 2**20  # of the scores that are in memory at a time: one of these,
WORTH = 1.1  # the smallest with which a pass takes at most so many times what it takes with the best
# Time that is no product's, in terms that a block adds up meanwhile, fitted to an H200:
FIXED = 256  # for each entry of a tile: its weight, its way to memory
SUMS = 512  # for each entry of an output that several slabs add to
LAUNCHES = 2**24  # for the two launches of a slab
MOST_KEYS = 2**16  # of a slab that is a part of a pair: a multiple of 64
GRADIENT_ROWS, GRADIENT_COLUMNS, GRADIENT_COLUMNS_OF_PARTS = 128, 128, 64  # of csrc/mask_gradient.h


Outputs = tuple[tuple[bool, int], ...]  # of each: whether scores are transposed for it, and its width
TileOf = Callable[[list[tuple[int, int, int]], int, int], tuple[int, int]]  # as `_tile`


class Slab(NamedTuple):
    """A range of scores: whole pairs of batch and head, or queries and keys of one pair."""

    pair: int
    pairs: int
    row: int
    rows: int
    key: int
    keys: int


class Plan(NamedTuple):
    """How scores are cut, the tiles of the products that make and use them, and about how long they take."""

    slabs: list[Slab]
    scores_tile: tuple[int, int]
    products_tile: tuple[int, int]
    time: float  # in terms that a block adds up


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, parts: int) -> Tensor:
    """o (B, H, Lq, E) in v's type, or in float32 from parts; E as in v."""
    heads = q.shape[1] // parts
    o = _output(q, v, heads, q.shape[2], parts)
    plan = _plan(q, mask, parts, (q.shape[3],), ((False, v.shape[3]),))
    sums = _Sums(plan, {"o": (False, v.shape[3])}, q)
    room = _room(q, plan, parts)
    for slab in plan.slabs:
        p = _scores(room, slab, parts)
        at = parts, slab.pair, slab.row, slab.key
        torch.ops.transnormer_kernels.masked_scores(q, k, None, None, mask, p, None, heads, *at, plan.scores_tile[1])
        # o of P and v is what dq is of A and k.
        torch.ops.transnormer_kernels.masked_products(
            None, p, None, v, None, o, None, None, sums.of("o", slab), None, None, *at, plan.products_tile[1]
        )
    return o


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    parts: int,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, those that are wanted, in their type, or in float32 from parts; widths as they are."""
    heads = q.shape[1] // parts
    if not any(wanted):
        return None, None, None
    plan, outputs = _backward_plan(q, k, v, mask, parts, wanted)
    if len(plan.slabs) > 1 and wanted[2] and any(wanted[:2]):  # larger slabs of P, then of A, may end before both
        apart = (False, False, True), (*wanted[:2], False)
        if sum(_backward_plan(q, k, v, mask, parts, of)[0].time for of in apart) < plan.time:
            (*_, dv), (dq, dk, _) = (backward(do, q, k, v, mask, parts, of) for of in apart)
            return dq, dk, dv
    lengths = q.shape[2], k.shape[2], v.shape[2]
    dq, dk, dv = (
        _output(q, x, heads, length, parts) if want else None
        for x, length, want in zip((q, k, v), lengths, wanted, strict=True)
    )
    makes_a = dq is not None or dk is not None
    sums = _Sums(plan, outputs, q)
    room_of_p = None if dv is None else _room(q, plan, parts)
    room_of_a = _room(q, plan, parts) if makes_a else None
    p_of, a_of = (None, None) if dv is None else (q, k), (do, v) if makes_a else (None, None)
    for slab in plan.slabs:
        p, a = _scores(room_of_p, slab, parts), _scores(room_of_a, slab, parts)
        at = parts, slab.pair, slab.row, slab.key
        torch.ops.transnormer_kernels.masked_scores(*p_of, *a_of, mask, p, a, heads, *at, plan.scores_tile[1])
        torch.ops.transnormer_kernels.masked_products(
            p, a, q, k, do, dq, dk, dv, *(sums.of(name, slab) for name in ("dq", "dk", "dv")), *at,
            plan.products_tile[1],
        )  # fmt: skip
    groups = k.shape[1] // parts, v.shape[1] // parts
    return (
        dq,
        None if dk is None else sum_groups(dk, groups[0]),
        None if dv is None else sum_groups(dv, groups[1]),
    )


def mask_gradient(do: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, parts: int) -> Tensor:
    """Gradient of the mask, of its whole shape and its type, contiguous; heads of any width."""
    heads = q.shape[1] // parts
    out = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
    shares = _shares(q.shape[0] * heads, mask, parts, multiprocessors(q.device))
    partial = q.new_empty((shares, *mask.shape), dtype=torch.float32) if shares > 1 else None
    torch.ops.transnormer_kernels.mask_gradient(q, k, do, v, out, partial, heads, parts)
    return out


def _shares(pairs: int, mask: Tensor, parts: int, slots: int) -> int:
    """Among how many blocks the pairs that share an entry of the mask are divided, so that all have work."""
    batch, heads, queries, keys = mask.shape
    columns = GRADIENT_COLUMNS if parts == 1 else GRADIENT_COLUMNS_OF_PARTS
    tiles = batch * heads * -(-queries // GRADIENT_ROWS) * -(-keys // columns)
    pairs //= batch * heads

    def longest(shares: int) -> int:
        return -(-tiles * shares // slots) * -(-pairs // shares)

    return min(range(1, min(pairs, max(2 * slots // tiles, 1)) + 1), key=longest)


def _output(q: Tensor, x: Tensor, heads: int, length: int, parts: int) -> Tensor:
    shape = (q.shape[0], heads, length, x.shape[3])
    return x.new_empty(shape, dtype=x.dtype if parts == 1 else torch.float32)


def _room(q: Tensor, plan: Plan, parts: int) -> Tensor:
    """For the scores of any slab: the first is the largest."""
    first = plan.slabs[0]
    return q.new_empty(first.pairs * parts * first.rows * (-(-first.keys // 8) * 8))


def _scores(room: Tensor | None, slab: Slab, parts: int) -> Tensor | None:
    """Those of a slab, in rows of whole 16 bytes."""
    if room is None:
        return None
    shape = (slab.pairs, parts, slab.rows, -(-slab.keys // 8) * 8)
    return room[: math.prod(shape)].view(shape)


def _backward_plan(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, parts: int, wanted: tuple[bool, bool, bool]
) -> tuple[Plan, dict[str, tuple[bool, int]]]:
    """And by name of what is wanted: whether scores are transposed for it, and its width."""
    every = {"dq": (False, q.shape[3]), "dk": (True, k.shape[3]), "dv": (True, v.shape[3])}
    outputs = {name: of for (name, of), want in zip(every.items(), wanted, strict=True) if want}
    depths = (v.shape[3],) * any(wanted[:2]) + (q.shape[3],) * wanted[2]
    return _plan(q, mask, parts, depths, tuple(outputs.values())), outputs


def _plan(q: Tensor, mask: Tensor, parts: int, depths: tuple[int, ...], outputs: Outputs) -> Plan:
    """For P or A or both, of which the products are so deep, and what is made of them."""
    sizes = q.shape[0] * q.shape[1] // parts, mask.shape[2], mask.shape[3]
    return _best_plan(sizes, parts, depths, outputs, multiprocessors(q.device), tuple(SLAB_BYTES), MOST_KEYS, _tile)


@functools.lru_cache(maxsize=256)  # the planning of a pass takes longer than its launches
def _best_plan(
    sizes: tuple[int, int, int],
    parts: int,
    depths: tuple[int, ...],
    outputs: Outputs,
    slots: int,
    slab_bytes: tuple[int, ...],
    most_keys: int,
    tile_of: TileOf,
) -> Plan:
    plans = []
    for limit in slab_bytes:
        slabs = list(_slabs(*sizes, limit // (2 * parts * len(depths)), most_keys))
        plans.append(_plan_of(slabs, sizes, parts, depths, outputs, slots, tile_of))
        if len(slabs) == 1:
            break
    enough = WORTH * min(plan.time for plan in plans)
    return next(plan for plan in plans if plan.time <= enough)


def _plan_of(
    slabs: list[Slab],
    sizes: tuple[int, int, int],
    parts: int,
    depths: tuple[int, ...],
    outputs: Outputs,
    slots: int,
    tile_of: TileOf,
) -> Plan:
    first, products = slabs[0], parts * (parts + 1) // 2
    scores = [(first.rows, first.keys, depth * products) for depth in depths]
    for_rows = first.keys * products + SUMS * (first.keys < sizes[2])
    for_keys = first.rows * products + SUMS * (first.rows < sizes[1])
    of_scores = [
        (first.keys, width, for_keys) if transposed else (first.rows, width, for_rows) for transposed, width in outputs
    ]
    tiles = [OF_PARTS if parts > 1 else tile_of(x, first.pairs, slots) for x in (scores, of_scores)]
    time = sum(_time(tile, x, first.pairs, slots) for tile, x in zip(tiles, (scores, of_scores), strict=True))
    return Plan(slabs, tiles[0], tiles[1], len(slabs) * (time + LAUNCHES))


def _slabs(pairs: int, queries: int, keys: int, limit: int, most_keys: int) -> Iterator[Slab]:
    """Cuts of no more scores than `limit`, but for 128 queries at least."""
    width = -(-keys // 8) * 8
    if queries * width <= limit:
        count = -(-pairs // (limit // (queries * width)))
        each = -(-pairs // count)
        for pair in range(0, pairs, each):
            yield Slab(pair, min(each, pairs - pair), 0, queries, 0, keys)
        return
    # As many queries as keys, so that gradients of either are sums as long, and blocks that make them take as long.
    columns = _even(keys, min(max(math.isqrt(limit), limit // max(queries, 128)), most_keys), 64)
    rows = _even(queries, limit // columns, 128)
    for pair in range(pairs):
        for row in range(0, queries, rows):
            for key in range(0, keys, columns):
                yield Slab(pair, 1, row, min(rows, queries - row), key, min(columns, keys - key))


def _even(length: int, most: int, whole: int) -> int:
    """Length of even cuts, the fewest, each a multiple of `whole` but the last, and at most `most` or one `whole`."""
    count = -(-length // (max(most // whole, 1) * whole))
    return -(-length // (count * whole)) * whole


def _tile(products: list[tuple[int, int, int]], pairs: int, slots: int) -> tuple[int, int]:
    """The tile with which blocks are done first with products of so many rows, columns and terms for each pair."""
    return min(LONG, SQUARE, key=lambda tile: _time(tile, products, pairs, slots))


def _time(tile: tuple[int, int], products: list[tuple[int, int, int]], pairs: int, slots: int) -> float:
    """Terms that one of `slots` blocks adds up while all run: whole rounds of tiles, of the mean depth."""
    counts = [-(-rows // tile[0]) * -(-columns // tile[1]) for rows, columns, _ in products]
    depth = sum(n * (terms + FIXED) for n, (*_, terms) in zip(counts, products, strict=True)) / sum(counts)
    return -(-sum(counts) * pairs // slots) * tile[0] * tile[1] * depth


class _Sums:
    """float32 sums of outputs to which several slabs add, in whole tiles; sums of a pair serve the next one too."""

    def __init__(self, plan: Plan, outputs: dict[str, tuple[bool, int]], like: Tensor) -> None:
        first, (tile_rows, tile_columns) = plan.slabs[0], plan.products_tile
        own = [slab for slab in plan.slabs if slab.pair == first.pair]
        self.step, self.sums = first.keys, {}
        for name, (transposed, width) in outputs.items():
            ranges = len({slab.key for slab in own}) if transposed else 1
            if len({slab.row if transposed else slab.key for slab in own}) == 1:
                continue
            rows = first.keys if transposed else first.rows
            tiles = -(-rows // tile_rows) * -(-width // tile_columns)
            self.sums[name] = like.new_empty((ranges, tiles * tile_rows * tile_columns), dtype=torch.float32)

    def of(self, name: str, slab: Slab) -> Tensor | None:
        """Where the slab adds to an output: dk and dv have sums for each range of keys."""
        if name not in self.sums:
            return None
        sums = self.sums[name]
        return sums[slab.key // self.step if len(sums) > 1 else 0]
