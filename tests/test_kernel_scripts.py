"""scripts/benchmark_passes.py and scripts/every_kernel.py, as far as they need no GPU, and on one."""

import functools
import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from ops import chunkwise, extension, lightning_cuda
from scripts import benchmark_passes, every_kernel
from scripts.benchmark_passes import GROUPS, Shape, measured

CPU = torch.device("cpu")


def test_every_kernel_makes_calls_that_the_operators_take() -> None:
    assert every_kernel.every(torch.float32, CPU, backend="torch", implementation="inplace") == 65 + 92


def test_every_kernel_makes_masks_of_each_kind() -> None:
    """Two tiles of zeros in each, of 64 × 64."""
    for kind in every_kernel.MASKS:
        mask = every_kernel.mask_of(kind, (1, 1, 147, 131), torch.bfloat16, CPU)
        assert mask.dtype == {"float32": torch.float32, "bool": torch.bool}.get(kind, torch.bfloat16)
        assert mask.shape == (1, 1, 147, 131)
        assert not mask[..., :128, :64].any()
        assert mask[..., 64:].any()


def test_passes_get_the_arguments_that_a_shape_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def forward(q, k, v, log_decay, initial, bounds, qk_norm, with_state, lengths):  # type: ignore[no-untyped-def]
        seen.append((tuple(q.shape), tuple(k.shape), qk_norm, None if bounds is None else bounds.tolist()))
        return chunkwise.forward(q, k, v, log_decay, initial, bounds, qk_norm)

    def backward(do, grad_state, *arguments):  # type: ignore[no-untyped-def]
        assert do.shape == arguments[0].shape
        assert (arguments[-1] is not None) == arguments[-2]

    monkeypatch.setattr(lightning_cuda, "forward", forward)
    monkeypatch.setattr(lightning_cuda, "backward", backward)
    shape = Shape(1, 4, 70, 16, G=2, qk_norm=True, bounds=(0, 30, 70))
    times = measured(shape, 2, CPU)
    assert min(times) >= 0
    assert seen == [((1, 4, 70, 16), (1, 2, 70, 16), True, [0, 30, 70])] * 5
    assert str(shape) == "(1, 4, 70, 16), 2 key/value, norm, packed"


@pytest.mark.parametrize(
    ("main", "options", "said"),
    [
        (benchmark_passes.main, ["broad"], "expected some of base, norm, group, packed, wide, long, got broad"),
        (benchmark_passes.main, ["--repeats", "0"], "--repeats: expected a whole number from 1, got 0"),
        (every_kernel.main, ["--dtypes", "float64"], "invalid choice: 'float64'"),
    ],
)
def test_wrong_options(
    main: Callable[[list[str]], None], options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_both_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if (reason := lightning_cuda.library_unavailable_reason(0)) is not None:
        pytest.skip(reason)
    every_kernel.main(["--dtypes", "bfloat16"])
    benchmark_passes.main(["norm", "--repeats", "1"])
    out = capsys.readouterr().out
    assert "bfloat16: 124 calls" in out
    assert len(re.findall(r"together \d+\.\d+", out)) == len(GROUPS["norm"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_kernel_that_is_compiled_is_called() -> None:
    if (reason := lightning_cuda.library_unavailable_reason(0)) is not None:
        pytest.skip(reason)
    report = extension.build().with_suffix(".txt").read_text()
    compiled = Counter(kernel_of(name) for name in set(re.findall(r"Compiling entry function '(\w+)'", report)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for name in every_kernel.DTYPES:
            every_kernel.every(getattr(torch, name), torch.device("cuda"))
        torch.cuda.synchronize()
    called = {event.name for event in profile.events()}
    seen = Counter(
        found[1] for name in called if (found := re.search(r"(\w+_kernel)\b", name)) and found[1] in compiled
    )
    assert seen == compiled


@functools.cache
def kernels() -> list[str]:
    """Names of all kernels in the sources."""
    sources = "".join(path.read_text() for path in extension.SOURCES.glob("*.cu*"))
    return re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", sources)


def kernel_of(mangled: str) -> str:
    """The function's own name, without namespaces and arguments: it follows its length."""
    (name,) = (name for name in kernels() if f"{len(name)}{name}" in mangled)
    return name
