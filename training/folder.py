"""The folder of a run: taken by one run at a time, the same one for all of its processes."""

import contextlib
import secrets
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from training.checkpoint import clean_leftovers
from training.config import Run, config_dict
from training.errors import ConfigError
from training.manifest import step_folders
from training.modelfolder import check_model_folder
from training.processes import Processes
from training.redaction import redact
from training.setup import find_checkpoint, refuse_other_run, refuse_resume
from training.state import read_state
from training.storage import disk_errors, remove_unfinished, replace_file


class RunFolder:
    """The folder of a run; every method is for all processes at once, and what fails in one fails in all.

    Args:
        run: whose folder it is.
        processes: those of the run, of which the main one reads and writes.
    """

    def __init__(self, run: Run, processes: Processes) -> None:
        self.run, self.out, self.processes = run, run.out, processes
        self._present: list[Path] = []
        self._sign = run.out / f".shared-{processes.gather_objects(secrets.token_hex(4))[0]}"

    def check(self) -> None:
        """Refuse at once what `find` and `claim` would refuse, as far as the folder alone tells."""

        def look() -> None:
            if self.processes.is_main:
                refuse_resume(self.out, self.run.resume)
                with disk_errors(self.out):
                    if (self.out / ".lock").exists():
                        self._lock().release()

        self.processes.together(look)

    def find(self, identity: dict[str, Any]) -> tuple[Path | None, dict[str, Any], list[str]]:
        """Find the checkpoint to go on from; nothing is written.

        Args:
            identity: what makes this run the one of the checkpoint, by `run_identity`.

        Returns:
            The checkpoint or None, the trainer's state that it holds, and why newer ones were passed over.
        """

        def find() -> tuple[Path | None, dict[str, Any], list[str]]:
            if not self.processes.is_main:
                return None, {}, []
            self._present = step_folders(self.out)
            checkpoint, passed_over = find_checkpoint(self.out, self.run.resume)
            if checkpoint is None:
                return None, {}, passed_over
            state = read_state(checkpoint)
            refuse_other_run(checkpoint, state["identity"], identity, self.run.changed)
            check_model_folder(checkpoint / "model")
            return checkpoint, state, passed_over

        return self.processes.gather_objects(self.processes.together(find))[0]

    def claim(self, stack: contextlib.ExitStack) -> None:
        """Take the folder until `stack` is closed, tidy it, and write `config.yaml`.

        Raises:
            ConfigError: another run has it, or the processes have not the same one.
        """

        def lock_and_tidy() -> None:
            if self.processes.is_main:
                with disk_errors(self.out):
                    self.out.mkdir(parents=True, exist_ok=True)
                    stack.callback(self._lock().release)
                    if step_folders(self.out) != self._present:  # by a run that has ended meanwhile
                        raise ConfigError(
                            f"--out: {self.out} was changed by another run; start again to go on from there"
                        )
                    self._tidy()
                with disk_errors(self.out / "config.yaml"):
                    replace_file(self.out / "config.yaml", self._config_text().encode())
                with disk_errors(self._sign):
                    self._sign.touch()

        def see() -> None:
            if not self._sign.exists():
                raise ConfigError(f"--out: expected {self.out} to be one folder for all processes, it is another here")

        try:
            self.processes.together(lock_and_tidy)
            self.processes.together(see)
        finally:
            if self.processes.is_main:
                self._sign.unlink(missing_ok=True)

    def _lock(self) -> FileLock:
        lock = FileLock(self.out / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"--out: {self.out} is in use by another run") from None
        return lock

    def _config_text(self) -> str:
        imports = "".join(f"# with --import {redact(name)}\n" for name in self.run.imports)
        return imports + yaml.safe_dump(redact(config_dict(self.run.config)), sort_keys=False)

    def _tidy(self) -> None:
        """Remove what an earlier start of the run has left: parts of files, and how it ended, as it goes on now."""
        clean_leftovers(self.out)
        for name in ("exit.json", "loss.png", "config.yaml"):
            remove_unfinished(self.out / name)
        for sign in self.out.glob(".shared-*"):
            sign.unlink()
        (self.out / "exit.json").unlink(missing_ok=True)
