"""Masked linear attention: each of its writings against the definition, on every road that a caller takes."""

import itertools

import pytest
import torch
from masked_cases import (
    EVERY_WRITING,
    MASK_LAYOUTS,
    MASKS,
    ODD_BLOCKS,
    SHAPES,
    MaskedCase,
    arguments,
    masked_call,
    masked_case,
    masked_spread,
    output_gradient,
    plain,
    run_masked,
    writing_id,
)
from operator_cases import assert_accurate, assert_same

from ops import flash_linear_attention, normal_linear_attention, reference
from ops.linear_attention import _backward, _forward

pytestmark = pytest.mark.usefixtures("poisoned_memory")

every_writing = pytest.mark.parametrize("options", EVERY_WRITING, ids=writing_id)


@pytest.mark.parametrize("options", EVERY_WRITING + ODD_BLOCKS, ids=writing_id)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_writing_equals_the_definition(shape: str, mask: str, options: dict, device: torch.device) -> None:
    case = masked_case(shape, mask)
    for qk_norm in (False, True):
        truth = masked_call(case, reference.masked, device, qk_norm=qk_norm)
        assert_same(masked_call(case, flash_linear_attention, device, qk_norm=qk_norm, **options), truth)
        assert_same(masked_call(case, plain, device, qk_norm=qk_norm), truth)


@pytest.mark.parametrize("mask", ["none", "full", "bool"])
def test_normal_is_a_writing_of_the_same(mask: str, device: torch.device) -> None:
    case = masked_case(mask=mask)
    assert_same(masked_call(case, normal_linear_attention, device), masked_call(case, plain, device))


@every_writing
@pytest.mark.parametrize(
    "mask_layout", ["contiguous", "columns", "transposed", "projection", "expanded", *MASK_LAYOUTS]
)
@pytest.mark.parametrize("layout", ["transposed", "projection", "expanded", "columns"])
def test_inputs_as_a_model_gives_them(layout: str, mask_layout: str, options: dict, device: torch.device) -> None:
    case = masked_case(layout=layout, mask_layout=mask_layout)
    assert_same(masked_call(case, flash_linear_attention, device, **options), masked_call(case, plain, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "unit"])
@pytest.mark.parametrize("mask", ["none", "one-row", "one", "bool"])
@every_writing
def test_is_as_accurate_as_plain_pytorch(
    options: dict, mask: str, qk_norm: bool, dtype: torch.dtype, device: torch.device
) -> None:
    case = masked_case("blocks", mask)
    truth = masked_call(case, plain, device, dtype, truth=True, qk_norm=qk_norm)
    actual = masked_call(case, flash_linear_attention, device, dtype, qk_norm=qk_norm, **options)
    rival = masked_call(case, plain, device, dtype, qk_norm=qk_norm)
    assert_accurate(actual, rival, truth, masked_spread(case, device, dtype, qk_norm=qk_norm), dtype)


@every_writing
@pytest.mark.parametrize("mask", ["full", "one"])
def test_every_subset_of_gradients(mask: str, options: dict, device: torch.device) -> None:
    case = masked_case(mask=mask)
    tensors, do = arguments(case, device), output_gradient(case, device)
    full = run_masked(flash_linear_attention, tensors, do, **options)
    for wanted in itertools.product([False, True], repeat=4):
        leaves = {n: x.detach().requires_grad_(w) for (n, x), w in zip(tensors.items(), wanted, strict=True)}
        o = flash_linear_attention(**leaves, **options)
        assert o.requires_grad == any(wanted)
        if not any(wanted):
            continue
        o.backward(do)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == leaf.requires_grad, name
            assert leaf.grad is None or torch.equal(leaf.grad, full[f"gradient of {name}"]), name


@every_writing
@pytest.mark.parametrize(
    ("layout", "mask", "mask_layout"),
    [
        ("contiguous", "none", "contiguous"),
        ("contiguous", "full", "contiguous"),
        ("transposed", "one", "columns"),
        ("projection", "bool", "columns"),
        ("projection", "full", "transposed"),
    ],
)
def test_operators_keep_the_contract_of_torch_library(
    layout: str, mask: str, mask_layout: str, options: dict, device: torch.device
) -> None:
    case = masked_case("blocks", mask, Lq=17, layout=layout, mask_layout=mask_layout)
    tensors, do = arguments(case, device, torch.float32), output_gradient(case, device, torch.float32)
    leaves = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in tensors.values()]
    name = "inplace" if options["implementation"] == "auto" else options["implementation"]
    rest = (True, name, options.get("q_block_size"), options.get("kv_block_size"))
    torch.library.opcheck(_forward, (*leaves, *rest))
    wanted = [True, True, True, mask in ("full", "one")]
    torch.library.opcheck(_backward, (do, *tensors.values(), wanted, *rest))


@every_writing
@pytest.mark.parametrize("mask", ["none", "one-row"])
def test_compiled_gives_the_same_numbers(mask: str, options: dict, device: torch.device) -> None:
    torch.compiler.reset()
    case = masked_case(mask=mask)
    compiled = torch.compile(flash_linear_attention, fullgraph=True)
    eager = masked_call(case, flash_linear_attention, device, torch.float32, qk_norm=True, **options)
    for name, x in masked_call(case, compiled, device, torch.float32, qk_norm=True, **options).items():
        assert torch.equal(x, eager[name]), name


@every_writing
@pytest.mark.parametrize("mask", ["none", "full"])
def test_compiles_once_more_for_all_lengths(mask: str, options: dict, device: torch.device) -> None:
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph

    compiled = torch.compile(flash_linear_attention, fullgraph=True, backend=backend)
    for lq, lk in ((20, 30), (65, 31), (48, 70), (90, 64)):
        case = masked_case(mask=mask, Lq=lq, Lk=lk)
        eager = masked_call(case, flash_linear_attention, device, **options)
        for name, x in masked_call(case, compiled, device, **options).items():
            assert torch.equal(x, eager[name]), name
    assert len(graphs) <= 2  # one for the first lengths, one for any


@every_writing
@pytest.mark.parametrize("mask", ["none", "one"])
def test_the_second_derivative_is_an_error(mask: str, options: dict, device: torch.device) -> None:
    tensors = arguments(masked_case("one-token", mask), device)
    q = tensors["q"].requires_grad_()
    o = flash_linear_attention(**tensors, **options)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dq.sum().backward()


@every_writing
@pytest.mark.parametrize("mask", ["none", "full", "bool"])
def test_autocast_casts_the_inputs_and_nothing_inside(mask: str, options: dict, device: torch.device) -> None:
    case = masked_case(mask=mask)
    tensors, do = arguments(case, device, torch.float32), output_gradient(case, device, torch.bfloat16)
    narrow = {name: x if x is None or x.dtype == torch.bool else x.bfloat16() for name, x in tensors.items()}
    expected = run_masked(flash_linear_attention, narrow, do, **options)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = run_masked(flash_linear_attention, tensors, do, **options)
    for name, x in actual.items():
        assert torch.equal(x, expected[name].to(x.dtype)), name


def test_autocast_leaves_a_float32_mask_of_float64_as_it_is(device: torch.device) -> None:
    tensors = arguments(masked_case(mask="full"), device)
    tensors["mask"] = tensors["mask"].float()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = flash_linear_attention(**tensors)
    assert actual.dtype == torch.float64
    assert torch.equal(actual, flash_linear_attention(**tensors))


def test_autocast_takes_a_mask_of_floats_beside_what_a_layer_made_narrow(device: torch.device) -> None:
    tensors = arguments(masked_case(mask="full"), device, torch.float32)
    mask = tensors["mask"]
    narrow = {name: x.bfloat16() for name, x in tensors.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = flash_linear_attention(**{**narrow, "mask": mask})
    assert torch.equal(actual, flash_linear_attention(**narrow))


@every_writing
def test_a_float_mask_of_zeros_and_ones_is_the_bool_one(options: dict, device: torch.device) -> None:
    case = MaskedCase(mask="bool")
    tensors, do = arguments(case, device, torch.bfloat16), output_gradient(case, device, torch.bfloat16)
    as_bool = run_masked(flash_linear_attention, tensors, do, **options)
    as_float = run_masked(flash_linear_attention, {**tensors, "mask": tensors["mask"].bfloat16()}, do, **options)
    for name, x in as_bool.items():
        assert torch.equal(x, as_float[name]), name


def test_flash_is_normal_on_float_masks_of_zeros_and_ones(device: torch.device) -> None:
    random = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 3, 128, 16, generator=random).to(device).requires_grad_() for _ in range(3)]
    mask = torch.randint(0, 2, (1, 1, 128, 128), generator=random).to(leaves[0])
    normal, flash = normal_linear_attention(*leaves, mask), flash_linear_attention(*leaves, mask)
    torch.testing.assert_close(flash, normal, rtol=1e-5, atol=1e-4)
    do = torch.randn(normal.shape, generator=random).to(device)
    for a, b in zip(torch.autograd.grad(flash, leaves, do), torch.autograd.grad(normal, leaves, do), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
