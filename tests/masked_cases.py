"""Cases of masked attention for its tests: shapes, masks, types, writings, the plain formula, how a case is run."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from operator_cases import case_id, laid_out, moved, spread_of_unit_length
from torch import Tensor

from ops import flash_linear_attention
from ops.numerics import unit_length

BLOCKS = {"q_block_size": 16, "kv_block_size": 24}
EVERY_WRITING: list[dict[str, Any]] = [
    {"implementation": "normal"},
    *({"implementation": name, **BLOCKS} for name in ("split", "block", "inplace")),
    {"implementation": "auto"},  # on a GPU the kernels, but for float64
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
    mask: str | None = "float"  # of q's type; or "float32", "bool"
    per_row: bool = True
    per_head: bool = True
    mask_layout: str = "contiguous"  # one of `laid_out`, or of MASK_LAYOUTS
    pattern: str = "full"  # or one of PATTERNS: what of the mask is not zero

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


def _tiles(rows: int, columns: int) -> Tensor:
    """Half of the tiles of 64 × 64, at random."""
    kept = torch.rand(-(-rows // 64), -(-columns // 64), generator=torch.Generator().manual_seed(0)) < 0.5
    return kept.repeat_interleave(64, 0).repeat_interleave(64, 1)[:rows, :columns]


def _last(rows: int, columns: int) -> Tensor:
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    kept[-1, -1] = True
    return kept


PATTERNS: dict[str, Callable[[int, int], Tensor]] = {
    "causal": lambda rows, columns: torch.ones(rows, columns, dtype=torch.bool).tril(),
    "tiles": _tiles,
    "last": _last,
    "none": lambda rows, columns: torch.zeros(rows, columns, dtype=torch.bool),
}
MASK_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # NaN is what no one should read
    "every-second": lambda x: torch.stack((x, torch.full_like(x, math.nan)), -1).flatten(3)[..., ::2],
    "shifted": lambda x: torch.nn.functional.pad(x, (3, 2), value=math.nan)[..., 3:-2],
    "one-row": lambda x: x[:, :, :1].clone().expand(x.shape),
    "one-column": lambda x: x[..., :1].clone().expand(x.shape),
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
    tensors: dict[str, Tensor | None] = {n: moved(x, device, dtype) for n, x in (("q", q), ("k", k), ("v", v))}
    if case.mask is None:
        return {**tensors, "mask": None}
    mask = _mask(case, random)
    if case.mask == "bool":
        (mask if mask._base is None else mask._base).clamp_(min=0)
    return {
        **tensors,
        "mask": moved(mask, device, {"float": dtype, "float32": torch.float32}.get(case.mask, torch.bool)),
    }


def _mask(case: MaskedCase, random: torch.Generator) -> Tensor:
    shape = (case.B if case.per_row else 1, case.H if case.per_head else 1, case.Lq, case.Lk)
    if case.mask_layout in MASK_LAYOUTS:
        mask = MASK_LAYOUTS[case.mask_layout](torch.randn(shape, generator=random, dtype=torch.float64))
    else:
        mask = laid_out(case.mask_layout, shape, random)
    return mask if case.pattern == "full" else mask.mul_(PATTERNS[case.pattern](case.Lq, case.Lk))


def output_gradient(
    case: MaskedCase, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """A gradient of the output, laid out as the case says, or as (B, Lq, H, E) in memory."""
    layout = "transposed" if case.layout == "contiguous" else case.layout
    random = torch.Generator().manual_seed(seed + 1)
    return moved(laid_out(layout, (case.B, case.H, case.Lq, case.E), random), device, dtype)


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
    return (scores if mask is None else (scores * mask).to(v.dtype)) @ v


class Numbers(NamedTuple):
    """The type of a call, and what `torch.set_float32_matmul_precision` says of float32."""

    dtype: torch.dtype
    precision: str = "highest"

    def __str__(self) -> str:
        return str(self.dtype)[6:] + ("" if self.precision == "highest" else f"-{self.precision}")

    @property
    def eps(self) -> float | None:
        """Of a factor, where it is more than a float32's: tf32 has 10 bits behind the first."""
        return None if self.precision == "highest" else 2.0**-10


BFLOAT16, FLOAT16, FLOAT32 = Numbers(torch.bfloat16), Numbers(torch.float16), Numbers(torch.float32)
by_kernels = partial(flash_linear_attention, implementation="cuda")


def given(case: MaskedCase, numbers: Numbers, device: torch.device, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a case, and the gradient of its output."""
    return arguments(case, device, numbers.dtype, seed), output_gradient(case, device, numbers.dtype, seed)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name
