"""Call every CUDA kernel of lightning attention on small shapes, to be run under `compute-sanitizer`."""

import argparse
import itertools
from unittest import mock

import torch

from ops import lightning_attention, lightning_attention_step, lightning_cuda, lightning_wide

DTYPES = ["bfloat16", "float16", "float32"]
WIDTHS = [(64, 64), (128, 128), (256, 64), (40, 24), (136, 200), (200, 136)]
# For what some widths alone need: rows not aligned, unit length outside of passes.
MORE_WIDTHS = [(7, 33), (7, 136), (40, 136), (128, 136), (24, 24), (1032, 8)]
# A wide head for each tile, in chunks of 64 tokens.
WIDE = [(264, 136), (512, 256)]


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


def every(dtype: torch.dtype, device: torch.device, backend: str = "cuda") -> int:
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
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # tf32
        with mock.patch.object(lightning_cuda, "_segment_length", return_value=(64, 0)):
            call(64, 64, dtype, device, False, False, backend)
        torch.set_float32_matmul_precision(precision)
        calls += 1
    for e in (24, 33):
        q, k, v = (torch.randn(3, 2, 1, width, device=device).to(dtype) for width in (40, 40, e))
        log_decay, state = torch.full((2,), -0.1, device=device), torch.zeros(3, 2, 40, e, device=device)
        lightning_attention_step(q, k, v, log_decay, state)
    return calls


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.every_kernel", description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--fill", action="store_true", help="fill memory that PyTorch hands out, for initcheck")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a GPU, torch.cuda.is_available() is False")
    if args.fill:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for name in args.dtypes:
        calls = every(getattr(torch, name), torch.device("cuda"))
        torch.cuda.synchronize()
        print(f"{name}: {calls} calls")


if __name__ == "__main__":
    main()
