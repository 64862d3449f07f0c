"""What no file of a run may hold: secrets of the configuration, the command line and the environment."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "[redacted]"
# A "token" is a secret as the last word of a key alone: token_budget and eval_tokens are sizes.
_SECRET_KEY = re.compile(
    r"(^|_)(api_?keys?|access_?keys?|private_?keys?|secrets?|passwords?|passwd|credentials?)(_|$)|(^|_)token$"
)
_SECRET_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(hf_|sk-|gh[opsu]_|github_pat_|glpat-|AKIA|xox[a-z]-|wandb_v\d_)[A-Za-z0-9_-]{6,}"
    r"|(?<=://)[^/@\s]+(?=@)"  # user and password of an address
)
_SHORTEST_SECRET = 8  # characters; shorter values of variables are words of any text


def redact(value: Any, key: str = "") -> Any:
    """Return a value without its secrets: texts under telling keys, what looks like a key, what the environment holds.

    Args:
        value: a mapping, a sequence, a text, a number or None.
        key: the key under which it stands.
    """
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if _is_secret_key(key):
        return REDACTED
    return _redact_text(value) if isinstance(value, str) else value


def _redact_text(text: str) -> str:
    for secret in _environment_secrets():
        text = text.replace(secret, REDACTED)
    return _SECRET_VALUE.sub(REDACTED, text)


def _environment_secrets() -> list[str]:
    """Values of environment variables with telling names, longest first, as one may be part of another."""
    values = {value for name, value in os.environ.items() if _is_secret_key(name) and len(value) >= _SHORTEST_SECRET}
    return sorted(values, key=len, reverse=True)


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """Return a command line without its secrets, for `--key value` and `--key=value`."""
    cleaned: list[str] = []
    key = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("-") and equals:
            cleaned.append(f"{name}={redact(value, name)}")
        else:
            cleaned.append(redact(argument, "" if argument.startswith("-") else key))
        key = name if argument.startswith("-") and not equals else ""
    return cleaned


def _is_secret_key(key: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    return _SECRET_KEY.search(re.sub(r"[^a-z0-9]+", "_", words)) is not None
