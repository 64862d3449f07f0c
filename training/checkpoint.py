"""Checkpoints: saved whole or not at all, retained by count, loaded without running code."""

import json
import os
import random
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training.errors import CheckpointError
from training.jsonfile import read_json_object
from training.manifest import (
    MANIFEST,
    FileEntry,
    checkpoint_path,
    describe_file,
    describe_files,
    list_checkpoints,
    verify_checkpoint,
)
from training.processes import Processes
from training.rngstate import check_rng_tensors
from training.storage import disk_errors, sync
from training.tensorfiles import Part, write_tensors

T = TypeVar("T")

_LEFTOVER_NAME = re.compile(r"\.(saving|deleting)-step_\d{8,}-[0-9a-f]{8}")


@dataclass(frozen=True)
class Content:
    """What a checkpoint is made of.

    Args:
        step: optimizer steps done.
        config_hash: goes into the manifest.
        write_model: called by the main process with a folder, writes what `model/` holds beside the weights.
        weights: parameters of the unwrapped model by name.
        moments: the optimizer's state, as `training/moments.py` names it.
        state: what else the run needs to go on, of JSON types with finite numbers; floats keep every bit.
    """

    step: int
    config_hash: str
    write_model: Callable[[Path], None]
    weights: dict[str, Part]
    moments: dict[str, Part]
    state: dict[str, Any]


def save_checkpoint(
    out: Path, content: Content, keep: int, max_file_bytes: int = 2**62, processes: Processes | None = None
) -> Path:
    """Save a checkpoint whole or not at all, then delete those beyond the newest `keep`; for all processes at once.

    One of this step that verifies and has the same config hash stays as it is; any other one is replaced.
    Checkpoints of later steps are not touched.

    Args:
        out: the run's folder, the same one for all processes.
        content: what to save.
        keep: how many checkpoints stay; 0 means all.
        max_file_bytes: size from which tensors go into several files.
        processes: those of the run, which share the writing; None for one.

    Returns:
        The checkpoint's folder.

    Raises:
        ResourceError: the disk is full; earlier checkpoints are whole.
        CheckpointError: the folder can't be written.
    """
    everyone = processes or Processes()
    target = checkpoint_path(out, content.step)

    def for_main(action: Callable[[], T]) -> T | None:
        def guarded() -> T | None:
            with disk_errors(target):
                return action() if everyone.is_main else None

        return everyone.together(guarded)

    folder = everyone.gather_objects(for_main(lambda: _begin(out, target, content)))[0]
    if folder is not None:
        with _removed_on_failure(folder) if everyone.is_main else nullcontext():
            shares = everyone.together(lambda: _write_tensors(folder, content, max_file_bytes, everyone))
            entries = {name: entry for share in everyone.gather_objects(shares) for name, entry in share.items()}
            for_main(lambda: _complete(folder, target, content, entries))
    for_main(lambda: _retain(out, target, keep))
    return target


def _begin(out: Path, target: Path, content: Content) -> Path | None:
    """Make the temporary folder of a checkpoint and all but its tensors; None where it is saved already."""
    clean_leftovers(out)
    if _is_saved(target, content.config_hash):
        return None
    folder = _temporary(target, "saving")
    with _removed_on_failure(folder):
        (folder / "model").mkdir(parents=True)
        content.write_model(folder / "model")
        save_file(_rng_tensors(), folder / "rng.safetensors")
        text = json.dumps(content.state, indent=1, allow_nan=False) + "\n"
        (folder / "trainer_state.json").write_text(text, encoding="utf-8")
    return folder


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # the first error counts; the next start cleans again
        raise


def _write_tensors(folder: Path, content: Content, max_file_bytes: int, processes: Processes) -> dict[str, FileEntry]:
    """Write this process's share of the tensors; return what the manifest says of its files."""
    files = write_tensors(folder / "model", "model", content.weights, max_file_bytes, processes)
    files += write_tensors(folder, "optimizer", content.moments, max_file_bytes, processes)
    with disk_errors(folder):
        for file in files:
            sync(file)
        return {file.relative_to(folder).as_posix(): describe_file(file) for file in files}


def _complete(folder: Path, target: Path, content: Content, entries: dict[str, FileEntry]) -> None:
    """Write the manifest and give the folder its name."""
    manifest = describe_files(folder, content.step, content.config_hash, entries)
    (folder / MANIFEST).write_bytes(manifest.render())
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    replaced = _set_aside(target) if os.path.lexists(target) else None
    os.rename(folder, target)
    sync(target.parent)
    sync(target.parent.parent)
    if replaced:
        shutil.rmtree(replaced)


def _retain(out: Path, target: Path, keep: int) -> None:
    saved = list_checkpoints(out)
    older = saved[: saved.index(target) + 1]
    for folder in older[:-keep] if keep else []:
        shutil.rmtree(_set_aside(folder))


def clean_leftovers(out: Path) -> list[Path]:
    """Remove what killed saves and deletions left in a run's folder, and return the removed folders."""
    root = out / "checkpoints"
    leftovers = [path for path in root.iterdir() if _LEFTOVER_NAME.fullmatch(path.name)] if root.is_dir() else []
    removed = [path for path in sorted(leftovers) if path.is_dir() and not path.is_symlink()]
    for path in removed:
        shutil.rmtree(path)
    return removed


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
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable: {error}") from error


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
        check_rng_tensors(tensors)
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
