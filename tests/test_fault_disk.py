"""A disk that is full, at every place where a run writes: exit code 7, nothing partial, and on when there is room."""

import itertools
import json
import random
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import Template, check_equal, leftovers, lines

from training.config import TrackingConfig
from training.errors import ResourceError
from training.manifest import step_folders, verify_checkpoint
from training.trackers import open_trackers

pytestmark = pytest.mark.faults


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.1 MB: room for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"can't mount a tmpfs: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def errors(said: str) -> list[str]:
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("error: ")]


def check_stopped(out: Path, said: str, *names: str) -> None:
    """Check that a run has said in one line what did not fit, and that what is there is whole."""
    (error,) = errors(said)
    assert "a file size limit is full" in error
    assert any(name in error for name in names), error
    assert leftovers(out) == set()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        lines(out / name)
    for folder in step_folders(out):
        verify_checkpoint(folder)
    if (out / "exit.json").exists():
        assert json.loads((out / "exit.json").read_text())["exit_code"] == 7


LONG_PROMPT, LONGER_PROMPT = (f"--training.sample_prompt={'def x ' * words}" for words in (400, 1_000))


# The largest file that fits, in bytes (what a run prints must fit too), what does not, and what makes it so large.
LIMITS = [
    (5_000, "config.yaml", [LONGER_PROMPT]),
    (5_000, "metrics.jsonl", ["--training.steps=40", "--training.eval_every=0", "--checkpoint.every=0"]),
    (5_000, "evaluations.jsonl", [LONG_PROMPT, "--checkpoint.every=0"]),
    (5_000, "step_00000004", []),  # the code of the model
    (100_000, "step_00000004", []),  # weights
    (250_000, "step_00000004", []),  # optimizer
]


@pytest.mark.parametrize(("limit", "name", "options"), LIMITS, ids=[f"{name}-{limit}" for limit, name, _ in LIMITS])
def test_a_file_that_does_not_fit(
    template: Template,
    fault_arguments: list[str],
    whole: Path,
    tmp_path: Path,
    limit: int,
    name: str,
    options: list[str],
) -> None:
    out = tmp_path / "run"
    workers = template.start([*fault_arguments, f"--out={out}", *options], tmp_path / "full.log", largest_file=limit)
    assert workers.wait() == [7], workers.said()
    check_stopped(out, workers.said(), name)
    again = template.start([*fault_arguments, f"--out={out}"], tmp_path / "again.log")
    assert again.wait() == [0], again.said()
    check_equal(out, whole)


@pytest.mark.parametrize(
    ("strategy", "limit"),
    [
        ("fsdp2", 100_000),  # weights
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in itertools.product(("ddp", "fsdp2", "zero2", "zero3"), (100_000, 250_000))  # and optimizer
            if case != ("fsdp2", 100_000)
        ),
    ],
)
def test_a_file_of_two_processes_that_does_not_fit(
    template: Template, fault_arguments: list[str], tmp_path: Path, strategy: str, limit: int
) -> None:
    """One process can't write its file while the other waits to put the next tensors together with it."""
    out = tmp_path / "run"
    argv = [*fault_arguments, f"--training.strategy={strategy}", f"--out={out}"]
    workers = template.start([*argv, "--training.steps=2"], tmp_path / "first.log", ranks=2)
    assert workers.wait() == [0, 0], workers.said()
    workers = template.start(argv, tmp_path / "full.log", ranks=2, largest_file=limit)
    assert workers.wait(20) == [7, 7], workers.said()
    assert all("step_00000004" in error for error in errors(workers.said())), workers.said()
    assert json.loads((out / "exit.json").read_text())["exit_code"] == 7
    assert leftovers(out) == set()
    assert [folder.name for folder in step_folders(out)] == ["step_00000002"]
    again = template.start(argv, tmp_path / "again.log", ranks=2)
    assert again.wait() == [0, 0], again.said()
    assert [line["step"] for line in lines(out / "metrics.jsonl")] == list(range(1, 9))


@pytest.mark.usefixtures("whole")  # has prepared the tokens
def test_metrics_of_two_processes_that_do_not_fit(
    template: Template, fault_arguments: list[str], tmp_path: Path
) -> None:
    """One process writes them: it ends by that reason, the other by the end of this one, which is not the reason."""
    out = tmp_path / "run"
    argv = [*fault_arguments, "--training.steps=40", "--training.eval_every=0", "--checkpoint.every=0", f"--out={out}"]
    workers = template.start(argv, tmp_path / "full.log", ranks=2, largest_file=5_000)
    assert workers.wait(30) == [7, 6], workers.said()
    assert json.loads((out / "exit.json").read_text())["exit_code"] == 7
    assert all("metrics.jsonl: the disk" in error for error in errors(workers.said())), workers.said()


def test_the_figure_at_the_end(template: Template, fault_arguments: list[str], whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "loss.png").unlink()
    argv = [*fault_arguments, f"--out={out}"]
    workers = template.start(argv, tmp_path / "full.log", largest_file=20_000)
    assert workers.wait() == [7], workers.said()
    check_stopped(out, workers.said(), "loss.png")
    assert not (out / "loss.png").exists()
    again = template.start(argv, tmp_path / "again.log")
    assert again.wait() == [0], again.said()
    assert (out / "loss.png").exists()


def test_tensorboard_without_room_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        threading, "excepthook", lambda arguments: None
    )  # TensorBoard's own thread ends with a traceback
    trackers = open_trackers(TrackingConfig(tensorboard=True), tmp_path, {}, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(ResourceError, match=f"{tmp_path / 'tensorboard'}: the disk"):  # noqa: PT012 (at any of them)
            for step in range(1_000):
                trackers.log(step, {"loss": 1.0})
            trackers.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_small_disk_that_fills_up(
    template: Template, fault_arguments: list[str], whole: Path, small_disk: Path, tmp_path: Path
) -> None:
    """There is room for one checkpoint; the second does not fit until somebody makes room."""
    out = small_disk / "run"
    argv = [*fault_arguments, f"--out={out}", "--checkpoint.every=3"]
    workers = template.start(argv, tmp_path / "full.log")
    assert workers.wait() == [7], workers.said()
    check_stopped(out, workers.said(), str(out))
    assert [folder.name for folder in step_folders(out)] == ["step_00000003"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    again = template.start([*fault_arguments, f"--out={out}"], tmp_path / "again.log")
    assert again.wait() == [0], again.said()
    assert "resuming from" in again.said()
    check_equal(out, whole)


def test_every_moment_at_which_a_small_disk_is_full(
    template: Template,
    fault_arguments: list[str],
    whole: Path,
    small_disk: Path,
    tmp_path: Path,
    fault_generator: random.Random,
    long_form: bool,
) -> None:
    """Before each start another part of the disk is taken, down to the last page."""
    pages = 1100 // 4
    for turn, taken in enumerate(fault_generator.sample(range(20, pages), 30 if long_form else 2)):
        out, ballast = small_disk / f"run{turn}", small_disk / "ballast"
        argv = [*fault_arguments, f"--out={out}"]
        ballast.write_bytes(bytes(4096 * taken))
        workers = template.start(argv, tmp_path / f"full{turn}.log")
        assert workers.wait() == [7], workers.said()
        if out.exists():
            check_stopped(out, workers.said(), str(out))
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
        again = template.start(argv, tmp_path / f"again{turn}.log")
        assert again.wait() == [0], again.said()
        check_equal(out, whole)
        shutil.rmtree(out)
        subprocess.run(["mount", "-o", "remount,size=1100k", str(small_disk)], check=True)


@pytest.mark.parametrize(
    ("limit", "label"),
    [(4_000, "training the tokenizer"), (9_000, "training the tokenizer"), (20_000, "packing tokens")],
)
def test_a_preparation_that_does_not_fit(
    template: Template, fault_arguments: list[str], whole: Path, tmp_path: Path, limit: int, label: str
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "run"
    argv = [*fault_arguments, f"--out={out}", f"--data.cache_dir={cache}"]
    workers = template.start(argv, tmp_path / "full.log", largest_file=limit)
    assert workers.wait() == [7], workers.said()
    (error,) = errors(workers.said())
    assert error.startswith(f"error: {label}: {cache}"), error
    assert leftovers(cache) == set()
    assert not out.exists()
    again = template.start(argv, tmp_path / "again.log")
    assert again.wait() == [0], again.said()
    check_equal(out, whole)
