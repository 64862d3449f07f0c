"""What a model is worth on held-out text, and what it writes: loss, perplexity, bits per byte, completions."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Score:
    """Sums over predicted tokens: negative log-likelihood in nats, tokens, the UTF-8 bytes they stand for, and how many
    of them were the most probable ones."""

    nll: float
    tokens: int
    num_bytes: int
    correct: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return self.nll / max(self.tokens, 1)

    @property
    def accuracy(self) -> float:
        """Share of the tokens that the model held the most probable ones."""
        return self.correct / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that coding the text would take for each of its bytes: comparable between tokenizers."""
        return self.nll / math.log(2) / max(self.num_bytes, 1)


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    byte_lengths: np.ndarray,
    precision: Callable[[], AbstractContextManager],
) -> Tensor:
    """Sum over batches: a float64 tensor (nll, tokens, bytes, correct), which processes may add up; see `Score`.

    Args:
        model: a causal language model; it is left in the mode it was in.
        batches: keyword arguments of the model with `shift_labels`, -100 where nothing is predicted.
        byte_lengths: (V,) bytes that each id stands for.
        precision: makes the context in which the model runs, such as autocast.
    """
    device = next(model.parameters()).device
    lengths = torch.from_numpy(byte_lengths).to(device)
    total = torch.zeros(4, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    training = model.training
    model.eval()
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch["shift_labels"]
        counted = labels >= 0
        predicted = labels[counted]
        with precision():
            output = model(**batch, num_items_in_batch=1, use_cache=False)
        total += torch.stack(
            [
                output.loss.double(),
                predicted.numel() * torch.ones_like(total[0]),
                lengths[predicted].sum(),
                (output.logits.argmax(-1)[counted] == predicted).sum(),
            ]
        )
    model.train(training)
    return total


def stop_when(condition: Callable[[], bool]) -> list[Callable]:
    """Return stopping criteria of `generate` that end it once `condition` holds."""
    return [lambda ids, scores, **_: torch.full((ids.shape[0],), condition(), device=ids.device)]


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, seed: int = 0, **options: Any) -> str:
    """Continue a prompt by sampling, the prompt included; the random state of the caller is left alone.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; an empty prompt starts a document.
        prompt: text to continue.
        max_new_tokens: tokens to add at most; the end of the document stops earlier.
        seed: of the sampling.
        options: passed to `generate`, over temperature 0.8 and top_p 0.95.
    """
    device = next(model.parameters()).device
    ids = tokenizer(prompt, split_special_tokens=True)["input_ids"] or [tokenizer.bos_token_id]
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        inputs = torch.tensor([ids], device=device)
        options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95} | options
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    model.train(training)
    return tokenizer.decode(output[0], skip_special_tokens=True)
