"""Tiny models and judges that the tests of the model share."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from model import TransnormerConfig, TransnormerForCausalLM

VOCABULARY = 61

# Together they hold every choice of the model at least once.
VARIANTS: dict[str, dict[str, Any]] = {
    "mha-lrpe-fixed": {},
    "gqa-l2-learned-tied": {
        "num_key_value_heads": 2,
        "qk_norm": "l2",
        "decay": "learned",
        "lrpe_layers": [],
        "tie_word_embeddings": True,
    },
    "mqa-lrpe2-l2-fixed": {
        "num_key_value_heads": 1,
        "lrpe_layers": [0, 1],
        "qk_norm": "l2",
        "decay_slopes": [2, 0.5, 0.1, 0.01],
    },
    "gqa-lrpe-none": {"num_key_value_heads": 2, "decay": "none", "lrpe_layers": [1], "scale_embeddings": False},
    "one-head-learned": {"num_attention_heads": 1, "head_dim": 24, "decay": "learned", "gate": False},
}
all_variants = pytest.mark.parametrize("variant", VARIANTS)
some_variants = pytest.mark.parametrize("variant", ["mha-lrpe-fixed", "gqa-l2-learned-tied", "gqa-lrpe-none"])

# The same for masked attention, each source of weights once; "shapes" is registered by the fixture `mask_registry`.
MASKS: dict[str, dict[str, Any]] = {
    "decay": {"mask": "decay", "num_key_value_heads": 2, "qk_norm": "l2", "decay": "learned"},
    "no-decay": {"mask": "decay", "decay": "none", "num_key_value_heads": 1, "lrpe_layers": [0, 1]},
    "learned": {"mask": "learned", "max_position_embeddings": 9, "num_key_value_heads": 2},
    "causal": {"mask": "causal", "qk_norm": "l2", "lrpe_layers": []},
    "shapes": {"mask": "shapes", "qk_norm": "l2"},
}
every_mask = pytest.mark.parametrize("mask", MASKS)

PADDING = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 1], [1] * 12, [0] * 8 + [1] * 4])


def tiny_config(variant: str = "mha-lrpe-fixed", **changes: Any) -> TransnormerConfig:
    """A configuration of some 30 thousand parameters, with weights wide enough that every part of it matters."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 3,
    }
    return TransnormerConfig(**(shape | VARIANTS[variant] | changes))


def tiny_model(
    variant: str = "mha-lrpe-fixed", device: torch.device | str = "cpu", **changes: Any
) -> TransnormerForCausalLM:
    """A model in evaluation mode whose weights depend on nothing but the configuration."""
    torch.manual_seed(0)
    return TransnormerForCausalLM(tiny_config(variant, **changes)).eval().to(device)


def masked_model(mask: str, **changes: Any) -> TransnormerForCausalLM:
    """A tiny model of masked attention whose learned weights are no decay."""
    model = tiny_model(attention="masked", **(MASKS[mask] | changes))
    generator = torch.Generator().manual_seed(5)
    for name, x in model.named_parameters():
        if name.endswith("mask_weights"):
            x.data += 0.3 * torch.randn(x.shape, generator=generator)
    return model


def named_gradients(model: TransnormerForCausalLM) -> dict[str, Tensor]:
    """Gradients of all parameters; each has one, and it is finite."""
    grads = {name: x.grad for name, x in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    return grads  # type: ignore[return-value]


def random_ids(*shape: int, seed: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """Token ids that are none of the special ones."""
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def states(cache: Any) -> list[Tensor]:
    """The recurrent states of a cache, copied, because stepping changes them in place."""
    return [layer.state.clone() for layer in cache.layers]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """The largest difference is below the tolerance, and nothing is NaN."""
    assert actual.shape == expected.shape
    largest = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    assert largest < tolerance, f"largest difference {largest:.3g}, expected less than {tolerance:.3g}"


def assert_all_near(actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 1e-4) -> None:
    """`assert_near` for each pair."""
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b, tolerance)
