"""The CUDA kernels of wide heads: widths, chunks and cuts of sequences, isolation, repeats, memory; and their plan."""

import math
from functools import partial
from unittest import mock

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

from ops import lightning_attention, lightning_wide
from ops.lightning_attention import _backward, _forward, cuda_unavailable_reason
from ops.lightning_wide import LONG, SQUARE

by_kernels = partial(lightning, backend="cuda")
two_bytes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
ONE = {"B": 1, "H": 1, "Gk": 1, "Gv": 1}
SMALL = {"B": 1, "H": 2, "Gk": 1, "Gv": 2}
CASES = [
    *(Case(T=t, D=384, E=384, **SMALL) for t in (1, 2, 63, 64, 65, 127, 191, 192, 193, 200, 384, 385, 768, 769, 1153)),
    *(Case(T=t, D=512, E=512, **ONE) for t in (64, 127, 129, 255, 257, 512, 513, 1024, 1025)),
    *(Case(T=800, D=d, E=e, **ONE) for d, e in ((768, 768), (1024, 1024), (640, 896), (768, 1536), (1024, 512))),
    *(Case(T=t, D=d, E=d, **ONE) for t, d in ((2047, 1024), (2049, 1024), (1600, 768))),  # one chunk; several
    *(Case(T=700, D=d, E=e, **SMALL) for d, e in ((128, 320), (64, 512))),  # the last tile of odd panels
    *(Case(T=150, D=d, E=e, **SMALL) for d, e in ((264, 264), (257, 300), (8, 264), (264, 8), (1, 513), (576, 200))),
    *(Case(T=t, D=300, E=300, **ONE) for t in (604, 609)),  # around what is one chunk
    *(Case(T=500, decay=decay, D=320, E=320) for decay in (None, 0.0, -1e-6, -8.0, -50.0, -float("inf"))),
    *(Case(T=200, Gk=a, Gv=b, D=264, E=320) for a, b in ((1, 1), (2, 2), (1, 4), (4, 2))),
    *(Case(T=450, qk_norm=True, D=d, E=e, **SMALL) for d, e in ((384, 384), (512, 264), (64, 264))),
    *(Case(T=130, layout=layout, D=320, E=264) for layout in ("transposed", "projection", "columns", "expanded")),
    Case(T=900, state=False, D=384, E=384),
    Case(T=200, state=False, D=512, E=512),
    packed(0, 130, D=384, E=384),
    packed(0, 1, 2, 66, 66, 130, 200, D=264, E=512),
    packed(0, 0, 64, 128, 128, 128, decay=-8.0, D=512, E=512),
    packed(0, 300, 301, 640, D=384, E=384, **{"H": 2, "Gk": 1, "Gv": 2}),
    packed(0, 0, 384, 768, 1300, 1300, D=384, E=320, **{"H": 2, "Gk": 1, "Gv": 2}),
    packed(0, 513, 514, 1100, 1200, qk_norm=True, D=512, E=512, **{"H": 2, "Gk": 2, "Gv": 1}),
    packed(0, 0, 70, 71, 71, state=False, qk_norm=True, Gk=2, Gv=1, D=320, E=64),
]
# Several chunks of 64 tokens each, whose rows don't fill a tile.
CHUNKED = [
    Case(T=330, D=264, E=384, **SMALL),
    Case(T=330, D=512, E=512, qk_norm=True, **SMALL),
    Case(T=300, D=384, E=384, state=False),
    packed(0, 64, 70, 70, 200, 333, 400, D=384, E=264),
    packed(0, 129, 333, D=512, E=264, qk_norm=True),
]


@pytest.fixture
def device() -> torch.device:
    """A GPU on which the kernels run."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: torch.cuda.is_available() is False")
    x = torch.zeros(1, 1, 1, 8, device="cuda", dtype=torch.bfloat16)
    if (reason := cuda_unavailable_reason(x, x)) is not None:
        pytest.skip(reason)
    return torch.device("cuda")


def check(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    truth = call(case, quadratic, device, dtype, truth=True)
    plain, terms = call(case, quadratic, device, dtype), spread(case, quadratic, device, dtype)
    assert_accurate(call(case, by_kernels, device, dtype), plain, truth, terms, dtype)


def cut_in(segment: int, chunk: int = 64):  # type: ignore[no-untyped-def]
    """Chunks and segments of so many tokens."""
    return (
        mock.patch.multiple(lightning_wide, CHUNKS={SQUARE: chunk, LONG: chunk}, ONE_CHUNK=0),
        mock.patch.object(lightning_wide, "_segment_length", return_value=(segment, 0)),
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@two_bytes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_accurate_as_plain_pytorch(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(case, device, dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", [Case(T=130, D=384, E=264), Case(T=40, D=1024, E=1536, **ONE)], ids=str)
def test_in_float32(case: Case, device: torch.device) -> None:
    check(case, device, torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@two_bytes
@pytest.mark.parametrize(("segment", "chunk"), [(64, 64), (128, 64), (384, 192), (1024, 128)])
@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_chunks_and_segments(case: Case, segment: int, chunk: int, dtype: torch.dtype, device: torch.device) -> None:
    chunks, segments = cut_in(segment, chunk)
    with chunks, segments:
        check(case, device, dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("value", [3.0, -math.inf, math.nan])
@pytest.mark.parametrize(
    "case",
    [
        Case(T=450, D=384, E=320, B=1),
        Case(T=900, D=384, E=320, B=1),
        packed(0, 90, 90, 1050, D=512, E=512, **{"H": 1, "Gk": 1, "Gv": 1}),
    ],
    ids=str,
)
def test_a_token_changes_nothing_before_it(case: Case, value: float, device: torch.device) -> None:
    """And no gradient of it anything after it."""
    tensors = inputs(case, device, torch.bfloat16)
    do, dstate = output_gradients(case, device, torch.bfloat16)
    cu_seqlens = case.cu_seqlens(device)
    clean = run(by_kernels, tensors, do, dstate, cu_seqlens=cu_seqlens)
    for at in (0, 37, 64, 100, 383, 384, case.T - 130, case.T - 1):
        for name in ("q", "k", "v"):
            changed = {**tensors, name: tensors[name].clone()}
            changed[name][:, :, at, 3] = value
            o, _ = by_kernels(**changed, cu_seqlens=cu_seqlens)
            assert torch.equal(o[:, :, :at], clean["o"][:, :, :at]), (name, at)
            assert not torch.equal(o[:, :, at], clean["o"][:, :, at]), (name, at)
        other = do.clone()
        other[:, :, at, 3] = value
        results = run(by_kernels, tensors, other, dstate, cu_seqlens=cu_seqlens)
        for name in ("gradient of k", "gradient of v"):
            assert torch.equal(results[name][:, :, at + 1 :], clean[name][:, :, at + 1 :]), (name, at)
        for rows in (slice(0, at), slice(at + 1, None)):
            assert torch.equal(results["gradient of q"][:, :, rows], clean["gradient of q"][:, :, rows]), at


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("sequence", [0, 1, 2])
def test_nan_stays_in_its_packed_sequence(sequence: int, device: torch.device) -> None:
    bounds = (0, 60, 470, 1000)
    case = packed(*bounds, H=2, Gk=1, Gv=2, D=384, E=512)
    cu_seqlens, grads = case.cu_seqlens(device), output_gradients(case, device, torch.bfloat16)
    tensors = inputs(case, device, torch.bfloat16)
    clean = run(by_kernels, tensors, *grads, cu_seqlens=cu_seqlens)
    inside = torch.arange(case.T, device=device)
    inside = (inside >= bounds[sequence]) & (inside < bounds[sequence + 1])
    for name in ("q", "k", "v"):
        tensors[name][:, :, inside] = torch.nan
    tensors["initial_state"][sequence] = torch.nan
    actual = run(by_kernels, tensors, *grads, cu_seqlens=cu_seqlens)
    assert actual["o"][:, :, inside].isnan().all()
    for name in ("o", "gradient of q", "gradient of k", "gradient of v"):
        assert torch.equal(actual[name][:, :, ~inside], clean[name][:, :, ~inside]), name
    others = [n for n in range(3) if n != sequence]
    for name in ("state", "gradient of initial_state"):
        assert torch.equal(actual[name][others], clean[name][others]), name


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [(5, 1000), (0, 300), (5, 300, 600), (0, 1000, 50, 1000)])
def test_bad_bounds_and_positive_decays_give_nan(bad: tuple[int, ...], device: torch.device) -> None:
    q = torch.randn(1, 1, 1000, 320, device=device, dtype=torch.bfloat16)
    bounds = torch.tensor(bad, dtype=torch.int32, device=device)
    decay = torch.tensor([-0.1], device=device)
    o, state = lightning_attention(q, q, q, decay, cu_seqlens=bounds, output_final_state=True, backend="cuda")
    assert o.isnan().all()
    assert state[0].isnan().all()
    assert lightning_attention(q, q, q, -decay, backend="cuda").isnan().all()


@pytest.mark.gpu
@two_bytes
@pytest.mark.parametrize("at", [1, 64, 191, 384, 500])
def test_split_anywhere(at: int, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(T=900, D=384, E=384, **SMALL)
    results = [call(case, operator, device, dtype) for operator in (by_kernels, in_two_passes([at]))]
    for name, x in results[0].items():
        assert ((x - results[1][name]).double().norm() / x.double().norm()) < 4 * torch.finfo(dtype).eps, name


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case(T=1500, D=384, E=384, **SMALL), Case(T=1500, D=512, E=512)], ids=str)
def test_a_hundred_repeats_are_equal(case: Case, device: torch.device) -> None:
    tensors, grads = inputs(case, device, torch.bfloat16), output_gradients(case, device, torch.bfloat16)
    first = run(by_kernels, tensors, *grads)
    for _ in range(99):
        for name, x in run(by_kernels, tensors, *grads).items():
            assert torch.equal(x, first[name]), name


@pytest.mark.gpu
def test_in_a_cuda_graph(device: torch.device) -> None:
    case = packed(0, 450, 450, 900, D=384, E=384, H=1, Gk=1, Gv=1)
    cu_seqlens, grads = case.cu_seqlens(device), output_gradients(case, device, torch.bfloat16)
    tensors = inputs(case, device, torch.bfloat16)
    expected = run(by_kernels, tensors, *grads, cu_seqlens=cu_seqlens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(by_kernels, tensors, *grads, cu_seqlens=cu_seqlens)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for name, x in expected.items():
        assert torch.equal(x, results[name]), name


@pytest.mark.gpu
def test_operators_keep_the_contract_of_torch_library(device: torch.device) -> None:
    case = Case(T=128, D=264, E=320, **SMALL)
    tensors = inputs(case, device, torch.bfloat16)
    chunks, segments = cut_in(128)
    with chunks, segments:
        arguments = *tensors.values(), None, False, True, True
        _, _, scores, states = _forward(*arguments)
        assert scores.shape == (1, 2, 128, 64)
        assert states.shape == (2, 2, 264, 320)
        do, dstate = output_gradients(case, device, torch.bfloat16)
        backward = do, dstate, *tensors.values(), None, scores, states, False, True, True
        # Scores of masked tiles, and states that no chunk needs, hold anything, so values are not compared.
        for operator, given in ((_forward, arguments), (_backward, backward)):
            torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
def test_memory_of_one_head_of_768(device: torch.device) -> None:
    q, k, v = (torch.randn(8, 1, 4096, 768, device=device).bfloat16().requires_grad_() for _ in range(3))
    do, decay = torch.randn_like(v), torch.tensor([-0.01], device=device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(lightning_attention(q, k, v, decay, backend="cuda"), (q, k, v), do)
    assert torch.cuda.max_memory_allocated() - before <= 600 * 2**20


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("d", "e", "wide"), [(256, 256, False), (257, 8, True), (8, 257, True), (768, 768, True), (128, 256, False)]
)
def test_which_heads_are_wide(d: int, e: int, wide: bool) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q, v = empty(1, 1, 9, d, dtype=dtype), empty(1, 1, 9, e, dtype=dtype)
        assert lightning_wide.is_wide(q, v) == (wide and dtype != torch.float32)


@pytest.mark.parametrize(
    ("tokens", "d", "e", "scores", "states"),
    [
        (4096, 768, 768, (2, 3, 4096, 384), (22, 3, 768, 768)),
        (4096, 1024, 512, (2, 3, 4096, 512), (16, 3, 1024, 512)),
        (512, 512, 512, (2, 3, 512, 512), (0,)),
        (65, 300, 257, (2, 3, 65, 128), (0,)),
        (528, 260, 260, (2, 3, 528, 576), (0,)),
        (529, 260, 260, (2, 3, 529, 384), (4, 3, 264, 264)),
        (2048, 1024, 1024, (2, 3, 2048, 2048), (0,)),
        (2049, 1536, 1536, (2, 3, 2049, 384), (12, 3, 1536, 1536)),
    ],
)
def test_what_is_prepared(tokens: int, d: int, e: int, scores: tuple[int, ...], states: tuple[int, ...]) -> None:
    """Chunks of 384 tokens with square tiles, else of 512; one for short sequences; widths that 8 divides."""
    prepared = lightning_wide.empty_prepared(empty(2, 3, tokens, d), empty(2, 3, tokens, e))
    assert prepared.scores.shape == scores
    assert prepared.states.shape == states


@pytest.mark.parametrize(("d", "e"), [(257, 257), (300, 300), (385, 257), (1021, 1023)])
def test_widths_are_padded_without_another_chunk(d: int, e: int) -> None:
    """What is prepared for q and v as they come fits them as the kernels get them."""
    for tokens in range(500, 2100):
        given, padded = (empty(1, 1, tokens, d), empty(1, 1, tokens, e)), (d + -d % 8, e + -e % 8)
        to_kernels = empty(1, 1, tokens, padded[0]), empty(1, 1, tokens, padded[1])
        assert lightning_wide._chunk(*given) == lightning_wide._chunk(*to_kernels), tokens


@pytest.mark.parametrize(
    ("chains", "tokens", "chunk", "expected"),
    [
        (128, 4096, 384, 4224),  # as many heads and tiles as multiprocessors: whole
        (64, 4096, 384, 4224),  # two segments would take as long, one after the other
        (16, 32768, 384, 4224),
        (1, 384, 384, 384),
    ],
)
def test_segments_fill_the_gpu(chains: int, tokens: int, chunk: int, expected: int) -> None:
    length, whole = lightning_wide._segment_length(chains, tokens, chunk, 132)
    assert length == expected
    assert length % chunk == 0
    assert whole >= min(tokens, length)
