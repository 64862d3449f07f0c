"""How a run ends: every failure becomes an exit code, one line for the user, and `OUT/exit.json`."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from training.errors import EXIT_SIGTERM, ResourceError, RunError
from training.storage import replace_file


class Interrupted(RunError):
    """A signal asked the run to stop; its checkpoint is saved."""

    exit_code = EXIT_SIGTERM


class Ending:
    """Where `exit.json` says how a run ended: `out` is set once the run's folder is its own, and no other run's."""

    out: Path | None = None


def exit_code_of(action: Callable[[Ending], Any]) -> int:
    """Run `action`; print a RunError as one line, anything else with its traceback, and return the exit code."""
    ending = Ending()
    try:
        action(ending)
        code, reason = 0, "done"
    except RunError as error:
        code, reason = error.exit_code, str(error)
        print(f"error: {error}" if code != EXIT_SIGTERM else reason, file=sys.stderr)
    except MemoryError as error:
        code, reason = ResourceError.exit_code, f"out of memory: {error}"
        print(f"error: {reason}", file=sys.stderr)
    except BaseException as error:
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        _write(ending.out, 1, f"{type(error).__name__}: {error}{notes}")
        raise
    _write(ending.out, code, reason)
    return code


def _write(out: Path | None, code: int, reason: str) -> None:
    """Write `exit.json` in one piece; a run that never got its folder has none."""
    if out is None or int(os.environ.get("RANK", "0")) != 0:
        return
    try:
        replace_file(out / "exit.json", (json.dumps({"exit_code": code, "reason": reason}) + "\n").encode())
    except OSError as error:  # the disk may be what failed; the exit code still tells
        print(f"{out / 'exit.json'}: not written: {error.strerror}", file=sys.stderr)


class StopSignal:
    """Whether SIGTERM or SIGINT has come; `asked` holds the signal's name."""

    def __init__(self) -> None:
        self.asked: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take both signals as a wish to stop after the current step, until the block ends."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
