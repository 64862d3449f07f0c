"""What makes a folder a checkpoint: a manifest that names every file with its size and sha256, and verifies."""

import dataclasses
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from training.errors import CheckpointError
from training.jsonfile import parse_json, read_regular

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_STEP_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and hexadecimal sha256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of; `files` maps paths relative to its folder, with forward slashes."""

    format_version: int
    step: int
    config_hash: str
    versions: dict[str, str]
    files: dict[str, FileEntry]

    def render(self) -> bytes:
        """Return the only valid content of the manifest's file; it ends with its own sha256."""
        fields = dataclasses.asdict(self)
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        return (json.dumps(fields | {"sha256": digest}, indent=1) + "\n").encode()


def describe_file(path: Path) -> FileEntry:
    """Return the size and the hash that a file has now."""
    return FileEntry(path.stat().st_size, _sha256(path))


def describe_files(folder: Path, step: int, config_hash: str, known: Mapping[str, FileEntry] | None = None) -> Manifest:
    """Return the manifest of the files that a folder holds now; those that are `known` are not read again."""
    known = known or {}
    files = {name: known.get(name) or describe_file(path) for name, path in regular_files(folder).items()}
    versions = {name: _version(name) for name in ("torch", "transformers", "transnormer")}
    return Manifest(FORMAT_VERSION, step, config_hash, {"python": platform.python_version(), **versions}, files)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def verify_checkpoint(folder: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Args:
        folder: the checkpoint; one named `step_N` must hold step N.

    Returns:
        The manifest.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a checkpoint folder, there is none")
    found = regular_files(folder)
    manifest = _read_manifest(folder)
    found.pop(MANIFEST)
    named = step_of(folder)
    if named not in (None, manifest.step):
        raise CheckpointError(f"{folder}: holds step {manifest.step}, its name says {named}")
    for name in manifest.files:
        _refuse_name(folder / MANIFEST, name)
        if name not in found:
            raise CheckpointError(f"{folder / name}: missing")
    for name, path in found.items():
        if name not in manifest.files:
            raise CheckpointError(f"{path}: stray, the manifest does not list it")
        _verify_file(path, manifest.files[name])
    return manifest


def _verify_file(path: Path, expected: FileEntry) -> None:
    try:
        size, digest = path.stat().st_size, _sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable: {error}") from error
    if size != expected.size:
        raise CheckpointError(f"{path}: size is {size} bytes, expected {expected.size}")
    if digest != expected.sha256:
        raise CheckpointError(f"{path}: sha256 is {digest}, expected {expected.sha256}")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        content = read_regular(path)
        fields = parse_json(content)
        version = fields.pop("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}")
        fields.pop("sha256")
        files = {name: FileEntry(**entry) for name, entry in fields.pop("files").items()}
        manifest = Manifest(format_version=version, files=files, **fields)
        _check_types(manifest)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: unreadable manifest: {type(error).__name__}: {error}") from error
    if manifest.render() != content:
        raise CheckpointError(f"{path}: altered, its content does not match its own sha256")
    return manifest


def _check_types(manifest: Manifest) -> None:
    for name, value, kind in (
        ("step", manifest.step, int),
        ("config_hash", manifest.config_hash, str),
        *((f"version of {name!r}", value, str) for name, value in manifest.versions.items()),
        *((f"size of {name!r}", entry.size, int) for name, entry in manifest.files.items()),
        *((f"sha256 of {name!r}", entry.sha256, str) for name, entry in manifest.files.items()),
    ):
        if type(value) is not kind:
            raise TypeError(f"{name}: expected {kind.__name__}, got {value!r}")
    if not 0 <= manifest.step < 2**63:
        raise ValueError(f"step: expected a whole number from 0, got {manifest.step}")


def _refuse_name(path: Path, name: str) -> None:
    """Refuse a name that is no plain path of a file inside the folder, on any system."""
    if name.startswith("/") or ".." in re.split(r"[/\\]", name):
        raise CheckpointError(f"{path}: the path {name!r} leaves the folder")
    if "\\" in name or not name.isprintable() or any(part in ("", ".") for part in name.split("/")):
        raise CheckpointError(f"{path}: expected plain relative paths such as 'model/config.json', got {name!r}")


def regular_files(folder: Path) -> dict[str, Path]:
    """Return the files under a folder by relative path; links and special files are a CheckpointError."""
    files = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in folders + sorted(names):
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"{path}: a link or special file, expected regular files only")
            if name in names:
                files[path.relative_to(folder).as_posix()] = path
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_path(out: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step of the run in `out`."""
    return out / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step that a checkpoint's folder is named for, or None where it has another name."""
    match = _STEP_NAME.fullmatch(folder.name)
    step = int(match[1]) if match else 0
    return step if match and folder.name == checkpoint_path(Path(), step).name else None


def step_folders(out: Path) -> list[Path]:
    """Return the folders of a run that have a checkpoint's name, whole or not, by step."""
    root = out / "checkpoints"
    folders = [path for path in (root.iterdir() if root.is_dir() else ()) if step_of(path) is not None]
    return sorted((p for p in folders if p.is_dir() and not p.is_symlink()), key=lambda p: (len(p.name), p.name))


def list_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints of a run by step: folders that have a manifest, which is not verified here."""
    return [folder for folder in step_folders(out) if (folder / MANIFEST).is_file()]


def latest_checkpoint(out: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint of a run that verifies.

    Args:
        out: the run's folder.

    Returns:
        The checkpoint, or None where there is none, and one message for each newer one that was skipped.
    """
    messages = []
    for folder in reversed(step_folders(out)):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            messages.append(f"skipped the checkpoint {folder.name}: {error}")
        else:
            return folder, messages
    return None, messages
