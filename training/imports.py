"""Modules of the user's that commands import first, for what they register."""

import importlib
import os
import sys
from collections.abc import Iterable

from training.errors import ConfigError

IMPORT_HELP = "module to import first, one that calls register_mask; may be given several times"


def import_modules(names: Iterable[str]) -> None:
    """Import modules from the working folder, or else from wherever Python finds them.

    Raises:
        ConfigError: naming a module that is not there; what a module itself raises is passed on.
    """
    here = os.getcwd()
    sys.path.insert(0, here)  # `python train.py` would look beside train.py first, `python -m` here
    try:
        for name in names:
            _import(name)
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)


def _import(name: str) -> None:
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"--import: expected a module's name, as masks of masks.py or a.b of a/b.py, got {name!r}")
    try:
        importlib.import_module(name)
    except SystemExit as error:
        raise ConfigError(f"--import: expected {name!r} to go on, it ended the program with {error.code!r}") from error
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # of a module that this one imports
        raise ConfigError(f"--import: no module {name!r} in {os.getcwd()} or on PYTHONPATH") from None
