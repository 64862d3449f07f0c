"""Train a model with each backend of lightning attention: `python -m scripts.compare_backends --help`."""

import argparse
import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import yaml
from torch import Tensor

from model import TransnormerConfig, TransnormerForCausalLM
from ops.lightning_attention import cuda_unavailable_reason

from .measure import header

WARM_UP = 10  # steps before tokens per second are counted, and of the learning rate
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def batches(text: bytes, vocab_size: int, rows: int, tokens: int) -> Iterator[Tensor]:
    """Batches (rows, tokens) of a text, from the beginning again behind its end; a token is two bytes."""
    if len(text) < 2 * rows * tokens:
        raise ValueError(f"text: expected {2 * rows * tokens} bytes for a batch, got {len(text)}")
    pairs = torch.frombuffer(bytearray(text[: len(text) // 2 * 2]), dtype=torch.uint8).long().view(-1, 2)
    ids = (pairs[:, 0] * 256 + pairs[:, 1]) % vocab_size
    while True:
        yield from ids[: len(ids) // (rows * tokens) * rows * tokens].view(-1, rows, tokens)


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """Let lightning attention choose as it does ("cuda" where it can), or keep it from the kernels ("torch")."""
    kept = mock.patch("ops.lightning_attention.cuda_unavailable_reason", new=_kept_from_the_kernels)
    with kept if backend == "torch" else contextlib.nullcontext():
        yield


def _kept_from_the_kernels(q: Tensor, v: Tensor) -> str:  # a mock object would hold on to all arguments
    return "kept from the kernels"


def read_config(path: Path, **instead: str | int | None) -> TransnormerConfig:
    """That of the `model` of a training configuration, but for what is given."""
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML: {error}") from error
    shape = content.get("model") if isinstance(content, dict) else None
    if not isinstance(shape, dict):
        raise ValueError(f"{path}: expected keys with `model` among them, a mapping")
    return TransnormerConfig(**{**shape, **{name: value for name, value in instead.items() if value is not None}})


def train(config: TransnormerConfig, text: bytes, args: argparse.Namespace) -> tuple[list[float], float]:
    """Losses of all steps and tokens per second, with weights and batches that depend on the seed alone."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    model = TransnormerForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    losses: list[Tensor] = []
    start = 0.0
    for step, batch in zip(range(args.steps), batches(text, config.vocab_size, args.batch, args.tokens), strict=False):
        if step == WARM_UP:
            _wait(device)
            start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / WARM_UP)
        ids = batch.to(device)
        with torch.autocast(device.type, DTYPES[args.precision]):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())  # read at the end: no step waits for it
    _wait(device)
    timed = (args.steps - WARM_UP) * args.batch * args.tokens
    return [float(x) for x in losses], timed / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.compare_backends", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="of training: `model` is used, vocab_size too")
    parser.add_argument("--text", type=Path, required=True, help="what is learned, two bytes a token")
    parser.add_argument("--backends", nargs="+", choices=["torch", "cuda"], default=["torch", "cuda"])
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16", help="of autocast; weights are float32")
    parser.add_argument("--qk-norm", choices=["none", "l2"], help="instead of the config's")
    parser.add_argument("--heads", type=int, help="instead of the config's; their width is what is left for each")
    parser.add_argument("--steps", type=int, default=50, help=f"more than {WARM_UP}")
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.steps <= WARM_UP:
        parser.error(f"--steps: expected more than {WARM_UP}, got {args.steps}")
    for name, least in (("batch", 1), ("tokens", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected a whole number from {least}, got {getattr(args, name)}")
    if args.heads is not None and args.heads < 1:
        parser.error(f"--heads: expected a whole number from 1, got {args.heads}")
    if len(set(args.backends)) < len(args.backends):
        parser.error(f"--backends: expected each once, got {' '.join(args.backends)}")
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr: expected a number above 0, got {args.lr}")
    try:
        config = read_config(args.config, qk_norm=args.qk_norm, num_attention_heads=args.heads)
        text = args.text.read_bytes()
        next(batches(text, 1, args.batch, args.tokens))
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    try:
        x = torch.zeros(1, 1, 1, config.head_dim or 1, device=args.device, dtype=DTYPES[args.precision])
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: {args.device} can't be used: {error}")
    if "cuda" in args.backends:
        if x.device.type != "cuda":
            parser.error(f"--backends: cuda needs a GPU, --device is {args.device}")
        if (reason := cuda_unavailable_reason(x, x)) is not None:
            parser.error(f"--backends: cuda can't run: {reason}")
    print(header(torch.device(args.device)))
    runs: dict[str, list[float]] = {}
    for backend in args.backends:
        with only(backend):
            runs[backend], rate = train(config, text, args)
        print(f"{backend}: {rate:,.0f} tokens/s")
    shown = [i for i in range(args.steps) if i in (0, args.steps - 1) or (i + 1) % 10 == 0]
    print("step ", *(f"{i + 1:>9}" for i in shown))
    for backend, losses in runs.items():
        print(f"{backend:5}", *(f"{losses[i]:9.4f}" for i in shown))
    first = runs[args.backends[0]]
    for backend in args.backends[1:]:
        gaps = [abs(a - b) for a, b in zip(first, runs[backend], strict=True)]
        mean = sum(gaps) / len(gaps)
        print(f"{backend} against {args.backends[0]}: largest difference {max(gaps):.4f}, mean {mean:.4f}")


if __name__ == "__main__":
    main()
