"""How a run ends: every failure becomes an exit code, one line for the user, and `OUT/exit.json`."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from training.errors import EXIT_SIGTERM, ConfigError, PeerError, ResourceError, RunError
from training.redaction import redact
from training.storage import DISK_FULL, full_disk, refuse_links, replace_file, unfinished

_DEAF_SECONDS = 5.0


class Interrupted(RunError):
    """A signal asked the run to stop; its checkpoint is saved."""

    exit_code = EXIT_SIGTERM


class Ending:
    """Where `exit.json` says how a run ended.

    Attributes:
        asked: the folder that the command line names; a refused start says so there if it is that of an idle run.
        out: the same, set once it is this run's own, and no other run's.
    """

    asked: Path | None = None
    out: Path | None = None

    def write(self, code: int, reason: str, lost: Sequence[int] = ()) -> None:
        """Write `exit.json` in one piece, from the first process that is not lost."""
        ranks = (rank for rank in range(int(os.environ.get("WORLD_SIZE", "1"))) if rank not in lost)
        if int(os.environ.get("RANK", "0")) != next(ranks, 0):
            return
        out = self.out or _idle_run(self.asked)
        if out is None:
            return
        if code == PeerError.exit_code and self.out is not None and (out / "exit.json").exists():
            return  # by a process that knew sooner, or that failed itself: this one may have been the one that hung
        record = {"exit_code": code, "reason": redact(reason)}
        try:
            replace_file(out / "exit.json", f"{json.dumps(record)}\n".encode())
        except OSError as error:  # the disk may be what failed; the exit code still tells
            _say(f"{out / 'exit.json'}: not written: {error.strerror}")

    def end_now(self, error: RunError) -> None:
        """End the process from a thread, while the main thread waits for what will not come."""
        _say(f"\nerror: {error}")
        self.write(error.exit_code, str(error), getattr(error, "lost", ()))
        os._exit(error.exit_code)


def _idle_run(folder: Path | None) -> Path | None:
    """The folder, if it is a run's and no process has taken it."""
    if folder is None or not (folder / ".lock").is_file():
        return None
    try:
        refuse_links(folder, (".lock", "exit.json", unfinished("exit.json")), ())
        with FileLock(folder / ".lock", timeout=0):
            return folder
    except (ConfigError, Timeout, OSError):
        return None


def exit_code_of(action: Callable[[Ending], Any]) -> int:
    """Run `action`; print a RunError as one line, anything else with its traceback, and return the exit code."""
    ending = Ending()
    try:
        action(ending)
    except BaseException as error:
        known = _run_error(error)
        if known is None:
            notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
            ending.write(1, f"{type(error).__name__}: {error}{notes}")
            raise
        _say(f"{known}" if known.exit_code == EXIT_SIGTERM else f"error: {known}")
        ending.write(known.exit_code, str(known), getattr(known, "lost", ()))
        return known.exit_code
    ending.write(0, "done")
    return 0


def _run_error(error: BaseException) -> RunError | None:
    """The reason for the user; full memory and full disks are reasons too, wherever they show."""
    if isinstance(error, RunError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError(f"out of memory: {error}")
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return full_disk(error.filename or "output", error)
    return None


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the disk of the log may be what is full; the exit code still tells
        print(text, file=sys.stderr, flush=True)


class StopSignal:
    """Whether SIGTERM or SIGINT has come; `asked` holds the signal's name.

    Until `wait_for_step` is set a signal ends what runs at once, and the process soon after, should it be deaf.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.wait_for_step = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take both signals as a wish to stop, until the block ends."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        before_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self._hear, args=(reading,), daemon=True).start()
        try:
            yield
        finally:
            for number, handler in before.items():  # a second signal must not break into the end of the process
                signal.signal(number, signal.SIG_IGN if self.asked else handler)
            signal.set_wakeup_fd(before_fd)
            os.close(writing)  # ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        if not self.wait_for_step:
            self.wait_for_step = True  # a second signal must not break into the end
            raise Interrupted(f"stopped by {self.asked} before the first step; there is nothing to save")

    def _hear(self, reading: int) -> None:
        """Note signals while the main thread is in code that lets no handler run."""
        while number := os.read(reading, 1):
            self.asked = signal.Signals(number[0]).name
            if not self.wait_for_step:
                time.sleep(_DEAF_SECONDS)
                if not self.wait_for_step:
                    _say(f"stopped by {self.asked} before the first step; there is nothing to save")
                    os._exit(EXIT_SIGTERM)
        os.close(reading)
