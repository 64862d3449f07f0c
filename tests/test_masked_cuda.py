"""Masked attention on a GPU by the CUDA kernels: types, widths, lengths, heads, masks, layouts, graphs, memory."""

import itertools
import math
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from masked_cases import (
    MASK_LAYOUTS,
    PATTERNS,
    MaskedCase,
    arguments,
    float32_products,
    masked_call,
    masked_case,
    masked_spread,
    output_gradient,
    plain,
    run_masked,
)
from operator_cases import assert_accurate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ops import flash_linear_attention, masked_cuda, masked_wide
from ops.kernels import multiprocessors
from ops.linear_attention import _backward, _forward
from ops.masked_cuda import unavailable_reason
from scripts.measure import peak_memory


class Numbers(NamedTuple):
    """The type of a call, and what `torch.set_float32_matmul_precision` says of float32."""

    dtype: torch.dtype
    precision: str = "highest"

    def __str__(self) -> str:
        return str(self.dtype)[6:] + ("" if self.precision == "highest" else f"-{self.precision}")

    @property
    def eps(self) -> float | None:
        """Of a factor, where it is less than a float32 has: "high" promises 14 bits of two bfloat16 numbers."""
        return None if self.precision == "highest" else 2.0**-14


BFLOAT16, FLOAT16, FLOAT32 = Numbers(torch.bfloat16), Numbers(torch.float16), Numbers(torch.float32)
TWO_BYTES = [BFLOAT16, FLOAT16]
EVERY_TYPE = [*TWO_BYTES, FLOAT32, Numbers(torch.float32, "high")]
every_type = pytest.mark.parametrize("numbers", EVERY_TYPE, ids=str)
by_kernels = partial(flash_linear_attention, implementation="cuda")
ONE: dict[str, Any] = {"B": 1, "H": 1, "Gk": 1, "Gv": 1}
AROUND_TILES = (1, 63, 64, 65, 127, 128, 129, 191, 193, 255, 257, 300, 1024)
CASES = [
    *(MaskedCase(n, n, D=64, E=64, **ONE) for n in AROUND_TILES),
    *(MaskedCase(n, n, D=128, E=128, **ONE) for n in (1, 63, 64, 65, 129, 193, 257)),
    *(MaskedCase(q, k, D=64, E=64, B=1) for q, k in (
        (1, 300), (300, 1), (1, 1024), (1024, 1), (65, 1024), (1024, 65), (191, 64), (64, 193), (257, 128))),
    *(MaskedCase(q, k, D=128, E=96, B=1) for q, k in ((1, 193), (300, 63), (65, 520))),
    *(MaskedCase(130, 200, D=d, E=e) for d, e in (
        (1, 1), (8, 8), (24, 40), (40, 24), (65, 65), (72, 64), (64, 128), (128, 64), (1, 128), (128, 1), (128, 128),
        (136, 136), (128, 136), (136, 8), (8, 136))),
    MaskedCase(100, 90, D=768, E=768, **ONE),
    *(MaskedCase(100, 136, D=64, E=64, H=6, Gk=a, Gv=b) for a, b in ((6, 6), (1, 1), (2, 3), (3, 1), (1, 6))),
    *(MaskedCase(100, 136, D=128, E=72, H=6, Gk=a, Gv=b) for a, b in ((6, 6), (1, 2), (6, 1))),
    *(masked_case(shape, mask) for shape, mask in itertools.product(
        ("no-query", "no-key", "no-row"), ("full", "bool"))),
]  # fmt: skip
EVERY_MASK = [
    *(MaskedCase(130, 200, D=64, E=64, mask=m, per_row=r, per_head=h) for m, r, h in itertools.product(
        ("float", "float32", "bool"), (True, False), (True, False))),
    *(MaskedCase(130, 136, D=64, E=64, mask=m, mask_layout=layout) for m, layout in itertools.product(
        ("float", "float32", "bool"), ("transposed", "projection", "columns", "expanded", *MASK_LAYOUTS))),
    *(MaskedCase(130, 131, D=64, E=64, mask=m, mask_layout=layout, per_row=False, per_head=False)
      for m, layout in itertools.product(("float", "bool"), ("contiguous", "columns", *MASK_LAYOUTS))),
    *(MaskedCase(300, 257, D=64, E=64, mask=m, pattern=pattern, per_row=False, per_head=False)
      for m, pattern in itertools.product(("float", "float32", "bool"), PATTERNS)),
    *(MaskedCase(200, 264, D=64, E=64, pattern=pattern, B=1) for pattern in PATTERNS),
    *(MaskedCase(257, 300, D=128, E=128, mask=m, pattern=pattern, per_row=False, per_head=False, B=1)
      for m, pattern in itertools.product(("float", "float32"), ("causal", "tiles", "last"))),
]  # fmt: skip
LAYOUTS = [
    MaskedCase(77, 90, D=d, E=e, layout=layout)
    for (d, e), layout in itertools.product(
        ((64, 32), (40, 72), (5, 7)), ("transposed", "projection", "columns", "expanded")
    )
]
SHARED = [  # groups of 4 and of 2 heads
    MaskedCase(100, 200, D=64, E=64, H=8, Gk=2, Gv=1),
    MaskedCase(65, 130, D=128, E=72, H=8, Gk=1, Gv=4, per_row=False, per_head=False, pattern="tiles"),
    MaskedCase(130, 64, D=40, E=64, H=8, Gk=2, Gv=2, mask="bool", per_row=False),
]
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


def check(case: MaskedCase, numbers: Numbers, device: torch.device, **options: Any) -> None:
    with float32_products(numbers.precision):
        actual, rival = (
            masked_call(case, operator, device, numbers.dtype, **options) for operator in (by_kernels, plain)
        )
    truth = masked_call(case, plain, device, numbers.dtype, truth=True, **options)
    terms = masked_spread(case, device, numbers.dtype, **options)
    assert_accurate(actual, rival, truth, terms, numbers.dtype, numbers.eps)


def given(case: MaskedCase, numbers: Numbers, device: torch.device, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a case, and the gradient of its output."""
    return arguments(case, device, numbers.dtype, seed), output_gradient(case, device, numbers.dtype, seed)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.gpu
@every_type
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_accurate_as_plain_pytorch(case: MaskedCase, numbers: Numbers, device: torch.device) -> None:
    check(case, numbers, device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "numbers"),
    [
        (case, numbers)
        for case, numbers in itertools.product(EVERY_MASK, (*TWO_BYTES, FLOAT32))
        if case.mask != "float32" or numbers != FLOAT32  # its own type
    ],
    ids=str,
)
def test_every_mask(case: MaskedCase, numbers: Numbers, device: torch.device) -> None:
    check(case, numbers, device)


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", [*TWO_BYTES, FLOAT32], ids=str)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_inputs_as_a_model_gives_them(case: MaskedCase, numbers: Numbers, device: torch.device) -> None:
    check(case, numbers, device)


@pytest.mark.gpu
@every_type
@pytest.mark.parametrize(("d", "e"), [(8, 8), (40, 64), (65, 24), (128, 128), (136, 72)])
def test_unit_length(d: int, e: int, numbers: Numbers, device: torch.device) -> None:
    for layout in ("contiguous", "projection"):
        check(MaskedCase(130, 100, D=d, E=e, layout=layout), numbers, device, qk_norm=True)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 136])
def test_float32_may_be_of_two_parts(width: int, device: torch.device) -> None:
    case, found = MaskedCase(130, 200, D=width, E=64), []
    for precision in ("highest", "high", "medium"):
        with float32_products(precision):
            found.append(masked_call(case, by_kernels, device, torch.float32))
    assert_equal(found[1], found[2])
    for name, x in masked_call(case, plain, device, torch.float32, truth=True).items():
        exact, rough = ((y[name] - x).norm() / x.norm() for y in found[:2])
        assert 2 * exact < rough < 2**-14, name


@pytest.mark.gpu
@every_type
@pytest.mark.parametrize("case", SHARED, ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["one", "group"])
def test_a_block_adds_up_heads(whole: bool, case: MaskedCase, numbers: Numbers, device: torch.device) -> None:
    shares = math.gcd(case.H // case.Gk, case.H // case.Gv) if whole else 1
    with mock.patch.object(masked_cuda, "_shares_of", return_value=shares) as asked:
        check(case, numbers, device)
    assert asked.called == (max(case.D, case.E) <= (64 if numbers.dtype == torch.float32 else 128))


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", [BFLOAT16, FLOAT32], ids=str)
def test_a_block_adds_up_heads_where_all_have_work(numbers: Numbers, device: torch.device) -> None:
    slots = multiprocessors(device)
    assert masked_cuda._shares_of(slots, 4, 1, 4, slots) == 4
    check(MaskedCase(64, 64, B=slots, Gk=1, Gv=1, D=64, E=64, per_row=False, per_head=False), numbers, device)


@pytest.mark.gpu
@every_type
@pytest.mark.parametrize("shares", [1, 3, 4])
def test_blocks_share_the_gradient_of_a_mask(shares: int, numbers: Numbers, device: torch.device) -> None:
    with mock.patch.object(masked_wide, "_shares", return_value=shares) as asked:
        check(MaskedCase(130, 131, D=64, E=40, per_head=False), numbers, device)
        check(MaskedCase(130, 136, D=136, E=64, per_row=False, per_head=False, mask="float32"), numbers, device)
    assert asked.called


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
    ("dtype", "precision", "parts"),
    [
        (torch.bfloat16, "high", 1),
        (torch.float16, "highest", 1),
        (torch.float32, "highest", 3),
        (torch.float32, "high", 2),
        (torch.float32, "medium", 2),
    ],
)
def test_parts_of_a_number(dtype: torch.dtype, precision: str, parts: int) -> None:
    with float32_products(precision):
        assert masked_cuda._parts(torch.empty(1, dtype=dtype)) == parts


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
