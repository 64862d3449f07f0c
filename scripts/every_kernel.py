"""Call every CUDA kernel on small shapes, to be run under `compute-sanitizer`."""

import argparse
import itertools
from collections.abc import Sequence
from unittest import mock

import torch
from torch import Tensor

from ops import (
    flash_linear_attention,
    lightning_attention,
    lightning_attention_step,
    lightning_cuda,
    lightning_wide,
    masked_cuda,
    masked_wide,
)

from .measure import float32_products

DTYPES = ["bfloat16", "float16", "float32"]
OPERATORS = ["lightning", "masked"]
WIDTHS = [(64, 64), (128, 128), (256, 64), (40, 24), (136, 200), (200, 136)]
# For what some widths alone need: rows not aligned, unit length outside of passes.
MORE_WIDTHS = [(7, 33), (7, 136), (40, 136), (128, 136), (24, 24), (1032, 8)]
# A wide head for each tile, in chunks of 64 tokens.
WIDE = [(264, 136), (512, 256)]
# Of masked attention: heads of 64 and of 128, rows not aligned; "own": of the type of q.
MASKED_WIDTHS = [(64, 64), (128, 96), (40, 24), (7, 33)]
MASKS = ["own", "float32", "bool", "columns", "one row"]
MASKED_WIDE = [(72, 264), (200, 7)]


def call(
    d: int,
    e: int,
    dtype: torch.dtype,
    device: torch.device,
    qk_norm: bool,
    packed: bool,
    backend: str,
    tokens: int = 147,
) -> None:
    """Forward and backward with all arguments and all gradients."""
    batch, heads = 1 if packed else 2, 2
    of_v = heads if packed else 1  # one for all: then gradients of two heads are added up
    q, k, v = (
        torch.randn(batch, n, tokens, width, device=device).to(dtype).requires_grad_()
        for n, width in ((heads, d), (1, d), (of_v, e))
    )
    bounds = torch.tensor([0, 70, 70, tokens], device=device, dtype=torch.int32) if packed else None
    state = torch.randn(3 if packed else batch, heads, d, e, device=device, requires_grad=True)
    log_decay = torch.full((heads,), -0.1, device=device, requires_grad=True)
    o, final = lightning_attention(
        q, k, v, log_decay, qk_norm=qk_norm, initial_state=state, output_final_state=True, cu_seqlens=bounds,
        backend=backend,
    )  # fmt: skip
    torch.autograd.backward((o, final), (torch.randn_like(o), torch.randn_like(final)))


def every_lightning(dtype: torch.dtype, device: torch.device, backend: str) -> int:
    """How many calls of `lightning_attention` there were."""
    plan, calls = lightning_cuda._segment_length, 0
    cases = itertools.product(WIDTHS, (False, True), (0, 64), (False, True))
    for (d, e), qk_norm, length, packed in (*cases, *((widths, True, 64, False) for widths in MORE_WIDTHS)):
        cut = (length, 0)
        with mock.patch.object(lightning_cuda, "_segment_length", (lambda *_, cut=cut: cut) if length else plan):
            call(d, e, dtype, device, qk_norm, packed, backend)
        calls += 1
    chunks = mock.patch.multiple(lightning_wide, CHUNKS=dict.fromkeys(lightning_wide.CHUNKS, 64), ONE_CHUNK=0)
    for (d, e), length, packed in itertools.product(WIDE, (64, 192), (False, True)):
        with chunks, mock.patch.object(lightning_wide, "_segment_length", return_value=(length, 0)):
            call(d, e, dtype, device, False, packed, backend)
        calls += 1
    for packed in (False, True):  # all tokens in one chunk, of several tiles
        call(*WIDE[1], dtype, device, False, packed, backend, tokens=600)
        calls += 1
    if dtype == torch.float32:
        with float32_products("high"), mock.patch.object(lightning_cuda, "_segment_length", return_value=(64, 0)):
            call(64, 64, dtype, device, False, False, backend)
        calls += 1
    for e in (24, 33):
        q, k, v = (torch.randn(3, 2, 1, width, device=device).to(dtype) for width in (40, 40, e))
        log_decay, state = torch.full((2,), -0.1, device=device), torch.zeros(3, 2, 40, e, device=device)
        lightning_attention_step(q, k, v, log_decay, state)
    return calls


def mask_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `MASKS` names it; two tiles of it are zeros."""
    mask = torch.randn(shape, device=device)
    mask[..., :128, :64] = 0
    match kind:
        case "own":
            return mask.to(dtype)
        case "float32":
            return mask
        case "bool":
            return mask > 0
        case "columns":
            return mask.to(dtype).mT.contiguous().mT
        case "one row":
            return mask[:, :, :1].to(dtype).expand(shape)
    raise ValueError(kind)


def masked_call(
    d: int,
    e: int,
    dtype: torch.dtype,
    device: torch.device,
    implementation: str,
    mask: str = "own",
    *,
    keys: int = 200,
    shared: bool = True,
    wanted: str = "qkv",
    qk_norm: bool = False,
) -> None:
    """Forward and backward; `wanted`: whose gradients, besides the mask's. `shared`: the mask, by all heads."""
    batch, heads, queries = 2, 4, 147
    q, k, v = (
        torch.randn(batch, n, tokens, width, device=device).to(dtype).requires_grad_(name in wanted)
        for name, n, tokens, width in (("q", heads, queries, d), ("k", 2, keys, d), ("v", 1, keys, e))
    )
    weights = mask_of(mask, (1, 1, queries, keys) if shared else (batch, heads, queries, keys), dtype, device)
    weights = weights.detach().requires_grad_(weights.is_floating_point())
    o = flash_linear_attention(q, k, v, weights, qk_norm=qk_norm, implementation=implementation)
    o.backward(torch.randn_like(o))


def every_narrow(dtype: torch.dtype, device: torch.device, implementation: str) -> int:
    """How many calls of `flash_linear_attention` there were, of heads whose output a multiprocessor holds."""
    calls = 0
    for shares in (1, 2):  # of the gradients of a tile of keys, and of the mask's
        with (
            mock.patch.object(masked_cuda, "_shares_of", return_value=shares),
            mock.patch.object(masked_wide, "_shares", return_value=shares),
        ):
            for (d, e), mask in itertools.product(MASKED_WIDTHS, MASKS if shares == 1 else MASKS[:2]):
                masked_call(d, e, dtype, device, implementation, mask, keys=200 if d % 8 == 0 else 131)
                calls += 1
    for wanted in ("q", "k", "v"):
        masked_call(64, 64, dtype, device, implementation, wanted=wanted, qk_norm=True)
    masked_call(64, 64, dtype, device, implementation, shared=False)  # whose tiles are not searched
    return calls + 4


def every_wide(dtype: torch.dtype, device: torch.device, implementation: str) -> int:
    """How many calls of `flash_linear_attention` there were, of heads whose scores lie in memory."""
    calls = 0
    whole = {"SLAB_BYTES": masked_wide.SLAB_BYTES, "MOST_KEYS": masked_wide.MOST_KEYS}
    cuts = (whole, {"SLAB_BYTES": [1], "MOST_KEYS": 64})  # whole pairs, and queries and keys of one
    tiles = (masked_wide.SQUARE, masked_wide.LONG)  # float32 has its own
    for cut, tile in itertools.product(cuts, tiles if dtype != torch.float32 else tiles[:1]):
        with mock.patch.multiple(masked_wide, _tile=lambda *_, tile=tile: tile, **cut):
            for d, e, mask in (*((136, 136, mask) for mask in MASKS), *((d, e, "own") for d, e in MASKED_WIDE)):
                masked_call(d, e, dtype, device, implementation, mask, keys=200 if e % 8 == 0 else 131)
                calls += 1
    return calls


def every_masked(dtype: torch.dtype, device: torch.device, implementation: str) -> int:
    """How many calls of `flash_linear_attention` there were."""
    calls = 0
    for precision in (
        ("highest", "high") if dtype == torch.float32 else ("highest",)
    ):  # in three parts, and as tf32 or in two
        with float32_products(precision):
            calls += every_narrow(dtype, device, implementation) + every_wide(dtype, device, implementation)
    return calls


def every(
    dtype: torch.dtype,
    device: torch.device,
    backend: str = "cuda",
    implementation: str = "cuda",
    operators: Sequence[str] = OPERATORS,
) -> int:
    """How many calls of the operators there were."""
    calls = every_lightning(dtype, device, backend) if "lightning" in operators else 0
    return calls + (every_masked(dtype, device, implementation) if "masked" in operators else 0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.every_kernel", description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--fill", action="store_true", help="fill memory that PyTorch hands out, for initcheck")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a GPU, torch.cuda.is_available() is False")
    if args.fill:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for name in args.dtypes:
        calls = every(getattr(torch, name), torch.device("cuda"), operators=args.operators)
        torch.cuda.synchronize()
        print(f"{name}: {calls} calls")


if __name__ == "__main__":
    main()
