"""The configuration of a run: typed, strict, merged from files and command line before anything is written."""

import dataclasses
import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from training.errors import ConfigError


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
        qk_norm: divide q and k by their length ("l2") or not ("none").
        decay: slopes of the decay "fixed" (ALiBi), "learned" (starting there) or "none".
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
    qk_norm: Literal["none", "l2"] = "none"
    decay: Literal["fixed", "learned", "none"] = "fixed"
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
        corpus: "python-stdlib" (sources of the running Python), local "text", "jsonl" or "parquet", or "hub".
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
        document_boundaries: reset the recurrent state at each document instead of reading across.
        sequence_length: tokens T in a row of a batch.
        num_proc: processes that tokenize; null means one a core.
        cache_dir: folder of prepared token files and trained tokenizers.
    """

    corpus: Literal["python-stdlib", "text", "jsonl", "parquet", "hub"] = "python-stdlib"
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
    """

    every: int = 500
    keep: int = 3


@dataclass
class TrackingConfig:
    """Trackers beside `metrics.jsonl`, which is always written.

    Args:
        wandb: "off", "online", "offline", or "auto": online with a key, else offline.
        wandb_project: project name.
        tensorboard: write TensorBoard event files under OUT/tensorboard.
    """

    wandb: Literal["off", "auto", "online", "offline"] = "off"
    wandb_project: str = "transnormer"
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
