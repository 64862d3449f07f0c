"""What is not finite, or not allowed to be seen, stays where it is: rows of a batch, sequences, later tokens."""

import itertools
import math

import pytest
import torch
from masked_cases import EVERY_WRITING, arguments, masked_case, output_gradient, run_masked, writing_id
from operator_cases import LONG, Case, inputs, lightning, output_gradients, packed, run

from ops import flash_linear_attention, lightning_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state"])
def test_nan_stays_in_its_row_of_the_batch(name: str, device: torch.device) -> None:
    case = Case(B=3)
    tensors, grads = inputs(case, device), output_gradients(case, device)
    clean = run(lightning, tensors, *grads)
    tensors[name][1] = torch.nan
    actual = run(lightning, tensors, *grads)
    for result in ("o", "state", "gradient of q", "gradient of k", "gradient of v", "gradient of initial_state"):
        assert torch.equal(actual[result][[0, 2]], clean[result][[0, 2]]), result
    assert actual["o"][1].isnan().any()


@pytest.mark.parametrize("sequence", [0, 1, 2])
@pytest.mark.parametrize("bounds", [(0, 60, 70, 200), (0, 700, 2100, 2500)], ids=str)
def test_nan_stays_in_its_packed_sequence(bounds: tuple[int, ...], sequence: int, device: torch.device) -> None:
    case = packed(*bounds, H=2, Gk=1, Gv=2)
    cu_seqlens, grads = case.cu_seqlens(device), output_gradients(case, device)
    tensors = inputs(case, device)
    clean = run(lightning, tensors, *grads, cu_seqlens=cu_seqlens)
    inside = torch.arange(case.T, device=device)
    inside = (inside >= bounds[sequence]) & (inside < bounds[sequence + 1])
    for name in ("q", "k", "v"):
        tensors[name][:, :, inside] = torch.nan
    tensors["initial_state"][sequence] = torch.nan
    actual = run(lightning, tensors, *grads, cu_seqlens=cu_seqlens)
    assert actual["o"][:, :, inside].isnan().all()
    for name in ("o", "gradient of q", "gradient of k", "gradient of v"):
        assert torch.equal(actual[name][:, :, ~inside], clean[name][:, :, ~inside]), name
    others = [n for n in range(3) if n != sequence]
    for name in ("state", "gradient of initial_state"):
        assert torch.equal(actual[name][others], clean[name][others]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("value", [3.0, -math.inf, math.inf, math.nan])
@pytest.mark.parametrize("case", [Case(T=150), packed(0, 90, 90, 150), *LONG], ids=str)
def test_a_token_changes_nothing_before_it(case: Case, value: float, dtype: torch.dtype, device: torch.device) -> None:
    tensors = inputs(case, device, dtype)
    before = lightning_attention(**tensors, cu_seqlens=case.cu_seqlens(device))
    for at, name in itertools.product((0, 37, 64, 100, case.T - 1), ("q", "k", "v")):
        changed = {**tensors, name: tensors[name].clone()}
        changed[name][:, :, at, 3] = value
        after, state = lightning(**changed, cu_seqlens=case.cu_seqlens(device))
        assert torch.equal(after[:, :, :at], before[:, :, :at]), (name, at)
        assert not torch.equal(after[:, :, at], before[:, :, at]), (name, at)
        if not math.isfinite(value):
            assert not after[:, :, at].isfinite().all(), (name, at)
            assert name == "q" or not state.isfinite().all(), (name, at)


@pytest.mark.parametrize("options", EVERY_WRITING, ids=writing_id)
@pytest.mark.parametrize("mask", ["full", "one-head", "none"])
def test_nan_of_masked_attention_stays_in_its_row(mask: str, options: dict, device: torch.device) -> None:
    case = masked_case(mask=mask, B=3)
    tensors, do = arguments(case, device), output_gradient(case, device)
    clean = run_masked(flash_linear_attention, tensors, do, **options)
    for name, x in tensors.items():
        if x is None:
            continue
        changed = {**tensors, name: x.clone()}
        changed[name][1] = torch.nan
        actual = run_masked(flash_linear_attention, changed, do, **options)
        assert actual["o"][1].isnan().any(), name
        for result, value in actual.items():
            assert torch.equal(value[[0, 2]], clean[result][[0, 2]]), (name, result)


@pytest.mark.parametrize("options", EVERY_WRITING, ids=writing_id)
def test_nan_of_masked_attention_stays_in_its_head(options: dict, device: torch.device) -> None:
    case = masked_case(Gk=4, Gv=4)
    tensors, do = arguments(case, device), output_gradient(case, device)
    clean = run_masked(flash_linear_attention, tensors, do, **options)
    for name, x in tensors.items():
        changed = {**tensors, name: x.clone()}
        changed[name][:, 2] = torch.nan
        for result, value in run_masked(flash_linear_attention, changed, do, **options).items():
            assert torch.equal(value[:, [0, 1, 3]], clean[result][:, [0, 1, 3]]), (name, result)
