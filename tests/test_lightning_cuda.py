"""The CUDA kernels of lightning attention: every type, width and cut of a sequence, streams, graphs, repeats."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from operator_cases import (
    Case,
    assert_accurate,
    call,
    in_two_passes,
    inputs,
    lightning,
    output_gradients,
    packed,
    quadratic,
    run,
    spread,
)

from ops import lightning_attention, lightning_attention_step, lightning_cuda
from ops.kernels import cut, sum_groups, warn_of_copy
from ops.kernels import unit_length as unit_length_by_kernel
from ops.lightning_attention import _backward, _forward, cuda_unavailable_reason
from ops.numerics import MIN_LENGTH, unit_length, unit_length_backward

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

by_kernels = partial(lightning, backend="cuda")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
every_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda t: str(t)[6:])
HEADS = {"H": 2, "Gk": 2, "Gv": 2, "B": 1}
CASES = [
    *(Case(T=t, D=64, E=64, **HEADS) for t in (1, 2, 63, 64, 65, 127, 128, 129, 200, 2048)),
    *(Case(T=t, D=128, E=128, **HEADS) for t in (1, 63, 64, 65, 193)),
    *(
        Case(T=130, D=d, E=e, **HEADS)
        for d, e in ((16, 16), (8, 72), (256, 256), (136, 40), (40, 264), (1, 1), (7, 33))
    ),
    *(Case(T=150, D=d, E=d, B=1, H=1, Gk=1, Gv=1) for d in (192, 384, 512, 576, 768, 1024)),
    *(Case(decay=decay, D=64, E=64) for decay in (None, 0.0, -1e-6, -8.0, -50.0, -float("inf"))),
    *(Case(Gk=a, Gv=b, D=64, E=128) for a, b in ((1, 1), (2, 2), (1, 4), (4, 2))),
    *(Case(qk_norm=True, D=d, E=64, Gk=2, Gv=1) for d in (40, 64, 128, 136, 200, 264)),
    *(Case(layout=layout, D=64, E=32) for layout in ("transposed", "projection", "columns")),
    # Three passes backward.
    *(Case(qk_norm=True, D=d, E=e) for d, e in ((128, 256), (64, 264), (136, 192), (200, 136), (256, 264))),
    Case(layout="projection", qk_norm=True, Gk=1, Gv=2, D=128, E=128),
    Case(state=False, D=64, E=64),
    packed(0, 130, D=64, E=64),
    packed(0, 1, 2, 66, 66, 130, 200, D=64, E=64),
    packed(0, 0, 64, 128, 128, 128, decay=-8.0, D=128, E=128),
    packed(0, 0, 70, 71, 71, state=False, qk_norm=True, Gk=2, Gv=1, D=128, E=64),
    packed(0, 70, 70, 150, qk_norm=True, D=192, E=136),
]


@pytest.fixture(autouse=True)
def _needs_the_kernels() -> None:
    x = torch.zeros(1, 1, 1, 8, device="cuda", dtype=torch.bfloat16)
    if (reason := cuda_unavailable_reason(x, x)) is not None:
        pytest.skip(reason)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


def check(case: Case, device: torch.device, dtype: torch.dtype, operator=by_kernels) -> None:  # type: ignore[no-untyped-def]
    truth = call(case, quadratic, device, dtype, truth=True)
    plain, terms = call(case, quadratic, device, dtype), spread(case, quadratic, device, dtype)
    assert_accurate(call(case, operator, device, dtype), plain, truth, terms, dtype)


@every_type
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_accurate_as_plain_pytorch(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(case, device, dtype)


@every_type
@pytest.mark.parametrize(
    "case",
    [
        Case(T=300, D=64, E=64, Gk=2, Gv=1),
        Case(T=300, D=128, E=128, qk_norm=True),
        Case(T=200, D=264, E=136, B=1, H=1, Gk=1, Gv=1),
        *(Case(T=200, D=d, E=e) for d, e in ((1, 1), (7, 33))),
        packed(0, 64, 70, 70, 200, 333, 400, D=64, E=64),
        packed(0, 129, 333, D=128, E=128, qk_norm=True),
        *(packed(0, 70, 70, 333, D=d, E=e, qk_norm=True, Gk=2, Gv=1) for d, e in ((136, 192), (200, 256))),
    ],
    ids=str,
)
def test_sequences_cut_in_segments(
    case: Case, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.lightning_cuda._segment_length", lambda *_: (64, 0))
    check(case, device, dtype)
    monkeypatch.setattr("ops.lightning_cuda._segment_length", lambda *_: (128, 0))
    check(case, device, dtype)


@every_type
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("d", "e"), [(40, 64), (128, 72), (136, 136), (200, 64), (200, 136)])
def test_every_variant_on_small_shapes(
    d: int, e: int, qk_norm: bool, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each also cut in segments."""
    for length in (192, 64):  # whole, and cut in three
        monkeypatch.setattr("ops.lightning_cuda._segment_length", lambda *_, length=length: (length, 0))
        check(Case(T=130, B=1, H=2, Gk=2, Gv=1, D=d, E=e, qk_norm=qk_norm), device, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("heads", "of_k", "of_v", "tokens"), [(2, 1, 1, 1), (4, 1, 2, 64), (12, 3, 1, 65), (8, 1, 1, 300), (6, 2, 1, 130)]
)
def test_gradients_of_neighbouring_heads_are_added_up(
    heads: int, of_k: int, of_v: int, tokens: int, qk_norm: bool, dtype: torch.dtype, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """More of them than run at a time, of sequences that are not cut; groups of three are not paired."""
    both, seen = lightning_cuda._gradients_of_both, set()

    def spied(*args, **more):  # type: ignore[no-untyped-def]
        gradients = both(*args, **more)
        seen.update(x.shape[1] for x in gradients)
        return gradients

    monkeypatch.setattr(lightning_cuda, "_gradients_of_both", spied)
    monkeypatch.setattr(lightning_cuda, "_segment_length", lambda *_: (320, 0))
    case = Case(T=tokens, B=30, H=heads, Gk=of_k, Gv=of_v, D=128, E=96, qk_norm=qk_norm)
    check(case, device, dtype)
    assert seen == {heads if heads == 6 else heads // 2}
    tensors, grads = inputs(case, device, dtype), output_gradients(case, device, dtype)
    first = run(by_kernels, tensors, *grads, qk_norm=qk_norm)
    for _ in range(99):
        for name, x in run(by_kernels, tensors, *grads, qk_norm=qk_norm).items():
            assert torch.equal(x, first[name]), name


@pytest.mark.parametrize("width", [40, 128, 200, 264])
@pytest.mark.parametrize(
    ("dtype", "large", "small"),
    [(torch.float32, 2.0**100, 2.0**-15), (torch.bfloat16, 2.0**100, 2.0**-15), (torch.float16, 2.0**9, 2.0**-9)],
    ids=["float32", "bfloat16", "float16"],
)
def test_lengths_of_some_vectors_change_nothing(
    dtype: torch.dtype, large: float, small: float, width: int, device: torch.device
) -> None:
    """Powers of two change no digit: of q and k they change nothing but their own gradients, by the same factor."""
    random = torch.Generator().manual_seed(0)
    tokens = 150
    signs = (torch.randint(0, 2, (2, 2, 2, tokens, width), generator=random) * 2 - 1).to(dtype)
    vectors = signs * (1 + torch.rand(2, 2, 2, tokens, width, generator=random)).to(dtype)
    v, do = (torch.randn(2, 2, tokens, width, generator=random).to(device, dtype) for _ in range(2))
    rows = torch.randint(0, 5, (2, 2, 2, tokens, 1), generator=random)
    scales = torch.where(rows == 0, large, torch.where(rows == 1, small, 1.0))

    def gradients(scales: torch.Tensor) -> list[torch.Tensor]:
        q, k = ((x * s).to(device, dtype).requires_grad_() for x, s in zip(vectors, scales, strict=True))
        values = v.clone().requires_grad_()
        log_decay = torch.full((2,), -0.1, device=device)
        o = lightning_attention(q, k, values, log_decay, qk_norm=True, backend="cuda")
        dq, dk, dv = torch.autograd.grad(o, (q, k, values), do)
        return [o, dv, *(dx.double() * s.double().to(device) for dx, s in zip((dq, dk), scales, strict=True))]

    expected, actual = gradients(torch.ones_like(scales)), gradients(scales)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    if dtype == torch.float16:  # gradients of large vectors are no longer normal numbers
        expected, actual = (
            [o, dv, *(dx.where(rows[i].to(device) != 0, 0) for i, dx in enumerate(of_vectors))]
            for o, dv, *of_vectors in (expected, actual)
        )
    for name, a, b in zip(("o", "dv", "dq", "dk"), actual, expected, strict=True):
        error = (a.double() - b.double()).norm(dim=-1) / b.double().norm(dim=-1).clamp(min=1e-2)
        assert error.max() < tolerance, name


@pytest.mark.parametrize("width", [64, 128, 200, 264])
@every_type
def test_vectors_of_zeros(dtype: torch.dtype, width: int, device: torch.device) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(2, 2, 150, width, generator=random).to(device, dtype) for _ in range(4))
    q[torch.randint(0, 5, q.shape[:3], generator=random) == 0] = 0
    k[torch.randint(0, 5, k.shape[:3], generator=random) == 0] = 0
    do *= 1e-4  # the gradient of zeros is divided by 1e-6: float16 still holds it
    results = []
    for backend in ("torch", "cuda"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = lightning_attention(*leaves, torch.full((2,), -0.1, device=device), qk_norm=True, backend=backend)
        results.append([o, *torch.autograd.grad(o, leaves, do)])
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for name, expected, actual in zip(("o", "dq", "dk", "dv"), *results, strict=True):
        error = (actual.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1).clamp(min=1e-3)
        assert error.max() < tolerance, name


@pytest.mark.parametrize("width", [1, 8, 33, 256, 264, 1024, 2048])
@every_type
def test_unit_length_is_that_of_pytorch(dtype: torch.dtype, width: int, device: torch.device) -> None:
    random = torch.Generator().manual_seed(0)
    least, most = (1e-7, 6e4) if dtype == torch.float16 else (1e-30, 3e38)
    scales = torch.tensor([0.0, least, 1e-6, 1e-3, 1.0, 100.0, most])[:, None]
    x = ((torch.rand(2, 3, 7, 2 * width, generator=random) * 2 - 1) * scales).to(device, dtype)[..., ::2]
    for of in (x, x.contiguous()):
        # Over 1e-6 float16 holds it; others hold all but infinity on the way.
        grad = (torch.randn(2, 3, 7, width, generator=random) * (1e-4 if dtype == torch.float16 else 1e3)).to(
            device, dtype
        )
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(unit_length_by_kernel(of), unit_length(of), rtol=2 * eps, atol=2 * eps)
        expected = unit_length_backward(grad.float(), of)
        actual = unit_length_by_kernel(of, grad).float()
        largest = grad.abs().amax(-1, keepdim=True) / of.float().abs().amax(-1, keepdim=True).clamp(min=MIN_LENGTH)
        assert ((actual - expected).abs() <= 4 * eps * largest + torch.finfo(dtype).tiny).all()
    for bad in (float("nan"), float("inf")):
        x[0, 0, 3, 0] = bad
        assert unit_length_by_kernel(x)[0, 0, 3].isnan().all()
        assert unit_length_by_kernel(x, grad)[0, 0, 3].isnan().all()


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "norm"])
def test_operators_keep_the_contract_of_torch_library(qk_norm: bool, device: torch.device) -> None:
    case = Case(T=24, B=1, H=2, Gk=1, Gv=2, D=16, E=24)  # no padding of lengths, which holds anything
    tensors = inputs(case, device, torch.bfloat16)
    arguments = *tensors.values(), None, qk_norm, True, True
    torch.library.opcheck(_forward, arguments)
    *_, of_q, of_k = _forward(*arguments)
    do, dstate = output_gradients(case, device, torch.bfloat16)
    torch.library.opcheck(_backward, (do, dstate, *tensors.values(), None, of_q, of_k, qk_norm, True, True))


def test_packed_sequences_are_cut_only_where_that_pays(device: torch.device) -> None:
    case = packed(0, 64, 200, 420, D=64, E=64)
    for longest, pieces in ((220, 3), (219, 1 + 3 + 4)):
        table = cut(torch.empty(1, 1, 420, 64, device=device), 64, longest, case.cu_seqlens(device))
        used = table.table[-1, 0].item()
        assert used == pieces
        assert table.table[:used, 2].sum().item() == 420


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_may_be_tf32(precision: str, device: torch.device) -> None:
    before = torch.get_float32_matmul_precision()
    case = Case(T=300, D=64, E=64)
    exact = call(case, by_kernels, device, torch.float32)
    torch.set_float32_matmul_precision(precision)
    try:
        rough = call(case, by_kernels, device, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    truth = call(case, quadratic, device, torch.float32, truth=True)
    for name, x in truth.items():
        error = [((y[name].double() - x).norm() / x.norm()).item() for y in (exact, rough)]
        assert error[0] < 1e-5, name
        assert 10 * error[0] < error[1] < 2e-3, name


@every_type
@pytest.mark.parametrize("at", [1, 63, 64, 65, 130, 199])
def test_split_anywhere(at: int, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(T=200, D=64, E=64, Gk=2, Gv=1)
    results = [call(case, operator, device, dtype) for operator in (by_kernels, in_two_passes([at]))]
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for name, x in results[0].items():
        assert ((x - results[1][name]).double().norm() / x.double().norm()) < tolerance, name


@every_type
@pytest.mark.parametrize(
    "case",
    [
        *(Case(T=1024, B=8, H=12, Gk=g, Gv=g, D=64, E=64, qk_norm=n) for g in (1, 12) for n in (False, True)),
        Case(T=1024, B=4, H=8, Gk=1, Gv=1, D=128, E=128, qk_norm=True),
        Case(T=1024, B=4, H=8, Gk=8, Gv=8, D=256, E=256, qk_norm=True),
        *(Case(T=2048, B=4, H=2, Gk=2, Gv=1, D=width, E=width) for width in (384, 768, 1024)),
    ],
    ids=str,
)
def test_blocks_that_do_one_piece_of_work_after_another(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Where a stage is needed again, a read that comes too late is wrong now and then."""
    check(case, device, dtype)
    tensors, grads = inputs(case, device, dtype), output_gradients(case, device, dtype)
    first = run(by_kernels, tensors, *grads, qk_norm=case.qk_norm)
    for _ in range(5):
        for name, x in run(by_kernels, tensors, *grads, qk_norm=case.qk_norm).items():
            assert torch.equal(x, first[name]), name


@every_type
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_hundred_repeats_are_equal(qk_norm: bool, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(T=1500, D=128, E=128, Gk=2, Gv=1, qk_norm=qk_norm)
    tensors, grads = inputs(case, device, dtype), output_gradients(case, device, dtype)
    first = run(by_kernels, tensors, *grads, qk_norm=qk_norm)
    for _ in range(99):
        for name, x in run(by_kernels, tensors, *grads, qk_norm=qk_norm).items():
            assert torch.equal(x, first[name]), name


@every_type
def test_runs_on_the_current_stream(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(T=200, D=64, E=64, qk_norm=True)
    expected = call(case, by_kernels, device, dtype)
    stream = torch.cuda.Stream()
    tensors, grads = inputs(case, device, dtype), output_gradients(case, device, dtype)
    late = {name: torch.zeros_like(x) for name, x in tensors.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would see zeros
        for name, x in tensors.items():
            late[name].copy_(x)
        actual = run(by_kernels, late, *grads, qk_norm=True)
    stream.synchronize()
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name


@every_type
def test_as_the_first_that_a_thread_does_on_the_gpu(dtype: torch.dtype, device: torch.device) -> None:
    tensors = inputs(Case(T=100, D=64, E=64), device, dtype)
    expected = by_kernels(**tensors)
    with ThreadPoolExecutor() as threads:  # whose memory comes from the cache, without a call of CUDA
        for actual, x in zip(threads.submit(by_kernels, **tensors).result(), expected, strict=True):
            assert torch.equal(actual, x)


@every_type
@pytest.mark.parametrize(
    "case",
    [Case(T=200, D=64, E=64, B=1), packed(0, 70, 70, 200, D=64, E=64), Case(T=200, D=128, E=128, Gk=1, Gv=1)],
    ids=["rows", "packed", "neighbours"],
)
def test_in_a_cuda_graph(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    cu_seqlens = case.cu_seqlens(device)
    tensors, grads = inputs(case, device, dtype), output_gradients(case, device, dtype)
    held = {name: x.clone() for name, x in tensors.items()}
    run(by_kernels, held, *grads, cu_seqlens=cu_seqlens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(by_kernels, held, *grads, cu_seqlens=cu_seqlens)
    for seed in (1, 2):
        tensors = inputs(case, device, dtype, seed)
        for name, x in tensors.items():
            held[name].copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        for name, x in run(by_kernels, tensors, *grads, cu_seqlens=cu_seqlens).items():
            assert torch.equal(x, results[name]), name


@every_type
def test_a_step_in_a_cuda_graph(dtype: torch.dtype, device: torch.device) -> None:
    *arguments, state = inputs(Case(T=1, D=128, E=128, Gk=2), device, dtype).values()
    mine, its = state.clone(), state.clone()
    lightning_attention_step(*arguments, its.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = lightning_attention_step(*arguments, its)
    for _ in range(3):
        expected = lightning_attention_step(*arguments, mine)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(o, expected)
        assert torch.equal(its, mine)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "case", [Case(T=200, D=64, E=64, qk_norm=True), Case(T=200, D=128, E=128, Gk=1, Gv=1)], ids=["norm", "neighbours"]
)
@every_type
def test_on_the_second_gpu(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    expected = call(case, by_kernels, device, dtype)
    for name, x in call(case, by_kernels, torch.device("cuda:1"), dtype).items():
        assert torch.equal(x.to(device), expected[name]), name


def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    heads, tokens, width = 130, 130_000, 128
    assert heads * tokens * width > 2**31
    random = torch.Generator(device).manual_seed(0)
    shape = (1, heads, tokens, width)
    q, k, v, do = (torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16) for _ in range(4))
    decay = torch.full((heads,), -0.05, device=device)
    dstate = torch.zeros(1, heads, width, width, device=device)
    tensors = {"q": q, "k": k, "v": v, "log_decay": decay, "initial_state": None}
    actual = run(by_kernels, tensors, do, dstate)
    for head, start in itertools.product((0, heads - 1), (0, tokens - 2000)):
        part = {name: x[:, head : head + 1, start:].contiguous() for name, x in (("q", q), ("k", k), ("v", v))}
        part = {**part, "log_decay": decay[:1], "initial_state": None}
        alone = run(by_kernels, part, do[:, head : head + 1, start:].contiguous(), dstate[:, :1])
        late = slice(1000, 2000) if start else slice(0, 1000)  # a decay of e^-50 away from the cut
        for name in ("o", "gradient of q", "gradient of k", "gradient of v"):
            x = actual[name][:, head, start:][:, late].double()
            assert (x - alone[name][:, 0, late]).norm() / x.norm() < 2e-2, (name, head, start)


def test_unit_length_and_sums_of_more_elements_than_32_bits_count(device: torch.device) -> None:
    """At their ends as without what is before."""
    x = torch.randn(1, 130, 130_000, 128, device=device, dtype=torch.bfloat16)
    late = x[:, -5:, -100:].contiguous()
    assert torch.equal(unit_length_by_kernel(x)[:, -5:, -100:], unit_length_by_kernel(late))
    assert torch.equal(unit_length_by_kernel(x, x)[:, -5:, -100:], unit_length_by_kernel(late, late))
    assert torch.equal(sum_groups(x, 26)[:, -1:, -100:], sum_groups(late, 1))


def test_an_argument_that_must_be_copied_is_mentioned_once(device: torch.device) -> None:

    warn_of_copy.cache_clear()
    x = torch.randn(1, 1, 20, 36, device=device, dtype=torch.bfloat16)[..., 1:33]
    expected = lightning_attention(x.clone(), x.clone(), x.clone(), backend="cuda")
    with pytest.warns(UserWarning, match="copies an argument") as seen:
        assert torch.equal(lightning_attention(x, x, x, backend="cuda"), expected)
    assert len(seen) == 1


@every_type
def test_takes_what_is_contiguous_but_not_aligned_or_of_one_column(dtype: torch.dtype, device: torch.device) -> None:
    flat = torch.randn(2 * 3 * 40 * 16 + 1, device=device, dtype=dtype)[1:]
    odd, column = flat.view(2, 3, 40, 16), flat[:240].view(2, 3, 1, 40).mT
    decay = torch.tensor(-0.1, device=device).expand(3)
    for x in (odd, column):
        expected = lightning_attention(x.clone(), x.clone(), x.clone(), decay.clone(), backend="cuda")
        assert torch.equal(lightning_attention(x, x, x, decay, backend="cuda"), expected)
    tokens = [x[:, :, :1] for x in (odd, odd, column)]
    states = torch.zeros(2 * 3 * 16 + 1, device=device)
    own, shifted = states[:-1].view(2, 3, 16, 1).clone(), states[1:].view(2, 3, 16, 1)
    expected = lightning_attention_step(*(x.clone() for x in tokens), decay.clone(), own)
    torch.testing.assert_close(lightning_attention_step(*tokens, decay, shifted), expected)
    torch.testing.assert_close(shifted, own)


def test_what_the_kernels_do_not_take_has_a_reason(device: torch.device) -> None:
    for x, reason in (
        (torch.zeros(1, 1, 4, 8, device=device, dtype=torch.float64), "q is float64"),
        (torch.zeros(1, 1, 4, 2056, device=device), "a head is 2056 wide"),
    ):
        with pytest.raises(ValueError, match=rf"^backend: 'cuda' can't take this call: {reason}"):
            lightning_attention(x, x, x, backend="cuda")
        lightning_attention(x, x, x)
