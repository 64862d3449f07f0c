"""Checkpoints: saved whole or not at all, retained by count, loaded without running code."""

import json
import os
import random
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training.errors import CheckpointError
from training.manifest import (
    MANIFEST,
    checkpoint_path,
    describe_files,
    latest_checkpoint,
    list_checkpoints,
    verify_checkpoint,
)
from training.storage import disk_errors, sync

__all__ = [
    "clean_leftovers",
    "latest_checkpoint",
    "list_checkpoints",
    "load_optimizer_state",
    "load_trainer_state",
    "restore_rng",
    "save_checkpoint",
    "verify_checkpoint",
]

_LEFTOVER_NAME = re.compile(r"\.(saving|deleting)-step_\d{8,}-[0-9a-f]{8}")


def save_checkpoint(
    out: Path,
    step: int,
    write_model: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    named_parameters: dict[str, torch.nn.Parameter],
    trainer_state: dict[str, Any],
    config_hash: str,
    keep: int,
) -> Path:
    """Save a checkpoint whole or not at all, then delete those beyond the newest `keep`.

    One of this step that verifies and has the same config hash stays as it is; any other one is replaced.
    Checkpoints of later steps are not touched.

    Args:
        out: the run's folder.
        step: optimizer steps done.
        write_model: writes the model and tokenizer files into the empty folder that it is given.
        optimizer: AdamW.
        named_parameters: parameters of the unwrapped model by name, at least those that the optimizer updates.
        trainer_state: what else the run needs to go on, of JSON types with finite numbers; floats keep every bit.
        config_hash: goes into the manifest.
        keep: how many checkpoints stay; 0 means all.

    Returns:
        The checkpoint's folder.

    Raises:
        ResourceError: the disk is full; earlier checkpoints are whole.
        CheckpointError: the folder can't be written.
    """
    target = checkpoint_path(out, step)
    with disk_errors(target):
        clean_leftovers(out)
        if not _is_saved(target, config_hash):
            with _building(target) as folder:
                (folder / "model").mkdir()
                write_model(folder / "model")
                save_file(_optimizer_tensors(optimizer, named_parameters), folder / "optimizer.safetensors")
                save_file(_rng_tensors(), folder / "rng.safetensors")
                text = json.dumps(trainer_state, indent=1, allow_nan=False) + "\n"
                (folder / "trainer_state.json").write_text(text, encoding="utf-8")
                (folder / MANIFEST).write_bytes(describe_files(folder, step, config_hash).render())
        saved = list_checkpoints(out)
        older = saved[: saved.index(target) + 1]
        for folder in older[:-keep] if keep else []:
            shutil.rmtree(_set_aside(folder))
    return target


def clean_leftovers(out: Path) -> list[Path]:
    """Remove what killed saves and deletions left in a run's folder, and return the removed folders."""
    root = out / "checkpoints"
    leftovers = [path for path in root.iterdir() if _LEFTOVER_NAME.fullmatch(path.name)] if root.is_dir() else []
    removed = [path for path in sorted(leftovers) if path.is_dir() and not path.is_symlink()]
    for path in removed:
        shutil.rmtree(path)
    return removed


@contextmanager
def _building(target: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `target` at the end, or vanishes with an exception."""
    folder = _temporary(target, "saving")
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        replaced = _set_aside(target) if os.path.lexists(target) else None
        os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # the first error counts; the next start cleans again
        raise
    sync(target.parent)
    sync(target.parent.parent)
    if replaced:
        shutil.rmtree(replaced)


def _set_aside(folder: Path) -> Path:
    """Rename a folder, so that a deletion that is killed half-way leaves no damaged checkpoint."""
    aside = _temporary(folder, "deleting")
    os.rename(folder, aside)
    return aside


def _temporary(target: Path, purpose: str) -> Path:
    return target.with_name(f".{purpose}-{target.name}-{secrets.token_hex(4)}")


def _is_saved(target: Path, config_hash: str) -> bool:
    try:
        return verify_checkpoint(target).config_hash == config_hash
    except CheckpointError:
        return False


def load_trainer_state(folder: Path) -> dict[str, Any]:
    """Return the `trainer_state` that `save_checkpoint` was given; an unreadable one is a CheckpointError."""
    path = folder / "trainer_state.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable: {error}") from error


def load_optimizer_state(
    folder: Path, optimizer: torch.optim.Optimizer, named_parameters: dict[str, torch.nn.Parameter]
) -> None:
    """Load AdamW's state bit by bit; learning rates and the other settings stay the optimizer's own.

    Args:
        folder: a checkpoint that verifies.
        optimizer: AdamW over the same parameters, grouped in any way.
        named_parameters: parameters of the unwrapped model by name.

    Raises:
        CheckpointError: a key is missing, unknown, or has another shape or type than its parameter asks for.
    """
    path = folder / "optimizer.safetensors"
    tensors = _load_tensors(path)
    states = {name: _fresh_state(p) for name, p in _updated(optimizer, named_parameters).items()}
    expected = {f"{kind}.{name}": value for name, state in states.items() for kind, value in state.items()}
    for key in sorted(expected.keys() ^ tensors.keys()):
        raise CheckpointError(f"{path}: {key} is {'missing' if key in expected else 'no state of this model'}")
    for key, value in expected.items():
        saved = tensors[key]
        if (saved.shape, saved.dtype) != (value.shape, value.dtype):
            raise CheckpointError(
                f"{path}: {key} is {saved.dtype} {tuple(saved.shape)}, expected {value.dtype} {tuple(value.shape)}"
            )
        value.copy_(saved)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(enumerate(states.values())), "param_groups": groups})


def _optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: dict[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Return AdamW's state keyed by parameter name, which depends on neither grouping nor world size."""
    return {
        f"{kind}.{name}": value.contiguous()
        for name, parameter in _updated(optimizer, named_parameters).items()
        for kind, value in (optimizer.state.get(parameter) or _fresh_state(parameter)).items()
    }


def _fresh_state(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Return the state that AdamW gives a parameter before its first update."""
    data = parameter.detach()
    return {"step": torch.zeros(()), "exp_avg": torch.zeros_like(data), "exp_avg_sq": torch.zeros_like(data)}


def _updated(
    optimizer: torch.optim.Optimizer, named_parameters: dict[str, torch.nn.Parameter]
) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of an optimizer by name, in the order of its groups, which is that of its state_dict."""
    names = {id(parameter): name for name, parameter in named_parameters.items()}
    return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}


def _rng_tensors() -> dict[str, torch.Tensor]:
    """Return the states of all random generators: torch on the CPU and on each CUDA device, Python and numpy."""
    _, python, python_gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        **{f"cuda.{device}": state for device, state in enumerate(cuda)},
        "python": torch.tensor(python, dtype=torch.int64),
        "python_gauss": _optional_number(python_gauss),
        "numpy": torch.tensor([*numpy["state"]["key"].tolist(), numpy["state"]["pos"]], dtype=torch.int64),
        "numpy_gauss": _optional_number(numpy["gauss"] if numpy["has_gauss"] else None),
    }


def _optional_number(value: float | None) -> torch.Tensor:
    return torch.tensor([] if value is None else [value], dtype=torch.float64)


def restore_rng(folder: Path) -> None:
    """Restore the random generators of a checkpoint; a CUDA device that its run did not have keeps its own state.

    Args:
        folder: a checkpoint that verifies.

    Raises:
        CheckpointError: the state of a generator is missing or unusable.
    """
    path = folder / "rng.safetensors"
    tensors = _load_tensors(path)
    try:
        torch.set_rng_state(tensors["torch"])
        for device in range(torch.cuda.device_count()):
            if f"cuda.{device}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{device}"], device)
        python_gauss, numpy_gauss = tensors["python_gauss"].tolist(), tensors["numpy_gauss"].tolist()
        random.setstate((3, tuple(tensors["python"].tolist()), python_gauss[0] if python_gauss else None))
        *words, position = tensors["numpy"].tolist()
        np.random.set_state(("MT19937", words, position, len(numpy_gauss), *(numpy_gauss or [0.0])))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: unusable: {type(error).__name__}: {error}") from error


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: unreadable: {error}") from error
