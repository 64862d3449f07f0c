"""Inputs, definitions of truth, plain rivals and the judge that the tests of the operators share."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ops import lightning_attention, reference
from ops.decay import causal_decay, powers
from ops.numerics import MIN_LENGTH, compute_type, unit_length

Operator = Callable[..., tuple[Tensor, Tensor]]


def case_id(case: Any, *always: str) -> str:
    """The fields of a case that differ from the defaults, and those that are always named."""
    values = ((f.name, getattr(case, f.name), f.default) for f in fields(case))
    return "-".join(f"{n}{x}".replace(" ", "") for n, x, default in values if n in always or x != default)


@dataclass(frozen=True)
class Case:
    """One call of `lightning_attention`; the id names what differs from the defaults."""

    T: int = 130
    B: int = 2
    H: int = 4
    Gk: int = 4
    Gv: int = 4
    D: int = 16
    E: int = 24
    decay: float | tuple[float, ...] | str | None = "mixed"  # of all heads, of each, from weak to strong, or none
    qk_norm: bool = False
    state: bool = True
    layout: str = "contiguous"
    bounds: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return case_id(self, "T")

    def cu_seqlens(self, device: torch.device) -> Tensor | None:
        return None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32, device=device)


def packed(*bounds: int, **others: Any) -> Case:
    return Case(T=bounds[-1], B=1, bounds=bounds, **others)


# More chunks than the scan takes in one go, with sequences that begin inside its blocks.
LONG = [Case(T=2100, B=1, H=2, Gk=1, Gv=2), packed(0, 700, 2100, 2100, 2500, H=2, Gk=2, Gv=1)]


def inputs(
    case: Case, device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor | None]:
    """The tensor arguments of a case: q, k, v, log_decay, initial_state (None where it has none)."""
    random = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (
        laid_out(case.layout, (case.B, heads, case.T, width), random).to(device, dtype)
        for heads, width in ((case.H, case.D), (case.Gk, case.D), (case.Gv, case.E))
    )
    sequences = case.B if case.bounds is None else len(case.bounds) - 1
    state = torch.randn(sequences, case.H, case.D, case.E, generator=random, dtype=torch.float64)
    return {
        "q": q,
        "k": k,
        "v": v,
        "log_decay": _log_decay(case).to(device, wide) if case.decay is not None else None,
        "initial_state": state.to(device, wide) if case.state else None,
    }


def output_gradients(
    case: Case, device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Gradients of the output, laid out as the case says, and of the final state."""
    random = torch.Generator().manual_seed(seed + 1)
    do = laid_out(case.layout, (case.B, case.H, case.T, case.E), random)
    sequences = case.B if case.bounds is None else len(case.bounds) - 1
    dstate = torch.randn(sequences, case.H, case.D, case.E, generator=random, dtype=torch.float64)
    return do.to(device, dtype), dstate.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


def _log_decay(case: Case) -> Tensor:
    if case.decay == "mixed":
        return -torch.logspace(-6, 0.5, case.H, dtype=torch.float64)
    decay = case.decay if isinstance(case.decay, tuple) else (case.decay,) * case.H
    return torch.tensor(decay, dtype=torch.float64)


def laid_out(layout: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """A tensor as a model passes it: shape (B, heads, T, width), in another order in memory, or seen several times."""
    b, heads, t, width = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random, dtype=torch.float64)

    if layout == "contiguous":
        return normal(b, heads, t, width)
    if layout == "transposed":
        return normal(b, t, heads, width).transpose(1, 2)
    if layout == "projection":  # one slice of a wider projection, rows not adjacent
        return normal(b, t, 3, heads, width)[:, :, 1].transpose(1, 2)
    if layout == "expanded":  # one head, or one row of the batch, seen as many
        return normal(1, 1, t, width).expand(shape)
    if layout == "columns":  # a column is adjacent, as in the transpose of a mask
        return normal(b, heads, width, t).mT
    raise ValueError(layout)


def moved(x: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """x elsewhere and in another type, laid out as it is: `to` closes gaps, and writes out what is expanded."""
    if x._base is None:
        return x.to(device, dtype)
    return x._base.to(device, dtype).as_strided(x.shape, x.stride(), x.storage_offset())


def run(
    operator: Operator, tensors: dict[str, Tensor | None], do: Tensor, dstate: Tensor, **options: Any
) -> dict[str, Tensor]:
    """Outputs and gradients of an operator by name: o, state, and the gradient of each tensor argument."""
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in tensors.items()}
    o, state = operator(**leaves, **options)
    given = [x for x in leaves.values() if x is not None]
    pairs = [(x, dx) for x, dx in ((o, do), (state, dstate)) if x.requires_grad]  # not so without a token
    outputs, output_grads = zip(*pairs, strict=True) if pairs else ((given[0],), (torch.zeros_like(given[0]),))
    grads = torch.autograd.grad(outputs, given, output_grads, materialize_grads=True)
    names = [f"gradient of {name}" for name, x in leaves.items() if x is not None]
    return {"o": o.detach(), "state": state.detach(), **dict(zip(names, grads, strict=True))}


def by_sequence(definition: Operator) -> Operator:
    """A definition applied to each packed sequence alone."""

    def apply(*, q, k, v, log_decay, initial_state, cu_seqlens=None, **options):  # type: ignore[no-untyped-def]
        if cu_seqlens is None:
            return definition(q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state, **options)
        results = []
        for n, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            part = {name: x[:, :, start:end] for name, x in (("q", q), ("k", k), ("v", v))}
            state = None if initial_state is None else initial_state[n : n + 1]
            results.append(definition(**part, log_decay=log_decay, initial_state=state, **options))
        return torch.cat([o for o, _ in results], dim=2), torch.cat([s for _, s in results])

    return apply


@by_sequence
def quadratic(*, q, k, v, log_decay, initial_state, qk_norm=False):  # type: ignore[no-untyped-def]
    """The mask materialised in the inputs' own type, and the states as weighted sums: plain PyTorch."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if qk_norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1, eps=1e-6) for x in (q, k))
    heads, tokens = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    decay = q.new_zeros(heads, dtype=wide) if log_decay is None else log_decay
    steps = torch.arange(tokens, device=q.device, dtype=wide)
    o = ((q @ k.mT) * causal_decay(decay, tokens).to(q.dtype)) @ v
    weight = powers(decay, steps.flip(0))[..., None].to(q.dtype)
    state = ((k * weight).mT @ v).to(wide)
    if initial_state is not None:
        read = powers(decay, steps + 1)[..., None].to(q.dtype)
        o = o + read * (q @ initial_state.to(q.dtype))
        state = state + powers(decay, steps.new_full((1, 1), tokens)) * initial_state
    return o, state


@by_sequence
def recurrent(*, q, k, v, log_decay, initial_state, qk_norm=False):  # type: ignore[no-untyped-def]
    return reference.recurrent(q, k, v, log_decay, qk_norm, initial_state)


@by_sequence
def chunkwise(*, q, k, v, log_decay, initial_state, qk_norm=False):  # type: ignore[no-untyped-def]
    return reference.chunkwise(q, k, v, log_decay, qk_norm, initial_state)


def call(
    case: Case,
    operator: Operator,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
    truth: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Results of an operator on a case; with `truth` on the float64 copy of what the type can hold."""
    tensors, grads = inputs(case, device, dtype, seed), output_gradients(case, device, dtype, seed)
    if truth:
        tensors = {name: None if x is None else x.double() for name, x in tensors.items()}
        grads = tuple(x.double() for x in grads)
    return run(operator, tensors, *grads, qk_norm=case.qk_norm, cu_seqlens=case.cu_seqlens(device))


def lightning(**arguments: Any) -> tuple[Tensor, Tensor]:
    return lightning_attention(**arguments, output_final_state=True)


def spread(
    case: Case, definition: Operator, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """Root of the sum of the squared terms that each result of `call` is a sum of, by name.

    Every result is a sum of products of inputs, so the same definition on their squares sums the squares of the terms,
    λ² standing for λ. Only log_decay differs: its terms carry a factor m, which the second derivative squares.
    """
    tensors, grads = inputs(case, device, dtype, seed), output_gradients(case, device, dtype, seed)
    wide = {name: None if x is None else x.double() for name, x in tensors.items()}
    units = {**wide, **{name: unit_length(wide[name]) for name in ("q", "k")}} if case.qk_norm else wide
    squares = {name: None if x is None else x.square() for name, x in units.items()}
    if wide["log_decay"] is not None:
        squares["log_decay"] = 2 * wide["log_decay"]
    grads, options = tuple(x.double().square() for x in grads), {"cu_seqlens": case.cu_seqlens(device)}
    result = {name: x.clamp(min=0).sqrt() for name, x in run(definition, squares, *grads, **options).items()}
    if case.qk_norm:
        for name in ("q", "k"):
            result[f"gradient of {name}"] = spread_of_unit_length(result[f"gradient of {name}"], wide[name])
    if wide["log_decay"] is not None:
        slope = squares["log_decay"].detach().requires_grad_()
        o, state = definition(**{**squares, "log_decay": slope}, **options)
        total = (o * grads[0]).sum() + (state * grads[1]).sum()
        (once,) = torch.autograd.grad(total, slope, create_graph=True)
        (twice,) = torch.autograd.grad(once.sum(), slope)
        result["gradient of log_decay"] = twice.clamp(min=0).sqrt()
    return result


def spread_of_unit_length(du: Tensor, x: Tensor) -> Tensor:
    """The same for (du - (du · u) u) / |x|, the gradient through u = x / |x|, from the spread of du."""
    length = x.norm(dim=-1, keepdim=True).clamp(min=MIN_LENGTH)
    u = (x / length).square()
    return (du.square() + u * (du.square() * u).sum(-1, keepdim=True)).sqrt() / length


def in_two_passes(cuts: Sequence[int]) -> Operator:
    """Lightning attention on the tokens before each sequence's cut, then on the rest from the state they left.

    Without bounds all rows of the batch are cut at the one place, so one cut is enough.
    """

    def apply(*, q, k, v, initial_state, cu_seqlens=None, **others):  # type: ignore[no-untyped-def]
        bounds = [0, q.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
        early = torch.zeros(bounds[-1], dtype=torch.bool, device=q.device)
        for start, cut in zip(bounds, cuts, strict=False):
            early[start : start + cut] = True
        o, state = q.new_zeros(*q.shape[:3], v.shape[3]), initial_state
        for chosen in (early, ~early):
            count = [int(chosen[s:e].sum()) for s, e in itertools.pairwise(bounds)]
            if cu_seqlens is not None:
                others["cu_seqlens"] = cu_seqlens.new_tensor([0, *itertools.accumulate(count)])
            at = chosen.nonzero()[:, 0]
            part = {name: x[:, :, at] for name, x in (("q", q), ("k", k), ("v", v))}
            out, state = lightning(**part, initial_state=state, **others)
            o = o.index_add(2, at, out)
        return o, state

    return apply


def assert_same(
    actual: dict[str, Tensor],
    truth: dict[str, Tensor],
    tolerance: float = 1e-11,
    terms: dict[str, Tensor] | None = None,
) -> None:
    """Every result within `tolerance` of the truth, relative to the largest value of its head.

    Where terms cancel, as all do in the gradient of a unit length of one number, the result is smaller than its
    rounding. With `terms`, `√(Σ t²)` of each result, the tolerance is relative to them where they are larger.
    """
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        got = actual[name]
        assert got.shape == expected.shape, f"{name}: {tuple(got.shape)}, expected {tuple(expected.shape)}"
        assert got.dtype == expected.dtype, f"{name}: {got.dtype}, expected {expected.dtype}"
        if expected.numel() == 0:
            continue
        error, size = (_by_head(x).abs().amax(-1) for x in (got - expected, expected))
        if terms is not None:
            size = torch.maximum(size, _by_head(terms[name]).amax(-1))
        right = error <= tolerance * (size + 1e-3 * size.max() + 1e-3)  # NaN is not
        assert right.all(), f"{name}: error {error.tolist()} of {size.tolist()}"


def assert_accurate(
    actual: dict[str, Tensor],
    plain: dict[str, Tensor],
    truth: dict[str, Tensor],
    terms: dict[str, Tensor],
    dtype: torch.dtype,
    eps: float | None = None,
) -> None:
    """An operator is accurate if no error is worse than twice plain PyTorch's in the same type, plus one ulp.

    Measured against a float64 truth: largest error, RMS error over all, of each head and of the worst row; a ratio
    over all alone would pass an operator that zeroes a small head.

    Where a result is a handful of numbers, plain PyTorch can meet them by luck, and twice nothing is nothing. So an
    error is also allowed that rounding makes in any case: each of n terms t passes through some roundings of `dtype`,
    the type of q, k and v, each off by up to eps / 2 of t in its own direction. Independent, they add up to
    `eps √(Σ t²)` times a number near 1, here `ROUNDINGS`. `terms` holds `√(Σ t²)`. log_decay's gradient is a single
    number a head, whose terms pass through twice as many roundings, among them those of three powers.
    Summing rounds too, in the type of sums: the k-th partial sum, of size `√(k / n Σ t²)`, is off by up to eps / 2
    of itself, and n of them add up to `√(n / 24) eps √(Σ t²)`, here five times that, since a normal number is beyond
    once in two million draws. No sum is longer than the longest dim.
    `eps`: of the roundings, where factors of products are rounded to less than `dtype` holds.
    """
    longest = max(max(x.shape) for x in truth.values())
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        got, rival = actual[name], plain[name]
        assert got.dtype == rival.dtype, f"{name}: {got.dtype}, expected {rival.dtype}"
        assert got.shape == expected.shape, f"{name}: {tuple(got.shape)}, expected {tuple(expected.shape)}"
        assert got.isfinite().all(), f"{name}: not finite"
        if expected.numel() == 0:
            continue
        ulp, rounding = torch.finfo(got.dtype).eps, ROUNDINGS * (eps or torch.finfo(dtype).eps)
        if got.dim() == 1:
            rounding *= 2
        rounding += 5 * math.sqrt(longest / 24) * torch.finfo(compute_type(dtype)).eps
        for what, measure in MEASURES.items():
            error, its, size, terms_of = (measure(x) for x in (got - expected, rival - expected, expected, terms[name]))
            its = its.nan_to_num(0, 0, 0)  # a rival that overflows allows nothing
            limit = torch.maximum(2 * its + ulp * size, rounding * terms_of)
            assert (error <= limit).all(), f"{name}: {what} {error.tolist()}, at most {limit.tolist()}"


def _by_head(x: Tensor) -> Tensor:
    """(heads, values): heads are dim 1 of a tensor, or the only dim of log_decay's gradient."""
    return x[:, None] if x.dim() == 1 else x.transpose(0, 1).flatten(1)


ROUNDINGS = 2
MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "largest error": lambda x: x.abs().max(),
    "RMS error": lambda x: x.square().mean().sqrt(),
    "RMS error of a head": lambda x: _by_head(x).square().mean(-1).sqrt(),
    "RMS error of the worst row": lambda x: x.square().mean(-1).max().sqrt(),
}
