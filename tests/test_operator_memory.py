"""What the operators hold in memory: scores never, in place no new buffer for a block, lightning nothing quadratic."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from masked_cases import MaskedCase, arguments, output_gradient
from operator_cases import Case, inputs

from ops import flash_linear_attention, lightning_attention
from scripts.measure import allocations, peak_memory, saved_bytes


def _both_passes(forward: Callable[[], torch.Tensor]) -> None:
    forward().sum().backward()


def test_backward_keeps_its_inputs_and_nothing_that_grows_faster(device: torch.device) -> None:
    stored, peaks = [], []
    for tokens in (2048, 4096):
        tensors = inputs(Case(T=tokens, B=1, state=False), device, torch.float32)
        leaves = {name: x.requires_grad_() for name, x in tensors.items() if x is not None}
        stored.append(saved_bytes(partial(lightning_attention, **leaves)))
        assert stored[-1] == sum(x.nbytes for x in leaves.values())
        peaks.append(peak_memory(partial(_both_passes, partial(lightning_attention, **leaves)), device))
    assert stored[1] < 2 * stored[0] + 1
    assert peaks[1] < 2.2 * peaks[0]  # quadratic memory would be 4
    assert peaks[1] < 4 * 4096**2 * 4  # one (H, T, T) score tensor


def _masked(heads: int, tokens: int, width: int, device: torch.device, mask_grad: bool) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, heads, tokens, width, generator=random).to(device).requires_grad_() for _ in range(3)]
    return [*qkv, torch.rand(1, 1, tokens, tokens, generator=random).to(device).requires_grad_(mask_grad)]


@pytest.mark.parametrize("mask_grad", [False, True], ids=["", "mask-gradient"])
def test_blocks_hold_less_than_half_of_normal_and_none_saves_scores(mask_grad: bool, device: torch.device) -> None:
    tokens = 4096 if device.type == "cuda" else 2048
    tensors = _masked(2, tokens, 64, device, mask_grad)
    peaks: dict[str, tuple[int, int]] = {}
    for name in ("normal", "split", "block", "inplace"):
        forward = partial(flash_linear_attention, *tensors, implementation=name)
        assert saved_bytes(forward) == sum(x.nbytes for x in tensors)
        peaks[name] = peak_memory(forward, device), peak_memory(partial(_both_passes, forward), device)
    scores = 2 * tokens**2 * 4
    assert peaks["normal"][0] >= scores
    assert peaks["normal"][1] >= 1.9 * scores
    for name in ("split", "block", "inplace"):
        assert peaks[name][0] < 0.5 * peaks["normal"][0], name
        assert peaks[name][1] < 0.5 * peaks["normal"][1], name


@pytest.mark.parametrize("mask_grad", [False, True], ids=["", "mask-gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("layout", ["contiguous", "projection", "expanded"])
def test_in_place_makes_nothing_for_a_block(
    layout: str, dtype: torch.dtype, mask_grad: bool, device: torch.device
) -> None:
    case = MaskedCase(128, 128, H=2, Gk=2, Gv=2, layout=layout, per_row=False, mask_layout="columns")
    tensors, do = arguments(case, device, dtype), output_gradient(case, device, dtype)
    if layout == "expanded":
        do = do[:1, :1, :1, :1].expand_as(do)  # as `sum` gives it
    leaves = [x.requires_grad_(name != "mask" or mask_grad) for name, x in tensors.items()]
    wanted = [x for x in leaves if x.requires_grad]

    def counts(name: str, block: int) -> tuple[int, int]:
        forward = partial(flash_linear_attention, *leaves, implementation=name, q_block_size=block, kv_block_size=block)
        return allocations(forward, device), allocations(lambda: torch.autograd.grad(forward(), wanted, do), device)

    whole = counts("inplace", 128)
    for block in (64, 48, 32):
        assert counts("inplace", block) == whole
    for name in ("split", "block"):
        whole, parts = counts(name, 128), counts(name, 32)
        assert parts[0] >= whole[0] + 15  # 16 blocks, one allocation for each of them at least
        assert parts[1] >= whole[1] + 2 * 15
