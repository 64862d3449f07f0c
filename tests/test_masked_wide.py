"""Masked attention of wide heads by the CUDA kernels, and the mask's gradient: shapes, masks, slabs, parts; a plan."""

import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from masked_cases import MaskedCase, arguments, masked_call, masked_spread, output_gradient, plain
from operator_cases import assert_accurate
from torch import Tensor

from ops import masked_wide
from ops.kernels import for_kernel
from ops.masked_wide import LONG, SQUARE, Slab

Results = dict[str, Tensor]
two_bytes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
ONE: dict[str, Any] = {"B": 1, "H": 1, "Gk": 1, "Gv": 1}
CASES = [
    *(MaskedCase(n, n, D=136, E=136, **ONE) for n in (1, 2, 63, 64, 65, 127, 128, 129, 192, 193, 256, 257, 400)),
    *(MaskedCase(q, k, D=200, E=320) for q, k in ((1, 300), (300, 1), (130, 264), (260, 137), (385, 72))),
    *(MaskedCase(150, 200, D=d, E=e) for d, e in ((768, 768), (1024, 1024), (8, 136), (257, 3), (300, 999))),
    *(MaskedCase(100, 136, D=136, E=264, H=6, Gk=a, Gv=b) for a, b in ((6, 6), (1, 2), (3, 1), (2, 6))),
    *(MaskedCase(130, 200, D=136, E=136, mask=m, per_row=r, per_head=h) for m, r, h in itertools.product(
        ("float", "bool"), (True, False), (True, False))),
    *(MaskedCase(130, 200, D=136, E=136, mask=m, mask_layout=layout) for m, layout in itertools.product(
        ("float", "bool"), ("transposed", "projection", "columns", "expanded"))),
    *(MaskedCase(77, 90, D=136, E=264, layout=x) for x in ("transposed", "projection", "columns", "expanded")),
]  # fmt: skip
# A part of a pair at a time: of the last queries and keys, few.
CUT = [
    MaskedCase(300, 330, D=136, E=264),
    MaskedCase(400, 260, D=264, E=136, B=1, mask="bool"),
    MaskedCase(129, 1000, D=136, E=136, per_head=False),
    MaskedCase(1000, 130, D=136, E=136, per_row=False),
]
OF_PARTS = [
    *(MaskedCase(q, k, D=72, E=136) for q, k in ((1, 1), (65, 129), (129, 50), (200, 264), (333, 301))),
    MaskedCase(150, 170, D=768, E=520),
    MaskedCase(150, 170, D=68, E=1021, mask="bool"),
    *(MaskedCase(90, 130, D=72, E=72, mask_layout=layout, per_row=False) for layout in ("columns", "expanded")),
    MaskedCase(90, 130, D=72, E=72, H=6, Gk=2, Gv=6, layout="transposed", per_head=False),
]
RIGHT_BY_PARTS = {2: 2**-13}  # of √(Σ t²): each number is off by 2^-18, and tensor cores cut sums off


@pytest.fixture
def device(kernel_device: torch.device) -> torch.device:
    return kernel_device


def in_parts(x: Tensor, parts: int) -> Tensor:
    """(B, heads × parts, T, width) bfloat16 that add up to a float32 x; the width a multiple of 8."""
    rest, found = F.pad(x.float(), (0, -x.shape[3] % 8)), []
    for _ in range(parts):
        found.append(rest.bfloat16())
        rest = rest - found[-1].float()
    return torch.stack(found, 2).flatten(1, 2).contiguous()


def by_kernels(tensors: dict[str, Tensor | None], do: Tensor, parts: int, slots: int = 132) -> Results:
    """Output and gradients by name, as `run_masked` names them."""
    q, k, v, mask = (tensors[name] for name in ("q", "k", "v", "mask"))
    d, e = q.shape[3], v.shape[3]
    to = for_kernel if parts == 1 else lambda x: in_parts(x, parts)
    do, q, k, v = (to(x) for x in (do, q, k, v))
    results = {"o": masked_wide.forward(q, k, v, mask, parts)[..., :e]}
    grads = masked_wide.backward(do, q, k, v, mask, parts, (True, True, True))
    for name, x, width in zip("qkv", grads, (d, d, e), strict=True):
        results[f"gradient of {name}"] = x[..., :width]
    if mask.is_floating_point():
        with mock.patch.object(masked_wide, "multiprocessors", return_value=slots):
            results["gradient of mask"] = masked_wide.mask_gradient(do, q, k, v, mask, parts)
    return results


def check(case: MaskedCase, device: torch.device, dtype: torch.dtype, parts: int, slots: int = 132) -> None:
    tensors, do = arguments(case, device, dtype), output_gradient(case, device, dtype)
    actual = by_kernels(tensors, do, parts, slots)
    truth, terms = masked_call(case, plain, device, dtype, truth=True), masked_spread(case, device, dtype)
    if parts not in RIGHT_BY_PARTS:
        assert_accurate(actual, masked_call(case, plain, device, dtype), truth, terms, dtype)
        return
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        got = actual[name]
        assert got.shape == expected.shape, name
        assert got.dtype == torch.float32, name
        for measure in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            error, limit = measure(got - expected), RIGHT_BY_PARTS[parts] * measure(terms[name])
            assert error <= limit, f"{name}: error {error}, at most {limit}"  # NaN is not


def cut(score_bytes: int, most_keys: int) -> Any:
    return mock.patch.multiple(masked_wide, SLAB_BYTES=[score_bytes], MOST_KEYS=most_keys)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@two_bytes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_accurate_as_plain_pytorch(case: MaskedCase, dtype: torch.dtype, device: torch.device) -> None:
    check(case, device, dtype, 1)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@two_bytes
@pytest.mark.parametrize("tile", [SQUARE, LONG], ids=["square", "long"])
def test_tiles(tile: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    with mock.patch.object(masked_wide, "_tile", return_value=tile):
        for mask in ("float", "bool"):
            check(MaskedCase(330, 520, D=136, E=776, mask=mask), device, dtype, 1)
            check(MaskedCase(200, 131, D=320, E=136, mask=mask, mask_layout="columns"), device, dtype, 1)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("score_bytes", "most_keys"), [(2**18, 64), (2**16, 128), (2**19, 256), (1, 192)])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("case", CUT, ids=str)
def test_slabs(case: MaskedCase, parts: int, score_bytes: int, most_keys: int, device: torch.device) -> None:
    with cut(score_bytes, most_keys):
        check(case, device, torch.float32 if parts > 1 else torch.bfloat16, parts)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("score_bytes", [2**18, 2**19, 2**20])
def test_slabs_of_whole_pairs(score_bytes: int, device: torch.device) -> None:
    with cut(score_bytes, 4096):
        check(MaskedCase(120, 137, B=3, D=136, E=200), device, torch.bfloat16, 1)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("case", OF_PARTS, ids=str)
def test_float32_in_parts(case: MaskedCase, parts: int, device: torch.device) -> None:
    check(case, device, torch.float32, parts)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("rows", [False, True])
def test_masks_that_repeat_a_row_or_begin_anywhere(rows: bool, parts: int, device: torch.device) -> None:
    case, dtype = MaskedCase(140, 200, D=136, E=136), torch.float32 if parts > 1 else torch.bfloat16
    tensors, do = arguments(case, device, dtype), output_gradient(case, device, dtype)
    whole = tensors["mask"]
    mask = whole[:, :, :1].expand(whole.shape) if rows else F.pad(whole, (1, 7))[..., 1:-7]
    found = [by_kernels({**tensors, "mask": x}, do, parts) for x in (mask, mask.contiguous())]
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), name


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("dtype", "parts"), [(torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 3)])
@pytest.mark.parametrize(("d", "e"), [(8, 8), (64, 64), (16, 128), (128, 40), (768, 64)])
@pytest.mark.parametrize("slots", [1, 20, 1000])
def test_gradient_of_the_mask(slots: int, d: int, e: int, dtype: torch.dtype, parts: int, device: torch.device) -> None:
    """Of any width, with few blocks and many: shares of a sum, where there are more than tiles."""
    for case in (
        MaskedCase(200, 151, B=3, D=d, E=e, per_row=False, per_head=False),
        MaskedCase(129, 152, B=2, D=d, E=e, H=6, Gk=3, Gv=2, per_head=False),
        MaskedCase(60, 70, B=5, D=d, E=e, per_row=False),
        MaskedCase(64, 65, D=d, E=e),
    ):
        check(case, device, dtype, parts, slots)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("wanted", itertools.product((False, True), repeat=3))
def test_only_what_is_wanted(wanted: tuple[bool, bool, bool], device: torch.device) -> None:
    case = MaskedCase(140, 200, D=136, E=264)
    tensors, do = arguments(case, device, torch.bfloat16), output_gradient(case, device, torch.bfloat16)
    do, q, k, v = (for_kernel(x) for x in (do, *(tensors[name] for name in "qkv")))
    every = masked_wide.backward(do, q, k, v, tensors["mask"], 1)
    some = masked_wide.backward(do, q, k, v, tensors["mask"], 1, wanted)
    for x, expected, want in zip(some, every, wanted, strict=True):
        assert (x is not None) == want
        assert x is None or torch.equal(x, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("score_bytes", [2**25, 2**17])
def test_repeats_are_equal(parts: int, score_bytes: int, device: torch.device) -> None:
    case = MaskedCase(400, 333, D=264, E=136, per_row=False, per_head=False)
    dtype = torch.float32 if parts > 1 else torch.bfloat16
    tensors, do = arguments(case, device, dtype), output_gradient(case, device, dtype)
    with cut(score_bytes, 128):
        first = by_kernels(tensors, do, parts)
        for _ in range(20):
            for name, x in by_kernels(tensors, do, parts).items():
                assert torch.equal(x, first[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_not_finite_stays_in_its_row(parts: int, device: torch.device) -> None:
    """But for gradients of keys and values, which every query has."""
    case = MaskedCase(140, 203, D=136, E=136, per_row=False)
    dtype = torch.float32 if parts > 1 else torch.bfloat16
    tensors, do = arguments(case, device, dtype), output_gradient(case, device, dtype)
    clean = by_kernels(tensors, do, parts)
    changed = {**tensors, "q": tensors["q"].clone()}
    changed["q"][1, 2, 70, 3] = math.nan
    actual = by_kernels(changed, do, parts)
    others = torch.ones(case.B, case.H, case.Lq, dtype=torch.bool, device=device)
    others[1, 2, 70] = False
    assert actual["o"][~others].isnan().all()
    assert torch.equal(actual["o"][others], clean["o"][others])
    assert torch.equal(actual["gradient of q"], clean["gradient of q"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mask": torch.float64}, "mask: expected bool, float32 or the type of the others"),
        ({"k": torch.float16}, "k, p: expected the type of the others"),
        ({"parts": 3}, "mask: expected bool, float32 or the type of the others"),
    ],
    ids=["mask", "type", "parts"],
)
def test_bad_arguments_are_refused(changed: dict[str, Any], said: str, device: torch.device) -> None:
    tensors = arguments(MaskedCase(64, 64, D=136, E=136, H=4, Gk=4, Gv=4), device, torch.bfloat16)
    for name in changed.keys() - {"parts"}:
        tensors[name] = tensors[name].to(changed[name])
    with pytest.raises(RuntimeError, match=said):
        masked_wide.forward(*(tensors[name] for name in ("q", "k", "v", "mask")), changed.get("parts", 1))


@pytest.mark.parametrize("limit", [1, 2**16, 2**20, 2**24])
@pytest.mark.parametrize("most_keys", [64, 256, 4096])
@pytest.mark.parametrize(
    ("pairs", "queries", "keys"), [(1, 1, 1), (7, 100, 130), (3, 1000, 1), (2, 1, 9000), (2, 1025, 4100)]
)
def test_slabs_are_all_of_the_scores_once(pairs: int, queries: int, keys: int, limit: int, most_keys: int) -> None:
    seen = torch.zeros(pairs, queries, keys, dtype=torch.int32)
    slabs = list(masked_wide._slabs(pairs, queries, keys, limit // 2, most_keys))
    for slab in slabs:
        seen[slab.pair : slab.pair + slab.pairs, slab.row : slab.row + slab.rows, slab.key : slab.key + slab.keys] += 1
        assert slab.row % 64 == slab.key % 64 == 0
        assert slab.row + slab.rows == queries or slab.rows % 64 == 0
        assert slab.key + slab.keys == keys or slab.keys % 64 == 0
        assert slab.pairs == 1 or (slab.rows, slab.keys) == (queries, keys)
        assert slab.pairs <= slabs[0].pairs
        assert slab.rows <= slabs[0].rows
        assert slab.keys <= slabs[0].keys
        assert slab.pairs * slab.rows * (slab.keys + -slab.keys % 8) * 2 <= limit or slab.rows <= 128
    assert (seen == 1).all()


def plan_of(shape: tuple[int, ...], parts: int, wanted: tuple[bool, bool, bool]) -> masked_wide.Plan:
    """Of the backward pass of (B, H, T, width) on 132 multiprocessors."""
    batch, heads, tokens, width = shape
    x = torch.empty(batch, heads * parts, tokens, width, device="meta")
    mask = torch.empty(1, 1, tokens, tokens, device="meta")
    with mock.patch.object(masked_wide, "multiprocessors", return_value=132):
        return masked_wide._backward_plan(x, x, x, mask, parts, wanted)[0]


def test_plan_of_one_head_of_768() -> None:
    """All of P at once and then all of A: 17 rounds of tiles, where halves of both take 18, and no more memory."""
    assert list(masked_wide._slabs(16, 1024, 1024, 2**24, 2**16)) == [Slab(0, 16, 0, 1024, 0, 1024)]
    both, of_p, of_a = (
        plan_of((16, 1, 1024, 768), 1, x) for x in ((True, True, True), (False, False, True), (True, True, False))
    )
    assert both.slabs == [Slab(pair, 8, 0, 1024, 0, 1024) for pair in (0, 8)]
    assert len(of_p.slabs) == len(of_a.slabs) == 1
    area, fixed = math.prod(LONG), masked_wide.FIXED
    assert both.time == 2 * (4 * area * (768 + fixed) + 5 * area * (1024 + fixed) + masked_wide.LAUNCHES)
    assert of_p.time == 4 * area * (768 + fixed) + 3 * area * (1024 + fixed) + masked_wide.LAUNCHES
    assert of_p.time + of_a.time < both.time


def test_tiles_by_whole_rounds() -> None:
    assert masked_wide._tile([(1024, 1024, 768)] * 2, 8, 132) == LONG
    assert masked_wide._tile([(192, 192, 768)], 132, 132) == SQUARE


@pytest.mark.parametrize(
    ("shape", "parts", "mebibytes"),
    [
        ((16, 1, 1024, 768), 1, 32),  # the other halves save two launches
        ((16, 2, 1024, 384), 1, 64),
        ((2, 12, 4096, 192), 1, 128),
        ((16, 6, 1024, 128), 3, 64),  # 5 pairs
        ((1, 1, 128, 768), 1, 32),
    ],
)
def test_slabs_are_no_larger_than_is_worth_it(shape: tuple[int, ...], parts: int, mebibytes: int) -> None:
    of_p = plan_of(shape, parts, (False, False, True)).slabs[0]
    size = of_p.pairs * of_p.rows * of_p.keys * 2 * parts / 2**20
    assert size <= mebibytes
    assert size > mebibytes / 2 or mebibytes == 32


@pytest.mark.parametrize(
    ("pairs", "shape", "slots", "expected"),
    [
        (192, (1, 1, 1024, 1024), 132, 2),  # 64 tiles
        (192, (16, 12, 1024, 1024), 132, 1),  # a tile has no sum to divide
        (16, (1, 1, 128, 128), 132, 16),
        (6, (2, 1, 128, 128), 132, 3),
    ],
)
def test_shares_fill_the_gpu(pairs: int, shape: tuple[int, ...], slots: int, expected: int) -> None:
    assert masked_wide._shares(pairs, torch.empty(shape, device="meta"), 1, slots) == expected


@pytest.mark.parametrize("case", [*CASES[:3], *OF_PARTS[:2]], ids=str)
def test_parts_add_up(case: MaskedCase) -> None:
    """And truth is made where no GPU is."""
    q = arguments(case, "cpu", torch.float32)["q"]
    parts = in_parts(q, 3).unflatten(1, (-1, 3)).float()
    assert torch.equal(parts.sum(2)[..., : case.D], q)
    truth = masked_call(case, plain, "cpu", torch.float32, truth=True)
    assert truth.keys() == masked_spread(case, "cpu", torch.float32).keys()
