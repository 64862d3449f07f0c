"""What `trainer_state.json` of a checkpoint must hold before a run goes on from it."""

import re
from pathlib import Path
from typing import Any

from training.checkpoint import load_trainer_state
from training.errors import CheckpointError
from training.manifest import step_of

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # becomes part of the names of wandb's folders


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the trainer's state of a checkpoint, each field of its type.

    Raises:
        CheckpointError: naming the field, what was expected and what came.
    """
    state = load_trainer_state(checkpoint)
    state = {"dropped": 0, "steps": None} | state  # fields that no version before wrote
    for name, (expected, fits) in _FIELDS.items():
        if name not in state or not fits(state[name]):
            came = repr(state[name])[:100] if name in state else "nothing"
            raise CheckpointError(f"{checkpoint / 'trainer_state.json'}: {name}: expected {expected}, got {came}")
    if step_of(checkpoint) not in (None, state["step"]):
        raise CheckpointError(f"{checkpoint / 'trainer_state.json'}: holds step {state['step']}")
    return state


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_scaler(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(isinstance(v, int | float) and 0 <= v < 2**63 for v in value.values())
    )


def _is_run_id(value: Any) -> bool:
    return value is None or (isinstance(value, str) and _RUN_ID.fullmatch(value) is not None)


_FIELDS = {
    "step": ("a whole number from 0", _is_count),
    "steps": ("null or a whole number from 0", lambda value: value is None or _is_count(value)),
    "tokens": ("a whole number from 0", _is_count),
    "skipped": ("a whole number from 0", _is_count),
    "dropped": ("a whole number from 0", _is_count),
    "scaler": ("null or numbers by name", _is_scaler),
    "wandb_run_id": ("null or letters and digits", _is_run_id),
    "identity": ("values by name", lambda value: isinstance(value, dict)),
}
