"""Gradients against finite differences, and the decay's against autograd in float64 from no decay to the strongest."""

from functools import partial

import pytest
import torch
from masked_cases import MaskedCase, arguments
from operator_cases import (
    Case,
    assert_accurate,
    assert_same,
    call,
    chunkwise,
    inputs,
    lightning,
    packed,
    quadratic,
    spread,
)
from torch.autograd import gradcheck

from ops import flash_linear_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WRITINGS = [{"implementation": "normal"}] + [
    {"implementation": name, "q_block_size": 2, "kv_block_size": 3} for name in ("split", "block", "inplace")
]
MASKED = [
    MaskedCase(5, 4, B=2, H=2, Gk=1, Gv=2, D=2, E=3, mask=None),
    MaskedCase(5, 4, B=2, H=2, Gk=2, Gv=1, D=2, E=3, per_row=False, per_head=False),
    MaskedCase(5, 4, B=2, H=2, Gk=1, Gv=2, D=2, E=3, per_row=False, layout="projection"),
    MaskedCase(4, 5, B=2, H=2, Gk=1, Gv=1, D=3, E=2, per_head=False, mask_layout="columns"),
    MaskedCase(4, 5, B=1, H=4, Gk=2, Gv=4, D=1, E=2),
]


@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "unit"])
@pytest.mark.parametrize("case", MASKED, ids=str)
@pytest.mark.parametrize("options", WRITINGS, ids=lambda options: options["implementation"])
def test_masked_attention_by_finite_differences(
    options: dict, case: MaskedCase, qk_norm: bool, device: torch.device
) -> None:
    operator = partial(flash_linear_attention, qk_norm=qk_norm, **options)
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments(case, device).values()]
    assert gradcheck(operator, leaves)


# Two chunks at least: a chunk of so few tokens has 16.
@pytest.mark.parametrize(
    "case",
    [
        Case(T=18, B=2, H=2, Gk=1, Gv=2, D=2, E=3, decay=-0.3),
        Case(T=18, B=1, H=2, Gk=2, Gv=1, D=3, E=1, decay=(-0.1, -2.0), qk_norm=True, layout="projection"),
        packed(0, 2, 2, 19, H=2, Gk=1, Gv=1, D=2, E=2, decay=(-0.1, -1.0)),
        packed(0, 17, 18, H=2, Gk=2, Gv=2, D=2, E=2, decay=-0.5, qk_norm=True),
    ],
    ids=str,
)
def test_lightning_attention_by_finite_differences(case: Case, device: torch.device) -> None:
    def operator(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = dict(zip(inputs(case, device), tensors, strict=True))
        return lightning(**given, qk_norm=case.qk_norm, cu_seqlens=case.cu_seqlens(device))

    assert gradcheck(operator, [x.detach().requires_grad_() for x in inputs(case, device).values()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000, 4096])
def test_the_gradient_of_the_decay(tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(T=tokens, B=1, Gk=2, Gv=1, D=8, E=12, decay=(0.0, -1e-6, -8.0, -50.0))
    definition = quadratic if tokens <= 1000 else chunkwise
    actual = call(case, lightning, device, dtype)
    truth = call(case, chunkwise, device, dtype, truth=True)
    if dtype == torch.float64:
        assert_same(actual, truth, tolerance=1e-10)
        assert_same(actual, call(case, definition, device), tolerance=1e-10)
        return
    terms = spread(case, definition, device, dtype)
    assert_accurate(actual, call(case, definition, device, dtype), truth, terms, dtype)
