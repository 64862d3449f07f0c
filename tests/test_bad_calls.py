"""Bad calls of every operator: the error names the argument, what was expected and what came."""

import pytest
import torch
from torch import Tensor

from ops import flash_linear_attention, lightning_attention, lightning_attention_step


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
    ({"q": q().to_sparse()}, TypeError, "q: expected a dense tensor, got torch.sparse_coo"),
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
    (
        {"q": q(2, 20, 6, 8), "log_decay": q(20)},
        ValueError,
        f"log_decay: expected values ≤ 0, got [{'1.0, ' * 16}… 20 values]",
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
        {"state": state()[:1].expand_as(state())},
        ValueError,
        "state: expected memory for each value, since it is written to, got an expanded tensor",
    ),
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
        {"implementation": "fast"},
        ValueError,
        "implementation: expected one of auto, normal, split, block, inplace, cuda, got 'fast'",
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


@pytest.mark.parametrize(
    ("operator", "choice"), [("lightning", {"backend": "cuda"}), ("flash", {"implementation": "cuda"})]
)
def test_cuda_says_why_it_cannot(operator: str, choice: dict) -> None:
    (name,) = choice
    with pytest.raises(ValueError, match=rf"^{name}: 'cuda' can't take this call: \w+"):
        WHICH[operator](**X, **choice)
