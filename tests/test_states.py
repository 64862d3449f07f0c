"""States carried from one call to the next: a sequence split anywhere is one pass, and so are single steps."""

import pytest
import torch
from operator_cases import Case, assert_same, call, in_two_passes, inputs, lightning, packed

from ops import lightning_attention_step

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 130, 199, 200])
def test_split_anywhere_is_one_pass(at: int, device: torch.device) -> None:
    case = Case(T=200, Gk=2, Gv=1, qk_norm=True)
    assert_same(call(case, in_two_passes([at]), device), call(case, lightning, device))


@pytest.mark.parametrize("cuts", [(0, 0, 0), (1, 0, 63), (64, 0, 1), (65, 0, 130), (70, 0, 129)], ids=str)
def test_packed_sequences_split_anywhere_are_one_pass(cuts: tuple[int, ...], device: torch.device) -> None:
    case = packed(0, 70, 70, 200)
    assert_same(call(case, in_two_passes(cuts), device), call(case, lightning, device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
def test_steps_are_one_pass(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(T=100, Gk=2, Gv=1)
    tensors = inputs(case, device, dtype)
    o, final = lightning(**tensors)
    state = tensors.pop("initial_state").clone()
    memory = state.data_ptr()
    decay = tensors.pop("log_decay")
    steps = [
        lightning_attention_step(*(x[:, :, t : t + 1] for x in tensors.values()), decay, state) for t in range(100)
    ]
    actual = torch.cat(steps, dim=2)
    assert state.data_ptr() == memory
    assert actual.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(actual, o, rtol=tolerance, atol=tolerance * o.abs().max().item())
    tolerance = tolerance if dtype != torch.bfloat16 or device.type == "cuda" else 1e-5
    torch.testing.assert_close(state, final, rtol=tolerance, atol=tolerance * final.abs().max().item())


def test_a_step_without_decay_adds_to_the_state(device: torch.device) -> None:
    q, k, v = (torch.randn(1, 2, 1, 4, device=device) for _ in range(3))
    state = torch.ones(1, 2, 4, 4, device=device)
    o = lightning_attention_step(q.requires_grad_(), k, v, None, state)
    assert not o.requires_grad
    torch.testing.assert_close(state, 1 + k.mT * v)
    torch.testing.assert_close(o, q @ state)
