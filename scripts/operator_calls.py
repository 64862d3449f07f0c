"""A library, no command: calls of the two operators, their implementations, inputs and truth.

Shapes: q (B, H, Lq, D), k (B, Gk, Lk, D), v (B, Gv, Lk, E), o and its gradient do (B, H, Lq, E); lightning attention
has Lq = Lk, called T. Our own implementations are those of `ops`; peers are what else there is for the same maths:
    plain     `((q kᵀ) ⊙ mask) v` in the inputs' own type, by autograd
    compiled  the same by torch.compile
    fla       `chunk_simple_gla` of flash-linear-attention, in its own layout (B, T, H, D)
    softmax   PyTorch's causal scaled dot product attention: other maths of the same shape, so it is not checked
"""

import itertools
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import flash_linear_attention, lightning_attention, reference
from ops.decay import alibi_slopes, causal_decay
from ops.lightning_attention import BACKENDS
from ops.lightning_attention import cuda_unavailable_reason as lightning_reason
from ops.linear_attention import IMPLEMENTATIONS
from ops.linear_attention import cuda_unavailable_reason as masked_reason
from ops.numerics import MIN_LENGTH, expand_heads

from .benchmark_cases import Case
from .measure import installed

# Largest error allowed before a time is taken, relative to the largest value: some ulps of sums of thousands of terms.
TOLERANCE = {"float64": 1e-10, "float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
SCORE_COPIES = 6  # (T, T) tensors of a head that the materialised mask holds at once, its mask included

Results = dict[str, Tensor]


class WrongResult(ArithmeticError):
    """An implementation whose numbers are not the operator's."""


@dataclass
class Inputs:
    """Tensors of a call; `weight` is the mask, or lightning attention's log-decay (H,)."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    weight: Tensor | None

    def bytes(self) -> int:
        return sum(0 if x is None else x.nbytes for x in (self.q, self.k, self.v, self.do, self.weight))

    def copy(self) -> "Inputs":
        weight = None if self.weight is None else self.weight.clone()
        return Inputs(self.q.clone(), self.k.clone(), self.v.clone(), self.do.clone(), weight)


def inputs(case: Case, device: torch.device) -> Inputs:
    """Normally distributed inputs, the same at each call; a mask of bool keeps every other weight."""
    random = torch.Generator(device).manual_seed(0)
    wide = torch.float64 if case.dtype == "float64" else torch.float32

    def normal(*shape: int, unit: bool = False) -> Tensor:
        x = torch.randn(shape, generator=random, device=device, dtype=wide)
        return (F.normalize(x, dim=-1) if unit else x).to(getattr(torch, case.dtype))

    q = normal(case.B, case.H, case.Lq, case.D, unit=case.unit)
    k = normal(case.B, case.Gk, case.Lk, case.D, unit=case.unit)
    v, do = normal(case.B, case.Gv, case.Lk, case.E), normal(case.B, case.H, case.Lq, case.E)
    if case.operator == "lightning":
        return Inputs(q, k, v, do, -alibi_slopes(case.H, device).to(wide))
    if case.mask == "none":
        return Inputs(q, k, v, do, None)
    mask = normal(*((case.B, case.H) if case.mask == "full" else (1, 1)), case.Lq, case.Lk)
    if case.mask == "causal":
        mask = mask.tril_()
    return Inputs(q, k, v, do, mask > 0 if case.mask == "bool" else mask)


def implementations(case: Case) -> tuple[str, ...]:
    """Names of what computes a case, ours first; without a mask all our writings are one, called linear."""
    if case.operator == "lightning":
        return *(name for name in BACKENDS if name != "auto"), "normal", "plain", "fla", "softmax"
    ours = tuple(name for name in IMPLEMENTATIONS if name != "auto") if case.mask != "none" else ("linear",)
    return *ours, "plain", "compiled", "softmax"


def unavailable_reason(case: Case, implementation: str, given: Inputs, score_memory: float) -> str | None:
    """Why an implementation can't take a case on the device of its inputs, or None if it can.

    `score_memory`: bytes that a mask materialised for lightning attention may take.
    """
    on_gpu = given.q.is_cuda
    if implementation == "cuda":
        return masked_reason(given.q, given.v) if case.operator == "masked" else lightning_reason(given.q, given.v)
    if implementation == "fla":
        return _fla_reason(case, on_gpu)
    if implementation == "softmax" and case.Gk != case.Gv:
        return f"takes as many key as value heads, not {case.Gk} and {case.Gv}"
    if implementation == "compiled":
        if on_gpu:
            return None if installed("triton") else "torch.compile needs triton on a GPU"
        compiler = os.environ.get("CXX", "g++")
        return (
            None if shutil.which(compiler) else f"torch.compile needs a C++ compiler on a CPU, {compiler} is not found"
        )
    if heads_at_once(case, implementation, score_memory) == 0:
        need, limit = _score_bytes(case) * case.share / 2**30, score_memory / 2**30
        return f"the scores of the fewest heads take {need:.3g} GiB, more than --score-memory {limit:.3g}"
    return None


def _fla_reason(case: Case, on_gpu: bool) -> str | None:
    if not installed("fla"):
        return "not installed: pip install flash-linear-attention"
    if not on_gpu:
        return "needs a CUDA GPU"
    if case.dtype == "float64":
        return "takes no float64"
    return None if case.Gk == case.Gv == case.H else f"takes as many key and value as query heads, {case.H}"


def heads_at_once(case: Case, implementation: str, memory: float) -> int:
    """The most heads, whole key/value groups that divide H, whose materialised scores fit into `memory` bytes, or 0.

    Only lightning attention by its mask goes by groups of heads; anything else takes all heads at once.
    """
    if case.operator == "masked" or implementation not in ("normal", "plain"):
        return case.H
    fits = memory / _score_bytes(case)
    return max((n for n in range(case.share, case.H + 1, case.share) if case.H % n == 0 and n <= fits), default=0)


def _score_bytes(case: Case) -> int:
    return SCORE_COPIES * (8 if case.dtype == "float64" else 4) * case.B * case.Lq * case.Lk


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, qk_norm: bool = False) -> Tensor:
    """`((q kᵀ) ⊙ mask) v` as one writes it, in the inputs' own type."""
    if qk_norm:
        q, k = (F.normalize(x, dim=-1, eps=MIN_LENGTH) for x in (q, k))
    k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    scores = q @ k.mT  # (B, H, Lq, Lk)
    return (scores if mask is None else scores * mask) @ v


def _function(case: Case, implementation: str) -> Callable[..., Any]:
    """An implementation as a function of q, k, v and the mask or log-decay."""
    norm = case.qk_norm
    if implementation == "plain":
        return partial(plain, qk_norm=norm)
    if implementation == "compiled":
        torch.compiler.reset()  # each case is a graph of its own, and torch allows a function only a few
        return torch.compile(partial(plain, qk_norm=norm), fullgraph=True, dynamic=False)
    if implementation == "softmax":
        gqa = case.Gk != case.H
        return lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    if implementation == "fla":
        return _fla(norm)
    if case.operator == "lightning" and implementation != "normal":
        return partial(lightning_attention, qk_norm=norm, backend=implementation)
    writing = "auto" if implementation == "linear" else implementation
    return partial(flash_linear_attention, qk_norm=norm, implementation=writing)


def _fla(qk_norm: bool) -> Callable[..., Tensor]:
    from fla.ops.simple_gla import chunk_simple_gla

    def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        if qk_norm:
            q, k = (F.normalize(x, dim=-1, eps=MIN_LENGTH) for x in (q, k))
        return chunk_simple_gla(q, k, v, g_gamma=log_decay, scale=1.0)[0]

    return call


class Part:
    """An implementation on a group of heads: called, it returns o and the gradients asked for."""

    def __init__(self, function: Callable[..., Tensor], given: list[Tensor], weight: Tensor | None, case: Case) -> None:
        self.function, self.backward, self.do = function, case.backward, given[3]
        self.leaves = {name: x.detach().requires_grad_(case.backward) for name, x in zip("qkv", given, strict=False)}
        self.weight = weight
        if case.mask_grad and weight is not None:
            self.weight = self.leaves["mask"] = weight.detach().requires_grad_()

    def forward(self) -> Tensor:
        return self.function(self.leaves["q"], self.leaves["k"], self.leaves["v"], self.weight)

    def __call__(self) -> Results:
        o = self.forward()
        if o.shape != self.do.shape:
            raise WrongResult(f"o has shape {tuple(o.shape)}, expected {tuple(self.do.shape)}")
        if not self.backward:
            return {"o": o}
        grads = torch.autograd.grad(o, list(self.leaves.values()), self.do)
        return {"o": o.detach(), **{f"d{name}": dx for name, dx in zip(self.leaves, grads, strict=True)}}


class Call:
    """One implementation on the inputs of a case, a group of heads at a time where all at once don't fit.

    `copies` of the inputs take turns, so that a GPU's cache does not hold the next ones already.
    """

    def __init__(self, case: Case, implementation: str, copies: Sequence[Inputs], group: int) -> None:
        self.case, self.implementation, self.copies = case, implementation, copies
        self.groups = [slice(start, start + group) for start in range(0, case.H, group)]
        self.function = _function(case, implementation)
        self._whole: dict[int, Part] = {}

    def part(self, heads: slice, turn: int = 0) -> Part:
        """The implementation on the query heads of a group and their key/value heads."""
        turn %= len(self.copies)
        if len(self.groups) > 1:
            return self._part(heads, turn)  # not kept: the masks of all groups would not fit
        if turn not in self._whole:
            self._whole[turn] = self._part(heads, turn)
        return self._whole[turn]

    def _part(self, heads: slice, turn: int) -> Part:
        case, given = self.case, self.copies[turn]
        index = _heads_of(case, heads)
        tensors = [x[:, index[name]] for name, x in (("q", given.q), ("k", given.k), ("v", given.v), ("o", given.do))]
        weight = given.weight
        if case.operator == "lightning" and weight is not None:
            weight = weight[heads]
            if self.implementation in ("normal", "plain"):
                weight = causal_decay(weight, case.Lq)[None].to(given.q.dtype)  # (1, heads, T, T)
        if self.implementation == "fla":
            tensors = [x.transpose(1, 2).contiguous() for x in tensors]  # (B, T, H, D)
        if self.implementation == "softmax":
            case = replace(case, mask_grad=False)
        return Part(self.function, tensors, weight, case)

    def results(self, heads: slice) -> Results:
        """What one run returns for a group of heads, each (B, heads, length, width)."""
        results = self.part(heads)()
        return {name: x.transpose(1, 2) for name, x in results.items()} if self.implementation == "fla" else results


def _heads_of(case: Case, heads: slice) -> dict[str, slice]:
    """Heads of each tensor, and of its gradient, that belong to whole groups of query heads."""

    def shared(groups: int) -> slice:
        each = case.H // groups
        return slice(heads.start // each, heads.stop // each)

    index = {"q": heads, "k": shared(case.Gk), "v": shared(case.Gv), "o": heads, "mask": heads}
    return {**index, **{f"d{name}": at for name, at in index.items()}}


@dataclass(frozen=True)
class Truth:
    """Float64 results by the definitions: of the first heads of the first row and the last of the last, and dmask.

    `corners` has the batch row and the first head of each; `dmask` is the gradient of a mask that all rows share.
    """

    corners: dict[tuple[int, int], Results]
    dmask: Tensor | None


def truth(case: Case, given: Inputs) -> Truth:
    """Results of the definitions, one batch row and one group of heads at a time so that the scores fit in memory."""
    ends = {(0, 0), (case.B - 1, case.H - case.share)}
    shared = case.mask_grad and case.mask != "full"
    corners: dict[tuple[int, int], Results] = {}
    dmask: Tensor | None = None
    for at in itertools.product(range(case.B), range(0, case.H, case.share)):
        if at not in ends and not shared:
            continue
        results = _truth_at(case, given, *at, of_qkv=at in ends)
        if shared:
            part = results.pop("dmask")
            dmask = part if dmask is None else dmask.add_(part)
        if at in ends:
            corners[at] = results
    return Truth(corners, dmask)


def _truth_at(case: Case, given: Inputs, row: int, head: int, of_qkv: bool) -> Results:
    index = _heads_of(case, slice(head, head + case.share))

    def wide(name: str, x: Tensor) -> Tensor:
        return x[row : row + 1, index[name]].double()

    q, k, v = leaves = [wide(name, getattr(given, name)).requires_grad_(of_qkv and case.backward) for name in "qkv"]
    weight = given.weight
    if case.operator == "lightning" and weight is not None:
        o, _ = reference.chunkwise(q, k, v, weight[index["q"]].double(), case.qk_norm, chunk_size=128)
    elif weight is None:
        o = reference.masked(q, k, v, None, case.qk_norm)
    else:
        weight = wide("mask", weight) if case.mask == "full" else weight.double().detach()
        weight.requires_grad_(case.mask_grad)
        o = reference.masked(q, k, v, weight, case.qk_norm)
        leaves.append(weight)
    wanted = {f"d{name}": x for name, x in zip(("q", "k", "v", "mask"), leaves, strict=False) if x.requires_grad}
    grads = torch.autograd.grad(o, list(wanted.values()), wide("o", given.do)) if wanted else ()
    return {"o": o.detach(), **dict(zip(wanted, grads, strict=True))}


def check(call: Call, expected: Truth) -> dict[str, float]:
    """Largest error of each result over its largest value; WrongResult where one is beyond the tolerance."""
    case = call.case
    errors: dict[str, float] = {}
    for heads in call.groups:
        corners = {at: x for at, x in expected.corners.items() if heads.start <= at[1] < heads.stop}
        results = call.results(heads) if corners else {}
        for (row, head), values in corners.items():
            index = _heads_of(case, slice(head - heads.start, head - heads.start + case.share))
            for name, x in values.items():
                error = _error(results[name][row : row + 1, index[name]], x)
                errors[name] = max(errors.get(name, 0), error)
        if expected.dmask is not None:
            errors["dmask"] = _error(results["dmask"], expected.dmask)
    for name, error in errors.items():
        if error > TOLERANCE[case.dtype]:
            raise WrongResult(f"{name} is off by {error:.1e} of its largest value, at most {TOLERANCE[case.dtype]:g}")
    return errors


def _error(actual: Tensor, expected: Tensor) -> float:
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    return error if math.isfinite(error) else math.inf
