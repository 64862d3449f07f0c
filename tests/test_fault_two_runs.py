"""Two runs into one folder: one goes on, the other is refused, whatever the moment."""

import signal
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from fault_runs import Template, Workers, check_equal, lines

import train
import training.folder
from training.manifest import step_folders, verify_checkpoint
from training.metrics import read_records

pytestmark = pytest.mark.faults


@pytest.fixture
def arguments(template: Template, fault_arguments: list[str], tmp_path: Path) -> list[str]:
    """The command line of a run without end; its tokens are there."""
    first = template.start([*fault_arguments, f"--out={tmp_path / 'whole'}"], tmp_path / "whole.log")
    assert first.wait() == [0], first.said()
    return [*fault_arguments, "--training.steps=100000", "--training.eval_every=0"]


def check_one_goes_on(runs: list[Workers], out: Path) -> None:
    """Check that of two runs one trains and the other is refused, and stop that one."""
    assert runs[0].wait_for(lambda: runs[1].poll() != [None]) or runs[0].poll() == [2]
    refused, going = runs if runs[0].poll() == [2] else runs[::-1]
    assert refused.poll() == [2], refused.said()
    assert f"error: --out: {out} is in use by another run" in refused.said()
    before = len(read_records(out / "metrics.jsonl"))
    assert going.wait_for(lambda: len(read_records(out / "metrics.jsonl")) > before + 5), going.said()
    going.send(signal.SIGTERM)
    assert going.wait() == [143], going.said()
    steps = [record["step"] for record in lines(out / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    for folder in step_folders(out):
        verify_checkpoint(folder)


@pytest.mark.parametrize("killed_before", [False, True], ids=["new", "killed-before"])
def test_two_runs_that_start_at_once(
    template: Template, arguments: list[str], tmp_path: Path, killed_before: bool, long_form: bool
) -> None:
    for turn in range(10 if long_form else 2):
        out = tmp_path / f"run{turn}"
        argv = [*arguments, f"--out={out}"]
        if killed_before:
            kill_while_training(template.start(argv, tmp_path / f"{turn}.dead"), out)
        check_one_goes_on([template.start(argv, tmp_path / f"{turn}.{i}") for i in range(2)], out)


def kill_while_training(run: Workers, out: Path) -> None:
    assert run.wait_for(lambda: len(read_records(out / "metrics.jsonl")) > 5), run.said()
    assert run.kill() == [-9]


def test_a_run_that_ends_while_another_starts(
    template: Template,
    fault_arguments: list[str],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The other one has looked for checkpoints before; it must not go on from what it saw then."""
    out = tmp_path / "run"
    argv, find = [*fault_arguments, f"--out={out}"], training.folder.find_checkpoint

    def find_and_wait(*parts: Any) -> Any:
        found = find(*parts)
        first = template.start(argv, tmp_path / "log")
        assert first.wait() == [0], first.said()
        return found

    monkeypatch.setattr(training.folder, "find_checkpoint", find_and_wait)
    try:
        assert train.main(argv) == 2
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    assert f"error: --out: {out} was changed by another run" in capsys.readouterr().err
    check_equal(out, tmp_path / "whole")
