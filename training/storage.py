"""Writing to a disk: wait until it holds what was written, and say plainly when it is full."""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import CheckpointError, ConfigError, ResourceError, RunError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: Path, otherwise: type[RunError] = CheckpointError) -> Iterator[None]:
    """Turn a failure to write `path` into a ResourceError if the disk is full, else into `otherwise`."""
    try:
        yield
    except RunError:
        raise
    except BaseException as error:
        number = error_number(error)
        if number is None:
            raise
        if number in DISK_FULL:
            raise full_disk(str(path), error) from error
        where = getattr(error, "filename", None) or path
        raise otherwise(f"{where}: can't be written: {error}") from error


def full_disk(where: str, error: BaseException) -> ResourceError:
    """Return what to raise for a failed system call whose number is among DISK_FULL."""
    reason = os.strerror(error_number(error) or 0)
    return ResourceError(
        f"{where}: the disk, a quota or a file size limit is full ({reason}); make room and start again"
    )


def error_number(error: BaseException) -> int | None:
    """Return the errno of a failed system call, None for other exceptions.

    safetensors and tokenizers raise no OSError: the mark of theirs is "os error N" in the message.
    """
    if isinstance(error, OSError):
        return error.errno or 0
    mark = re.search(r"\(os error (\d+)\)", str(error))
    return int(mark[1]) if mark else None


def sync(path: Path) -> None:
    """Wait until a file's content or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one piece: whoever opens it, even after a kill, sees the old content or the new one, whole.

    Raises:
        OSError: it can't be written; the old content is there, and nothing partial beside it.
    """
    temporary = path.with_name(unfinished(path.name))
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_unfinished(path: Path) -> None:
    """Remove what a `replace_file` that was killed has left beside `path`."""
    path.with_name(unfinished(path.name)).unlink(missing_ok=True)


def unfinished(name: str) -> str:
    """Return the name of a file while `replace_file` writes it."""
    return f".{name}.writing"


def refuse_links(folder: Path, files: Iterable[str], folders: Iterable[str]) -> None:
    """Refuse a folder in which one of these names is a link, or not what it should be: writing would follow it.

    Raises:
        ConfigError: naming it.
    """
    for kind, is_kind, names in (("file", Path.is_file, files), ("folder", Path.is_dir, folders)):
        for path in (folder / name for name in names):
            if os.path.lexists(path) and (path.is_symlink() or not is_kind(path)):
                state = "a link" if path.is_symlink() else "something else"
                raise ConfigError(f"{path}: expected a {kind} of a run, or nothing; it is {state}")
