"""TransNormer: GLU → layer → model → language model, in this order; norm and attention have a file of their own.

Source: Qin et al. 2023, "TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer",
arXiv:2307.14995. Dims: B batch, T tokens, C hidden size, V vocabulary.
"""

import ast
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .attention_transnormer import (
    ATTENTIONS,
    Attention,
    LinearizedRelativePosition,
    SimpleRMSNorm,
    flash_linear_attention,
    lightning_attention,
)
from .cache_transnormer import KeyValueLayer, RecurrentLayer, TransnormerCache, check_cache, next_positions
from .configuration_transnormer import TransnormerConfig
from .masks_transnormer import Pairs, function_mask, pair_documents, pair_tokens
from .packing_transnormer import Packing, from_attention_mask, from_cu_seqlens, from_position_ids

try:  # in the repository the operators are a package; beside a checkpoint the same files lie flat
    from ops.numerics import autocast
    from ops.validation import check_cu_seqlens
except ImportError:
    from .numerics import autocast  # type: ignore[no-redef]
    from .validation import check_cu_seqlens  # type: ignore[no-redef]


class GLU(nn.Module):
    """Gated linear unit without activation: `(x W1 ⊙ x W2) W3`."""

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__()
        self.l1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.l2 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.l3 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.l3(self.l1(x) * self.l2(x))


class TransnormerLayer(GradientCheckpointingLayer):
    """Pre-norm block: `x = x + attention(norm(x)); x = x + glu(norm(x))`."""

    def __init__(self, config: TransnormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.token_norm = SimpleRMSNorm(config.rms_norm_eps)
        self.token_mixer = ATTENTIONS[config.attention](config, layer_idx)
        self.channel_norm = SimpleRMSNorm(config.rms_norm_eps)
        self.channel_mixer = GLU(config)

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        layout: Packing | Pairs | None = None,
        cache: RecurrentLayer | KeyValueLayer | None = None,
    ) -> Tensor:
        hidden_states = hidden_states + self.token_mixer(self.token_norm(hidden_states), position_ids, layout, cache)
        return hidden_states + self.channel_mixer(self.channel_norm(hidden_states))


class TransnormerPreTrainedModel(PreTrainedModel):
    """What every TransNormer shares: initial weights, and a checkpoint folder that carries its own code."""

    config_class = TransnormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["TransnormerLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = {"decay_log", "mask_weights", "theta"}
    no_weight_decay = {"mask_weights"}
    _supports_context_parallel = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, LinearizedRelativePosition | Attention):
            module.reset_parameters()

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """As in transformers, with the source files of model and operators beside the weights.

        Raises:
            ValueError: for `push_to_hub`, which uploads before those files are there.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub: expected False, use model.push_to_hub(name), which uploads the code as well")
        self.config.auto_map = {
            "AutoConfig": "configuration_transnormer.TransnormerConfig",
            "AutoModel": "modeling_transnormer.TransnormerModel",
            "AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM",
        }
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        if is_main_process:
            for source in source_files():
                shutil.copyfile(source, Path(save_directory) / source.name)

    def save_without_weights(self, save_directory: str | Path) -> None:
        """All that `save_pretrained` writes but the weights, for a trainer that holds them in shares."""
        self.save_pretrained(save_directory, state_dict={})


class TransnormerModel(TransnormerPreTrainedModel):
    """Embeddings, layers and the final norm."""

    _keys_to_ignore_on_load_unexpected = [r"lm_head"]

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
        self.layers = nn.ModuleList(TransnormerLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = SimpleRMSNorm(config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TransnormerCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """One pass over T tokens, after those that the cache has seen.

        Args:
            input_ids: (B, T) token ids, or
            inputs_embeds: (B, T, C) embeddings, not yet scaled.
            attention_mask: (B, T) or (B, tokens seen + T), 0 at padding, which may stand anywhere.
            position_ids: (B, T) or (1, T); without attention_mask, cache and cu_seq_lens_q, a position that does not
                follow the one before starts a document. Else positions for LRPE only.
            past_key_values: a TransnormerCache to go on from; it is moved on in place.
            use_cache: return a cache; by default in evaluation of unpacked rows.
            output_hidden_states: return the hidden states before each layer and after the final norm.
            cu_seq_lens_q: (documents + 1,) bounds of documents packed in a batch of one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        check_cache(past_key_values, self.config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        hidden_states = inputs_embeds * self.embed_scale  # (B, T, C)

        valid = _valid_tokens(attention_mask, hidden_states)  # (B, T) bool, or None when all are
        packing = self._packing(hidden_states, attention_mask, valid, position_ids, past_key_values, cu_seq_lens_q)
        documents = None if packing is None or packing.padded else packing
        if documents is not None and (past_key_values is not None or use_cache):
            raise ValueError("packed documents: expected no cache, each document has a state of its own")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past_key_values is None and use_cache and documents is None:
            past_key_values = TransnormerCache(self.config)
        if past_key_values is not None and self.gradient_checkpointing and self.training:
            raise ValueError("use_cache: expected False with gradient checkpointing, which runs a layer twice")
        layout: Packing | Pairs | None = packing
        if self.config.attention == "masked":
            layout = self._pairs(hidden_states, valid, documents, past_key_values)
        if valid is None:
            valid = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        counted = next_positions(past_key_values, valid)
        if position_ids is None:
            position_ids = counted if documents is None else documents.positions(hidden_states.shape[1])

        states: tuple[Tensor, ...] | None = (
            (hidden_states,) if self._wants_hidden_states(output_hidden_states) else None
        )
        for i, layer in enumerate(self.layers):
            cache = None if past_key_values is None else past_key_values.layers[i]
            hidden_states = layer(hidden_states, position_ids, layout, cache)
            if states is not None and i < len(self.layers) - 1:
                states += (hidden_states,)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache or past_key_values is not None else None,
            hidden_states=None if states is None else (*states, hidden_states),
        )

    def _wants_hidden_states(self, asked: bool | None) -> bool:
        return bool(self.config.output_hidden_states if asked is None else asked)

    def _packing(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        valid: Tensor | None,
        position_ids: Tensor | None,
        cache: TransnormerCache | None,
        cu_seq_lens_q: Tensor | None,
    ) -> Packing | None:
        """Sequences of the batch by the first thing given: document bounds, padding, positions."""
        if cu_seq_lens_q is not None:
            if valid is not None:
                raise ValueError("cu_seq_lens_q: expected no padding in attention_mask beside packed documents")
            return from_cu_seqlens(cu_seq_lens_q, hidden_states.shape[0], hidden_states.device)
        if valid is not None:
            return from_attention_mask(valid)
        if attention_mask is None and position_ids is not None and cache is None:
            # Reads values, which breaks a compiled graph in two; bounds of documents don't.
            return from_position_ids(position_ids.expand(hidden_states.shape[:2]))
        return None

    def _pairs(
        self, hidden_states: Tensor, valid: Tensor | None, documents: Packing | None, cache: TransnormerCache | None
    ) -> Pairs:
        """Pairs of new tokens and all so far, with the mask of all layers where it is one."""
        batch, tokens = hidden_states.shape[:2]
        if documents is not None:
            check_cu_seqlens(documents.cu_seqlens, hidden_states.flatten(0, 1)[None, None])  # (1, 1, B·T, C)
            pairs = pair_documents(documents, batch, tokens)
        else:
            total = tokens if cache is None else cache.get_seq_length() + tokens
            valid = valid if cache is None else cache.extend_valid(valid, batch, tokens)
            pairs = pair_tokens(tokens, total, hidden_states.device, valid)
        return pairs._replace(mask=self._mask_of_all_layers(pairs, hidden_states))

    def _mask_of_all_layers(self, pairs: Pairs, hidden_states: Tensor) -> Tensor | None:
        config = self.config
        if config.mask == "decay" and config.decay == "none":
            return pairs.allowed
        function = config.mask_function()
        if function is None:
            return None
        mask = function_mask(config.mask, function, pairs, hidden_states.shape[0], config.num_attention_heads)
        return mask if mask.dtype == torch.bool else autocast(hidden_states, mask.to(hidden_states.dtype))[1]


class TransnormerForCausalLM(TransnormerPreTrainedModel, GenerationMixin):
    """The model with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__(config)
        self.model = TransnormerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TransnormerCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `TransnormerModel.forward`, then logits (B, T, V) and the loss.

        Args:
            labels: (B, T) ids, -100 to ignore; the label at t+1 is what position t predicts. With `shift_labels`
                (B, T) in the keywords, its entry at t is what position t predicts.
            logits_to_keep: compute the last this many logits only (0: all), or those at these positions.
            skip_logits: return the loss without the logits, which are the largest tensor of a training step.
            kwargs: `num_items_in_batch` makes the loss a sum divided by it; the rest as above.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits, labels, self.vocab_size, num_items_in_batch=num_items, shift_labels=shift_labels
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if skip_logits else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """The library's hook before generation: its own caches don't know our layers."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation: expected None, got {generation_config.cache_implementation!r}:"
                " a TransNormer has one kind of cache"
            )
        check_cache(model_kwargs.get("past_key_values"), self.config)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = TransnormerCache(self.config)


def source_files() -> list[Path]:
    """Every file of ours that the model imports, to lie flat beside a checkpoint."""
    found: set[Path] = set()
    operators = {Path(sys.modules[f.__module__].__file__ or "") for f in (lightning_attention, flash_linear_attention)}
    unread = {*Path(__file__).parent.glob("*_transnormer.py"), *operators}
    while unread:
        found |= unread
        unread = {other for file in unread for other in _imported_beside(file)} - found
    return sorted(found)


def _imported_beside(file: Path) -> Iterator[Path]:
    """Files of the same folder that a file imports, as `from .name import …` or `from . import name`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (path for name in names if (path := file.parent / f"{name}.py").is_file())


def _valid_tokens(attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """Which of the T new tokens are no padding, (B, T) bool; None when all are, read off unless compiling."""
    if attention_mask is None:
        return None
    batch, tokens = hidden_states.shape[:2]
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask: expected shape ({batch}, {tokens} or more), got {tuple(attention_mask.shape)}"
        )
    valid = attention_mask[:, attention_mask.shape[1] - tokens :].to(hidden_states.device).bool()
    return None if not torch.compiler.is_compiling() and bool(valid.all()) else valid
