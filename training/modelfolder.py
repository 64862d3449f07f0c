"""What a model folder must be before transformers opens it: ours, whole, and as large as its weights are."""

from pathlib import Path
from typing import Any

import torch

from model import TransnormerConfig, TransnormerForCausalLM
from training.errors import CheckpointError
from training.foreign import foreign_errors
from training.jsonfile import read_json_object
from training.manifest import regular_files
from training.weights import TensorEntry, tensor_entries, weight_files

EXPECTED = "{}: expected a run, a checkpoint or a model folder"
# Of what the library would read from a config.json, all that a TransNormer needs; others reach for files elsewhere,
# for kernels of the hub, or for memory (`num_labels` makes as many names).
_LIBRARY_KEYS = {
    "_name_or_path",
    "architectures",
    "auto_map",  # not followed
    "dtype",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torch_dtype",
    "transformers_version",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
_FLOAT_TYPES = (None, "float64", "float32", "float16", "bfloat16")


def check_model_folder(folder: Path) -> None:
    """Check all that can be known of a folder without opening it as a model: no code runs, no weights are read.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    with foreign_errors(CheckpointError, EXPECTED.format(folder)):
        files = regular_files(folder)
        if "adapter_config.json" in files:
            raise CheckpointError(f"{folder}: expected whole weights, got an adapter (adapter_config.json)")
        for name, path in files.items():
            if name.endswith(".json"):
                _read(path)
        if "config.json" not in files:
            raise CheckpointError(f"{EXPECTED.format(folder)}: it has no config.json")
        weights = tensor_entries(weight_files(folder))
        _check_shapes(folder, _checked_config(folder / "config.json", weights), weights)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable: {error}") from error


def _checked_config(path: Path, weights: dict[str, TensorEntry]) -> TransnormerConfig:
    """The configuration, made only of fields that are known and no larger than the weights show."""
    fields = _read(path)
    if fields.get("model_type") != "transnormer":
        raise CheckpointError(f"{path}: expected the model_type 'transnormer', got {_brief(fields.get('model_type'))}")
    for name in fields:
        if name not in TransnormerConfig.__annotations__ and name not in _LIBRARY_KEYS:
            raise CheckpointError(f"{path}: {_brief(name)} is no field of TransnormerConfig")
    for name in ("dtype", "torch_dtype"):
        if fields.get(name) not in _FLOAT_TYPES:
            raise CheckpointError(f"{path}: {name}: expected one of {_FLOAT_TYPES}, got {_brief(fields[name])}")
    largest = max((size for entry in weights.values() for size in entry.shape), default=0)
    limits = {**dict.fromkeys(_SIZES, largest), "num_hidden_layers": len(weights)}
    if fields.get("mask") == "learned":
        limits["max_position_embeddings"] = largest
    for name, limit in limits.items():
        value = fields.get(name, getattr(TransnormerConfig, name))
        if isinstance(value, int | float) and not value <= limit:
            raise CheckpointError(f"{path}: {name} is {_brief(value)}, the weights are of {limit} at most")
    config = TransnormerConfig.from_dict(fields)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, name)
        for value in ids if isinstance(ids, list) else [ids]:
            if value is not None and not 0 <= value < config.vocab_size:
                raise CheckpointError(f"{path}: {name}: expected an id below {config.vocab_size}, got {_brief(ids)}")
    return config


def _check_shapes(folder: Path, config: TransnormerConfig, weights: dict[str, TensorEntry]) -> None:
    """Compare the weights with a model that has shapes alone; where two share a matrix, one of them may be left out."""
    with torch.device("meta"):
        model = TransnormerForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shared = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name in sorted((expected.keys() ^ weights.keys()) - shared):
        state = "missing" if name in expected else "no weight of this model"
        raise CheckpointError(f"{folder}: the tensor {_brief(name)} is {state}")
    for name, entry in weights.items():
        if entry.shape != expected[name]:
            raise CheckpointError(f"{folder}: the tensor {name} is {entry.shape}, config.json says {expected[name]}")
        if entry.dtype not in _WEIGHT_TYPES:
            raise CheckpointError(f"{folder}: {name}: expected one of {', '.join(_WEIGHT_TYPES)}, got {entry.dtype}")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
