"""Time one token of decoding in a CUDA graph against a copy: `python -m scripts.benchmark_step --help`."""

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

from ops import lightning_attention_step
from ops.lightning_attention import cuda_unavailable_reason

from .measure import header, median_seconds


class Step(NamedTuple):
    """A captured graph, and what it works on, which must live as long."""

    graph: torch.cuda.CUDAGraph
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    states: Tensor  # (layers, batch, heads, width, width)


def captured_step(layers: int, batch: int, heads: int, width: int, dtype: torch.dtype) -> Step:
    """One token of every layer, each with a state of its own, as a graph."""
    q, k, v = torch.nn.functional.normalize(torch.randn(3, batch, heads, 1, width, device="cuda"), dim=-1).to(dtype)
    log_decay = -torch.rand(heads, device="cuda")
    states = torch.zeros(layers, batch, heads, width, width, device="cuda")

    def token() -> None:
        for state in states:
            lightning_attention_step(q, k, v, log_decay, state)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # builds and loads the kernels, which a capture can't
        token()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        token()
    return Step(graph, q, k, v, log_decay, states)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark_step", description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=128, help="of a head's q, k and v")
    parser.add_argument("--layers", type=int, default=24, help="steps of a graph, each with a state of its own")
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help="of q, k and v; states are float32")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args(argv)
    for name in ("heads", "width", "layers", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected a whole number from 1, got {getattr(args, name)}")
    if min(args.batch) < 1:
        parser.error(f"--batch: expected whole numbers from 1, got {min(args.batch)}")
    if not torch.cuda.is_available():
        parser.error("needs a GPU, torch.cuda.is_available() is False")
    device = torch.device("cuda")
    dtype = getattr(torch, args.dtype)
    x = torch.zeros(1, 1, 1, args.width, device=device, dtype=dtype)
    if (reason := cuda_unavailable_reason(x, x)) is not None:
        parser.error(reason)
    print(header(device))
    source = torch.zeros(2**28, device="cuda")  # a gigabyte, so from no cache
    target = torch.empty_like(source)
    most = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), args.repeats, device) / 1e9
    for batch in args.batch:
        step = captured_step(args.layers, batch, args.heads, args.width, dtype)
        median = median_seconds(step.graph.replay, args.repeats, device)
        rate = 2 * step.states.nbytes / median / 1e9
        print(
            f"batch {batch}: {median / args.layers * 1e6:.2f} us a layer and token, states read and written at"
            f" {rate:,.0f} GB/s, {rate / most:.0%} of the {most:,.0f} GB/s of a copy"
        )


if __name__ == "__main__":
    main()
