"""A library, no command: what the benchmark of the operators measures: named cases, their nominal work and traffic.

Shapes: q (B, H, Lq, D), k (B, Gk, Lk, D), v (B, Gv, Lk, E), o and its gradient do (B, H, Lq, E); lightning attention
has Lq = Lk, called T in its ids.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

OPERATORS = ("masked", "lightning")
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}  # and their short names
MASKS = ("shared", "none", "bool", "full", "causal")
PASSES: list[dict[str, Any]] = [{"backward": False}, {}, {"mask_grad": True}]
CHUNK = 64  # tokens of a chunk in the nominal work of lightning attention


@dataclass(frozen=True)
class Case:
    """One call: shapes, type and options; str() of it is its id."""

    operator: str
    B: int
    H: int
    Gk: int
    Gv: int
    Lq: int
    Lk: int
    D: int
    E: int
    dtype: str = "float32"
    # Of the masked operator: (1, 1, Lq, Lk), none, the same of bool, (B, H, Lq, Lk), or the first with zeros above the
    # diagonal.
    mask: str = "shared"
    mask_grad: bool = False
    qk_norm: bool = False  # the operator divides q and k by their length
    unit: bool = False  # q and k are drawn with length 1
    backward: bool = True

    def __post_init__(self) -> None:
        valid = {"operator": OPERATORS, "dtype": tuple(DTYPES), "mask": MASKS}
        for name, choices in valid.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        for name in ("B", "H", "Gk", "Gv", "Lq", "Lk", "D", "E"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected a whole number from 1, got {value}")
        for name in ("Gk", "Gv"):
            if self.H % (value := getattr(self, name)):
                raise ValueError(f"{name}: expected a divisor of {self.H} heads, got {value}")
        if self.operator == "lightning" and self.mask != "none":
            raise ValueError(f"mask: expected none for lightning attention, got {self.mask}")
        if self.operator == "lightning" and self.Lq != self.Lk:
            raise ValueError(f"Lk: expected Lq = {self.Lq} for lightning attention, got {self.Lk}")
        if self.qk_norm and self.backward and self.D == 1:
            raise ValueError("D: expected at least 2 with qk_norm, since its gradient of one number is 0, got 1")
        if self.mask_grad and not (self.backward and self.mask in ("shared", "full", "causal")):
            raise ValueError(
                f"mask_grad: expected a backward pass and mask shared, full or causal, got mask {self.mask}"
            )

    def __str__(self) -> str:
        length = "L" if self.operator == "masked" else "T"
        parts = [self.operator, f"B{self.B}", f"H{self.H}", f"{length}{self.Lq}", f"D{self.D}"]
        parts += [f"Lk{self.Lk}"] if self.Lk != self.Lq else []
        parts += [f"E{self.E}"] if self.E != self.D else []
        parts += [DTYPES[self.dtype]]
        if self.operator == "masked" and self.mask != "shared":
            parts += ["nomask" if self.mask == "none" else self.mask]
        if (self.Gk, self.Gv) != (self.H, self.H):
            parts += [f"kv{self.Gk}" if self.Gk == self.Gv else f"k{self.Gk}v{self.Gv}"]
        marks = {"norm": self.qk_norm, "unit": self.unit, "dmask": self.mask_grad, "fwd": not self.backward}
        return "-".join(parts + [mark for mark, given in marks.items() if given])

    @property
    def share(self) -> int:
        """Query heads of the smallest group that shares no key or value head with another."""
        return math.lcm(self.H // self.Gk, self.H // self.Gv)


def masked(B: int, H: int, L: int, D: int, dtype: str = "float32", kv: int | None = None, **others: Any) -> Case:
    """A case of the masked operator with as many keys as queries."""
    return Case("masked", B, H, kv or H, kv or H, L, L, D, D, dtype, **others)


def lightning(B: int, H: int, T: int, D: int, dtype: str = "float32", **others: Any) -> Case:
    """A case of lightning attention."""
    return Case("lightning", B, H, H, H, T, T, D, D, dtype, mask="none", **others)


def _writings() -> list[Case]:
    """Every writing of the masked operator, for narrow heads and for a wide one."""
    both = [(heads, width, dtype) for heads, width in ((12, 64), (1, 768)) for dtype in ("float32", "bfloat16")]
    every = [masked(16, heads, 1024, width, dtype, **how) for heads, width, dtype in both for how in PASSES]
    return every + [masked(16, 12, 1024, 64, dtype, kv=1) for dtype in ("float32", "bfloat16")]


def _masked() -> list[Case]:
    """What the kernels of masked attention are held to."""
    narrow = [masked(16, 12, 1024, 64, "bfloat16", **how) for how in PASSES]
    others = [
        masked(*shape, dtype, backward=backward, **how)
        for shape, dtype, how in (
            ((16, 12, 1024, 64), "bfloat16", {"kv": 1}),
            ((16, 12, 1024, 64), "float32", {}),
            ((16, 1, 1024, 768), "bfloat16", {}),
            ((2, 12, 8192, 64), "bfloat16", {}),
            ((2, 12, 8192, 64), "bfloat16", {"mask": "causal"}),
            ((2, 12, 4096, 192), "bfloat16", {}),
            ((16, 6, 1024, 128), "float32", {}),
            ((4, 1, 4096, 768), "float32", {}),
        )
        for backward in (False, True)
    ]
    return narrow + others


def _lengths(*tokens: int) -> list[Case]:
    """The masked operator with and without a mask, and lightning attention, on one shape."""
    with_mask, without = (
        [masked(1, 4, n, 64, mask=mask, mask_grad=mask == "shared") for n in tokens] for mask in ("shared", "none")
    )
    return with_mask + without + [lightning(1, 4, n, 64) for n in tokens]


def _unit(shapes: list[tuple[int, int, int, int]]) -> list[Case]:
    """Lightning attention in bfloat16, q and k of unit length, without and with the backward pass."""
    return [
        lightning(*shape, "bfloat16", unit=True, backward=backward) for shape in shapes for backward in (False, True)
    ]


FLOORS = [  # the shapes (B, H, T, D) of the published comparison of lightning attention, unit-length q and k
    (16, 16, 2048, 128), (8, 16, 4096, 128), (2, 16, 16384, 128), (1, 16, 65536, 128), (1, 32, 131072, 128),
    (8, 12, 4096, 64), (8, 4, 4096, 256), (8, 1, 4096, 768), (8, 2, 4096, 1024),
]  # fmt: skip
# Heads that no block holds.
WIDE = [(8, 2, 4096, 384), (8, 1, 4096, 512), *FLOORS[-2:], (1, 1, 32768, 768), (16, 1, 512, 768)]
GROUPS: dict[str, list[Case]] = {
    "writings": _writings(),
    "masked": _masked(),
    "lengths": _lengths(256, 512, 1024, 2048, 4096),
    "long": _lengths(8192, 16384),
    "memory": [masked(1, 4, 4096, 64, **how) for how in PASSES],
    "scaling": [lightning(1, 8, 2**n, 64) for n in range(10, 17)],
    "kernels": _unit(FLOORS),
    "wide": _unit(WIDE),
    "quick": [
        Case("masked", 2, 4, 2, 1, 96, 80, 16, 24, mask_grad=True),
        *(lightning(2, 4, tokens, 16) for tokens in (128, 256)),
    ],
}


def work(case: Case) -> int:
    """Nominal flop of a call, the same for every implementation: 2 for each multiplication of the maths below.

    Masked, of Lq · Lk pairs: q kᵀ (D) and P v (E); backward q kᵀ again (D), do vᵀ (E), Pᵀ do (E), A k (D) and Aᵀ q
    (D); the mask's gradient is a product of two of these, element by element, and counts nothing.
    No mask, D · E each: kᵀ v (Lk) and q S (Lq); backward kᵀ v again (Lk), qᵀ do and do Sᵀ (Lq), v dSᵀ and k dS (Lk).
    Lightning attention, a token and head: 2 products of D · E with the state and C (D + E) flop inside a chunk of
    C = 64, where half the pairs are masked; backward 2.5 times that.
    """
    heads = case.B * case.H
    if case.operator == "lightning":
        forward = heads * case.Lq * (4 * case.D * case.E + CHUNK * (case.D + case.E))
        return forward * 7 // 2 if case.backward else forward
    if case.mask == "none":
        lengths = case.Lk + case.Lq + (3 * case.Lk + 2 * case.Lq if case.backward else 0)
        return 2 * heads * case.D * case.E * lengths
    widths = case.D + case.E + (3 * case.D + 2 * case.E if case.backward else 0)
    return 2 * heads * case.Lq * case.Lk * widths


def traffic(case: Case) -> int:
    """Nominal bytes of a call: each input read and each output written once, in both passes.

    Forward reads q, k, v and the mask and writes o; backward reads these inputs and do and writes their gradients.
    """
    item = getattr(torch, case.dtype).itemsize
    rows = case.B * case.Lq * case.H
    qkv = item * (rows * case.D + case.B * case.Lk * (case.Gk * case.D + case.Gv * case.E))
    o = item * rows * case.E
    pairs = case.Lq * case.Lk * (case.B * case.H if case.mask == "full" else 1)
    mask = {"none": 0, "bool": 1}.get(case.mask, item) * pairs
    forward = qkv + mask + o
    return forward + (qkv + mask + o + qkv + (mask if case.mask_grad else 0) if case.backward else 0)
