"""Start-up steps that take long: said to be alive, and done once where several processes need the same folder."""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from training.errors import DataError, RunError
from training.storage import DISK_FULL, error_number, full_disk, sync


@contextmanager
def working(label: str) -> Iterator[None]:
    """Say on stderr that a step runs: its name at once, then the elapsed seconds until it ends.

    A terminal sees one line rewritten every second; a log gets a new line every 1.5 s.
    """
    stream, terminal = sys.stderr, sys.stderr.isatty()
    start, ended = time.monotonic(), threading.Event()

    def say(note: str) -> None:
        line = f"{label} … {note}".rstrip(" ")
        stream.write(f"\r\033[K{line}" if terminal else f"{line}\n")
        stream.flush()

    def beat() -> None:
        while not ended.wait(1.0 if terminal else 1.5):
            say(f"{int(time.monotonic() - start)} s")

    say("")
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        elapsed = time.monotonic() - start
        if terminal or elapsed >= 1.5:
            say(f"{elapsed:.1f} s in all" + ("\n" if terminal else ""))


def build_once(folder: Path, label: str, build: Callable[[Path], object]) -> None:
    """Make `folder` by `build(temporary folder)` unless it exists; whoever sees the folder sees it whole.

    Of several processes one builds while the others wait, say so, and then use its result. What a killed
    process left is removed by the next one that builds beside it.

    Raises:
        ResourceError: the disk is full.
        DataError: a file can't be read or written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            return
        lock = FileLock(_beside(folder, "lock"))
        with _acquired(lock, label):
            if not folder.exists():
                _remove_leftovers(folder)
                _build(folder, build)
    except RunError:
        raise
    except BaseException as error:
        number = error_number(error)
        if number is None:
            raise
        if number in DISK_FULL:
            raise full_disk(f"{label}: {folder}", error) from error
        raise DataError(f"{label}: {error}") from error


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


@contextmanager
def _acquired(lock: FileLock, label: str) -> Iterator[None]:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with working(f"waiting for another process: {label}"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, build: Callable[[Path], object]) -> None:
    partial = _beside(folder, "building")
    partial.mkdir()
    try:
        build(partial)
        for path in (*partial.rglob("*"), partial):
            sync(path)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(folder.parent)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed builds left beside `folder`, whose own lock is held; a lock that is free tells."""
    shutil.rmtree(_beside(folder, "building"), ignore_errors=True)
    for path in folder.parent.glob(".*.lock"):
        partial = path.with_suffix(".building")
        if not partial.exists():
            continue
        try:
            with FileLock(path, timeout=0):
                shutil.rmtree(partial, ignore_errors=True)
        except Timeout:
            continue
