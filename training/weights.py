"""The safetensors files of a model folder: which they are and what they hold, before anything is opened."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from training.errors import CheckpointError
from training.jsonfile import read_json_object


class TensorEntry(NamedTuple):
    """Shape and type of a tensor in a file; the type is named as safetensors does, such as BF16."""

    shape: tuple[int, ...]
    dtype: str


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """Return the files of a set of tensors: `STEM.safetensors`, or else those that `STEM.safetensors.index.json` names.

    Nothing else is read for weights, a pickle under any name least of all.

    Raises:
        CheckpointError: there are none, one is no regular file directly in the folder, or the index is none.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a model folder, there is none")
    whole = f"{stem}.safetensors"
    index = f"{whole}.index.json"
    if os.path.lexists(folder / whole):
        names = [whole]
    elif os.path.lexists(folder / index):
        names = _names_in_index(folder / index)
    else:
        raise CheckpointError(f"{folder}: expected weights as {whole} or {index}, found neither")
    return [_checked_file(folder / name) for name in names]


def _checked_file(file: Path) -> Path:
    if os.path.islink(file) or not os.path.isfile(file):  # False too for names that no file can have
        state = "a link, folder or special file" if os.path.lexists(file) else "missing"
        raise CheckpointError(f"{file}: {state}, expected a regular file with weights")
    return file


def _names_in_index(index: Path) -> list[str]:
    try:
        weight_map = read_json_object(index).get("weight_map")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: unreadable index: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map of tensors and their files, got {_brief(weight_map)}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: expected a file's name for {_brief(tensor)}, got {_brief(name)}")
        _refuse_name(index, name)
    return sorted(set(weight_map.values()))


def _refuse_name(index: Path, name: str) -> None:
    """Refuse what is no plain name of a safetensors file beside the index, on any system."""
    if any(sign in name for sign in "/\\:") or name.startswith("."):
        raise CheckpointError(f"{index}: expected files of its own folder, {_brief(name)} leaves or hides in it")
    if not name.endswith(".safetensors") or not name.isprintable():
        raise CheckpointError(f"{index}: expected names that end in .safetensors, got {_brief(name)}")


def _brief(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}…"


def tensor_entries(files: list[Path]) -> dict[str, TensorEntry]:
    """Read what the files of `weight_files` hold from their headers alone.

    Raises:
        CheckpointError: a file is not safetensors, or two hold the same tensor.
    """
    entries: dict[str, TensorEntry] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    if name in entries:
                        raise CheckpointError(f"{file}: the tensor {name!r} is in another file too")
                    part = opened.get_slice(name)
                    entries[name] = TensorEntry(tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: expected a file of safetensors: {error}") from error
    return entries
