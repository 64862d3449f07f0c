"""scripts/compare_backends.py: the same training with each backend of lightning attention."""

import re
import sys
from pathlib import Path

import pytest
import torch

from ops.lightning_attention import cuda_unavailable_reason
from scripts.compare_backends import batches, main, only

CONFIG = (
    "model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 512}"
)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 50)
    return ["--config", str(tmp_path / "tiny.yaml"), "--text", str(tmp_path / "text.txt"), "--batch", "2"]


def test_runs_of_one_backend_are_equal_and_learn(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for _ in range(2):
        main([*files, "--backends", "torch", "--tokens", "64", "--steps", "30", "--device", "cpu"])
        shown.append(capsys.readouterr().out.splitlines()[-1])
    assert shown[0] == shown[1]
    losses = [float(x) for x in re.findall(r"\d+\.\d+", shown[0])]
    assert losses[0] == pytest.approx(6.24, abs=0.3)  # ln 512
    assert losses[-1] < losses[0] - 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_kernels_learn_what_pytorch_learns(
    precision: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.zeros(1, 1, 1, 8, device="cuda", dtype=torch.bfloat16)
    if (reason := cuda_unavailable_reason(x, x)) is not None:
        pytest.skip(reason)
    main([*files, "--tokens", "200", "--steps", "30", "--precision", precision, "--qk-norm", "l2"])
    gap = re.search(r"cuda against torch: largest difference (\S+),", capsys.readouterr().out)
    assert gap is not None
    assert float(gap[1]) < 0.02


def test_what_the_kernels_are_kept_from_is_given_back() -> None:
    module = sys.modules["ops.lightning_attention"]
    before = module.cuda_unavailable_reason
    with only("torch"):
        assert module.cuda_unavailable_reason(torch.zeros(1), torch.zeros(1)) == "kept from the kernels"
    assert module.cuda_unavailable_reason is before


def test_batches_begin_again() -> None:
    given = batches(bytes(range(10)), 1000, 1, 2)
    first = [next(given).tolist() for _ in range(3)]
    assert first == [[[1, 515]], [[1029 % 1000, 1543 % 1000]], [[1, 515]]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--steps", "10"], "--steps: expected more than 10, got 10"),
        (["--batch", "0"], "--batch: expected a whole number from 1, got 0"),
        (["--tokens", "1"], "--tokens: expected a whole number from 2, got 1"),
        (["--heads", "0"], "--heads: expected a whole number from 1, got 0"),
        (["--backends", "torch", "torch"], "--backends: expected each once, got torch torch"),
        (["--backends", "torch", "--tokens", "2048"], "text: expected 8192 bytes for a batch, got 2250"),
        (["--backends", "torch", "--config", "nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
        (["--tokens", "64", "--device", "cpu"], "--backends: cuda needs a GPU, --device is cpu"),
        (["--lr", "-1"], "--lr: expected a number above 0, got -1.0"),
        (["--tokens", "64", "--device", "gpu"], "--device: gpu can't be used: "),
        (["--config", "no.yaml"], "no.yaml: expected YAML: "),
        (["--config", "list.yaml"], "list.yaml: expected keys with `model` among them, a mapping"),
        (["--config", "null.yaml"], "null.yaml: expected keys with `model` among them, a mapping"),
        (["--config", "typo.yaml"], "hidden_sizee"),
    ],
)
def test_wrong_options(
    change: list[str],
    said: str,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = {"no": "a: [", "list": "[1, 2]", "null": "model:", "typo": "model: {hidden_sizee: 64}"}
    for name, content in wrong.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*files, *change])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
