"""Runs that SIGTERM or SIGINT stops, at any moment: one whole checkpoint of the step they are at, and code 143."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from fault_runs import Template, Workers, check_equal, leftovers, lines

from training.manifest import list_checkpoints, verify_checkpoint

pytestmark = pytest.mark.faults
SECONDS = 15
OPTIONS = ["--checkpoint.keep=99", "--training.steps=40", "--training.eval_every=5", "--checkpoint.every=7"]


def check_stopped(workers: Workers, out: Path, began: float) -> None:
    """Check that a run has ended in time, all ranks alike, with a checkpoint of its last step."""
    codes = workers.wait(SECONDS)
    assert time.monotonic() - began < SECONDS
    assert codes == [143] * len(codes), workers.said()
    assert "Traceback" not in workers.said()
    step = lines(out / "metrics.jsonl")[-1]["step"]
    folders = list_checkpoints(out)
    assert [verify_checkpoint(folder).step for folder in folders][-1] == step
    assert leftovers(out) == set()
    record = json.loads((out / "exit.json").read_text())
    assert (record["exit_code"], f"step_{step:08d}" in record["reason"]) == (143, True), record


def steps_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def finish(template: Template, argv: list[str], whole: Path, out: Path, ranks: int) -> None:
    workers = template.start(argv, out.with_suffix(".log"), ranks=ranks)
    assert workers.wait() == [0] * ranks, workers.said()
    check_equal(out, whole)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_at_any_moment(
    template: Template,
    fault_arguments: list[str],
    tmp_path: Path,
    fault_generator: random.Random,
    long_form: bool,
    ranks: int,
) -> None:
    """And a second one soon after; the run then goes on and ends as if nothing had happened."""
    whole, options = tmp_path / "whole", [*fault_arguments, *OPTIONS]
    workers = template.start([*options, f"--out={whole}"], tmp_path / "whole.log", ranks=ranks)
    assert workers.wait() == [0] * ranks, workers.said()
    for number in range(20 if long_form else 1):
        out = tmp_path / f"run{number}"
        argv = [*options, f"--out={out}"]
        workers = template.start(argv, out.with_suffix(".log"), ranks=ranks)
        steps = fault_generator.randint(1, 35)
        assert workers.wait_for(lambda run=out, least=steps: steps_of(run) >= least), workers.said()
        time.sleep(fault_generator.uniform(0, 0.05))
        began = time.monotonic()
        receivers = workers.pids if fault_generator.random() < 0.5 else [fault_generator.choice(workers.pids)]
        for _ in range(2):
            for pid in receivers:
                os.kill(pid, fault_generator.choice([signal.SIGTERM, signal.SIGINT]))
            time.sleep(fault_generator.uniform(0, 0.05))
        check_stopped(workers, out, began)
        finish(template, argv, whole, out, ranks)


@pytest.fixture(scope="module")
def whole(template: Template, fault_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without signals, on one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    workers = template.start([*fault_arguments, *OPTIONS, f"--out={out}"], out.with_suffix(".log"))
    assert workers.wait() == [0], workers.said()
    return out


SIGNALS = [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("where", ["step 1: forward pass", "evaluation after step 5", "sample after", "checkpoint of"])
def test_a_signal_at_certain_moments(
    template: Template, fault_arguments: list[str], whole: Path, tmp_path: Path, where: str, number: signal.Signals
) -> None:
    """In the first step, while it evaluates, generates or saves."""
    out = tmp_path / "run"
    argv = [*fault_arguments, *OPTIONS, f"--out={out}", "--import=tests.signalled"]
    workers = template.start(argv, tmp_path / "log", SIGNAL=str(int(number)), SIGNAL_AT=where)
    check_stopped(workers, out, time.monotonic())
    finish(template, [*fault_arguments, *OPTIONS, f"--out={out}"], whole, out, 1)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("where", ["preparing data", "building the model", "opening the run"])
def test_a_signal_before_the_first_step(
    template: Template, fault_arguments: list[str], tmp_path: Path, where: str, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    argv = [*fault_arguments, f"--out={out}", f"--data.cache_dir={tmp_path / 'cache'}", "--import=tests.signalled"]
    workers = template.start(argv, tmp_path / "log", SIGNAL=str(int(number)), SIGNAL_AT=where)
    assert workers.wait(SECONDS) == [143], workers.said()
    assert workers.said().endswith(" before the first step; there is nothing to save\n")
    assert not leftovers(tmp_path)
    again = template.start([*argv, "--training.steps=2"], tmp_path / "log", SIGNAL="0", SIGNAL_AT="")
    assert again.wait() == [0], again.said()


def test_code_that_lets_no_handler_run_is_ended(template: Template, fault_arguments: list[str], tmp_path: Path) -> None:
    """As the training of a tokenizer may, for minutes, before anything is there to be saved."""
    argv = [*fault_arguments, f"--out={tmp_path / 'run'}", "--import=tests.signalled"]
    workers = template.start(argv, tmp_path / "log", SIGNAL=str(int(signal.SIGTERM)), SIGNAL_AT="deaf")
    assert workers.wait(SECONDS) == [143], workers.said()
    assert "stopped by SIGTERM before the first step" in workers.said()
