"""Writing to a disk: wait until it holds what was written, and say plainly when it is full."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import CheckpointError, ResourceError, RunError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into a ResourceError if the disk is full, else into a CheckpointError.

    safetensors and tokenizers raise no OSError: the mark of theirs is "os error N" in the message.
    """
    try:
        yield
    except RunError:
        raise
    except BaseException as error:
        mark = re.search(r"\(os error (\d+)\)", str(error))
        if not isinstance(error, OSError) and mark is None:
            raise
        number = error.errno if isinstance(error, OSError) else int(mark[1]) if mark else None
        where = getattr(error, "filename", None) or path
        if number in DISK_FULL:
            raise ResourceError(f"{where}: the disk, a quota or a file size limit is full: {error}") from error
        raise CheckpointError(f"{where}: can't be written: {error}") from error


def sync(path: Path) -> None:
    """Wait until a file's content or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
