"""Open a trained model from a run's folder, a checkpoint, a transformers model folder or a hub name."""

from pathlib import Path
from typing import Any

from training.errors import CheckpointError, ConfigError
from training.manifest import MANIFEST, latest_checkpoint, verify_checkpoint
from training.progress import working


def model_folder(name: str) -> str:
    """The model folder that `name` means: that of the newest whole checkpoint of a run, of a checkpoint, or itself.

    Raises:
        CheckpointError: a run has no whole checkpoint, or the checkpoint is altered.
    """
    path = Path(name)
    if (path / "checkpoints").is_dir():
        checkpoint, bad = latest_checkpoint(path)
        if checkpoint is None:
            raise CheckpointError(f"{path}: expected a whole checkpoint, found none{''.join(f'; {m}' for m in bad)}")
        return str(checkpoint / "model")
    if (path / MANIFEST).is_file():
        verify_checkpoint(path)
        return str(path / "model")
    return name


def open_model(name: str, device: str, dtype: str) -> tuple[Any, Any, str]:
    """Open model and tokenizer with the Auto classes of transformers.

    Args:
        name: as in `model_folder`.
        device: "auto" for a GPU where there is one, else a torch device.
        dtype: "auto" for the checkpoint's type, or "float32", "bfloat16", "float16".

    Returns:
        The model in evaluation mode, its tokenizer, and the folder that was opened.

    Raises:
        CheckpointError: nothing there can be opened.
        ConfigError: there is no such device.
    """
    with working("loading torch and transformers"):
        import torch
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        import model  # noqa: F401 (registers the architecture)

    disable_progress_bar()
    folder = model_folder(name)
    with working(f"opening {folder}" if Path(folder).exists() else f"no folder {folder} here: asking the hub"):
        try:
            opened = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
            )
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, StrictDataclassError) as error:
            reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
            raise CheckpointError(f"{folder}: expected a run, a checkpoint or a model folder: {reason}") from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return opened.to(device).eval(), tokenizer, folder
    except (RuntimeError, AssertionError) as error:  # torch raises both for a device that is not there
        raise ConfigError(f"--device: expected a device of this machine, got {device}: {error}") from error
