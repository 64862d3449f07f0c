"""Check every file of checkpoints against their manifests: `python -m scripts.verify_checkpoint FOLDER`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.errors import CheckpointError
from training.manifest import step_folders, verify_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each checkpoint: ok, or what is wrong; return 0 if all are good, else 4."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.verify_checkpoint",
        description="Check that checkpoints are whole and unaltered: every file present, none too many, "
        "sizes and sha256 equal to the manifest. Exit code 0 if all are good, else 4.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--all", type=Path, metavar="RUN", help="a run's folder: check all of its checkpoints")
    options = parser.parse_args(arguments)
    if not options.folders and options.all is None:
        parser.error("expected a FOLDER or --all RUN")
    folders = [*options.folders, *(step_folders(options.all) if options.all else [])]
    if not folders:
        print(f"{options.all}: expected a run with checkpoints, there are none", file=sys.stderr)
        return CheckpointError.exit_code
    verdicts = [_is_good(folder) for folder in folders]
    return 0 if all(verdicts) else CheckpointError.exit_code


def _is_good(folder: Path) -> bool:
    if (folder / "checkpoints").is_dir():
        print(f"{folder}: BAD: a run, expected a checkpoint; --all {folder} checks those of the run", flush=True)
        return False
    try:
        manifest = verify_checkpoint(folder)
    except CheckpointError as error:
        print(f"{folder}: BAD: {error}", flush=True)
        return False
    size = sum(entry.size for entry in manifest.files.values()) / 1e6
    print(f"{folder}: ok, step {manifest.step}, {len(manifest.files)} files, {size:.1f} MB", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
