"""Checkpoints: finding, retaining, saving through crashes and full disks, exact loading."""

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import Run

from training.checkpoint import Content, clean_leftovers, load_trainer_state, restore_rng, save_checkpoint
from training.config import OptimConfig
from training.errors import CheckpointError, ResourceError
from training.manifest import latest_checkpoint, list_checkpoints, verify_checkpoint
from training.moments import load_moments, moment_parts, part_of
from training.optim import build_optimizer
from training.tensorfiles import TensorReader

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def saved(run: Run) -> Path:
    run.train(0, 1)
    return run.save(10)


def steps(out: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in list_checkpoints(out)]


def test_latest_skips_broken_ones_and_names_them(run: Run) -> None:
    for step in (2, 4, 6):
        run.save(step)
    run.save(8)
    (run.out / "checkpoints/step_00000006/trainer_state.json").write_text("{}")
    (run.out / "checkpoints/step_00000008/manifest.json").unlink()
    found, messages = latest_checkpoint(run.out)
    assert found == run.out / "checkpoints/step_00000004"
    assert ["step_00000008" in messages[0], "trainer_state.json: size" in messages[1]] == [True, True]
    assert latest_checkpoint(run.out / "nothing") == (None, [])


def test_only_our_names_are_checkpoints(saved: Path) -> None:
    for name in ("step_10", "step_000000011", "step_0000001x", ".saving-step_00000012-0123abcd", "best"):
        shutil.copytree(saved, saved.with_name(name))
    saved.with_name("step_00000013").symlink_to(saved)
    saved.with_name("step_00000014").touch()
    assert steps(saved.parents[1]) == [10]


def test_steps_beyond_eight_digits_sort_by_number(run: Run) -> None:
    for step in (100_000_000, 99_999_999):
        run.save(step)
    assert steps(run.out) == [99_999_999, 100_000_000]


def test_retention_keeps_the_newest_and_what_is_not_ours(run: Run) -> None:
    foreign = run.out / "checkpoints" / "step_00000001"
    foreign.mkdir(parents=True)
    (foreign / "notes.txt").write_text("mine")
    for step in range(2, 7):
        run.save(step, keep=2)
    assert steps(run.out) == [5, 6]
    assert (foreign / "notes.txt").read_text() == "mine"
    run.save(7, keep=0)
    assert steps(run.out) == [5, 6, 7]


def test_retention_never_deletes_the_checkpoint_just_saved(run: Run) -> None:
    for step in (4, 6, 8):
        run.save(step)
    run.save(5, keep=1)
    assert steps(run.out) == [5, 6, 8]


def test_saving_a_step_again_changes_nothing(run: Run) -> None:
    folder = run.save(3)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run.train(0, 1)
    assert run.save(3) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_broken_or_foreign_checkpoint_of_the_step_is_replaced(run: Run) -> None:
    folder = run.save(3)
    (folder / "optimizer.safetensors").unlink()
    assert verify_checkpoint(run.save(3)).config_hash == "abc"
    assert verify_checkpoint(run.save(3, config_hash="def")).config_hash == "def"
    assert os.listdir(folder.parent) == [folder.name]


def test_trainer_state_keeps_every_bit_of_a_float(run: Run) -> None:
    state = {"scale": 65536.0, "loss": 0.1 + 0.2, "tiny": 5e-324, "nested": {"tokens": 2**60, "id": None}}
    folder = run.save(1, **state)
    assert load_trainer_state(folder) == {"step": 1, **state}
    (folder / "trainer_state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"trainer_state\.json"):
        load_trainer_state(folder)


def test_five_steps_save_load_five_steps_equal_ten(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole")
    whole.train(0, 10)
    first = Run(tmp_path / "split")
    first.train(0, 5)
    second = Run(tmp_path / "split", seed=1)
    second.load(first.save(5))
    second.train(5, 10)
    for name, parameter in whole.names.items():
        assert torch.equal(parameter, second.names[name]), name


def test_state_loads_into_another_grouping_of_the_parameters(run: Run, saved: Path) -> None:
    other = Run(run.out, seed=1, grouped=False)
    other.load(saved)
    for name, parameter in other.names.items():
        state = run.optimizer.state[run.names[name]]
        assert all(torch.equal(value, state[kind]) for kind, value in other.optimizer.state[parameter].items())
        assert len(other.optimizer.state[parameter]) == 3


def test_loaded_state_is_the_optimizers_own_memory(saved: Path, run: Run) -> None:
    run.load(saved)
    run.train(1, 3)
    verify_checkpoint(saved)


def test_a_parameter_without_updates_starts_from_zeros(run: Run) -> None:
    folder = run.save(0)
    load_moments(TensorReader(folder, "optimizer"), run.optimizer, run.names)
    run.train(0, 3)
    fresh = Run(run.out)
    fresh.train(0, 3)
    assert all(torch.equal(fresh.names[name], parameter) for name, parameter in run.names.items())


def test_loading_keeps_the_settings_of_the_optimizer(saved: Path, run: Run) -> None:
    run.optimizer.param_groups[0]["lr"] = 0.125
    load_moments(TensorReader(saved, "optimizer"), run.optimizer, run.names)
    assert run.optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("exp_avg.0.weight"), r"exp_avg\.0\.weight is missing"),
        (lambda t: t.update({"step.9.bias": torch.zeros(())}), r"step\.9\.bias is no part of this model"),
        (
            lambda t: t.update({"exp_avg_sq.0.bias": torch.zeros(4)}),
            r"exp_avg_sq\.0\.bias is torch.float32 \(4,\), exp",
        ),
        (lambda t: t.update({"step.0.bias": torch.zeros((), dtype=torch.int64)}), r"step\.0\.bias is torch.int64"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_a_wrong_optimizer_state_is_named(
    saved: Path, run: Run, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    tensors = load_file(saved / "optimizer.safetensors")
    change(tensors)
    save_file(tensors, saved / "optimizer.safetensors")
    before = run.optimizer.state[run.names["0.weight"]]["exp_avg"].clone()
    with pytest.raises(CheckpointError, match=message):
        load_moments(TensorReader(saved, "optimizer"), run.optimizer, run.names)
    assert torch.equal(run.optimizer.state[run.names["0.weight"]]["exp_avg"], before)


def draw() -> list[float]:
    return [torch.rand(1).item(), random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand()]


@pytest.mark.parametrize("gaussians_drawn", [0, 1], ids=["no-spare-gaussian", "spare-gaussian"])
def test_random_generators_continue(run: Run, gaussians_drawn: int) -> None:
    for _ in range(gaussians_drawn):
        draw()
    folder = run.save(1)
    expected = draw()
    draw()
    restore_rng(folder)
    assert draw() == expected
    tensors = load_file(folder / "rng.safetensors")
    del tensors["numpy"]
    save_file(tensors, folder / "rng.safetensors")
    with pytest.raises(CheckpointError, match=r"rng\.safetensors.*numpy"):
        restore_rng(folder)


@pytest.mark.gpu
def test_cuda_state_continues(tmp_path: Path) -> None:
    def trained(steps: range, load: Path | None) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64).cuda()
        optimizer = build_optimizer(model, OptimConfig(), "cuda")
        if load:
            model.load_state_dict(load_file(load / "model/model.safetensors"))
            load_moments(TensorReader(load, "optimizer"), optimizer, dict(model.named_parameters()))
            restore_rng(load)
        for _ in steps:
            model(torch.randn(8, 64, device="cuda")).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    whole, _ = trained(range(6), None)
    half, optimizer = trained(range(3), None)
    names = dict(half.named_parameters())
    weights = {name: part_of(parameter) for name, parameter in names.items()}
    content = Content(3, "abc", lambda path: None, weights, moment_parts(optimizer, names), {})
    folder = save_checkpoint(tmp_path, content, keep=0)
    resumed, _ = trained(range(3, 6), folder)
    assert torch.equal(resumed.weight, whole.weight)


def write_to_full_device(folder: Path) -> None:
    Path("/dev/full").write_text("x" * 100)


def raise_as_rust_does(folder: Path) -> None:
    raise Exception("No space left on device (os error 28)")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("write_model", [write_to_full_device, raise_as_rust_does])
def test_a_full_disk_leaves_the_last_checkpoint_whole(run: Run, saved: Path, write_model: Callable) -> None:
    run.write_model = write_model  # type: ignore[method-assign]
    with pytest.raises(ResourceError, match="is full"):
        run.save(20, keep=1)
    verify_checkpoint(saved)
    assert os.listdir(saved.parent) == [saved.name]


def test_other_failures_name_the_path_or_pass_through(run: Run, saved: Path) -> None:
    def fail(folder: Path) -> None:
        raise KeyError("a bug")

    run.write_model = fail  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="a bug"):
        run.save(20)
    assert os.listdir(saved.parent) == [saved.name]
    (run.out.parent / "file").touch()
    run.out = run.out.parent / "file"
    with pytest.raises(CheckpointError, match=r"file/checkpoints.*can't be written"):
        run.save(20)


def start(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """Run code in a process of its own, beside the helpers of this file."""
    code = "import resource, sys, time\nfrom pathlib import Path\nfrom tiny_run import Run\n"
    code += "from training.errors import ResourceError\n"
    return subprocess.Popen(
        [sys.executable, "-c", code + textwrap.dedent(body), str(tmp_path / "run")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )


def test_a_save_killed_half_way_is_no_checkpoint(tmp_path: Path) -> None:
    child = start(
        tmp_path,
        """
        def write_half(folder):
            (folder / "model.safetensors").write_bytes(b"half")
            print("writing", flush=True)
            time.sleep(60)

        run = Run(Path(sys.argv[1]))
        run.save(1)
        run.write_model = write_half
        run.save(2)
        """,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    out = tmp_path / "run"
    assert steps(out) == [1]
    assert latest_checkpoint(out) == (out / "checkpoints/step_00000001", [])
    assert len(clean_leftovers(out)) == 1
    assert os.listdir(out / "checkpoints") == ["step_00000001"]


def test_a_process_killed_while_saving_and_deleting_leaves_whole_checkpoints(tmp_path: Path) -> None:
    child = start(
        tmp_path,
        """
        run = Run(Path(sys.argv[1]))
        for step in range(1, 100_000):
            run.save(step, keep=2)
        """,
    )
    out = tmp_path / "run"
    deadline = time.monotonic() + 60
    while len(steps(out)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert 2 <= len(steps(out)) <= 3
    for folder in list_checkpoints(out):
        verify_checkpoint(folder)
    clean_leftovers(out)
    assert len(os.listdir(out / "checkpoints")) == len(steps(out))


def test_a_file_size_limit_is_a_resource_error(tmp_path: Path) -> None:
    child = start(
        tmp_path,
        """
        run = Run(Path(sys.argv[1]))
        run.save(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        try:
            run.save(2, keep=1)
        except ResourceError as error:
            print(f"{error.exit_code} {error}")
        """,
    )
    output, _ = child.communicate(timeout=60)
    assert output.startswith("7 ")
    assert "step_00000002" in output
    out = tmp_path / "run"
    verify_checkpoint(out / "checkpoints/step_00000001")
    assert os.listdir(out / "checkpoints") == ["step_00000001"]


def test_cleaning_touches_only_our_temporary_folders(saved: Path) -> None:
    for name in (".saving-step_00000012-0123abcd", ".deleting-step_00000002-0123abcd", ".cache", "tmp", ".saving-x"):
        saved.with_name(name).mkdir()
    outside = saved.parents[1] / "outside"
    outside.mkdir()
    saved.with_name(".saving-step_00000013-0123abcd").symlink_to(outside)
    removed = clean_leftovers(saved.parents[1])
    assert [path.name for path in removed] == [".deleting-step_00000002-0123abcd", ".saving-step_00000012-0123abcd"]
    assert outside.is_dir()
    assert saved.with_name(".saving-x").is_dir()
