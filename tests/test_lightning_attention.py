"""Lightning attention against float64 definitions, on every road that a model takes through it."""

import itertools
import math

import pytest
import torch
from operator_cases import (
    LONG,
    Case,
    assert_accurate,
    assert_same,
    call,
    chunkwise,
    inputs,
    lightning,
    output_gradients,
    packed,
    quadratic,
    recurrent,
    run,
    spread,
)

from ops import flash_linear_attention, lightning_attention, lightning_attention_step
from ops.lightning_attention import _backward, _forward, _step

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = [
    *(Case(T=t) for t in (0, 1, 2, 31, 63, 64, 65, 127, 128, 129, 200)),  # chunks of 64, on a GPU of 128
    *(Case(T=t, D=96, E=160, B=1, H=2, Gk=2, Gv=1) for t in (127, 129, 255, 257, 392)),  # of 128, on a GPU of 256
    Case(T=300, D=300, E=8, B=1, H=1, Gk=1, Gv=1),
    *(Case(decay=decay) for decay in (None, 0.0, -1e-6, -8.0, -50.0, -math.inf)),
    *(Case(Gk=a, Gv=b) for a, b in ((1, 1), (2, 2), (1, 4), (4, 2), (2, 1))),
    Case(H=6, Gk=3, Gv=2, qk_norm=True),
    Case(qk_norm=True, decay=None),
    Case(qk_norm=True, T=1),
    Case(state=False),
    Case(T=0, state=False),
    Case(B=0),
    Case(D=1, E=1),
    *(Case(layout=layout) for layout in ("transposed", "projection", "expanded")),
    Case(layout="projection", qk_norm=True, Gk=1, Gv=2),
    packed(0, 130),
    packed(0, 0),
    packed(0, 0, 0, 0, state=False),
    packed(0, 1, 2, 66, 66, 130, 200),
    packed(0, 0, 64, 128, 128, 128, decay=-8.0),
    packed(0, 0, 70, 71, 71, state=False, qk_norm=True, Gk=2, Gv=1),
    packed(0, 100, 163, decay=None, layout="projection"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_both_definitions_in_float64(case: Case, device: torch.device) -> None:
    actual = call(case, lightning, device)
    assert_same(actual, call(case, quadratic, device))
    assert_same(actual, call(case, recurrent, device))


@pytest.mark.parametrize("case", [Case(T=200), packed(0, 1, 1, 66, 200, qk_norm=True, Gk=1, Gv=2)], ids=str)
def test_the_reference_by_chunks_is_one_of_the_definitions(case: Case, device: torch.device) -> None:
    assert_same(call(case, chunkwise, device), call(case, quadratic, device))


@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sequences_agree(case: Case, device: torch.device) -> None:
    assert_same(call(case, lightning, device), call(case, quadratic, device), tolerance=1e-10)


@pytest.mark.parametrize("case", [Case(Gk=2, Gv=1, qk_norm=True), packed(0, 3, 70, 70, 200, Gk=1, Gv=4)], ids=str)
def test_one_head_at_a_time_agrees(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    at_once = call(case, lightning, cpu)
    monkeypatch.setattr("ops.chunkwise.LARGE", 0)
    assert_same(call(case, lightning, cpu), at_once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize(
    "case",
    [
        Case(T=65),
        Case(T=200, Gk=2, Gv=1, layout="projection"),
        Case(T=200, qk_norm=True),
        Case(T=392, B=1, D=96, E=160, H=2, Gk=2, Gv=2),
        Case(T=2048, B=1),
        packed(0, 1, 2, 66, 66, 130, 200),
    ],
    ids=str,
)
def test_is_as_accurate_as_plain_pytorch(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    actual, plain = call(case, lightning, device, dtype), call(case, quadratic, device, dtype)
    truth = call(case, quadratic, device, dtype, truth=True)
    assert_accurate(actual, plain, truth, spread(case, quadratic, device, dtype), dtype)


@pytest.mark.parametrize("layout", ["contiguous", "projection"])
@pytest.mark.parametrize("bounds", [None, (0, 3, 3, 20)], ids=["rows", "packed"])
def test_operators_keep_the_contract_of_torch_library(layout: str, bounds, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    case = Case(T=20, B=1 if bounds else 2, H=2, Gk=1, Gv=2, D=4, E=3, layout=layout, bounds=bounds)
    tensors = inputs(case, device, torch.float32)
    leaves = [x.detach().requires_grad_() for x in tensors.values()]
    do, dstate = output_gradients(case, device, torch.float32)
    cu_seqlens = case.cu_seqlens(device)
    for with_state in (False, True):
        torch.library.opcheck(_forward, (*leaves, cu_seqlens, True, with_state, False))
    nothing = (torch.empty(0, device=device),) * 2
    torch.library.opcheck(_backward, (do, dstate, *tensors.values(), cu_seqlens, *nothing, True, True, False))


@pytest.mark.parametrize("layout", ["contiguous", "projection"])
def test_the_step_keeps_the_contract_of_torch_library(layout: str, device: torch.device) -> None:
    tensors = inputs(Case(T=1, H=2, Gk=1, Gv=2, D=4, E=3, layout=layout), device, torch.bfloat16)
    torch.library.opcheck(_step, tuple(tensors.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
def test_compiled_gives_the_same_numbers(dtype: torch.dtype, device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lightning, fullgraph=True)
    case = Case(T=70, Gk=2, Gv=1, qk_norm=True)
    eager = call(case, lightning, device, dtype)
    for name, x in call(case, compiled, device, dtype).items():
        assert torch.equal(x, eager[name]), name


def test_compiles_once_more_for_all_lengths(device: torch.device) -> None:
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph

    compiled = torch.compile(lightning, fullgraph=True, backend=backend)
    for tokens in (20, 65, 130, 200):
        tensors = inputs(Case(T=tokens), device)
        for actual, expected in zip(compiled(**tensors), lightning(**tensors), strict=True):
            assert torch.equal(actual, expected)
    assert len(graphs) <= 2  # one for the first length, one for any length


def test_the_compiled_step_writes_into_the_state(device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lightning_attention_step, fullgraph=True)
    tensors = inputs(Case(T=1, Gk=2, Gv=1), device, torch.float32)
    *others, state = tensors.values()
    for _ in range(3):
        mine, its = state.clone(), state
        expected, actual = lightning_attention_step(*others, mine), compiled(*others, its)
        assert torch.equal(actual, expected)
        assert torch.equal(mine, its)


def test_the_second_derivative_is_an_error(device: torch.device) -> None:
    q = torch.randn(1, 1, 5, 4, device=device, requires_grad=True)
    (dq,) = torch.autograd.grad(lightning_attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dq.sum().backward()


def test_forward_mode_is_an_error(device: torch.device) -> None:
    q, k, v = (torch.randn(1, 2, 8, 4, device=device) for _ in range(3))
    for operator in (lightning_attention, flash_linear_attention):
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(lambda x, operator=operator: operator(x, k, v), (q,), (q,))
    one, state = q[:, :, :1], q.new_zeros(1, 2, 4, 4)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: lightning_attention_step(x, one, one, None, state), (one,), (one,))


def test_a_step_changes_no_state_that_asks_for_a_gradient(device: torch.device) -> None:
    one, state = torch.ones(1, 2, 1, 4, device=device), torch.zeros(1, 2, 4, 4, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=r"^state: expected one without gradient"):
        lightning_attention_step(one, one, one, None, state)
    assert state.count_nonzero() == 0
    with torch.no_grad():
        lightning_attention_step(one, one, one, None, state)
    assert state.count_nonzero() == state.numel()


def test_a_width_of_zero(device: torch.device) -> None:
    q, v = torch.randn(1, 2, 8, 0, device=device), torch.randn(1, 2, 8, 4, device=device)
    assert lightning_attention(q, q, v).equal(torch.zeros_like(v))
    assert lightning_attention(v, v, q).shape == q.shape


def test_autocast_casts_the_inputs_and_nothing_inside(device: torch.device) -> None:
    case = Case(T=70)
    tensors = inputs(case, device, torch.float32)
    do, dstate = output_gradients(case, device, torch.float32)
    narrow = {name: x.bfloat16() if name in ("q", "k", "v") else x for name, x in tensors.items()}
    expected = run(lightning, narrow, do.bfloat16(), dstate)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = run(lightning, tensors, do.bfloat16(), dstate)
    for name, x in actual.items():
        assert torch.equal(x, expected[name].to(x.dtype)), name


def test_autocast_of_a_step_keeps_the_state_in_float32(device: torch.device) -> None:
    *others, state = inputs(Case(T=1), device, torch.float32).values()
    expected_state = state.clone()
    expected = lightning_attention_step(*(x.bfloat16() for x in others[:3]), others[3], expected_state)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = lightning_attention_step(*others, state)
    assert torch.equal(actual, expected)
    assert torch.equal(state, expected_state)


def test_autocast_leaves_float64_alone(device: torch.device) -> None:
    tensors = inputs(Case(T=70), device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = lightning(**tensors)
    assert all(torch.equal(a, b) for a, b in zip(actual, lightning(**tensors), strict=True))


def test_every_subset_of_gradients(device: torch.device) -> None:
    case = Case(T=20, Gk=2, Gv=1, D=4, E=3, qk_norm=True)
    tensors, (do, dstate) = inputs(case, device), output_gradients(case, device)
    full = run(lightning, tensors, do, dstate, qk_norm=True)
    for wanted in itertools.product([False, True], repeat=len(tensors)):
        leaves = {n: x.detach().requires_grad_(w) for (n, x), w in zip(tensors.items(), wanted, strict=True)}
        o, state = lightning(**leaves, qk_norm=True)
        assert o.requires_grad == any(wanted)
        if not any(wanted):
            continue
        torch.autograd.backward((o, state), (do, dstate))
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                assert torch.equal(leaf.grad, full[f"gradient of {name}"]), name
            else:
                assert leaf.grad is None, name


@pytest.mark.parametrize("kept", [0, 1], ids=["o", "state"])
def test_a_gradient_that_nobody_gave_is_zero(kept: int, device: torch.device) -> None:
    case = Case(T=70)
    tensors, grads = inputs(case, device), list(output_gradients(case, device))
    grads[1 - kept] = torch.zeros_like(grads[1 - kept])
    expected = run(lightning, tensors, *grads)
    leaves = [x.requires_grad_() for x in tensors.values()]
    actual = torch.autograd.grad(lightning(**tensors)[kept], leaves, grads[kept])
    for name, x in zip(tensors, actual, strict=True):
        assert torch.equal(x, expected[f"gradient of {name}"]), name


def test_fp16_stays_finite_only_where_q_and_k_have_unit_length(device: torch.device) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 8192, 768, generator=random).mul(30).to(device, torch.float16) for _ in range(3))
    decay = torch.tensor([-0.01], device=device)
    assert not lightning_attention(q, k, v, decay).isfinite().all()
    assert lightning_attention(q, k, v, decay, qk_norm=True).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("operator", [lightning_attention, lightning_attention_step])
def test_a_positive_log_decay_on_a_gpu_gives_nan(operator) -> None:  # type: ignore[no-untyped-def]
    x = torch.ones(1, 2, 1, 4, device="cuda")
    decay = torch.tensor([-1.0, 0.5], device="cuda")
    state = torch.zeros(1, 2, 4, 4, device="cuda")
    if operator is lightning_attention_step:
        o = operator(x, x, x, decay, state)
    else:
        o, state = operator(x, x, x, decay, output_final_state=True)
    for result in (o, state):
        assert result[:, 0].isfinite().all()
        assert result[:, 1].isnan().all()


BAD_BOUNDS = [
    (1, 100),
    (0, 99),
    (0, 101),
    (0, 60, 50, 100),
    (0, 1000),
    (-5, 100),
    (0, -1, 100),
    (100, 0),
    (0, 2**31 - 1),
]


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", BAD_BOUNDS, ids=str)
def test_bad_bounds_on_a_gpu_give_nan(bounds: tuple[int, ...]) -> None:
    x = torch.randn(1, 2, 100, 16, device="cuda", requires_grad=True)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    o = lightning_attention(x, x, x, cu_seqlens=cu_seqlens)
    assert o.isnan().all()
    o.sum().backward()
    assert x.grad.isnan().any()


@pytest.mark.parametrize("bounds", BAD_BOUNDS, ids=str)
def test_bad_bounds_that_a_graph_does_not_read_give_nan(bounds: tuple[int, ...]) -> None:
    x = torch.randn(1, 2, 100, 16)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    assert _forward(x, x, x, None, None, cu_seqlens, False, False, False)[0].isnan().all()
