"""The configuration: defaults, what it refuses and how it says so, and that every field changes something."""

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from model_cases import random_ids, tiny_config, tiny_model
from transformers import AutoConfig

from model import TransnormerConfig, TransnormerForCausalLM

WRONG = [
    ("hiden_size", 32, ValueError, "hiden_size: not a field of TransnormerConfig; did you mean hidden_size?"),
    ("zzz", 1, ValueError, "zzz: not a field of TransnormerConfig"),
    ("vocab_size", 0, ValueError, "vocab_size: expected a whole number from 1, got 0"),
    ("hidden_size", -32, ValueError, "hidden_size"),
    ("hidden_size", "32", TypeError, "hidden_size"),
    ("hidden_size", 30, ValueError, "head_dim: hidden_size 30 is not a multiple of num_attention_heads 4"),
    ("intermediate_size", 0, ValueError, "intermediate_size: expected a whole number from 1, got 0"),
    ("intermediate_size", 48.0, TypeError, "intermediate_size"),
    ("num_hidden_layers", 0, ValueError, "num_hidden_layers: expected a whole number from 1, got 0"),
    ("num_attention_heads", 0, ValueError, "num_attention_heads: expected a whole number from 1, got 0"),
    ("num_attention_heads", -4, ValueError, "num_attention_heads: expected a whole number from 1, got -4"),
    ("num_key_value_heads", 3, ValueError, "num_key_value_heads: expected a divisor of num_attention_heads 4, got 3"),
    ("num_key_value_heads", 0, ValueError, "num_key_value_heads: expected a whole number from 1, got 0"),
    ("num_key_value_heads", 8, ValueError, "num_key_value_heads: expected a divisor of num_attention_heads 4, got 8"),
    ("head_dim", 0, ValueError, "head_dim: expected a whole number from 1, got 0"),
    ("max_position_embeddings", 0, ValueError, "max_position_embeddings: expected a whole number from 1, got 0"),
    ("attention", "softmax", ValueError, "attention: expected one of lightning, masked, got 'softmax'"),
    ("mask", "window", ValueError, "mask: expected one of decay, learned, causal"),
    ("mask", "learned", ValueError, "mask: expected attention 'masked' with 'learned', got attention 'lightning'"),
    ("mask", None, TypeError, "mask"),
    ("qk_norm", "l1", ValueError, "qk_norm: expected one of none, l2, got 'l1'"),
    ("qk_norm", True, TypeError, "qk_norm"),
    ("decay", "alibi", ValueError, "decay: expected one of fixed, learned, none, got 'alibi'"),
    ("decay_slopes", [0.5], ValueError, "decay_slopes: expected 4 numbers, one for each of num_attention_heads, got 1"),
    ("decay_slopes", [], ValueError, "decay_slopes: expected 4 numbers, one for each of num_attention_heads, got 0"),
    ("decay_slopes", [1, 0, -0.5, 1], ValueError, "positive numbers, from 1e-30 to 1e+30, got [0, -0.5]"),
    ("decay_slopes", [float("nan"), 1, float("inf"), 10**400], ValueError, "decay_slopes: expected positive numbers"),
    ("decay_slopes", [1, 1, 1, True], TypeError, "decay_slopes"),
    ("decay_slopes", [1, 1, 1, "1"], TypeError, "decay_slopes"),
    ("decay_slopes", 0.5, TypeError, "decay_slopes"),
    ("gate", 1, TypeError, "gate"),
    ("gate", None, TypeError, "gate"),
    ("lrpe_layers", [2], ValueError, "lrpe_layers: expected layers from 0 to 1, got [2]"),
    ("lrpe_layers", [-1], ValueError, "lrpe_layers: expected layers from 0 to 1, got [-1]"),
    ("lrpe_layers", ["first"], TypeError, "lrpe_layers"),
    ("lrpe_layers", None, TypeError, "lrpe_layers"),
    ("lrpe_layers", 0, TypeError, "lrpe_layers"),
    ("scale_embeddings", "no", TypeError, "scale_embeddings"),
    ("tie_word_embeddings", 1, TypeError, "tie_word_embeddings"),
    ("initializer_range", 0.0, ValueError, "initializer_range: expected a number between 0 and 1, got 0.0"),
    ("initializer_range", float("nan"), ValueError, "initializer_range: expected a number between 0 and 1, got nan"),
    ("rms_norm_eps", -1e-6, ValueError, "rms_norm_eps: expected a number between 0 and 1, got -1e-06"),
    ("rms_norm_eps", "1e-6", TypeError, "rms_norm_eps"),
    ("use_cache", "yes", TypeError, "use_cache"),
    ("eos_token_id", "</s>", TypeError, "eos_token_id"),
]

# Each field with a value that must change the shapes of the weights, the weights, or what the model returns.
CHANGES: dict[str, Any] = {
    "vocab_size": 62,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "attention": "masked",
    "mask": "causal",
    "qk_norm": "l2",
    "decay": "none",
    "decay_slopes": [2.0, 0.5, 0.1, 0.01],
    "gate": False,
    "lrpe_layers": [1],
    "scale_embeddings": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    "rms_norm_eps": 0.5,
    "use_cache": False,
}


@pytest.mark.parametrize(("field", "value", "error", "message"), WRONG)
def test_refuses_a_wrong_value_and_names_it(field: str, value: Any, error: type[Exception], message: str) -> None:
    # The library wraps what a check raises, or a wrong type, in an error of its own.
    with pytest.raises((error, StrictDataclassError)) as caught:
        tiny_config(**{field: value})
    assert message in str(caught.value)


def test_refuses_slopes_of_no_decay() -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=r"decay_slopes: expected None with decay 'none'"):
        tiny_config(decay="none", decay_slopes=[1, 1, 1, 1])


def test_refuses_a_wrong_value_from_a_file(tmp_path: Any) -> None:
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_key_value_heads": 3}))
    with pytest.raises((ValueError, StrictDataclassError), match="num_key_value_heads: expected a divisor"):
        AutoConfig.from_pretrained(tmp_path)


def test_derived_fields() -> None:
    config = TransnormerConfig(hidden_size=768, num_attention_heads=12)
    assert (config.head_dim, config.num_key_value_heads, config.lrpe_layers) == (64, 12, [0])
    assert TransnormerConfig(hidden_size=768, num_attention_heads=12, head_dim=100).head_dim == 100
    assert TransnormerConfig(hidden_size=768, num_attention_heads=1).head_dim == 768


@pytest.mark.parametrize("road", ["file", "dict", "deepcopy", "pickle"])
def test_survives(road: str, tmp_path: Any) -> None:
    changes: dict[str, Any] = {"decay_slopes": (1, 0.5, 0.25, 0.1), "gate": False}
    config = tiny_config("gqa-l2-learned-tied", dtype="bfloat16", eos_token_id=[2, 5], **changes)
    if road == "file":
        config.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
    elif road == "dict":
        again = TransnormerConfig.from_dict(config.to_dict())
    elif road == "deepcopy":
        again = copy.deepcopy(config)
    else:
        again = pickle.loads(pickle.dumps(config))
    assert type(again) is TransnormerConfig
    assert again.to_diff_dict() == config.to_diff_dict()
    assert again.eos_token_id == [2, 5]
    assert (again.decay_slopes, again.gate) == ([1, 0.5, 0.25, 0.1], False)
    assert again.dtype == torch.bfloat16


def test_auto_config_knows_the_model_type() -> None:
    assert isinstance(AutoConfig.for_model("transnormer", hidden_size=64), TransnormerConfig)


def test_every_field_of_ours_is_in_the_table() -> None:
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}  # read by generation
    window = {"max_position_embeddings"}  # read by evaluation
    assert set(TransnormerConfig.__annotations__) - tokens - window - {"model_type"} == set(CHANGES)


# What a field has a meaning with.
BESIDE: dict[str, dict[str, Any]] = {"mask": {"attention": "masked"}}


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_something(field: str) -> None:
    def outcome(**changes: Any) -> tuple[dict[str, Any], Any]:
        model = tiny_model(**changes)
        with torch.no_grad():
            out = model(random_ids(1, 7))
        shapes = {name: tuple(x.shape) for name, x in model.named_parameters()}
        cached = out.past_key_values and type(out.past_key_values.layers[0])
        return shapes, (cached, out.logits)

    beside = BESIDE.get(field, {})
    shapes, (cached, logits) = outcome(**beside)
    other_shapes, (other_cached, other) = outcome(**beside, **{field: CHANGES[field]})
    assert shapes != other_shapes or cached != other_cached or not torch.allclose(logits, other, atol=1e-3)


@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 16, "num_attention_heads": 1},
        {"hidden_size": 12, "num_attention_heads": 3},
        {"hidden_size": 10, "num_attention_heads": 5, "head_dim": 7},
        {"hidden_size": 1, "num_attention_heads": 1, "intermediate_size": 1},
    ],
)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_decays_are_negative_and_fall_with_depth(shape: dict[str, int], layers: int) -> None:
    model = TransnormerForCausalLM(tiny_config(num_hidden_layers=layers, **shape))
    decays = torch.stack([layer.token_mixer.log_decay(torch.device("cpu")) for layer in model.model.layers])
    assert decays.shape == (layers, shape["num_attention_heads"])
    assert torch.isfinite(decays).all()
    assert (decays < 0).all()
    assert (decays.diff(dim=0) > 0).all()
    slope = 2 ** (-8 / 2 ** (shape["num_attention_heads"].bit_length() - 1))  # ALiBi's first
    torch.testing.assert_close(decays[0, 0].item(), -slope * (1 + 1e-5))
    if layers > 1:
        torch.testing.assert_close(decays[-1, 0].item(), -slope * 1e-5)


def test_published_decays_of_eight_heads() -> None:
    model = TransnormerForCausalLM(tiny_config(num_attention_heads=8, num_hidden_layers=3))
    for layer, rate in enumerate((1 + 1e-5, 0.5 + 1e-5, 1e-5)):
        expected = torch.tensor([-(2.0**-h) * rate for h in range(1, 9)])
        torch.testing.assert_close(model.model.layers[layer].token_mixer.log_decay(torch.device("cpu")), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decay": "learned"},
        {"attention": "masked"},
        {"attention": "masked", "decay": "learned"},
        {"attention": "masked", "mask": "learned", "max_position_embeddings": 5},
    ],
    ids=str,
)
def test_given_slopes_are_those_of_every_kind(changes: dict[str, Any]) -> None:
    slopes = [2, 0.5, 0.1, 0.01]
    model = TransnormerForCausalLM(tiny_config(num_hidden_layers=3, decay_slopes=slopes, **changes))
    for layer, rate in zip(model.model.layers, (1 + 1e-5, 0.5 + 1e-5, 1e-5), strict=True):
        expected = -torch.tensor(slopes) * rate
        torch.testing.assert_close(layer.token_mixer.log_decay(torch.device("cpu")), expected)
        if "mask" in changes:
            weights = (expected[:, None] * torch.arange(5)).exp()
            torch.testing.assert_close(layer.token_mixer.mask_weights.detach(), weights)
