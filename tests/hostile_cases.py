"""A small run to attack, and commands called as a user would: their code, what they say, time and memory."""

import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState, GradientState
from small_run import small_run

import train
from scripts import evaluate, generate, verify_checkpoint
from training.manifest import MANIFEST, describe_files

ROOT = Path(__file__).parents[1]
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train.main,
    "generate": generate.main,
    "evaluate": evaluate.main,
    "verify": verify_checkpoint.main,
}
DEEP = '{"a":' * 100_000


class Result(NamedTuple):
    """How a command ended: its code, or the exception that left it; all of stderr and stdout; seconds."""

    code: int | str
    err: str
    seconds: float

    def refused(self, code: int) -> str:
        """Check that it ended with `code` and one line that says why, without a traceback; return that line."""
        assert self.code == code, (self.code, self.err)
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ") or ": BAD: " in line]
        assert len(lines) == 1, self.err
        assert self.err.rstrip().endswith(lines[0])
        assert self.seconds < 20
        return lines[0]


def call(command: str, *arguments: object) -> Result:
    """Run a command in this process; nothing waits for a terminal."""
    stream, began = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
        try:
            code: int | str = COMMANDS[command](list(map(str, arguments)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (what leaves a command is what is tested)
            code = f"{type(error).__name__}: {error}"
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return Result(code, stream.getvalue(), time.monotonic() - began)


def call_apart(calls: Sequence[Sequence[object]]) -> tuple[list[Result], float]:
    """Run commands one after the other in one child; return their results and the most memory it had, in bytes."""
    text = json.dumps([list(map(str, arguments)) for arguments in calls])
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, __file__], input=text, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    results, kilobytes = json.loads(done.stdout)
    return [Result(*result) for result in results], kilobytes * 1024


class Made(NamedTuple):
    """A finished run: its folder, the checkpoint in it, and the command line that made it, without --out."""

    out: Path
    checkpoint: Path
    arguments: list[str]

    def copy(self, target: Path) -> Path:
        """Return a copy of the checkpoint, under another name than a step's."""
        return Path(shutil.copytree(self.checkpoint, target))


def make_run(folder: Path) -> Made:
    """Train for two steps."""
    arguments = small_run(folder, steps=2)
    result = call("train", *arguments, f"--out={folder / 'run'}")
    assert result.code == 0, result.err
    return Made(folder / "run", folder / "run" / "checkpoints" / "step_00000002", arguments)


def renew_manifest(checkpoint: Path, step: int = 2) -> None:
    """Do what an attacker does who may write the folder: make a manifest that verifies."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    (checkpoint / MANIFEST).write_bytes(describe_files(checkpoint, step, "0" * 64).render())


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def pickles(marker: Path) -> list[bytes]:
    """Return pickles that make the folder `marker` when they are loaded: a plain one and torch's archive."""
    buffer = io.BytesIO()
    torch.save({"weight": _Bomb(marker)}, buffer)
    return [pickle.dumps(_Bomb(marker)), buffer.getvalue()]


def _main() -> None:
    import resource

    results = [call(command, *arguments) for command, *arguments in json.load(sys.stdin)]
    print(json.dumps([results, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))


if __name__ == "__main__":
    _main()
