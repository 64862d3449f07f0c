"""What a run is made of before its first step: processes and precision, the model's shape, what may not change."""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from model import TransnormerConfig, TransnormerForCausalLM
from training.config import Config, config_dict, config_values
from training.errors import CheckpointError, ConfigError
from training.manifest import latest_checkpoint, list_checkpoints, step_folders, verify_checkpoint
from training.storage import DISK_FULL, full_disk, refuse_links, unfinished

_RUN_FILES = ("config.yaml", "evaluations.jsonl", "exit.json", "loss.png", "metrics.jsonl")
_RUN_FOLDERS = ("checkpoints", "tensorboard", "wandb")


def check_out(out: Path) -> None:
    """Refuse a run's folder that can't be made or written; nothing stays written."""
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"--out: expected a folder, got {out}: {nearest} is a file")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=nearest))  # os.access says yes to root on file systems that refuse
    except OSError as error:
        if error.errno in DISK_FULL:
            raise full_disk(str(nearest), error) from None
        raise ConfigError(f"--out: {out}: {nearest} is not writable: {os.strerror(error.errno or 0)}") from None
    refuse_links(out, (".lock", *_RUN_FILES, *map(unfinished, _RUN_FILES)), _RUN_FOLDERS)


def use_cores(device: torch.device, threads: int | None) -> None:
    """Compute on a CPU with so many threads; None for this process's share of the cores."""
    if device.type == "cpu":
        torch.set_num_threads(threads or _asked_threads() or _share_of_cores())


def _asked_threads() -> int | None:
    """OMP_NUM_THREADS of a process that was started by itself: launchers set it to 1, whatever there is."""
    launched = any(name in os.environ for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 and not launched else None


def _share_of_cores() -> int:
    """Cores for each process of this machine: `accelerate launch` would leave one thread, whatever there is."""
    return max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # as torchrun and accelerate set it


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_micro_batches(config: Config, processes: int) -> int:
    """Micro-batches that each process runs in a step."""
    batch, micro = config.training.batch_size, config.training.micro_batch_size
    if batch % processes:
        raise ConfigError(f"training.batch_size: expected a multiple of the {processes} processes, got {batch}")
    share = batch // processes
    if share % min(micro, share):
        raise ConfigError(
            f"training.micro_batch_size: expected a divisor of {share}, the rows of each of {processes} processes,"
            f" got {micro}"
        )
    return share // min(micro, share)


def model_config(config: Config, vocab_size: int, special_ids: dict[str, Any]) -> TransnormerConfig:
    """The model's configuration; a shape that can't be is a ConfigError."""
    try:
        return TransnormerConfig(
            vocab_size=vocab_size,
            max_position_embeddings=config.data.sequence_length,
            **dataclasses.asdict(config.model),
            **special_ids,
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
        raise ConfigError(f"model.{reason}") from None


def checkpoint_activations(model: TransnormerForCausalLM) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    # transformers 6 keeps the first name alone, 5.17 has the second alone.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def find_checkpoint(out: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that `--resume` means, or None for a fresh start, and why newer ones were passed over.

    Raises:
        ConfigError: `resume` does not fit what the run's folder holds.
        CheckpointError: no checkpoint of the folder, or not the one that was named, is whole.
    """
    refuse_resume(out, resume)
    if resume == "auto":
        checkpoint, passed_over = latest_checkpoint(out)
        if checkpoint is None and passed_over:
            raise CheckpointError(f"{out}: expected a whole checkpoint: {'; '.join(passed_over)}")
        return checkpoint, passed_over
    if resume == "never":
        return None, []
    step = verify_checkpoint(Path(resume)).step
    later = [path.name for path in list_checkpoints(out) if path.name > f"step_{step:08d}"]
    if later:
        raise ConfigError(f"--resume {resume}: {out} holds later checkpoints ({', '.join(later)}); give another --out")
    return Path(resume), []


def refuse_resume(out: Path, resume: str) -> None:
    """Refuse what `--resume` can't mean, without looking into a checkpoint; the errors of `find_checkpoint`."""
    if resume == "never" and list_checkpoints(out):
        raise ConfigError(f"--resume never: {out} holds checkpoints of a run; give another --out")
    if resume not in ("auto", "never"):
        expected = f"--resume {resume}: expected auto, never or the folder of a checkpoint"
        if not Path(resume).is_dir():
            raise CheckpointError(f"{expected}; there is none")
        if step_folders(Path(resume)):
            raise CheckpointError(f"{expected}; this is a run's, which has {step_folders(Path(resume))[-1]}")


def run_identity(config: Config, data_fingerprint: str, tokenizer_sha256: str) -> dict[str, Any]:
    """What must not change unasked when a run goes on, or it would be another run."""
    names = ("seed", "data.sequence_length", "data.document_boundaries", "training.batch_size")
    values = config_values(config)
    settings = {name: v for name, v in values.items() if name in names or name.startswith(("model.", "optim."))}
    return {"tokenizer.sha256": tokenizer_sha256, "data.fingerprint": data_fingerprint, **settings}


def refuse_changed(changed: Iterable[str], config: Config) -> None:
    """Refuse a `--changed` that `run_identity` does not name."""
    names = run_identity(config, data_fingerprint="", tokenizer_sha256="")
    for name in (name for name in changed if name not in names):
        near = [known for known in names if known.rpartition(".")[2] == name.rpartition(".")[2]]
        hint = f"; did you mean {near[0]}?" if near else f"; it can be {', '.join(names)}"
        raise ConfigError(f"--changed: no setting {name} is compared with the checkpoint's{hint}")


def refuse_other_run(
    checkpoint: Path, saved: dict[str, Any], current: dict[str, Any], changed: Iterable[str] = ()
) -> None:
    """Compare two results of `run_identity`; a difference that is not `changed` is a CheckpointError that names it.

    A setting that the checkpoint does not name, because there was none, was as it is by default.
    """
    saved = config_values(Config()) | saved
    for name in (name for name in current if name not in changed):
        if saved.get(name) != current[name]:
            raise CheckpointError(
                f"{checkpoint}: {name} was {saved.get(name)!r}, is {current[name]!r}: that is another run; give another"
                f" --out, the settings it was started with, or --changed {name}"
            )


def config_hash(config: Config) -> str:
    """sha256 of the whole configuration."""
    return hashlib.sha256(json.dumps(config_dict(config), sort_keys=True).encode()).hexdigest()
