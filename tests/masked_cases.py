"""Cases of masked attention for its tests: shapes, masks, writings, the plain formula, and how a case is run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from operator_cases import case_id, laid_out, spread_of_unit_length
from torch import Tensor

from ops.numerics import unit_length

BLOCKS = {"q_block_size": 16, "kv_block_size": 24}
EVERY_WRITING: list[dict[str, Any]] = [
    {"implementation": "normal"},
    *({"implementation": name, **BLOCKS} for name in ("split", "block", "inplace")),
    {"implementation": "auto"},
]
ODD_BLOCKS = [
    {"implementation": name, "q_block_size": 1, "kv_block_size": 1000} for name in ("split", "block", "inplace")
]


def writing_id(options: dict[str, Any]) -> str:
    return "-".join(str(x) for x in options.values())


@dataclass(frozen=True)
class MaskedCase:
    """One call of `flash_linear_attention`; the id names what differs from the defaults."""

    Lq: int = 50
    Lk: int = 37
    B: int = 2
    H: int = 4
    Gk: int = 2
    Gv: int = 1
    D: int = 16
    E: int = 24
    layout: str = "contiguous"
    mask: str | None = "float"  # or "bool"
    per_row: bool = True
    per_head: bool = True
    mask_layout: str = "contiguous"

    def __str__(self) -> str:
        return case_id(self, "Lq", "Lk")


SHAPES = {
    "blocks": MaskedCase(48, 48, Gk=4, Gv=4, E=8),
    "ragged": MaskedCase(50, 37),
    "one-head": MaskedCase(17, 65, B=1, H=6, Gk=1, Gv=3, D=5, E=1),
    "one-token": MaskedCase(1, 1, B=1, H=1, Gk=1, Gv=1, D=1, E=1),
    "no-query": MaskedCase(0, 5, H=2, Gk=1, Gv=2, D=4, E=4),
    "no-key": MaskedCase(5, 0, H=2, Gk=2, Gv=1, D=4, E=4),
    "no-row": MaskedCase(5, 6, B=0, H=2, Gk=2, Gv=2, D=4, E=4),
}
MASKS: dict[str, dict[str, Any]] = {
    "none": {"mask": None},
    "full": {},
    "one-row": {"per_row": False},
    "one-head": {"per_head": False},
    "one": {"per_row": False, "per_head": False},
    "bool": {"mask": "bool", "per_row": False},
}


def masked_case(shape: str = "ragged", mask: str = "full", **others: Any) -> MaskedCase:
    return replace(SHAPES[shape], **MASKS[mask], **others)


def arguments(
    case: MaskedCase, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor | None]:
    """The tensor arguments of a case: q, k, v, mask (None where it has none)."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (
        laid_out(case.layout, (case.B, heads, tokens, width), random)
        for heads, tokens, width in ((case.H, case.Lq, case.D), (case.Gk, case.Lk, case.D), (case.Gv, case.Lk, case.E))
    )
    tensors: dict[str, Tensor | None] = {name: x.to(device, dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    if case.mask is None:
        return {**tensors, "mask": None}
    shape = (case.B if case.per_row else 1, case.H if case.per_head else 1, case.Lq, case.Lk)
    mask = laid_out(case.mask_layout, shape, random)
    return {**tensors, "mask": (mask > 0 if case.mask == "bool" else mask.to(dtype)).to(device)}


def output_gradient(
    case: MaskedCase, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """A gradient of the output, laid out as the case says, or as (B, Lq, H, E) in memory."""
    layout = "transposed" if case.layout == "contiguous" else case.layout
    random = torch.Generator().manual_seed(seed + 1)
    return laid_out(layout, (case.B, case.H, case.Lq, case.E), random).to(device, dtype)


def run_masked(
    operator: Callable[..., Tensor], tensors: dict[str, Tensor | None], do: Tensor, **options: Any
) -> dict[str, Tensor]:
    """Output and gradients by name."""
    leaves = {
        name: x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in tensors.items()
    }
    o = operator(**leaves, **options)
    given = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    grads = torch.autograd.grad(o, list(given.values()), do)
    return {"o": o.detach(), **{f"gradient of {n}": g for n, g in zip(given, grads, strict=True)}}


def masked_call(
    case: MaskedCase,
    operator: Callable[..., Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    truth: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    """Results of an operator on a case; with `truth` on the float64 copy of what the type can hold."""
    tensors, do = arguments(case, device, dtype, seed), output_gradient(case, device, dtype, seed)
    if truth:
        tensors, do = as_float64(tensors), do.double()
    return run_masked(operator, tensors, do, **options)


def as_float64(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: x if x is None or x.dtype == torch.bool else x.double() for name, x in tensors.items()}


def masked_spread(
    case: MaskedCase,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    qk_norm: bool = False,
) -> dict[str, Tensor]:
    """Root of the sum of the squared terms of each result: the same formula on squares sums the squares of them."""
    wide, do = as_float64(arguments(case, device, dtype, seed)), output_gradient(case, device, dtype, seed).double()
    units = {**wide, **{name: unit_length(wide[name]) for name in ("q", "k")}} if qk_norm else wide
    squares = {name: x if x is None or x.dtype == torch.bool else x.square() for name, x in units.items()}
    result = {name: x.clamp(min=0).sqrt() for name, x in run_masked(plain, squares, do.square()).items()}
    if qk_norm:
        for name in ("q", "k"):
            result[f"gradient of {name}"] = spread_of_unit_length(result[f"gradient of {name}"], wide[name])
    return result


def plain(*, q, k, v, mask, qk_norm=False):  # type: ignore[no-untyped-def]
    """The formula in the inputs' own type."""
    if qk_norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1, eps=1e-6) for x in (q, k))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT
    return (scores if mask is None else scores * mask) @ v
