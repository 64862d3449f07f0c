"""A run of `train.py` that takes a second."""

import json
import random
from pathlib import Path

WORDS = ["def", "return", "self", "if", "else", "for", "in", "value", "=", "==", "(", ")", ":", "None", "x", "y", "0"]


def write_corpus(path: Path, documents: int) -> None:
    """Write a jsonl file of short texts, always the same."""
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(5, 120))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def small_run(folder: Path, **training: int) -> list[str]:
    """Write a corpus of 300 documents into `folder`; return the command line of a run over it, without --out.

    Args:
        folder: also has the cached tokens.
        training: keys of the section `training` with other values than here.
    """
    write_corpus(folder / "corpus.jsonl", 300)
    config = {
        "model.hidden_size": 32,
        "model.intermediate_size": 48,
        "model.num_hidden_layers": 2,
        "model.num_attention_heads": 2,
        "tokenizer.vocab_size": 320,
        "data.corpus": "jsonl",
        "data.paths": json.dumps([str(folder / "corpus.jsonl")]),
        "data.validation_share": 0.1,
        "data.sequence_length": 64,
        "data.cache_dir": folder / "cache",
        "optim.warmup_steps": 2,
        "optim.lr": 0.01,
        "optim.min_lr": 0.001,
        "training.cpu_threads": 1,
        "training.steps": 6,
        "training.batch_size": 4,
        "training.micro_batch_size": 4,
        "training.eval_every": 0,
        "training.eval_tokens": 512,
        "training.sample_tokens": 4,
        **{f"training.{key}": value for key, value in training.items()},
    }
    return [f"--{key}={value}" for key, value in config.items()]
