"""The configuration of a run: typed, strict, merged from files and command line before anything is written."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from training.errors import ConfigError
from training.imports import IMPORT_HELP
from training.yamlfile import read_yaml, refuse_references

_MOST_THREADS = 1024  # far above any use, far below where a process gets no more
_CHANGED_HELP = "go on from a checkpoint although this key differs, as optim.lr; may be given several times"


@dataclass
class ModelConfig:
    """Shape of the model; the same names as `model.TransnormerConfig`, whose vocabulary comes from the tokenizer.

    Args:
        hidden_size: width C of the residual stream.
        intermediate_size: inner width of the GLU.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads H.
        num_key_value_heads: key/value heads G, a divisor of H; null means H.
        head_dim: width D of a head; null means hidden_size / num_attention_heads.
        attention: "lightning", causal with decay and linear in the length, or "masked", every pair weighed by `mask`.
        mask: weights of attention "masked": "decay", "learned" (by distance, starting at the decay), "causal" (ones),
            or the name of a function that `model.register_mask` was given, by a module that `--import` names.
        qk_norm: divide q and k by their length ("l2") or not ("none").
        decay: slopes of the decay "fixed" (`decay_slopes`), "learned" (starting there) or "none".
        decay_slopes: slope of each head, larger forgets faster; null means ALiBi's.
        gate: multiply the normed output of the heads by a projection of the input.
        lrpe_layers: indices of the layers with a linearized relative positional encoding.
        scale_embeddings: multiply the embeddings by sqrt(hidden_size).
        tie_word_embeddings: use one matrix for the embeddings and the head.
        initializer_range: standard deviation of the initial weights.
        rms_norm_eps: added to the mean square inside every norm.
    """

    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention: Literal["lightning", "masked"] = "lightning"
    mask: str = "decay"
    qk_norm: Literal["none", "l2"] = "none"
    decay: Literal["fixed", "learned", "none"] = "fixed"
    decay_slopes: list[float] | None = None
    gate: bool = True
    lrpe_layers: list[int] = field(default_factory=lambda: [0])
    scale_embeddings: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6


@dataclass
class TokenizerConfig:
    """Which SentencePiece tokenizer to use.

    Args:
        path: folder of an existing tokenizer; null trains one on the corpus and caches it.
        vocab_size: number of pieces, control and byte pieces included, of a tokenizer trained here.
        sample_bytes: how much text the training of a tokenizer reads, in bytes.
    """

    path: str | None = None
    vocab_size: int = 4096
    sample_bytes: int = 10_000_000


@dataclass
class DataConfig:
    """Where documents come from and how they are packed.

    Args:
        corpus: "python-stdlib" (sources of the running Python), local "text", "jsonl" or "parquet", "hub", or "recall",
            generated rows of multi-query associative recall, of which the answers alone are predicted.
        paths: files, globs or folders of a local corpus; each text file is one document.
        validation_paths: the same for validation; empty takes a share of the documents of `paths`.
        text_column: column or JSON key that holds the text (jsonl, parquet, hub).
        dataset: name of a dataset on the Hugging Face hub.
        subset: its configuration name.
        split: its split for training.
        revision: its git revision.
        streaming: read the hub dataset as a stream, for corpora larger than the disk; needs a token budget.
        validation_split: its split for validation; null takes a share of the documents of `split`.
        validation_share: share of documents held out for validation where no split or path is named.
        token_budget: stop preparing after this many training tokens; null takes all.
        recall_pairs: key-value pairs N of a row of corpus recall, each key asked for once.
        recall_fewest_pairs: rows for training have from so many pairs to N, as often each; null means N in every row.
        recall_symbols: different keys and values, half of each; its tokenizer has these, and 261 other pieces.
        recall_examples: rows for training; `validation_share` of that number, others, are for validation.
        recall_power: a question x places behind the pairs weighs x^(recall_power - 1); 1 spreads them evenly.
        document_boundaries: reset the recurrent state at each document instead of reading across.
        sequence_length: tokens T in a row of a batch.
        num_proc: threads that tokenize; null means one a core.
        cache_dir: folder of prepared token files and trained tokenizers.
    """

    corpus: Literal["python-stdlib", "text", "jsonl", "parquet", "hub", "recall"] = "python-stdlib"
    paths: list[str] = field(default_factory=list)
    validation_paths: list[str] = field(default_factory=list)
    text_column: str = "text"
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    validation_split: str | None = None
    validation_share: float = 0.01
    token_budget: int | None = None
    recall_pairs: int = 16
    recall_fewest_pairs: int | None = None
    recall_symbols: int = 8187
    recall_examples: int = 100_000
    recall_power: float = 0.01
    document_boundaries: bool = True
    sequence_length: int = 512
    num_proc: int | None = None
    cache_dir: str = ".cache"


@dataclass
class OptimConfig:
    """AdamW, its schedule and clipping.

    Args:
        lr: highest learning rate.
        min_lr: learning rate at the end.
        warmup_steps: updates from zero to `lr`.
        schedule: "cosine", or "wsd": warm-up, stable, then a linear decay over the last `decay_share` of the run.
        decay_share: share of the updates in which "wsd" decays.
        weight_decay: decoupled weight decay of matrices.
        learned_decay_lr_scale: factor of the learning rate of the decays that `model.decay` learned learns. They are
            kept as logarithms, which move by little more than the sum of the learning rates of all updates.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the root of the second moment.
        grad_clip: largest global gradient norm; 0 means no clipping.
    """

    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 100
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_share: float = 0.2
    weight_decay: float = 0.1
    learned_decay_lr_scale: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0


@dataclass
class TrainingConfig:
    """Length, batch, precision and evaluation of the run.

    Args:
        steps: optimizer steps.
        batch_size: rows of a global batch, over all processes and accumulation steps.
        micro_batch_size: rows that one process runs at once; divides batch_size / processes.
        precision: "fp32", "bf16", "fp16", or "auto": bf16 on a GPU that has it, else fp32.
        strategy: how processes share the work: "ddp", "fsdp2", "zero2", "zero3", or "auto": as accelerate was launched.
        peer_timeout: seconds that a process waits for another one, after the first step of each start.
        skip_nonfinite: batches with a loss or gradient that is not finite to leave out before the run ends.
        cpu_threads: threads of one process that trains on a CPU; null means its share of the cores.
        compile: run the model through torch.compile.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        eval_every: steps between evaluations; 0 evaluates at the end only.
        eval_tokens: validation tokens of one evaluation.
        sample_prompt: prompt of the text generated at each evaluation; "" turns samples off.
        sample_tokens: tokens of that text.
        peak_tflops: peak of one device for MFU, in TFLOP/s; null looks the GPU up, and a CPU has none.
    """

    steps: int = 1000
    batch_size: int = 16
    micro_batch_size: int = 16
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    strategy: Literal["auto", "ddp", "fsdp2", "zero2", "zero3"] = "auto"
    peer_timeout: float = 100.0
    skip_nonfinite: int = 0
    cpu_threads: int | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    eval_every: int = 200
    eval_tokens: int = 65_536
    sample_prompt: str = "def "
    sample_tokens: int = 64
    peak_tflops: float | None = None


@dataclass
class CheckpointConfig:
    """When to save and what to keep.

    Args:
        every: steps between checkpoints; 0 saves at the end only.
        keep: newest checkpoints kept; 0 keeps all.
        max_file_bytes: size from which weights, or moments, go into several files; each process holds one at a time.
    """

    every: int = 500
    keep: int = 3
    max_file_bytes: int = 5_000_000_000


@dataclass
class TrackingConfig:
    """Trackers beside `metrics.jsonl`, which is always written.

    Args:
        wandb: "off", "online", "offline", or "auto": online with a key, else offline.
        wandb_project: project name.
        wandb_group: group of the run on wandb, such as the variant of an experiment.
        tensorboard: write TensorBoard event files under OUT/tensorboard.
    """

    wandb: Literal["off", "auto", "online", "offline"] = "off"
    wandb_project: str = "transnormer"
    wandb_group: str | None = None
    tensorboard: bool = False


@dataclass
class Config:
    """A whole run.

    Args:
        seed: seed of initial weights and data order.
        model: shape of the model.
        tokenizer: which tokenizer.
        data: documents and packing.
        optim: optimizer and schedule.
        training: length, batch, precision, evaluation.
        checkpoint: saving.
        tracking: trackers.
    """

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class Run:
    """What a command line asks for: the resolved configuration, the run's folder, how to resume, what to import."""

    config: Config
    out: Path
    resume: str
    changed: list[str]
    imports: list[str]


def load_config(argv: list[str], prog: str = "train.py") -> Run:
    """Merge `--config` files left to right, then the command line's `--section.key value`.

    Args:
        argv: the arguments after the program's name.
        prog: the program's name in `--help`.

    Raises:
        ConfigError: naming the file or key, what was expected, and the nearest valid name of an unknown key.
    """
    parser = _parser(prog)
    files, rest = _split_config_files(argv)
    arguments = [argument for file in files for argument in _file_arguments(Path(file))]
    _refuse_unknown_options(rest)
    for argument in (*arguments, *rest):
        _refuse_references(argument)
    try:
        parsed = parser.parse_args([*arguments, *rest])
        values = parser.instantiate(parsed)
    except argparse.ArgumentError as error:
        raise ConfigError(_readable(str(error))) from None
    config = Config(**{f.name: values[f.name] for f in dataclasses.fields(Config)})
    check(config)
    if not values["out"]:
        raise ConfigError("--out: expected a folder, got nothing")
    return Run(config, Path(values["out"]), values["resume"], values["changed"], values["import"])


def config_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def config_values(config: Config) -> dict[str, Any]:
    """Every value of the configuration by its key, such as `optim.lr`."""
    values: dict[str, Any] = {}
    for name, value in config_dict(config).items():
        values |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return values


def check(config: Config) -> None:
    """Refuse values that no run can work with.

    Raises:
        ConfigError: naming the key, what was expected and what came.
    """
    for key, number in _numbers(config):
        if isinstance(number, int) and not abs(number) < 2**63:
            raise ConfigError(f"{key}: expected a whole number that 64 bits hold, got {number}")
        if not math.isfinite(number):
            raise ConfigError(f"{key}: expected a finite number, got {number}")
    for key, value, least in _lower_bounds(config):
        if value is not None and value < least:
            raise ConfigError(f"{key}: expected {least} or more, got {value}")
    for key, threads in (
        ("data.num_proc", config.data.num_proc),
        ("training.cpu_threads", config.training.cpu_threads),
    ):
        if threads is not None and threads > _MOST_THREADS:
            raise ConfigError(f"{key}: expected {_MOST_THREADS:,} or fewer threads, got {threads}")
    optim, data = config.optim, config.data
    for key in ("lr", "learned_decay_lr_scale"):
        if not getattr(optim, key) > 0:
            raise ConfigError(f"optim.{key}: expected a positive number, got {getattr(optim, key)}")
    if not 0 <= optim.min_lr <= optim.lr:
        raise ConfigError(f"optim.min_lr: expected 0 to optim.lr = {optim.lr}, got {optim.min_lr}")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(optim, key) < 1:
            raise ConfigError(f"optim.{key}: expected 0 up to but not including 1, got {getattr(optim, key)}")
    if not 0 <= optim.decay_share <= 1:
        raise ConfigError(f"optim.decay_share: expected 0 to 1, got {optim.decay_share}")
    if not 0 < data.validation_share < 1:
        raise ConfigError(f"data.validation_share: expected between 0 and 1, got {data.validation_share}")


def _numbers(config: Config) -> list[tuple[str, float]]:
    """Every number of the configuration with its key."""
    items = ((key, item) for key, v in config_values(config).items() for item in (v if isinstance(v, list) else [v]))
    return [(key, item) for key, item in items if isinstance(item, int | float)]


def _lower_bounds(config: Config) -> list[tuple[str, float | None, float]]:
    """Fields that count or measure something, with the least value that makes sense."""
    return [
        ("seed", config.seed, 0),
        ("tokenizer.vocab_size", config.tokenizer.vocab_size, 300),
        ("tokenizer.sample_bytes", config.tokenizer.sample_bytes, 1),
        ("data.sequence_length", config.data.sequence_length, 1),
        ("data.token_budget", config.data.token_budget, 1),
        ("data.recall_pairs", config.data.recall_pairs, 1),
        ("data.recall_fewest_pairs", config.data.recall_fewest_pairs, 1),
        ("data.recall_power", config.data.recall_power, 0),
        ("data.num_proc", config.data.num_proc, 1),
        ("training.cpu_threads", config.training.cpu_threads, 1),
        ("optim.warmup_steps", config.optim.warmup_steps, 0),
        ("optim.weight_decay", config.optim.weight_decay, 0),
        ("optim.eps", config.optim.eps, 1e-30),
        ("optim.grad_clip", config.optim.grad_clip, 0),
        ("training.steps", config.training.steps, 1),
        ("training.batch_size", config.training.batch_size, 1),
        ("training.micro_batch_size", config.training.micro_batch_size, 1),
        ("training.eval_every", config.training.eval_every, 0),
        ("training.eval_tokens", config.training.eval_tokens, 1),
        ("training.sample_tokens", config.training.sample_tokens, 1),
        ("training.peak_tflops", config.training.peak_tflops, 1e-9),
        ("training.peer_timeout", config.training.peer_timeout, 1),
        ("training.skip_nonfinite", config.training.skip_nonfinite, 0),
        ("checkpoint.max_file_bytes", config.checkpoint.max_file_bytes, 1),
        ("checkpoint.every", config.checkpoint.every, 0),
        ("checkpoint.keep", config.checkpoint.keep, 0),
    ]


def _parser(prog: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, description="Train a TransNormer.")
    parser.add_argument("--config", help="YAML file; several merge left to right", metavar="FILE")
    parser.add_argument("--out", type=str, default="runs/run", help="folder of the run")
    parser.add_argument("--resume", type=str, default="auto", help="auto, never, or a checkpoint's path")
    parser.add_argument("--changed", type=str, action="append", default=[], metavar="KEY", help=_CHANGED_HELP)
    parser.add_argument("--import", type=str, action="append", default=[], metavar="MODULE", help=IMPORT_HELP)
    parser.add_class_arguments(Config)
    return parser


def _split_config_files(argv: list[str]) -> tuple[list[str], list[str]]:
    files, rest, arguments = [], [], iter(argv)
    for argument in arguments:
        if argument == "--config":
            file = next(arguments, None)
            if file is None:
                raise ConfigError("--config: expected a file, got nothing")
            files.append(file)
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    return files, rest


def _file_arguments(file: Path) -> list[str]:
    """A YAML file as command-line arguments, its keys checked."""
    try:
        tree = read_yaml(file)
    except OSError as error:
        raise ConfigError(f"{file}: {os.strerror(error.errno or 0)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected keys and values, got {tree!r}")
    leaves = _leaves(tree, f"{file}: ")
    return [f"--{key}={_text(key, value)}" for key, value in leaves]


def _leaves(tree: dict[str, Any], place: str, prefix: str = "") -> list[tuple[str, Any]]:
    known, found = _known_keys(), []
    for name, value in tree.items():
        key = prefix + name
        if key not in known:
            raise ConfigError(f"{place}{key}: no such key{_nearest(key)}")
        section = known[key] is None
        if section and not isinstance(value, dict):
            raise ConfigError(f"{place}{key}: expected a section with keys of its own, got {value!r}")
        if not section and isinstance(value, dict):
            raise ConfigError(f"{place}{key}: expected a value, got keys {', '.join(map(str, value))}")
        found += _leaves(value, place, f"{key}.") if section else [(key, value)]
    return found


def _known_keys() -> dict[str, Any]:
    """Every key, its sections joined by dots, with its type; a section's type is None."""
    keys: dict[str, Any] = {}
    for outer in dataclasses.fields(Config):
        section = dataclasses.is_dataclass(outer.type)
        keys[outer.name] = None if section else outer.type
        if section:
            keys |= {f"{outer.name}.{inner.name}": inner.type for inner in dataclasses.fields(outer.type)}  # type: ignore[arg-type]
    return keys


def _nearest(key: str) -> str:
    """A hint with the nearest valid key: by the whole name, else by the last part alone."""
    known = [name for name, kind in _known_keys().items() if kind]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if not near:
        lasts = {name.split(".")[-1]: name for name in known}
        near = [lasts[last] for last in difflib.get_close_matches(key.split(".")[-1], lasts, n=1, cutoff=0.7)]
    return f"; did you mean {near[0]}?" if near else ""


def _text(key: str, value: Any) -> str:
    """A YAML value of strings as the text of a command-line argument."""
    if not isinstance(value, list):
        return str(value)
    if any(not isinstance(item, str) for item in value):
        raise ConfigError(f"{key}: expected a plain list, got {value!r}")
    return json.dumps(value) if _known_keys()[key] == list[str] else f"[{', '.join(value)}]"


def _refuse_unknown_options(rest: list[str]) -> None:
    known = {"help", "out", "resume", "changed", "import", *(key for key, kind in _known_keys().items() if kind)}
    for argument in rest:
        if argument.startswith("--"):
            key = argument[2:].split("=")[0]
            if key not in known:
                raise ConfigError(f"--{key}: no such option{_nearest(key)}")


def _refuse_references(argument: str) -> None:
    """Refuse a value that the parser would unfold beyond all bounds: it reads values as YAML."""
    key, equals, value = argument.partition("=") if argument.startswith("--") else ("", "=", argument)
    try:
        refuse_references(value if equals else "")
    except ValueError as error:
        raise ConfigError(f"{key.removeprefix('--') or value[:40]}: {error}") from None


def _readable(message: str) -> str:
    """The parser's complaint in one line: the key, what was expected, what came."""
    found = re.match(r'Parser key "([^"]+)":.*\s(?:Got|Given) value:(.*)$', message.strip(), re.DOTALL)
    if found and _known_keys().get(found[1]):
        message = f"{found[1]}: expected {_in_words(_known_keys()[found[1]])}, got {found[2].strip() or 'nothing'}"
    return " ".join(message.split())


def _in_words(kind: Any) -> str:
    """What a value of a type looks like."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    words |= {list[str]: """a list like '["one", "two"]'""", list[int]: "a list like [0, 1]"}
    words |= {list[float]: "a list like [0.5, 0.25]"}
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return words.get(kind) or " or ".join(map(_in_words, get_args(kind)))
