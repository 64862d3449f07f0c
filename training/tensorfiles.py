"""Named tensors in safetensors files: cut by size, written by all processes in turn, read in parts.

A set of tensors with the stem "model" is `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with
`model.safetensors.index.json` in the format of transformers. How it is cut depends on the tensors alone, neither on the
number of processes nor on how they share the tensors.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.errors import CheckpointError, RunError
from training.processes import Processes
from training.storage import disk_errors
from training.weights import weight_files


class Part(NamedTuple):
    """A tensor that a file will hold; `whole` puts it together and has to be called by all processes at once."""

    shape: torch.Size
    dtype: torch.dtype
    whole: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def plan_files(parts: dict[str, Part], stem: str, max_bytes: int) -> dict[str, list[str]]:
    """Return the names of the tensors of each file: in order, as many as fit, at least one."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, part in parts.items():
        if groups[-1] and size + part.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += part.num_bytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def write_tensors(folder: Path, stem: str, parts: dict[str, Part], max_bytes: int, processes: Processes) -> list[Path]:
    """Write a set of tensors; called by all processes, each of which holds one file at most at a time.

    Args:
        folder: exists, and is the same for all processes.
        stem: begin of the files' names.
        parts: the tensors by name, the same names in every process.
        max_bytes: size of a file, unless a single tensor is larger.
        processes: those that share the work: one writes the first file, the next one the second.

    Returns:
        The files that this process has written.

    Raises:
        ResourceError: the disk is full; in every process, whichever had to write the file.
        CheckpointError: a file can't be written.
    """
    plan, written, failure = plan_files(parts, stem, max_bytes), [], None
    for number, (file, names) in enumerate(plan.items()):
        mine = number % processes.count == processes.rank
        tensors = {}
        for name in names:
            tensor = parts[name].whole()
            if mine:
                tensors[name] = tensor.detach().cpu().contiguous()
        if mine and failure is None:
            try:
                with disk_errors(folder / file):
                    save_file(tensors, folder / file, metadata={"format": "pt"})
            except RunError as error:
                failure = error  # raised below: the others still need this process to put tensors together
            written.append(folder / file)

    def end() -> None:
        if failure is not None:
            raise failure
        if processes.is_main and len(plan) > 1:
            written.append(_write_index(folder, stem, parts, plan))

    processes.together(end)
    return written


def _write_index(folder: Path, stem: str, parts: dict[str, Part], plan: dict[str, list[str]]) -> Path:
    places = {name: file for file, names in plan.items() for name in names}
    index = {"metadata": {"total_size": sum(part.num_bytes for part in parts.values())}, "weight_map": places}
    path = folder / f"{stem}.safetensors.index.json"
    with disk_errors(path):
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


class TensorReader:
    """The tensors of a set, read when asked for.

    Args:
        folder: where `write_tensors` wrote.
        stem: as it was given.

    Raises:
        CheckpointError: a file is missing or is no safetensors file.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.path = folder / f"{stem}.safetensors"
        self._files: dict[str, Any] = {}
        for file in weight_files(folder, stem):
            try:
                opened = safe_open(file, framework="pt")
                self._files |= dict.fromkeys(opened.keys(), opened)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: unreadable: {error}") from error

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str, expected: Tensor | Part, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows.

        Args:
            name: of the tensor.
            expected: has the shape of the whole tensor, and the type.
            rows: which rows; None for all.

        Raises:
            CheckpointError: it is missing, or has another shape or type.
        """
        if name not in self._files:
            raise CheckpointError(f"{self.path}: {name} is missing")
        try:
            view = self._files[name].get_slice(name)
            shape = tuple(view.get_shape())
            tensor = view[rows] if rows is not None else self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: {name} is unreadable: {error}") from error
        if (shape, tensor.dtype) != (tuple(expected.shape), expected.dtype):
            raise CheckpointError(
                f"{self.path}: {name} is {tensor.dtype} {shape}, expected {expected.dtype} {tuple(expected.shape)}"
            )
        return tensor
