"""Runs in which a number of one process is NaN: all stop before the update, and the rank is named."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_runs import ROOT, Template, check_equal, lines
from safetensors.torch import load_file

from training.manifest import list_checkpoints, verify_checkpoint

pytestmark = pytest.mark.faults


def strategies(*in_short_form: str) -> list:
    """All strategies, most of them in the long form alone."""
    names = ("ddp", "fsdp2", "zero2", "zero3")
    return [pytest.param(name, marks=[] if name in in_short_form else pytest.mark.long) for name in names]


@pytest.fixture
def poisoned(template: Template, fault_arguments: list[str], tmp_path: Path):
    """Start a run in which what POISON says becomes NaN; return its exit codes, what it said and its folder."""

    def start(poison: str, *more: str, ranks: int = 2, name: str = "run") -> tuple[list[int | None], str, Path]:
        out = tmp_path / name
        argv = [*fault_arguments, "--checkpoint.every=2", "--import=tests.poison", f"--out={out}", *more]
        workers = template.start(argv, tmp_path / f"{name}.log", ranks=ranks, POISON=poison)
        return workers.wait(), workers.said(), out

    return start


def reason(out: Path) -> str:
    record = json.loads((out / "exit.json").read_text())
    assert record["exit_code"] == 5
    return record["reason"]


def steps(out: Path) -> list[int]:
    for folder in list_checkpoints(out):
        verify_checkpoint(folder)
    return [int(folder.name[5:]) for folder in list_checkpoints(out)]


@pytest.mark.parametrize("strategy", strategies("ddp", "zero2"))
def test_nan_in_the_loss_of_one_rank(poisoned, strategy: str) -> None:
    codes, said, out = poisoned("loss:1:4", f"--training.strategy={strategy}")
    assert codes == [5, 5], said
    assert reason(out).startswith("step 4: loss of rank 1 is nan")
    assert "; no update was made; " in reason(out)
    assert " on rank 1" in reason(out)
    assert [line["step"] for line in lines(out / "metrics.jsonl")] == [1, 2, 3]
    assert steps(out) == [2, 3]


@pytest.mark.parametrize("strategy", strategies("fsdp2", "zero3"))
def test_nan_in_one_gradient_of_one_rank(poisoned, strategy: str) -> None:
    codes, said, out = poisoned("gradient:1:4", f"--training.strategy={strategy}")
    assert codes == [5, 5], said
    assert reason(out).startswith("step 4: the gradient norm is nan; no update was made; ")
    assert "not finite: gradient of lm_head.weight on rank 1" in reason(out)
    assert steps(out) == [2, 3]


@pytest.mark.parametrize("strategy", strategies("ddp", "fsdp2"))
def test_nan_in_one_weight_of_one_rank(poisoned, strategy: str) -> None:
    codes, said, out = poisoned("weight:1:4", f"--training.strategy={strategy}")
    assert codes == [5, 5], said
    assert "no update was made; not finite: weight lm_head.weight on rank 1" in reason(out)
    copied = strategy.startswith("zero")  # DeepSpeed computes with a copy of the weights that it updates and we save
    assert steps(out) == ([2, 3] if copied else [2])  # the weights are not those of step 3 any more


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_are_not_finite_are_not_saved(poisoned, ranks: int) -> None:
    codes, said, out = poisoned(f"update:{ranks - 1}:4", ranks=ranks)
    assert codes == [5] * ranks, said
    assert reason(out) == f"step 4: weights of rank {ranks - 1} are not finite; not saved"
    assert steps(out) == [2]


def test_the_weights_saved_are_those_of_the_last_good_step(poisoned) -> None:
    codes, _, stopped = poisoned("loss:1:4")
    assert codes == [5, 5]
    codes, said, good = poisoned("loss:1:99", "--checkpoint.every=3", "--checkpoint.keep=9", name="good")
    assert codes == [0, 0], said
    place = "checkpoints/step_00000003/model/model.safetensors"
    ours, theirs = load_file(stopped / place), load_file(good / place)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("strategy", "what"),
    [
        ("ddp", "loss"),
        pytest.param("ddp", "gradient", marks=pytest.mark.long),
        pytest.param("fsdp2", "loss", marks=pytest.mark.long),
        ("fsdp2", "gradient"),
    ],
)
def test_batches_may_be_left_out_up_to_a_number(poisoned, strategy: str, what: str) -> None:
    more = [f"--training.strategy={strategy}", "--training.skip_nonfinite=2"]
    codes, said, out = poisoned(f"{what}:1:3,5", *more)
    assert codes == [0, 0], said
    records = lines(out / "metrics.jsonl")
    assert [line["skipped"] for line in records] == [0, 0, 1, 1, 2, 2, 2, 2]
    rates = [line["lr"] for line in records]
    assert (rates[2], rates[4]) == (rates[3], rates[5])  # the rate goes on where it was
    assert "batch left out, the 2. of at most 2" in said
    codes, said, out = poisoned(f"{what}:1:3,5,7", *more, name="more")
    assert codes == [5, 5], said
    assert reason(out).startswith("step 7: ")


def test_the_number_left_out_is_counted_across_starts(poisoned, template: Template, fault_arguments: list[str]) -> None:
    assert poisoned("loss:0:3,5,7", "--training.skip_nonfinite=2", ranks=1)[0] == [5]
    codes, said, out = poisoned("loss:0:7", "--training.skip_nonfinite=2", ranks=1)
    assert codes == [5], said
    assert reason(out).startswith("step 7: loss of rank 0 is nan")
    codes, said, out = poisoned("loss:0:7", "--training.skip_nonfinite=3", ranks=1)
    assert codes == [0], said
    assert lines(out / "metrics.jsonl")[-1]["skipped"] == 3
    whole = poisoned("loss:0:3,5,7", "--training.skip_nonfinite=3", ranks=1, name="whole")
    assert whole[0] == [0]
    check_equal(out, whole[2])


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_overflow_skips_the_step(poisoned, ranks: int) -> None:
    def run(*more: str) -> Path:
        codes, said, out = poisoned(f"gradient:{ranks - 1}:3,5", "--import=tests.scaled", *more, ranks=ranks)
        assert codes == [0] * ranks, said
        return out

    check_skipped(run)


@pytest.mark.gpu
def test_an_overflow_of_fp16_skips_the_step(fault_arguments: list[str], tmp_path: Path) -> None:
    def run(*more: str) -> Path:
        out, options = tmp_path / "run", ["--import=tests.poison", "--training.precision=fp16", "--model.qk_norm=l2"]
        command = [sys.executable, "train.py", *fault_arguments, *options, f"--out={out}", *more]
        environment = {**os.environ, "POISON": "gradient:0:3,5"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return out

    check_skipped(run)


def check_skipped(run: Callable[..., Path]) -> None:
    """Check that steps 3 and 5 make no update, the rate stays, the scale is halved, and a run that goes on has it."""
    run("--checkpoint.every=2", "--training.steps=4")
    out = run("--checkpoint.every=1", "--checkpoint.keep=9")
    records = lines(out / "metrics.jsonl")
    assert [line["skipped"] for line in records] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert (records[2]["lr"], records[4]["lr"]) == (records[3]["lr"], records[5]["lr"])
    places = {int(folder.name[5:]): folder for folder in list_checkpoints(out)}
    states = {step: json.loads((place / "trainer_state.json").read_text()) for step, place in places.items()}
    scales = {step: state["scaler"]["scale"] for step, state in states.items()}
    assert scales == {2: 2.0**16, 4: 2.0**15} | dict.fromkeys(range(5, 9), 2.0**14)
    weights = [(places[step] / "model/model.safetensors").read_bytes() for step in (4, 5, 6)]
    assert weights[0] == weights[1] != weights[2]
