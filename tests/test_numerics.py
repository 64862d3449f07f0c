"""Unit length at the ends of what a type can hold."""

import pytest
import torch

from ops import flash_linear_attention, lightning_attention
from ops.numerics import MIN_LENGTH, unit_length, unit_length_backward

# Ends of the types, where squares overflow or vanish, and both sides of the least length.
ENDS = [
    *((torch.float32, scale) for scale in (1e-38, 1e-20, 0.9e-7, 1e-6, 1.0, 1e19, 3e38)),
    *((torch.bfloat16, scale) for scale in (1e-30, 1e-6, 1e19, 3e38)),
    *((torch.float16, scale) for scale in (1e-7, 1.0, 6e4)),
    *((torch.float64, scale) for scale in (1e-300, 1e-6, 1e160, 1.7e308)),
]
every_end = pytest.mark.parametrize(("dtype", "scale"), ENDS, ids=lambda x: str(x).removeprefix("torch."))


@every_end
def test_unit_length_and_its_gradient(dtype: torch.dtype, scale: float, device: torch.device) -> None:
    random = torch.Generator().manual_seed(0)
    x = ((torch.rand(50, 8, generator=random, dtype=torch.float64) * 2 - 1) * scale).to(dtype)
    # Powers of two change no digit: the plain formula of float64 is exact on what they bring into its range.
    factor = 2.0 ** -torch.tensor(scale, dtype=torch.float64).log2().floor().item()
    wide = (x.double() * factor).requires_grad_()
    unit = wide / wide.norm(dim=-1, keepdim=True).clamp(min=MIN_LENGTH * factor)
    du = torch.randn(50, 8, generator=random, dtype=torch.float64)
    (dx,) = torch.autograd.grad(unit, wide, du)
    rtol = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    actual = unit_length(x.to(device)).cpu()
    torch.testing.assert_close(actual.double(), unit.detach(), rtol=rtol, atol=rtol * unit.abs().max().item())
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    back = unit_length_backward(du.to(device, sums), x.to(device)).cpu().double() / factor
    least = torch.finfo(sums).smallest_normal * torch.finfo(sums).eps / factor  # step of the smallest numbers
    rtol = 1e-13 if sums == torch.float64 else 2e-6
    torch.testing.assert_close(back, dx, rtol=rtol, atol=max(rtol * dx.abs().max().item(), 4 * least))


@pytest.mark.parametrize("operator", [lightning_attention, flash_linear_attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
def test_no_finite_length_changes_the_result(operator, dtype: torch.dtype, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 8, generator=random).to(device, dtype) for _ in range(3))
    expected = operator(q, k, v, qk_norm=True)
    for scale in (2.0**-10, 2.0**100):
        assert torch.equal(operator(q * scale, k * scale, v, qk_norm=True), expected), scale
