"""Runs of which one process dies or hangs: the others end with code 6 and its rank, and nobody waits for ever."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from fault_runs import Template, Workers, check_equal, lines

pytestmark = pytest.mark.faults
TIMEOUT = 6  # s; a process counts as dead after 5 s of silence even where something else says so too
OPTIONS = [f"--training.peer_timeout={TIMEOUT}", "--training.steps=100000", "--training.eval_every=0"]


def start(template: Template, arguments: list[str], out: Path, *more: str, ranks: int = 2, **variables: str) -> Workers:
    argv = [*arguments, *OPTIONS, "--checkpoint.every=0", f"--out={out}", *more]
    return template.start(argv, out.with_suffix(".log"), ranks=ranks, **variables)


def exit_record(out: Path) -> dict:
    return json.loads((out / "exit.json").read_text())


def wait_for_steps(workers: Workers, out: Path) -> None:
    path = out / "metrics.jsonl"
    assert workers.wait_for(lambda: path.exists() and len(path.read_bytes().splitlines()) > 3), workers.said()


@pytest.mark.parametrize(
    ("strategy", "victim"),
    [
        ("ddp", 0),
        ("fsdp2", 1),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [("ddp", 1), ("fsdp2", 0), ("zero3", 0), ("zero3", 1)]
        ),
    ],
)
def test_a_process_that_is_killed_is_named(
    template: Template, fault_arguments: list[str], tmp_path: Path, strategy: str, victim: int
) -> None:
    out = tmp_path / "run"
    workers = start(template, fault_arguments, out, f"--training.strategy={strategy}")
    wait_for_steps(workers, out)
    began = time.monotonic()
    os.kill(workers.pids[victim], signal.SIGKILL)
    codes = workers.wait(seconds=TIMEOUT + 5)
    assert time.monotonic() - began < TIMEOUT + 5
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 6, workers.said()
    record = exit_record(out)
    assert record["exit_code"] == 6
    assert record["reason"].startswith(f"rank {victim} (process {workers.pids[victim]} on "), record


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.long), 3])
def test_a_process_that_is_stopped_is_named(
    template: Template, fault_arguments: list[str], tmp_path: Path, ranks: int
) -> None:
    out = tmp_path / "run"
    more = ["--training.batch_size=6", "--training.micro_batch_size=1"] if ranks == 3 else []
    workers = start(template, fault_arguments, out, *more, ranks=ranks)
    wait_for_steps(workers, out)
    began = time.monotonic()
    os.kill(workers.pids[1], signal.SIGSTOP)
    try:
        assert workers.wait_for(lambda: workers.poll()[0] is not None, TIMEOUT + 5)
        assert TIMEOUT - 1 < time.monotonic() - began < TIMEOUT + 5
        assert workers.poll()[0] == 6
        assert exit_record(out)["reason"].startswith(f"rank 1 (process {workers.pids[1]} on ")
        assert "gave no sign of life for" in (said := exit_record(out)["reason"])
        os.kill(workers.pids[1], signal.SIGCONT)  # it wakes, and now the others are silent
        assert workers.wait_for(lambda: None not in workers.poll(), TIMEOUT + 10)
        assert exit_record(out) == {"exit_code": 6, "reason": said}
    finally:
        workers.kill()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_process_that_hangs_is_named(
    template: Template, fault_arguments: list[str], tmp_path: Path, rank: int
) -> None:
    out = tmp_path / "run"
    variables = {"STUCK_RANK": str(rank), "STUCK_STEP": "5"}
    workers = start(template, fault_arguments, out, "--import=tests.stuck", **variables)
    wait_for_steps(workers, out)
    began = time.monotonic()
    assert workers.wait(TIMEOUT + 5) == [6, 6], workers.said()
    assert time.monotonic() - began < TIMEOUT + 5
    reason = exit_record(out)["reason"]
    assert reason.startswith(f"rank {rank} (process {workers.pids[rank]} on ")
    assert reason.endswith("in step 5: forward pass, while others wait; training.peer_timeout allows more")


@pytest.mark.long
def test_before_the_first_step_a_process_may_take_longer(
    template: Template, fault_arguments: list[str], tmp_path: Path
) -> None:
    """Preparing, loading and compiling may take one process minutes more than another."""
    out = tmp_path / "run"
    workers = start(template, fault_arguments, out, "--import=tests.stuck", STUCK_RANK="1", STUCK_STEP="1")
    assert workers.wait_for(lambda: (out / "config.yaml").exists())
    time.sleep(TIMEOUT + 4)
    assert workers.poll() == [None, None], workers.said()
    workers.kill()


def test_the_reason_of_the_process_that_failed_is_passed_on(
    template: Template, fault_arguments: list[str], tmp_path: Path
) -> None:
    """Rank 1 raises what no other does: exit.json has its reason, not the broken connection that others see."""
    out = tmp_path / "run"
    workers = start(template, fault_arguments, out, "--import=tests.raising", RAISING_RANK="1", RAISING_STEP="4")
    assert workers.wait(30) == [6, 1], workers.said()
    assert exit_record(out)["exit_code"] == 6
    assert "ended: ZeroDivisionError: a defect of rank 1" in exit_record(out)["reason"]


def test_a_run_goes_on_after_its_process_died(template: Template, fault_arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--training.steps=12", "--checkpoint.every=4", f"--training.peer_timeout={TIMEOUT}"]
    argv = [*fault_arguments, *options]

    def start_into(out: Path, *more: str, **variables: str) -> Workers:
        return template.start([*argv, f"--out={out}", *more], tmp_path / "log", ranks=2, **variables)

    broken = start_into(out, "--import=tests.raising", RAISING_RANK="1", RAISING_STEP="7")
    assert broken.wait(30) == [6, 1], broken.said()
    for folder in (out, tmp_path / "whole"):
        workers = start_into(folder)
        assert workers.wait() == [0, 0], workers.said()
    check_equal(out, tmp_path / "whole")
    assert len(lines(out / "metrics.jsonl")) == 12
