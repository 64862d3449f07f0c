"""What a run is made of before its first step: processes and precision, the model's shape, what may not change."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from model import TransnormerConfig, TransnormerForCausalLM
from training.config import Config, config_dict
from training.errors import CheckpointError, ConfigError
from training.manifest import latest_checkpoint, list_checkpoints, verify_checkpoint
from training.storage import refuse_links, unfinished

_RUN_FILES = ("config.yaml", "evaluations.jsonl", "exit.json", "loss.png", "metrics.jsonl")
_RUN_FOLDERS = ("checkpoints", "tensorboard", "wandb")


def check_out(out: Path) -> None:
    """Refuse a run's folder that can't be made or written; nothing is written to find out."""
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"--out: expected a folder, got {out}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--out: {nearest} is not writable")
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # as torchrun and accelerate set it


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
    if resume == "auto":
        checkpoint, passed_over = latest_checkpoint(out)
        if checkpoint is None and passed_over:
            raise CheckpointError(f"{out}: expected a whole checkpoint: {'; '.join(passed_over)}")
        return checkpoint, passed_over
    if resume == "never":
        if list_checkpoints(out):
            raise ConfigError(f"--resume never: {out} holds checkpoints of a run; give another --out")
        return None, []
    step = verify_checkpoint(Path(resume)).step
    later = [path.name for path in list_checkpoints(out) if path.name > f"step_{step:08d}"]
    if later:
        raise ConfigError(f"--resume {resume}: {out} holds later checkpoints ({', '.join(later)}); give another --out")
    return Path(resume), []


def run_identity(config: Config, data_fingerprint: str, tokenizer_sha256: str) -> dict[str, Any]:
    """What must not change unasked when a run goes on, or it would be another run."""
    plain = config_dict(config)
    return {
        "seed": plain["seed"],
        **{f"model.{name}": value for name, value in plain["model"].items()},
        "tokenizer.sha256": tokenizer_sha256,
        "data.fingerprint": data_fingerprint,
        "data.sequence_length": plain["data"]["sequence_length"],
        "data.document_boundaries": plain["data"]["document_boundaries"],
        **{f"optim.{name}": value for name, value in plain["optim"].items()},
        "training.batch_size": plain["training"]["batch_size"],
    }


def refuse_other_run(
    checkpoint: Path, saved: dict[str, Any], current: dict[str, Any], changed: Iterable[str] = ()
) -> None:
    """Compare two results of `run_identity`; a difference that is not `changed` is a CheckpointError that names it."""
    changed = set(changed)
    unknown = changed - set(current)
    if unknown:
        name = min(unknown)
        near = [known for known in current if known.rpartition(".")[2] == name.rpartition(".")[2]]
        hint = f"; did you mean {near[0]}?" if near else f"; it can be {', '.join(current)}"
        raise ConfigError(f"--changed: no setting {name} is compared with the checkpoint's{hint}")
    for name in (name for name in current if name not in changed):
        if saved.get(name) != current[name]:
            raise CheckpointError(
                f"{checkpoint}: {name} was {saved.get(name)!r}, is {current[name]!r}: that is another run; give another"
                f" --out, the settings it was started with, or --changed {name}"
            )


def config_hash(config: Config) -> str:
    """sha256 of the whole configuration."""
    return hashlib.sha256(json.dumps(config_dict(config), sort_keys=True).encode()).hexdigest()
