"""Masked linear attention: its writings against the definition, and the bad calls of every operator."""

import itertools

import pytest
import torch
from operator_cases import assert_accurate, assert_same
from torch import Tensor

from ops import (
    flash_linear_attention,
    lightning_attention,
    lightning_attention_step,
    normal_linear_attention,
    reference,
)
from ops.linear_attention import _backward, _forward
from scripts.benchmark_ops import peak_memory, saved_bytes

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WRITINGS = [
    {"implementation": "normal"},
    {"implementation": "split", "q_block_size": 16, "kv_block_size": 24},
    {"implementation": "split", "q_block_size": 1, "kv_block_size": 1000},
    {"implementation": "auto"},
]
# (B, H, Gk, Gv, Lq, Lk), width of q and k, width of v
SHAPES = {
    "blocks": ((2, 4, 4, 4, 48, 48), 16, 8),
    "ragged": ((2, 4, 2, 1, 50, 37), 16, 24),
    "one-head": ((1, 6, 1, 3, 17, 65), 5, 1),
    "one-token": ((1, 1, 1, 1, 1, 1), 1, 1),
    "no-query": ((2, 2, 1, 2, 0, 5), 4, 4),
    "no-key": ((2, 2, 2, 1, 5, 0), 4, 4),
    "no-row": ((0, 2, 2, 2, 5, 6), 4, 4),
}
MASKS = {"none": None, "full": (1, 1), "one-row": (0, 1), "one-head": (1, 0), "one": (0, 0), "bool": (0, 1)}


def arguments(
    shape: str = "ragged", mask: str = "full", device: torch.device | str = "cpu", dtype=torch.float64, layout="rows"
) -> dict[str, Tensor | None]:  # type: ignore[no-untyped-def]
    (b, h, gk, gv, lq, lk), d, e = SHAPES[shape]
    random = torch.Generator().manual_seed(0)

    def normal(heads: int, tokens: int, width: int) -> Tensor:
        if layout == "rows":
            return torch.randn(b, heads, tokens, width, generator=random, dtype=torch.float64)
        return torch.randn(b, tokens, 2, heads, width, generator=random, dtype=torch.float64)[:, :, 1].transpose(1, 2)

    q, k, v = normal(h, lq, d), normal(gk, lk, d), normal(gv, lk, e)
    m = None
    if MASKS[mask] is not None:
        per_row, per_head = MASKS[mask]
        m = torch.randn(b if per_row else 1, h if per_head else 1, lq, lk, generator=random, dtype=torch.float64)
    m = m > 0 if mask == "bool" else None if m is None else m.to(dtype)
    move = lambda x: None if x is None else x.to(device)  # noqa: E731
    return {"q": move(q.to(dtype)), "k": move(k.to(dtype)), "v": move(v.to(dtype)), "mask": move(m)}


def run(operator, tensors: dict[str, Tensor | None], **options: object) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """Output and gradients by name, under an output gradient that is no contiguous tensor."""
    leaves = {
        name: x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in tensors.items()
    }
    o = operator(**leaves, **options)
    do = torch.linspace(-1, 1, o.numel(), device=o.device, dtype=o.dtype).view(o.mT.shape).mT
    given = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    grads = torch.autograd.grad(o, list(given.values()), do)
    return {"o": o.detach(), **{f"gradient of {n}": g for n, g in zip(given, grads, strict=True)}}


def plain(*, q, k, v, mask, qk_norm=False):  # type: ignore[no-untyped-def]
    """The formula in the inputs' own type."""
    if qk_norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1, eps=1e-6) for x in (q, k))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT
    return (scores if mask is None else scores * mask) @ v


@pytest.mark.parametrize("options", WRITINGS, ids=lambda o: "-".join(str(x) for x in o.values()))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_writing_equals_the_definition(shape: str, mask: str, options: dict, device: torch.device) -> None:
    tensors = arguments(shape, mask, device)
    for qk_norm in (False, True):
        truth = run(reference.masked, tensors, qk_norm=qk_norm)
        assert_same(run(flash_linear_attention, tensors, qk_norm=qk_norm, **options), truth)
        assert_same(run(plain, tensors, qk_norm=qk_norm), truth)


@pytest.mark.parametrize("mask", ["none", "full", "bool"])
def test_normal_is_a_writing_of_the_same(mask: str, device: torch.device) -> None:
    tensors = arguments(mask=mask, device=device)
    assert_same(run(normal_linear_attention, tensors), run(plain, tensors))


@pytest.mark.parametrize("options", WRITINGS[:2], ids=lambda o: o["implementation"])
def test_inputs_as_a_projection_gives_them(options: dict, device: torch.device) -> None:
    tensors = arguments(device=device, layout="projection")
    tensors["mask"] = tensors["mask"].mT.contiguous().mT
    assert_same(run(flash_linear_attention, tensors, **options), run(plain, tensors))
    tensors["mask"] = tensors["mask"][:1, :1].expand_as(tensors["mask"])
    assert_same(run(flash_linear_attention, tensors, **options), run(plain, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("mask", ["none", "one-row", "bool"])
@pytest.mark.parametrize("options", WRITINGS[:2], ids=lambda o: o["implementation"])
def test_is_as_accurate_as_plain_pytorch(options: dict, mask: str, dtype: torch.dtype, device: torch.device) -> None:
    tensors = arguments("blocks", mask, device, dtype)
    wide = {name: x if x is None or x.dtype == torch.bool else x.double() for name, x in tensors.items()}
    truth = run(plain, wide)
    actual, rival = run(flash_linear_attention, tensors, **options), run(plain, tensors)
    for name, expected in truth.items():
        assert_accurate(name, actual[name], rival[name], expected)


def test_every_subset_of_gradients(device: torch.device) -> None:
    tensors = arguments(device=device)
    full = run(flash_linear_attention, tensors)
    for wanted in itertools.product([False, True], repeat=4):
        leaves = {n: x.detach().requires_grad_(w) for (n, x), w in zip(tensors.items(), wanted, strict=True)}
        o = flash_linear_attention(**leaves)
        assert o.requires_grad == any(wanted)
        if not any(wanted):
            continue
        o.backward(torch.linspace(-1, 1, o.numel(), device=o.device, dtype=o.dtype).view(o.mT.shape).mT)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == leaf.requires_grad, name
            assert leaf.grad is None or torch.equal(leaf.grad, full[f"gradient of {name}"]), name


@pytest.mark.parametrize("options", WRITINGS[:2], ids=lambda o: o["implementation"])
def test_nan_stays_in_its_row_of_the_batch(options: dict, device: torch.device) -> None:
    tensors = arguments(device=device)
    clean = run(flash_linear_attention, tensors, **options)
    for name in ("q", "k", "v", "mask"):
        changed = {**tensors, name: tensors[name].clone()}
        changed[name][1] = torch.nan
        for result, x in run(flash_linear_attention, changed, **options).items():
            assert torch.equal(x[0], clean[result][0]), result


@pytest.mark.parametrize("mask", ["none", "full"])
@pytest.mark.parametrize("layout", ["rows", "projection"])
def test_operators_keep_the_contract_of_torch_library(layout: str, mask: str, device: torch.device) -> None:
    tensors = arguments(mask=mask, device=device, dtype=torch.float32, layout=layout)
    leaves = [x if x is None else x.detach().requires_grad_() for x in tensors.values()]
    options = (True, "split", 16, 24)
    torch.library.opcheck(_forward, (*leaves, *options))
    do = torch.randn_like(flash_linear_attention(**tensors))
    torch.library.opcheck(_backward, (do, *tensors.values(), mask == "full", *options))


@pytest.mark.parametrize("mask", ["none", "one-row"])
def test_compiled_gives_the_same_numbers(mask: str, device: torch.device) -> None:
    torch.compiler.reset()
    tensors = arguments(mask=mask, device=device, dtype=torch.float32)
    compiled = torch.compile(flash_linear_attention, fullgraph=True)
    eager = run(flash_linear_attention, tensors, qk_norm=True)
    for name, x in run(compiled, tensors, qk_norm=True).items():
        assert torch.equal(x, eager[name]), name


def test_the_second_derivative_is_an_error(device: torch.device) -> None:
    q = torch.randn(1, 1, 5, 4, device=device, requires_grad=True)
    (dq,) = torch.autograd.grad(flash_linear_attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dq.sum().backward()


@pytest.mark.parametrize("mask", ["none", "full", "bool"])
def test_autocast_casts_the_inputs_and_nothing_inside(mask: str, device: torch.device) -> None:
    tensors = arguments(mask=mask, device=device, dtype=torch.float32)
    narrow = {name: x if x is None or x.dtype == torch.bool else x.bfloat16() for name, x in tensors.items()}
    expected = run(flash_linear_attention, narrow)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = run(flash_linear_attention, tensors)
    for name, x in actual.items():
        assert torch.equal(x, expected[name].to(x.dtype)), name


def test_split_holds_less_than_normal_and_neither_saves_scores(device: torch.device) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 2048, 16, generator=random).to(device).requires_grad_() for _ in range(3))
    mask = torch.ones(1, 1, 2048, 2048, device=device)
    peak = {}
    for name in ("normal", "split"):
        forward = lambda name=name: flash_linear_attention(q, k, v, mask, implementation=name)  # noqa: E731
        assert saved_bytes(forward) == sum(x.nbytes for x in (q, k, v, mask))
        peak[name] = peak_memory(lambda forward=forward: forward().sum().backward(), device)
    scores = 2 * 2048**2 * 4
    assert peak["normal"] > 2 * scores
    assert peak["split"] < scores / 2


def q(*shape: int, **options) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.ones(*shape or (2, 4, 6, 8), **options)


def state(*shape: int, **options) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.zeros(*shape or (2, 4, 8, 8), **options)


def bounds(*values: int, **options) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.tensor(values, dtype=options.pop("dtype", torch.int32), **options)


X, META = {"q": q(), "k": q(), "v": q()}, "meta"
ONE = {name: x[:1] for name, x in X.items()}
STEP = {"q": q(2, 4, 1, 8), "k": q(2, 4, 1, 8), "v": q(2, 4, 1, 8), "log_decay": None, "state": state()}
WHICH = {"lightning": lightning_attention, "step": lightning_attention_step, "flash": flash_linear_attention}
BAD_QKV = [
    ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
    ({"k": None}, TypeError, "k: expected a tensor, got NoneType"),
    ({"q": q(4, 6, 8)}, ValueError, "q: expected 4 dims (batch, heads, tokens, width), got shape (4, 6, 8)"),
    ({"v": q(8)}, ValueError, "v: expected 4 dims (batch, heads, tokens, width), got shape (8,)"),
    ({"q": q().long()}, TypeError, "q: expected one of float32, bfloat16, float16, float64, got torch.int64"),
    ({"k": q().double()}, TypeError, "k: expected q's type torch.float32, got torch.float64"),
    ({"v": q().half()}, TypeError, "v: expected q's type torch.float32, got torch.float16"),
    ({"k": q(device=META)}, ValueError, "k: expected q's device cpu, got meta"),
    ({"v": q(3, 4, 6, 8)}, ValueError, "v: expected q's batch size 2, got 3"),
    ({"k": q(2, 3, 6, 8)}, ValueError, "k: expected a number of heads that divides q's 4, got 3"),
    ({"v": q(2, 8, 6, 8)}, ValueError, "v: expected a number of heads that divides q's 4, got 8"),
    ({"v": q(2, 0, 6, 8)}, ValueError, "v: expected a number of heads that divides q's 4, got 0"),
    ({"k": q(2, 4, 6, 7)}, ValueError, "k: expected q's width 8, got 7"),
    ({"v": q(2, 4, 5, 8)}, ValueError, "v: expected k's 6 tokens, got 5"),
]
BAD_DECAYS = [
    ({"log_decay": -0.5}, TypeError, "log_decay: expected a tensor or None, got float"),
    ({"log_decay": -q(4).half()}, TypeError, "log_decay: expected torch.float32, got torch.float16"),
    ({"log_decay": -q(3)}, ValueError, "log_decay: expected shape (4,), one value a head, got (3,)"),
    ({"log_decay": -q(4, 1)}, ValueError, "log_decay: expected shape (4,), one value a head, got (4, 1)"),
    ({"log_decay": -q(4, device=META)}, ValueError, "log_decay: expected q's device cpu, got meta"),
    (
        {"log_decay": torch.tensor([-1, 0, 0.5, -2])},
        ValueError,
        "log_decay: expected values ≤ 0, got [-1.0, 0.0, 0.5, -2.0]",
    ),
    ({"log_decay": -q(4) * torch.nan}, ValueError, "log_decay: expected values ≤ 0, got [nan, nan, nan, nan]"),
]
BAD_BOUNDS = [
    ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens: expected a tensor or None, got list"),
    ({"cu_seqlens": bounds(0, 6, dtype=torch.int64)}, TypeError, "cu_seqlens: expected torch.int32, got torch.int64"),
    ({"cu_seqlens": bounds(6)}, ValueError, "cu_seqlens: expected shape (sequences + 1,), got (1,)"),
    ({"cu_seqlens": bounds(0, 6)[None]}, ValueError, "cu_seqlens: expected shape (sequences + 1,), got (1, 2)"),
    ({"cu_seqlens": bounds(0, 6, device=META)}, ValueError, "cu_seqlens: expected q's device cpu, got meta"),
    *(
        (
            {"cu_seqlens": bounds(*wrong)},
            ValueError,
            f"cu_seqlens: expected values rising from 0 to 6 tokens, got {list(wrong)}",
        )
        for wrong in ((0, 5), (0, 7), (1, 6), (0, 4, 3, 6), (0, -1, 6))
    ),
    (
        {"cu_seqlens": bounds(0, 6), "initial_state": state(2, 4, 8, 8)},
        ValueError,
        "initial_state: expected shape (1, 4, 8, 8), got (2, 4, 8, 8)",
    ),
]
BAD_CALLS = [
    *(("lightning", X, *bad) for bad in [*BAD_QKV, *BAD_DECAYS]),
    *(("flash", X, *bad) for bad in BAD_QKV),
    *(("lightning", ONE, *bad) for bad in BAD_BOUNDS),
    (
        "lightning",
        X,
        {"cu_seqlens": bounds(0, 6)},
        ValueError,
        "cu_seqlens: expected packed sequences in a batch of 1, got a batch of 2",
    ),
    ("lightning", X, {"k": q(2, 4, 5, 8)}, ValueError, "k: expected q's 6 tokens, got 5"),
    ("lightning", X, {"backend": "fast"}, ValueError, "backend: expected one of auto, torch, cuda, got 'fast'"),
    ("lightning", X, {"qk_norm": "l2"}, TypeError, "qk_norm: expected True or False, got 'l2'"),
    ("lightning", X, {"output_final_state": 1}, TypeError, "output_final_state: expected True or False, got 1"),
    ("lightning", X, {"initial_state": 0}, TypeError, "initial_state: expected a tensor or None, got int"),
    (
        "lightning",
        X,
        {"initial_state": state().half()},
        TypeError,
        "initial_state: expected torch.float32, got torch.float16",
    ),
    (
        "lightning",
        X,
        {"initial_state": state(2, 4, 8, 7)},
        ValueError,
        "initial_state: expected shape (2, 4, 8, 8), got (2, 4, 8, 7)",
    ),
    (
        "lightning",
        X,
        {"initial_state": state(device=META)},
        ValueError,
        "initial_state: expected q's device cpu, got meta",
    ),
    ("step", STEP, {"q": q()}, ValueError, "k: expected q's 6 tokens, got 1"),
    ("step", STEP, {"q": q(), "k": q(), "v": q()}, ValueError, "q: expected 1 token, got 6"),
    ("step", STEP, {"k": q(2, 3, 1, 8)}, ValueError, "k: expected a number of heads that divides q's 4, got 3"),
    ("step", STEP, {"log_decay": q(4)}, ValueError, "log_decay: expected values ≤ 0, got [1.0, 1.0, 1.0, 1.0]"),
    ("step", STEP, {"state": None}, TypeError, "state: expected a tensor, got None"),
    ("step", STEP, {"state": state().bfloat16()}, TypeError, "state: expected torch.float32, got torch.bfloat16"),
    (
        "step",
        STEP,
        {"state": state(1, 4, 8, 8)},
        ValueError,
        "state: expected shape (2, 4, 8, 8), got (1, 4, 8, 8)",
    ),
    (
        "flash",
        X,
        {"implementation": "cuda"},
        ValueError,
        "implementation: expected one of auto, normal, split, got 'cuda'",
    ),
    ("flash", X, {"q_block_size": 0}, ValueError, "q_block_size: expected 'auto' or a whole number from 1, got 0"),
    (
        "flash",
        X,
        {"kv_block_size": 2.0},
        ValueError,
        "kv_block_size: expected 'auto' or a whole number from 1, got 2.0",
    ),
    (
        "flash",
        X,
        {"kv_block_size": True},
        ValueError,
        "kv_block_size: expected 'auto' or a whole number from 1, got True",
    ),
    ("flash", X, {"qk_norm": None}, TypeError, "qk_norm: expected True or False, got None"),
    ("flash", X, {"mask": 1}, TypeError, "mask: expected a tensor or None, got int"),
    (
        "flash",
        X,
        {"mask": q(2, 4, 6, 6).double()},
        TypeError,
        "mask: expected q's type torch.float32 or torch.bool, got torch.float64",
    ),
    (
        "flash",
        X,
        {"mask": q(6, 6)},
        ValueError,
        "mask: expected shape (2 or 1, 4 or 1, 6, 6), got (6, 6)",
    ),
    (
        "flash",
        X,
        {"mask": q(2, 2, 6, 6)},
        ValueError,
        "mask: expected shape (2 or 1, 4 or 1, 6, 6), got (2, 2, 6, 6)",
    ),
    ("flash", X, {"mask": q(1, 1, 6, 6, device=META)}, ValueError, "mask: expected q's device cpu, got meta"),
]


@pytest.mark.parametrize(
    ("operator", "good", "bad", "error", "message"), BAD_CALLS, ids=[f"{c[0]}-{c[4]}" for c in BAD_CALLS]
)
def test_a_bad_call_says_what_is_wrong(operator, good, bad, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error) as raised:
        WHICH[operator](**{**good, **bad})
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("operator", "good", "bad", "error", "message"),
    [
        ("lightning", X, {"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
        ("lightning", X, {"k": q().double()}, TypeError, "k: expected q's type torch.bfloat16, got torch.float64"),
        ("step", STEP, {"v": None}, TypeError, "v: expected a tensor, got NoneType"),
        (
            "flash",
            X,
            {"q": q().long()},
            TypeError,
            "q: expected one of float32, bfloat16, float16, float64, got torch.int64",
        ),
    ],
)
def test_a_bad_call_under_autocast_says_it_too(operator, good, bad, error, message) -> None:  # type: ignore[no-untyped-def]
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(error) as raised:
        WHICH[operator](**{**good, **bad})
    assert str(raised.value) == message


def test_the_meta_device_gives_shapes() -> None:
    x = torch.empty(2, 4, 6, 8, device="meta")
    o, final = lightning_attention(x, x, x, output_final_state=True)
    assert o.shape == x.shape
    assert final.shape == (2, 4, 8, 8)
    assert flash_linear_attention(x, x, x).shape == x.shape


@pytest.mark.parametrize("good", [("lightning", X), ("step", STEP), ("flash", X)], ids=lambda g: g[0])
def test_the_calls_that_the_bad_ones_differ_from_are_good(good) -> None:  # type: ignore[no-untyped-def]
    operator, arguments = good
    assert WHICH[operator](**arguments).isfinite().all()


def test_backend_cuda_says_why_it_cannot() -> None:
    with pytest.raises(ValueError, match=r"^backend: 'cuda' can't take this call: \w+"):
        lightning_attention(**X, backend="cuda")
