"""Open a trained model from a run's folder, a checkpoint, a transformers model folder or a hub name."""

from pathlib import Path
from typing import Any

from training.errors import CheckpointError, ConfigError
from training.foreign import foreign_errors
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
        return _folder_of(checkpoint)
    if (path / MANIFEST).is_file():
        verify_checkpoint(path)
        return _folder_of(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: expected a run, a checkpoint or a model folder, got a file")
    return name


def _folder_of(checkpoint: Path) -> str:
    if not (checkpoint / "model").is_dir():  # else a relative path would be taken for a name of the hub
        raise CheckpointError(f"{checkpoint / 'model'}: expected a model folder, there is none")
    return str(checkpoint / "model")


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
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        from transformers.utils.logging import disable_progress_bar

        from training.modelfolder import EXPECTED, check_model_folder

    disable_progress_bar()
    folder = model_folder(name)
    with working(f"opening {folder}" if Path(folder).exists() else f"no folder {folder} here: asking the hub"):
        if (local := Path(folder)).is_dir():
            check_model_folder(local)
        with foreign_errors(CheckpointError, EXPECTED.format(folder)):
            opened = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if len(tokenizer) > opened.config.vocab_size:
            raise CheckpointError(
                f"{folder}: expected at most {opened.config.vocab_size} pieces, as the model has, "
                f"the tokenizer has {len(tokenizer)}"
            )
        if local.is_dir():  # its generation_config.json could ask for a billion beams
            opened.generation_config = GenerationConfig.from_model_config(opened.config)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return opened.to(device).eval(), tokenizer, folder
    except (RuntimeError, AssertionError) as error:  # torch raises both for a device that is not there
        raise ConfigError(f"--device: expected a device of this machine, got {device}: {error}") from error
