"""Modules of the user's that commands import first, for what they register."""

import importlib
import os
import sys
from collections.abc import Iterable

from training.errors import ConfigError

IMPORT_HELP = "module to import first, one that calls register_mask; may be given several times"


def import_modules(names: Iterable[str]) -> None:
    """Import modules from the working folder, the repository, or wherever Python finds them.

    Raises:
        ConfigError: naming a module that is not there; what a module itself raises is passed on.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # of a module that this one imports
            raise ConfigError(f"--import: no module {name!r} in {os.getcwd()} or on PYTHONPATH") from None
