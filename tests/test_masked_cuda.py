"""Masked attention by the CUDA kernels: every type, width, length and cut of heads, masks and layouts."""

import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from masked_cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    MASK_LAYOUTS,
    PATTERNS,
    MaskedCase,
    Numbers,
    assert_equal,
    by_kernels,
    given,
    masked_call,
    masked_case,
    masked_spread,
    plain,
    run_masked,
)
from operator_cases import assert_accurate

from ops import masked_cuda, masked_wide
from ops.kernels import multiprocessors
from scripts.measure import float32_products

TWO_BYTES = [BFLOAT16, FLOAT16]
EVERY_TYPE = [*TWO_BYTES, FLOAT32, Numbers(torch.float32, "high")]
every_type = pytest.mark.parametrize("numbers", EVERY_TYPE, ids=str)
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
LONG = [
    MaskedCase(1024, 1024, B=4, H=12, Gk=12, Gv=1, D=64, E=64, per_row=False, per_head=False),
    MaskedCase(1024, 1100, B=2, H=12, Gk=12, Gv=12, D=128, E=96, per_row=False, per_head=False),
    MaskedCase(1024, 1024, B=8, H=2, Gk=2, Gv=2, D=256, E=256, per_row=False, per_head=False),
    MaskedCase(6000, 5000, D=512, E=512, **ONE),
]
SHARED = [  # groups of 4 and of 2 heads
    MaskedCase(100, 200, D=64, E=64, H=8, Gk=2, Gv=1),
    MaskedCase(65, 130, D=128, E=72, H=8, Gk=1, Gv=4, per_row=False, per_head=False, pattern="tiles"),
    MaskedCase(130, 64, D=40, E=64, H=8, Gk=2, Gv=2, mask="bool", per_row=False),
]


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
@pytest.mark.parametrize("case", LONG, ids=str)
def test_blocks_that_do_one_piece_of_work_after_another(
    case: MaskedCase, numbers: Numbers, device: torch.device
) -> None:
    """Where a stage is needed again, a read that comes too late is wrong now and then."""
    check(case, numbers, device)
    tensors, do = given(case, numbers, device)
    with float32_products(numbers.precision):
        first = run_masked(by_kernels, tensors, do)
        for _ in range(5):
            assert_equal(run_masked(by_kernels, tensors, do), first)


@pytest.mark.gpu
@every_type
@pytest.mark.parametrize(("d", "e"), [(8, 8), (40, 64), (65, 24), (128, 128), (136, 72)])
def test_unit_length(d: int, e: int, numbers: Numbers, device: torch.device) -> None:
    for layout in ("contiguous", "projection"):
        check(MaskedCase(130, 100, D=d, E=e, layout=layout), numbers, device, qk_norm=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "most"), [(64, 2**-10), (136, 2**-14)], ids=["tf32", "two-parts"])
def test_float32_may_be_less_exact(width: int, most: float, device: torch.device) -> None:
    case, found = MaskedCase(130, 200, D=width, E=64), []
    for precision in ("highest", "high", "medium"):
        with float32_products(precision):
            found.append(masked_call(case, by_kernels, device, torch.float32))
    assert_equal(found[1], found[2])
    for name, x in masked_call(case, plain, device, torch.float32, truth=True).items():
        exact, rough = ((y[name] - x).norm() / x.norm() for y in found[:2])
        assert 2 * exact < rough < most, name


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
