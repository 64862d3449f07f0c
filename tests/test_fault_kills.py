"""Runs that are killed again and again, at any moment, and end as if nothing had happened."""

import random
import shutil
import time
from pathlib import Path

import pytest
from fault_runs import Template, Workers, check_equal, leftovers

from training.manifest import MANIFEST, step_folders, verify_checkpoint
from training.metrics import read_records

pytestmark = pytest.mark.faults

OPTIONS = [
    "--data.token_budget=6000",  # some 95 rows: three epochs
    "--training.steps=36",
    "--training.micro_batch_size=2",
    "--training.eval_every=5",
    "--checkpoint.every=4",
    "--checkpoint.keep=2",
]
KILLS_OF_A_RUN = 4


def kill_at_random(workers: Workers, out: Path, generator: random.Random, seconds: float) -> bool:
    """Kill all ranks at a random moment of a run that takes `seconds`; False if it ended before.

    A third of the kills hits a checkpoint that is being written.
    """
    end = time.monotonic() + generator.uniform(0, 0.6 * seconds)
    saving = generator.random() < 1 / 3
    delay = generator.uniform(0, 0.005)
    alive = workers.wait_for(lambda: time.monotonic() > end)
    if alive and saving:
        alive = workers.wait_for(lambda: list(out.glob("checkpoints/.saving-*")))
        time.sleep(delay)
    return alive and -9 in workers.kill()


def check_folders(out: Path) -> None:
    """Check that every folder that looks like a checkpoint is one and whole, and that metrics can be read."""
    for folder in step_folders(out):
        assert (folder / MANIFEST).is_file(), folder
        verify_checkpoint(folder)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        steps = [record["step"] for record in read_records(out / name)]
        assert steps == sorted(set(steps))


def test_killed_runs_end_with_the_bits_of_the_uninterrupted_run(
    template: Template, fault_arguments: list[str], tmp_path: Path, fault_generator: random.Random, long_form: bool
) -> None:
    def start(out: Path) -> Workers:
        return template.start([*fault_arguments, *OPTIONS, f"--out={out}"], out.with_suffix(".log"), ranks=2)

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == [0, 0]
    seconds = time.monotonic() - began
    asked = 40 if long_form else 5
    kills = runs = in_saves = 0
    while kills < asked:
        runs += 1
        out, orphans = tmp_path / f"killed{runs}", set()
        for _ in range(min(KILLS_OF_A_RUN, asked - kills)):
            workers = start(out)
            if not kill_at_random(workers, out, fault_generator, seconds):
                assert workers.wait() == [0, 0], workers.said()
                break
            kills += 1
            check_folders(out)
            found = leftovers(out) if out.exists() else set()
            opened = "%|" in workers.said().split("\n--\n")[-1]
            assert not (opened and orphans & found), "a start left what the kill before it had left"
            workers.output.open("a").write("\n--\n")
            in_saves += any(name.startswith(".saving") for name in found - orphans)
            orphans = found
        workers = start(out)
        assert workers.wait() == [0, 0], workers.said()
        assert leftovers(out) == set()
        check_folders(out)
        check_equal(out, tmp_path / "whole")
    print(f"{kills} kills of {runs} runs of {seconds:.1f} s, {in_saves} of them left a checkpoint half written")


def test_a_start_removes_what_a_kill_can_leave(template: Template, fault_arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = [*fault_arguments, f"--out={out}"]
    first = template.start(argv, tmp_path / "log")
    assert first.wait() == [0], first.said()
    for name in ("config.yaml", "exit.json", "metrics.jsonl", "evaluations.jsonl", "loss.png"):
        (out / f".{name}.writing").write_text("{")
    for name in (".saving-step_00000012-0123abcd", ".deleting-step_00000004-0123abcd"):
        (out / "checkpoints" / name / "model").mkdir(parents=True)
    (out / ".notes").write_text("not of the run")
    killed = template.start([*argv, "--training.steps=100000"], tmp_path / "log")
    assert killed.wait_for(lambda: len(read_records(out / "metrics.jsonl")) > 10)
    assert killed.kill() == [-9]
    assert {name for name in leftovers(out) if not name.startswith(".saving-")} == {".notes"}
    assert not (out / "exit.json").exists(), "the reason of another end"


def test_a_finished_run_that_starts_again_keeps_its_records(
    template: Template, fault_arguments: list[str], tmp_path: Path
) -> None:
    """As one does that was killed after its last checkpoint; it evaluates again."""
    argv = [*fault_arguments, f"--out={tmp_path / 'run'}"]
    for again in (False, True):
        workers = template.start(argv, tmp_path / "log")
        assert workers.wait() == [0], workers.said()
        if not again:
            shutil.copytree(tmp_path / "run", tmp_path / "copy")
    check_equal(tmp_path / "run", tmp_path / "copy")
