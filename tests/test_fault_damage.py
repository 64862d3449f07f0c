"""Checkpoints of a run in which anything was damaged: each damage is noticed, named, and got over."""

import json
import random
import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
from fault_runs import Template, check_equal

from scripts import verify_checkpoint as verify_script
from training.errors import CheckpointError
from training.manifest import verify_checkpoint

pytestmark = pytest.mark.faults

OLDER, NEWER = "step_00000004", "step_00000008"


def flip(part: int) -> Callable[[Path, random.Random], None]:
    """Return what flips a bit in a third of a file: 0 the first, 2 the last."""

    def damage(path: Path, generator: random.Random) -> None:
        content = bytearray(path.read_bytes())
        content[(part * len(content) + generator.randrange(len(content))) // 3] ^= 1 << generator.randrange(8)
        path.write_bytes(content)

    return damage


def truncate(path: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


def remove(path: Path, generator: random.Random) -> None:
    path.unlink()


def swap(path: Path, generator: random.Random) -> None:
    """Put the file of the older checkpoint in its place."""
    older = Path(str(path).replace(NEWER, OLDER))
    path.write_bytes(older.read_bytes())


def stray(path: Path, generator: random.Random) -> None:
    path.with_name(f"{path.name}.orig").write_bytes(path.read_bytes())


DAMAGES = {
    "flip at the begin": flip(0),
    "flip in the middle": flip(1),
    "flip at the end": flip(2),
    "truncate": truncate,
    "remove": remove,
    "swap": swap,
    "stray": stray,
}


def cases_of(checkpoint: Path, generator: random.Random, every: bool) -> list[tuple[str, str]]:
    """Return (file, damage): all of them, or each file and each damage at least once."""
    files = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    older = checkpoint.with_name(OLDER)
    same = {name for name in files if (older / name).read_bytes() == (checkpoint / name).read_bytes()}
    possible = [(name, damage) for name in files for damage in DAMAGES if damage != "swap" or name not in same]
    if every:
        return possible
    changing = generator.choice(sorted(set(files) - same))
    damages = cycle(generator.sample(sorted(set(DAMAGES) - {"swap"}), len(DAMAGES) - 1))
    generator.shuffle(files)
    return [(changing, "swap"), *zip(files, damages, strict=False)]


def check_noticed(out: Path, named: str) -> None:
    """Check that the newer checkpoint of `out` does not verify, and that what is wrong is named."""
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(out / "checkpoints" / NEWER)
    assert named in str(caught.value)
    assert verify_script.main(["--all", str(out)]) == 4


def check_got_over(template: Template, arguments: list[str], out: Path, whole: Path, named: str) -> None:
    """Check that a run refuses the damaged checkpoint by name, and goes on from the older one to the same end."""
    bad = out / "checkpoints" / NEWER
    workers = template.start([*arguments, f"--out={out}", f"--resume={bad}"], out.with_suffix(".path"))
    assert workers.wait() == [4], workers.said()
    (error,) = (line for line in workers.said().splitlines() if line.startswith("error: "))
    assert named in error
    workers = template.start([*arguments, f"--out={out}"], out.with_suffix(".auto"))
    assert workers.wait() == [0], workers.said()
    (passed_over,) = (line for line in workers.said().splitlines() if line.startswith("not resumed from: "))
    assert NEWER in passed_over
    assert named in passed_over
    assert f"resuming from {out / 'checkpoints' / OLDER}" in workers.said()
    check_equal(out, whole)
    verify_checkpoint(bad)


@pytest.mark.parametrize("half", [0, 1])  # so that two workers share them
def test_each_damage_of_each_file(
    template: Template,
    fault_arguments: list[str],
    whole: Path,
    tmp_path: Path,
    fault_generator: random.Random,
    long_form: bool,
    half: int,
) -> None:
    cases = cases_of(whole / "checkpoints" / NEWER, fault_generator, long_form)[half::2]
    for number, (name, damage) in enumerate(cases):
        print(f"{damage}: {name}")  # shown where it fails
        out = shutil.copytree(whole, tmp_path / f"run{number}")
        DAMAGES[damage](out / "checkpoints" / NEWER / name, fault_generator)
        named = f"{NEWER}: holds step 4" if (name, damage) == ("manifest.json", "swap") else name
        check_noticed(out, named)
        if number < 2 or (long_form and number % 5 == 0):
            check_got_over(template, fault_arguments, out, whole, named)
        shutil.rmtree(out)
    print(f"{len(cases)} damages")


def test_a_checkpoint_in_the_place_of_another(
    template: Template, fault_arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    checkpoints = out / "checkpoints"
    shutil.rmtree(checkpoints / NEWER)
    shutil.copytree(checkpoints / OLDER, checkpoints / NEWER)
    named = f"{NEWER}: holds step 4, its name says 8"
    check_noticed(out, named)
    check_got_over(template, fault_arguments, out, whole, named)


def test_without_a_whole_checkpoint_nothing_starts(
    template: Template, fault_arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    """A run does not begin anew over checkpoints that somebody may still mend."""
    out = shutil.copytree(whole, tmp_path / "run")
    for step in (OLDER, NEWER):
        (out / "checkpoints" / step / "optimizer.safetensors").unlink()
    (out / "exit.json").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    workers = template.start([*fault_arguments, f"--out={out}"], tmp_path / "log")
    assert workers.wait() == [4], workers.said()
    (error,) = (line for line in workers.said().splitlines() if line.startswith("error: "))
    assert all(f"{step}/optimizer.safetensors: missing" in error for step in (OLDER, NEWER))
    assert json.loads((out / "exit.json").read_text())["exit_code"] == 4
    (out / "exit.json").unlink()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
