"""Random calls of both operators: shapes, layouts, types, head groups, cuts, packings; `--sweep N` makes N of each."""

import itertools
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from masked_cases import MaskedCase, masked_call, masked_spread, plain
from operator_cases import (
    Case,
    assert_accurate,
    assert_same,
    call,
    in_two_passes,
    lightning,
    quadratic,
    recurrent,
    spread,
)

from ops import flash_linear_attention, reference

pytest.importorskip("hypothesis", reason="needs hypothesis")
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.sampled_from(["contiguous", "transposed", "projection", "expanded", "columns"])
WIDTHS = st.sampled_from([1, 2, 7, 16, 33])
SEEDS = st.integers(0, 2**16)
DECAYS = st.sampled_from([0.0, -1e-6, -1e-3, -0.1, -1.0, -8.0, -50.0])


def head_groups(heads: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])


@st.composite
def lightning_calls(draw: st.DrawFn) -> tuple[Case, tuple[int, ...], bool]:
    """A case, a cut of each of its sequences, and whether heads are taken one at a time."""
    heads = draw(st.integers(1, 6))
    tokens = draw(st.integers(0, 40) | st.sampled_from([63, 64, 65, 127, 128, 129, 193]) | st.integers(41, 300))
    bounds = None
    if draw(st.booleans()):
        bounds = (0, *sorted(draw(st.lists(st.integers(0, tokens), max_size=6))), tokens)
    of_each = st.lists(DECAYS, min_size=heads, max_size=heads).map(tuple)
    case = Case(
        T=tokens,
        B=1 if bounds else draw(st.integers(0, 3)),
        H=heads,
        Gk=draw(head_groups(heads)),
        Gv=draw(head_groups(heads)),
        D=draw(WIDTHS | st.just(130)),
        E=draw(WIDTHS),
        decay=draw(st.none() | of_each),
        qk_norm=draw(st.booleans()),
        state=draw(st.booleans()),
        layout=draw(LAYOUTS),
        bounds=bounds,
    )
    lengths = [end - start for start, end in itertools.pairwise(bounds or (0, tokens))]
    return case, tuple(draw(st.integers(0, n)) for n in lengths), draw(st.booleans())


@st.composite
def masked_calls(draw: st.DrawFn) -> tuple[MaskedCase, dict[str, Any]]:
    """A case, and the options of a call."""
    heads, sizes = draw(st.integers(1, 6)), st.integers(1, 80) | st.just("auto")
    case = MaskedCase(
        Lq=draw(st.integers(0, 90)),
        Lk=draw(st.integers(0, 90)),
        B=draw(st.integers(0, 3)),
        H=heads,
        Gk=draw(head_groups(heads)),
        Gv=draw(head_groups(heads)),
        D=draw(WIDTHS),
        E=draw(WIDTHS),
        layout=draw(LAYOUTS),
        mask=draw(st.sampled_from(["float", "float", "bool", None])),
        per_row=draw(st.booleans()),
        per_head=draw(st.booleans()),
        mask_layout=draw(LAYOUTS),
    )
    writing = draw(st.sampled_from(["auto", "normal", "split", "block", "inplace"]))
    return case, {"implementation": writing, "q_block_size": draw(sizes), "kv_block_size": draw(sizes)}


def in_a_type(dtype: torch.dtype, case: Any) -> Any:
    """The case, without heads and rows that are copies where roundings must be independent."""
    return case if dtype == torch.float64 or case.layout != "expanded" else replace(case, layout="projection")


@given(drawn=lightning_calls(), dtype=TYPES, seed=SEEDS)
def test_lightning_attention(drawn, dtype: torch.dtype, seed: int, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    case, cuts, one_head_at_a_time = in_a_type(dtype, drawn[0]), *drawn[1:]
    with patch("ops.chunkwise.LARGE", 0 if one_head_at_a_time else 2**21):
        actual = call(case, lightning, device, dtype, seed=seed)
        parts = call(case, in_two_passes(cuts), device, dtype, seed=seed) if dtype == torch.float64 else None
    truth = call(case, quadratic, device, dtype, truth=True, seed=seed)
    terms = spread(case, quadratic, device, dtype, seed)
    if parts is None:
        assert_accurate(actual, call(case, quadratic, device, dtype, seed=seed), truth, terms, dtype)
        return
    for results, expected in ((actual, truth), (actual, call(case, recurrent, device, seed=seed)), (parts, truth)):
        assert_same(results, expected, terms=terms)


@given(drawn=masked_calls(), dtype=TYPES, qk_norm=st.booleans(), seed=SEEDS)
def test_masked_attention(drawn, dtype: torch.dtype, qk_norm: bool, seed: int, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    case, options = in_a_type(dtype, drawn[0]), drawn[1]
    actual = masked_call(case, flash_linear_attention, device, dtype, seed=seed, qk_norm=qk_norm, **options)
    truth = masked_call(case, reference.masked, device, dtype, truth=True, seed=seed, qk_norm=qk_norm)
    terms = masked_spread(case, device, dtype, seed, qk_norm)
    if dtype == torch.float64:
        assert_same(actual, truth, terms=terms)
        return
    rival = masked_call(case, plain, device, dtype, seed=seed, qk_norm=qk_norm)
    assert_accurate(actual, rival, truth, terms, dtype)
