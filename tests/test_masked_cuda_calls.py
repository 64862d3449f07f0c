"""Calls of masked attention's CUDA kernels: gradients that are wanted, repeats, streams, graphs, memory, reasons."""

import itertools
import math
from functools import partial
from unittest import mock

import pytest
import torch
from masked_cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    MASK_LAYOUTS,
    MaskedCase,
    Numbers,
    arguments,
    assert_equal,
    by_kernels,
    given,
    masked_call,
    masked_spread,
    output_gradient,
    plain,
    run_masked,
)
from operator_cases import assert_accurate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ops import flash_linear_attention, masked_cuda, masked_wide
from ops.linear_attention import _backward, _forward
from ops.masked_cuda import unavailable_reason
from scripts.measure import float32_products, peak_memory

# For what does not depend on numbers: narrow heads, a mask of another type, three parts, wide heads.
PATHS = [
    (MaskedCase(200, 150, D=64, E=64), BFLOAT16),
    (MaskedCase(200, 150, D=128, E=96, mask="float32", per_row=False), FLOAT16),
    (MaskedCase(150, 131, D=64, E=40, per_row=False, per_head=False), FLOAT32),
    (MaskedCase(140, 200, D=136, E=264), BFLOAT16),
    (MaskedCase(140, 130, D=72, E=64, per_head=False), FLOAT32),
]
every_path = pytest.mark.parametrize(("case", "numbers"), PATHS, ids=str)


@pytest.fixture
def device(kernel_device: torch.device, poisoned_memory: None) -> torch.device:
    return kernel_device


@pytest.mark.gpu
@every_path
def test_every_subset_of_gradients(case: MaskedCase, numbers: Numbers, device: torch.device) -> None:
    """Alone the gradient of k or of v is another kernel's than both, but of wide heads and float32."""
    tensors, do = given(case, numbers, device)
    both = max(case.D, case.E) <= 128 and numbers.dtype != torch.float32
    full = run_masked(by_kernels, tensors, do)
    judges = [
        masked_call(case, plain, device, numbers.dtype),
        masked_call(case, plain, device, numbers.dtype, truth=True),
        masked_spread(case, device, numbers.dtype),
    ]
    for wanted in itertools.product([False, True], repeat=4):
        leaves = {n: x.detach().requires_grad_(w) for (n, x), w in zip(tensors.items(), wanted, strict=True)}
        o = by_kernels(**leaves)
        assert o.requires_grad == any(wanted)
        assert torch.equal(o, full["o"])
        if not any(wanted):
            continue
        o.backward(do)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == leaf.requires_grad, name
            result = f"gradient of {name}"
            if leaf.grad is not None and both and name in ("k", "v") and wanted[1] != wanted[2]:
                assert_accurate({result: leaf.grad}, *({result: x[result]} for x in judges), numbers.dtype)
            elif leaf.grad is not None:
                assert torch.equal(leaf.grad, full[result]), result


@pytest.mark.gpu
@every_path
def test_repeats_are_equal(case: MaskedCase, numbers: Numbers, device: torch.device) -> None:
    """Also where each pair of batch and head that shares a mask has a share of its gradient."""
    tensors, do = given(case, numbers, device)
    pairs = (1 if case.per_row else case.B) * (1 if case.per_head else case.H)
    with mock.patch.object(masked_wide, "_shares", return_value=pairs):
        first = run_masked(by_kernels, tensors, do)
        for _ in range(20):
            assert_equal(run_masked(by_kernels, tensors, do), first)


@pytest.mark.gpu
@every_path
def test_a_number_that_is_not_finite_stays_in_its_row(case: MaskedCase, numbers: Numbers, device: torch.device) -> None:
    """Of o, of q's gradient, and of the mask's; those of keys and values every query has."""
    tensors, do = given(case, numbers, device)
    clean = run_masked(by_kernels, tensors, do)
    spoiled = tensors["q"].clone()
    spoiled[1, 2, 70, 3] = math.nan
    actual = run_masked(by_kernels, {**tensors, "q": spoiled}, do)
    others = torch.ones(case.B, case.H, case.Lq, dtype=torch.bool, device=device)
    others[1, 2, 70] = False
    assert actual["o"][~others].isnan().all()
    assert torch.equal(actual["o"][others], clean["o"][others])
    assert torch.equal(actual["gradient of q"], clean["gradient of q"])
    rows = [i for i in range(case.Lq) if i != 70]
    assert torch.equal(actual["gradient of mask"][:, :, rows], clean["gradient of mask"][:, :, rows])


@pytest.mark.gpu
@every_path
def test_a_weight_that_is_not_finite_stays_in_its_row_and_column(
    case: MaskedCase, numbers: Numbers, device: torch.device
) -> None:
    tensors, do = given(case, numbers, device)
    clean = run_masked(by_kernels, tensors, do)
    mask = tensors["mask"].clone()
    mask[-1, -1, 70, 33] = math.nan
    actual = run_masked(by_kernels, {**tensors, "mask": mask}, do)
    of_pair = torch.zeros(case.B, case.H, dtype=torch.bool, device=device)
    of_pair[-1 if case.per_row else slice(None), -1 if case.per_head else slice(None)] = True
    for name, heads, at in (("o", case.H, 70), ("gradient of q", case.H, 70), ("gradient of k", case.Gk, 33),
                            ("gradient of v", case.Gv, 33)):  # fmt: skip
        spoiled = torch.zeros(actual[name].shape[:3], dtype=torch.bool, device=device)
        spoiled[:, :, at] = of_pair.unflatten(1, (heads, -1)).any(2)
        assert actual[name][spoiled].isnan().all(), name
        assert torch.equal(actual[name][~spoiled], clean[name][~spoiled]), name
    assert torch.equal(actual["gradient of mask"], clean["gradient of mask"])


@pytest.mark.gpu
@every_path
def test_runs_on_the_current_stream(case: MaskedCase, numbers: Numbers, device: torch.device) -> None:
    tensors, do = given(case, numbers, device)
    expected = run_masked(by_kernels, tensors, do)
    stream = torch.cuda.Stream()
    late = {name: torch.zeros_like(x) for name, x in tensors.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would see zeros
        for name, x in tensors.items():
            late[name].copy_(x)
        actual = run_masked(by_kernels, late, do)
    stream.synchronize()
    assert_equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "numbers"),
    [*PATHS, (MaskedCase(130, 131, D=64, E=64, mask="bool", per_head=False, per_row=False), BFLOAT16)],
    ids=str,
)
def test_in_a_cuda_graph(case: MaskedCase, numbers: Numbers, device: torch.device) -> None:
    tensors, do = given(case, numbers, device)
    held = {name: x.clone() for name, x in tensors.items()}
    run_masked(by_kernels, held, do)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run_masked(by_kernels, held, do)
    for seed in (1, 2):
        tensors, _ = given(case, numbers, device, seed)
        for name, x in tensors.items():
            held[name].copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(run_masked(by_kernels, tensors, do), results)


@pytest.mark.gpu
@every_path
def test_compiled_gives_the_same_numbers(case: MaskedCase, numbers: Numbers, device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(by_kernels, fullgraph=True)
    tensors, do = given(case, numbers, device)
    assert_equal(run_masked(compiled, tensors, do, qk_norm=True), run_masked(by_kernels, tensors, do, qk_norm=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "numbers"),
    [
        (MaskedCase(17, 40, D=16, E=24), BFLOAT16),
        (MaskedCase(17, 40, D=7, E=5, mask="bool", mask_layout="columns", layout="projection"), BFLOAT16),
        (MaskedCase(17, 40, D=16, E=24, per_row=False), FLOAT32),
        (MaskedCase(17, 40, D=136, E=24, per_head=False), FLOAT32),
    ],
    ids=str,
)
def test_operators_keep_the_contract_of_torch_library(case: MaskedCase, numbers: Numbers, device: torch.device) -> None:
    tensors, do = given(case, numbers, device)
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in tensors.values()]
    rest = (True, "cuda", None, None)
    torch.library.opcheck(_forward, (*leaves, *rest))
    for some in ([True] * 3, [False, True, False]):
        torch.library.opcheck(_backward, (do, *tensors.values(), [*some, case.mask != "bool"], *rest))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 136])
def test_autocast_casts_the_inputs_and_nothing_inside(width: int, device: torch.device) -> None:
    case = MaskedCase(130, 150, D=width, E=64)
    tensors, do = arguments(case, device, torch.float32), output_gradient(case, device, torch.bfloat16)
    expected = run_masked(by_kernels, {name: x.bfloat16() for name, x in tensors.items()}, do)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = run_masked(by_kernels, tensors, do)
    assert_equal(actual, {name: x.to(actual[name].dtype) for name, x in expected.items()})


@pytest.mark.gpu
@every_path
def test_auto_is_the_kernels(case: MaskedCase, numbers: Numbers, device: torch.device) -> None:
    tensors, do = given(case, numbers, device)
    assert_equal(run_masked(flash_linear_attention, tensors, do), run_masked(by_kernels, tensors, do))


@pytest.mark.gpu
def test_without_a_mask_it_is_what_the_others_are(device: torch.device) -> None:
    tensors, do = given(MaskedCase(70, 90, mask=None), BFLOAT16, device)
    expected = run_masked(partial(flash_linear_attention, implementation="normal"), tensors, do)
    assert_equal(run_masked(by_kernels, tensors, do), expected)


@pytest.mark.gpu
def test_what_the_kernels_do_not_take_has_a_reason(device: torch.device) -> None:
    for x, reason in (
        (torch.zeros(1, 1, 4, 8, device=device, dtype=torch.float64), "q is float64"),
        (torch.zeros(1, 1, 4, 1032, device=device), "a head is 1032 wide"),
    ):
        mask = x.new_ones(1, 1, 4, 4)
        with pytest.raises(ValueError, match=rf"^implementation: 'cuda' can't take this call: {reason}"):
            by_kernels(x, x, x, mask)
        assert torch.equal(flash_linear_attention(x, x, x, mask), x)


def _large(device: torch.device) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v, the gradient of o, and a mask that all heads share."""
    *qkv, do = (torch.randn(4, 4, 2048, 64, device=device, dtype=torch.bfloat16) for _ in range(4))
    return [x.requires_grad_() for x in qkv], do, torch.randn(1, 1, 2048, 2048, device=device, dtype=torch.bfloat16)


def _peak_of_both_passes(leaves: list[Tensor], mask: Tensor, do: Tensor) -> int:
    """Above o and the gradients."""
    wanted = [x for x in (*leaves, mask) if x.requires_grad]

    def both() -> tuple[Tensor, ...]:
        o = by_kernels(*leaves, mask)
        return (o, *torch.autograd.grad(o, wanted, do))

    results = sum(x.nbytes for x in both())
    return peak_memory(both, do.device) - results


@pytest.mark.gpu
def test_holds_its_results_and_nothing_that_grows(device: torch.device) -> None:
    leaves, do, mask = _large(device)
    assert _peak_of_both_passes(leaves, mask.requires_grad_(), do) <= 2 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("of_bool", [False, True], ids=["bfloat16", "bool"])
def test_a_mask_that_all_heads_share_is_not_written_out(of_bool: bool, device: torch.device) -> None:
    leaves, do, mask = _large(device)
    mask = (mask > 0 if of_bool else mask).expand(4, 4, 2048, 2048)
    copy = 2048**2 * 2 if of_bool else 0
    assert _peak_of_both_passes(leaves, mask, do) <= copy + 2 * 2**20


def test_on_a_cpu_the_reason_is_the_cpu() -> None:
    x = torch.zeros(1, 1, 4, 8)
    assert unavailable_reason(x, x) == "q is on cpu, the kernels run on a CUDA GPU"
    with pytest.raises(ValueError, match=r"^implementation: 'cuda' can't take this call: q is on cpu"):
        by_kernels(x, x, x, torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"^implementation: 'cuda' can't take this call: q is on cpu"):
        by_kernels(x, x, x)


@pytest.mark.parametrize(
    ("dtype", "d", "e", "said"),
    [
        (torch.float64, 8, 8, "q is float64, the kernels take float32, bfloat16 and float16"),
        (torch.bfloat16, 1025, 8, "a head is 1025 wide, the kernels take up to 1024"),
        (torch.float32, 8, 2000, "a head is 2000 wide, the kernels take up to 1024"),
    ],
)
def test_types_and_widths_that_are_not_taken(dtype: torch.dtype, d: int, e: int, said: str) -> None:
    with FakeTensorMode():
        q, v = (torch.empty(1, 1, 4, width, dtype=dtype, device="cuda") for width in (d, e))
        assert unavailable_reason(q, v) == said


@pytest.mark.parametrize(
    ("dtype", "precision", "of_narrow", "of_wide"),
    [
        (torch.bfloat16, "high", 1, 1),
        (torch.float16, "highest", 1, 1),
        (torch.float32, "highest", 3, 3),
        (torch.float32, "high", 1, 2),
        (torch.float32, "medium", 1, 2),
    ],
)
def test_parts_of_a_number(dtype: torch.dtype, precision: str, of_narrow: int, of_wide: int) -> None:
    with float32_products(precision):
        assert masked_cuda._parts(torch.empty(1, dtype=dtype), wide=False) == of_narrow
        assert masked_cuda._parts(torch.empty(1, dtype=dtype), wide=True) == of_wide


@pytest.mark.parametrize(
    ("batch", "heads", "tiles", "group", "shares"),
    [
        (1, 1, 1, 1, 1),
        (1, 16, 8, 16, 1),  # 128 tiles are less than a round
        (132, 4, 1, 4, 4),
        (66, 4, 1, 4, 2),
        (30, 8, 1, 8, 2),
        (132, 6, 1, 3, 3),
        (1056, 5, 1, 5, 5),
        (1000, 5, 1, 5, 1),
    ],
)
def test_heads_are_added_up_if_none_is_idle(batch: int, heads: int, tiles: int, group: int, shares: int) -> None:
    assert masked_cuda._shares_of(batch, heads, tiles, group, 132) == shares


@pytest.mark.parametrize("slots", [1, 7, 132])
@pytest.mark.parametrize("group", [1, 4, 6, 12])
@pytest.mark.parametrize(("batch", "tiles"), [(1, 1), (3, 5), (64, 2)])
def test_adding_up_heads_takes_no_longer(batch: int, tiles: int, group: int, slots: int) -> None:
    shares = masked_cuda._shares_of(batch, 12, tiles, group, slots)
    assert group % shares == 0
    apart = math.ceil(batch * 12 * tiles / slots)
    assert math.ceil(batch * 12 // shares * tiles / slots) * shares <= apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda t: str(t)[6:])
def test_masks_that_the_copy_engine_takes(dtype: torch.dtype) -> None:
    def whole(keys: int, layout: str) -> bool:
        mask = arguments(MaskedCase(9, keys, mask_layout=layout), "cpu", dtype)["mask"]
        return masked_cuda._whole(mask)

    for keys in (8, 136):
        for layout in ("contiguous", "transposed", "projection"):
            assert whole(keys, layout), layout
        for layout in ("columns", "expanded", *MASK_LAYOUTS):
            assert not whole(keys, layout), layout
    for keys in (1, 131, 133):
        assert not whole(keys, "contiguous")
    mask = torch.zeros(1, 1, 9, 24, dtype=dtype)
    assert masked_cuda._whole(mask[..., 8:])
    assert not masked_cuda._whole(mask[..., 1:])
    assert masked_cuda._whole(mask[:, :, :1, :5].expand(1, 1, 1, 5))  # strides of one entry have no meaning
