"""Configuration of a TransNormer language model, checked when it is made."""

import difflib
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .masks_transnormer import MaskFunction, find_mask, register_mask

__all__ = ["TransnormerConfig", "register_mask"]

ATTENTIONS = ("lightning", "masked")
QK_NORMS = ("none", "l2")
DECAYS = ("fixed", "learned", "none")
SLOPES = (1e-30, 1e30)  # so that float32 holds the decay of every layer

# Keywords that the library itself hands over, or that it wrote into a config.json.
_LIBRARY_KEYS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
}


@strict
class TransnormerConfig(PreTrainedConfig):
    """Shape and choices of a TransNormer.

    Args:
        vocab_size: number of token ids V.
        hidden_size: width C of the residual stream.
        intermediate_size: inner width of the GLU.
        num_hidden_layers: number of blocks N.
        num_attention_heads: query heads H.
        num_key_value_heads: key/value heads G, a divisor of H; None means H.
        head_dim: width D of a head; None means hidden_size / num_attention_heads.
        max_position_embeddings: tokens of a row in training: the default window of evaluation, and of mask "learned",
            no limit of the model.
        attention: "lightning" is causal with decay, over a state of fixed size; "masked" weighs every pair of tokens by
            `mask`, over all keys and values so far.
        mask: weights of attention "masked": "decay", from `decay`, the same numbers as lightning attention; "learned",
            for each layer and head max_position_embeddings numbers, one for each distance, starting at `decay`, and 0
            from there on; or a function's name: "causal", all ones, and those of `register_mask`, which don't read
            `decay`. The future, other documents and padding never have weight.
        qk_norm: "l2" divides q and k by their length, "none" leaves them.
        decay: slopes of the decay "fixed" (`decay_slopes`, by layer), "learned" (starting there) or "none".
        decay_slopes: slope of each head, larger forgets faster; None means ALiBi's.
        gate: multiply the normed output of the heads by a projection u of the input.
        lrpe_layers: indices of the layers with a linearized relative positional encoding.
        scale_embeddings: multiply the embeddings by sqrt(hidden_size).
        tie_word_embeddings: one matrix for the embeddings and the head.
        initializer_range: standard deviation of the initial weights.
        rms_norm_eps: added to the mean square inside every norm.
        use_cache: return a cache from a forward pass outside training.
        bos_token_id, eos_token_id, pad_token_id: special ids.

    Raises:
        ValueError, TypeError: for an unknown field, a wrong type or an impossible shape, saying why.
    """

    model_type = "transnormer"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 64_000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    attention: str = "lightning"
    mask: str = "decay"
    qk_norm: str = "none"
    decay: str = "fixed"
    decay_slopes: list[int | float] | tuple[int | float, ...] | None = None
    gate: bool = True
    lrpe_layers: list[int] | tuple[int, ...] = (0,)
    scale_embeddings: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 3

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"head_dim: hidden_size {self.hidden_size} is not a multiple of num_attention_heads"
                    f" {self.num_attention_heads}; give head_dim, or change one of them"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.lrpe_layers = list(self.lrpe_layers)
        self.decay_slopes = None if self.decay_slopes is None else list(self.decay_slopes)
        super().__post_init__(**kwargs)

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        unknown = [key for key in kwargs if key not in _LIBRARY_KEYS and not key.startswith("_")]
        for key in unknown:
            fields = [name for name in self.__dataclass_fields__ if not name.startswith("_")]
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key}: not a field of TransnormerConfig{hint}")

    def validate_architecture(self) -> None:
        """Refuse impossible shapes; called by the library's strict dataclass after every construction."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a whole number from 1, got {getattr(self, name)}")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_key_value_heads: expected a divisor of num_attention_heads {self.num_attention_heads},"
                f" got {self.num_key_value_heads}"
            )
        for name, valid in (("attention", ATTENTIONS), ("qk_norm", QK_NORMS), ("decay", DECAYS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: expected one of {', '.join(valid)}, got {getattr(self, name)!r}")
        self._validate_mask()
        self._validate_slopes()
        outside = [layer for layer in self.lrpe_layers if not 0 <= layer < self.num_hidden_layers]
        if outside:
            raise ValueError(f"lrpe_layers: expected layers from 0 to {self.num_hidden_layers - 1}, got {outside}")
        for name in ("initializer_range", "rms_norm_eps"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number between 0 and 1, got {getattr(self, name)}")

    def mask_function(self) -> MaskFunction | None:
        """The registered function that `mask` names, or None for a mask that layers make.

        A model asks its configuration: of code beside a checkpoint the library makes two copies, one for the
        configuration and one for the model, and functions are registered with the first.
        """
        return find_mask(self.mask)

    def _validate_mask(self) -> None:
        find_mask(self.mask)
        if self.attention != "masked" and self.mask != "decay":
            raise ValueError(f"mask: expected attention 'masked' with {self.mask!r}, got attention {self.attention!r}")
        if self.decay == "learned" and self.mask != "decay":
            raise ValueError(
                f"decay: expected fixed or none with mask {self.mask!r}, which learns no decay, got 'learned'"
            )

    def _validate_slopes(self) -> None:
        if self.decay_slopes is None:
            return
        if self.decay == "none":
            raise ValueError(f"decay_slopes: expected None with decay 'none', got {self.decay_slopes}")
        if len(self.decay_slopes) != self.num_attention_heads:
            raise ValueError(
                f"decay_slopes: expected {self.num_attention_heads} numbers, one for each of num_attention_heads,"
                f" got {len(self.decay_slopes)}"
            )
        least, most = SLOPES
        wrong = [slope for slope in self.decay_slopes if not least <= slope <= most]
        if wrong:
            raise ValueError(f"decay_slopes: expected positive numbers, from {least} to {most}, got {wrong}")
