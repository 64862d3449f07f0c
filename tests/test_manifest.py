"""What counts as a checkpoint: every file present, none too many, none altered."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import Run

from scripts import verify_checkpoint as verify_script
from training.errors import CheckpointError
from training.manifest import latest_checkpoint, verify_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def saved(run: Run) -> Path:
    run.train(0, 1)
    return run.save(10)


FILES = [
    "manifest.json",
    "model/README.md",
    "model/model.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "trainer_state.json",
]


def test_a_checkpoint_holds_the_documented_files(saved: Path) -> None:
    manifest = verify_checkpoint(saved)
    assert saved.name == "step_00000010"
    assert sorted([*manifest.files, "manifest.json"]) == FILES
    assert (manifest.step, manifest.config_hash) == (10, "abc")
    assert manifest.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_noticed(saved: Path, name: str, where: float) -> None:
    content = bytearray((saved / name).read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(saved)


def test_every_byte_of_the_manifest_counts(saved: Path) -> None:
    path = saved / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 7]) + content[position + 1 :])
        with pytest.raises(CheckpointError):
            verify_checkpoint(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_noticed(saved: Path, name: str) -> None:
    os.truncate(saved / name, (saved / name).stat().st_size - 1)
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_removed_file_is_noticed(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(saved)
    found, messages = latest_checkpoint(saved.parents[1])
    assert found is None
    assert name in messages[0]


@pytest.mark.parametrize("name", ["stray.bin", "model/modeling_other.py", "new/deep/file"])
def test_a_stray_file_is_noticed(saved: Path, name: str) -> None:
    (saved / name).parent.mkdir(parents=True, exist_ok=True)
    (saved / name).touch()
    with pytest.raises(CheckpointError, match=f"{name}: stray"):
        verify_checkpoint(saved)


@pytest.mark.parametrize("name", ["manifest.json", "trainer_state.json", "model"])
def test_a_link_is_refused_even_to_the_same_content(saved: Path, tmp_path: Path, name: str) -> None:
    shutil.move(saved / name, tmp_path / "elsewhere")
    (saved / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name}: a link"):
        verify_checkpoint(saved)


def test_a_pipe_is_refused(saved: Path) -> None:
    os.mkfifo(saved / "pipe")
    with pytest.raises(CheckpointError, match="pipe: a link or special file"):
        verify_checkpoint(saved)


@pytest.mark.parametrize("name", ["../outside.txt", "model/../../outside.txt", "/etc/hostname"])
def test_a_path_that_leaves_the_folder_is_refused(saved: Path, name: str) -> None:
    (saved.parent / "outside.txt").write_text("x")
    manifest = verify_checkpoint(saved)
    manifest.files[name] = manifest.files["model/README.md"]
    (saved / "manifest.json").write_bytes(manifest.render())
    with pytest.raises(CheckpointError, match="leaves the folder"):
        verify_checkpoint(saved)


@pytest.mark.parametrize("content", ["", "[]", "{}", "nonsense", '{"format_version": 1, "sha256": "", "files": []}'])
def test_an_unreadable_manifest_is_named(saved: Path, content: str) -> None:
    (saved / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json: unreadable manifest"):
        verify_checkpoint(saved)


def test_another_format_version_is_refused(saved: Path) -> None:
    (saved / "manifest.json").write_text('{"format_version": 2, "layout": "new"}')
    with pytest.raises(CheckpointError, match="format_version is 2, expected 1"):
        verify_checkpoint(saved)


def test_a_renamed_checkpoint_does_not_pass_for_another_step(saved: Path) -> None:
    renamed = saved.rename(saved.with_name("step_00000020"))
    with pytest.raises(CheckpointError, match="holds step 10, its name says 20"):
        verify_checkpoint(renamed)
    assert verify_checkpoint(renamed.rename(saved.with_name("best"))).step == 10


def test_the_script_prints_each_verdict(run: Run, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_script.main([str(saved)]) == 0
    assert f"{saved}: ok, step 10, 5 files" in capsys.readouterr().out
    run.save(20)
    (saved / "rng.safetensors").unlink()
    assert verify_script.main(["--all", str(run.out)]) == 4
    bad, good = capsys.readouterr().out.splitlines()
    assert "rng.safetensors: missing" in bad
    assert "step_00000020: ok" in good
    assert verify_script.main(["--all", str(run.out / "nothing")]) == 4
    with pytest.raises(SystemExit) as usage:
        verify_script.main([])
    assert usage.value.code == 2
