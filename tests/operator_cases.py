"""Inputs, definitions of truth, plain rivals and the judge that the tests of the operators share."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ops import reference
from ops.decay import causal_decay, powers

Operator = Callable[..., tuple[Tensor, Tensor]]


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
    decay: float | str | None = "mixed"
    qk_norm: bool = False
    state: bool = True
    layout: str = "contiguous"
    bounds: tuple[int, ...] | None = None

    def __str__(self) -> str:
        different = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return "-".join(
            f"{name}{value}".replace(" ", "")
            for (name, value), f in zip(different, fields(self), strict=True)
            if name == "T" or value != f.default
        )

    @property
    def options(self) -> dict[str, Any]:
        return {"qk_norm": self.qk_norm}

    def cu_seqlens(self, device: torch.device) -> Tensor | None:
        return None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32, device=device)


def packed(*bounds: int, **others: Any) -> Case:
    return Case(T=bounds[-1], B=1, bounds=bounds, **others)


def inputs(
    case: Case, device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor | None]:
    """The tensor arguments of a case: q, k, v, log_decay, initial_state (None where it has none)."""
    random = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (
        _laid_out(case.layout, (case.B, heads, case.T, width), random).to(device, dtype)
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


def output_gradients(case: Case, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Gradients of the output, laid out as the case says, and of the final state."""
    random = torch.Generator().manual_seed(1)
    do = _laid_out(case.layout, (case.B, case.H, case.T, case.E), random)
    sequences = case.B if case.bounds is None else len(case.bounds) - 1
    dstate = torch.randn(sequences, case.H, case.D, case.E, generator=random, dtype=torch.float64)
    return do.to(device, dtype), dstate.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


def _log_decay(case: Case) -> Tensor:
    if case.decay == "mixed":
        return -torch.logspace(-6, 0.5, case.H, dtype=torch.float64)
    return torch.full((case.H,), float(case.decay), dtype=torch.float64)


def _laid_out(layout: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """A tensor as a model passes it: (B, heads, T, width) in memory, in a projection's, or seen several times."""
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
    raise ValueError(layout)


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


def assert_same(actual: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    """Every result within `tolerance` of the truth, relative to the largest value of its head."""
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        got = actual[name]
        assert got.shape == expected.shape, f"{name}: {tuple(got.shape)}, expected {tuple(expected.shape)}"
        assert got.dtype == expected.dtype, f"{name}: {got.dtype}, expected {expected.dtype}"
        if expected.numel() == 0:
            continue
        error, size = (_by_head(x).abs().amax(-1) for x in (got - expected, expected))
        right = error <= tolerance * (size + 1e-3 * size.max() + 1e-3)  # NaN is not
        assert right.all(), f"{name}: error {error.tolist()} of {size.tolist()}"


def assert_accurate(name: str, actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """An operator is accurate if nothing in it is worse than twice plain PyTorch in the same type, plus one ulp.

    Measured against a float64 truth: largest error, RMS error over all, of each head and of the worst row; a ratio
    over all alone would pass an operator that zeroes a small head.
    """
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, expected {plain.dtype}"
    assert actual.isfinite().all(), f"{name}: not finite"
    ulp = torch.finfo(actual.dtype).eps
    measures = {
        "largest": lambda x: x.abs().max(),
        "RMS": lambda x: x.square().mean().sqrt(),
        "RMS of a head": lambda x: _by_head(x).square().mean(-1).sqrt(),
        "RMS of the worst row": lambda x: x.square().mean(-1).max().sqrt(),
    }
    factor = 2
    if actual.dim() == 1:  # log_decay's gradient: one number a head, which plain PyTorch may meet by luck
        del measures["RMS of a head"]
        factor, ulp = 4, 8 * ulp
    for what, measure in measures.items():
        error, rival, size = (measure(x) for x in (actual - truth, plain - truth, truth))
        limit = factor * rival + ulp * size
        assert (error <= limit).all(), f"{name}: {what} error {error.tolist()}, at most {limit.tolist()}"


def _by_head(x: Tensor) -> Tensor:
    """(heads, values): heads are dim 1 of a tensor, or the only dim of log_decay's gradient."""
    return x[:, None] if x.dim() == 1 else x.transpose(0, 1).flatten(1)
