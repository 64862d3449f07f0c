"""Time the CUDA kernels' forward and backward pass alone: `python -m scripts.benchmark_passes --help`."""

import argparse
from dataclasses import dataclass

import torch

from ops import lightning_cuda
from ops.kernels import unit_length

from .benchmark_cases import FLOORS, WIDE
from .measure import Run, header, median_seconds


@dataclass(frozen=True)
class Shape:
    """bfloat16 q (B, H, T, D), k and v (B, G, T, D); `bounds` of packed sequences."""

    B: int
    H: int
    T: int
    D: int
    E: int | None = None  # width of v, if not D
    G: int | None = None
    qk_norm: bool = False
    outside: bool = False  # unit length by kernels of its own
    bounds: tuple[int, ...] | None = None

    def floors(self, flops: float, bandwidth: float) -> tuple[float, float]:
        """Milliseconds that forward, and both passes, need at so many flop and bytes a second, whichever is more.

        4 D E flop a token and head, and 2.5 times that backward; 4 tensors read or written, and 7 backward.
        """
        d, e = self.D, self.E or self.D
        tokens, bytes_forward = self.B * self.H * self.T, 2 * (2 * d + 2 * e)
        times = ((4 * d * e, bytes_forward), (14 * d * e, bytes_forward + 2 * (4 * d + 3 * e)))
        forward, together = (tokens * max(work / flops, moved / bandwidth) * 1e3 for work, moved in times)
        return forward, together

    def __str__(self) -> str:
        marks = {
            f"E {self.E}": self.E,
            f"{self.G} key/value": self.G,
            "norm": self.qk_norm,
            "norm outside": self.outside,
            "packed": self.bounds,
        }
        return ", ".join([str((self.B, self.H, self.T, self.D)), *(mark for mark, given in marks.items() if given)])


OTHER_WIDTHS = [(640, 640), (896, 896), (768, 1536), (1024, 512)]  # D and E
GROUPS = {
    "base": [Shape(*shape) for shape in FLOORS],
    "norm": [
        Shape(*FLOORS[i], qk_norm=not outside, outside=outside) for i in (0, 2, 5, 6) for outside in (False, True)
    ],
    "group": [Shape(*FLOORS[i], G=1) for i in (0, 5)],
    "packed": [
        Shape(16, 16, 4096, 128),
        Shape(1, 16, 65536, 128, bounds=tuple(range(0, 65537, 4096))),
        Shape(1, 16, 65536, 128),
    ],
    "wide": [*(Shape(*shape) for shape in WIDE), *(Shape(8, 1, 4096, *widths) for widths in OTHER_WIDTHS)],
    "long": [Shape(64, 16, 2048, 128), Shape(1, 16, 131072, 128)],
}


def measured(shape: Shape, repeats: int, device: torch.device) -> tuple[float, float]:
    """Median milliseconds of forward and of backward."""
    random = torch.Generator(device=device).manual_seed(0)

    def vectors(heads: int, width: int, unit: bool) -> torch.Tensor:
        x = torch.randn(shape.B, heads, shape.T, width, device=device, generator=random)
        return (torch.nn.functional.normalize(x, dim=-1) if unit else x).bfloat16()

    shared = shape.G or shape.H
    q, k = (vectors(heads, shape.D, not shape.qk_norm and not shape.outside) for heads in (shape.H, shared))
    v, do = (vectors(heads, shape.E or shape.D, False) for heads in (shared, shape.H))
    log_decay = -torch.rand(shape.H, device=device, generator=random) * 0.1
    bounds = None if shape.bounds is None else torch.tensor(shape.bounds, device=device, dtype=torch.int32)
    lengths = lightning_cuda.empty_kept(q, k, v, shape.qk_norm)
    rest = v, log_decay, None, bounds, shape.qk_norm

    def queries_and_keys() -> tuple[torch.Tensor, torch.Tensor]:
        return (unit_length(q), unit_length(k)) if shape.outside else (q, k)

    kept = queries_and_keys()

    def median(run: Run) -> float:
        return median_seconds(run, repeats, device) * 1e3

    def forward() -> None:
        lightning_cuda.forward(*(*queries_and_keys(), *rest), False, lengths)

    def backward() -> None:
        grads = lightning_cuda.backward(do, None, *(*kept, *rest), lengths)
        if shape.outside:
            unit_length(q, grads[0])
            unit_length(k, grads[1])

    return median(forward), median(backward)


def ceilings(device: torch.device) -> tuple[float, float]:
    """Flop a second of a product of 8,192 × 8,192 bfloat16 matrices, bytes a second of a copy of 1 GiB."""
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    flops = 2 * 8192**3 / median_seconds(lambda: a @ b, 25, device)
    return flops, 2 * 2**30 / median_seconds(lambda: copy.copy_(source), 25, device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark_passes", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args(argv)
    for name in args.groups:
        if name not in GROUPS:
            parser.error(f"expected some of {', '.join(GROUPS)}, got {name}")
    if args.repeats < 1:
        parser.error(f"--repeats: expected a whole number from 1, got {args.repeats}")
    if not torch.cuda.is_available():
        parser.error("needs a GPU, torch.cuda.is_available() is False")
    if (reason := lightning_cuda.library_unavailable_reason(torch.cuda.current_device())) is not None:
        parser.error(reason)
    device = torch.device("cuda")
    print(header(device))
    flops, bandwidth = ceilings(device)
    print(f"a matrix product {flops / 1e12:.0f} TFLOP/s, a copy {bandwidth / 1e12:.2f} TB/s")
    for name in args.groups or GROUPS:
        for shape in GROUPS[name]:
            forward, backward = measured(shape, args.repeats, device)
            together, floors = forward + backward, shape.floors(flops, bandwidth)
            print(
                f"{shape!s:45} forward {forward:.4f} ms, backward {backward:.4f}, together {together:.4f};"
                f" {forward / floors[0]:.2f} and {together / floors[1]:.2f} times the floors"
                f" {floors[0]:.4f}, {floors[1]:.4f}"
            )


if __name__ == "__main__":
    main()
