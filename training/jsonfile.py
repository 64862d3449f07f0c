"""JSON that somebody else may have written: read whole or refused as a ValueError, whatever it holds."""

import json
import stat
from pathlib import Path
from typing import Any

DEEPEST = 50  # far from the limit at which Python gives up, as whoever prints or copies a value goes as deep
LARGEST_BYTES = 64 * 2**20  # a vocabulary of 256,000 pieces takes 35 MB as a tokenizer.json


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: the text is no JSON, or nested more than DEEPEST deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        value, too_deep = None, True
    else:
        too_deep = _is_too_deep(value)
    if too_deep:
        raise ValueError(f"nested more than {DEEPEST} deep")
    return value


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: it is no regular file, larger than LARGEST_BYTES, or no JSON object.
        OSError: it can't be read.
    """
    value = parse_json(read_regular(path))
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def read_regular(path: Path) -> bytes:
    """Read a regular file of bounded size, never through a link and never waiting for a pipe's other end.

    Raises:
        ValueError: it is something else, or larger than LARGEST_BYTES.
        OSError: it can't be read.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("a link, folder or special file, expected a regular file")
    if status.st_size > LARGEST_BYTES:
        raise ValueError(f"expected at most {LARGEST_BYTES:,} bytes, got {status.st_size:,}")
    return path.read_bytes()
