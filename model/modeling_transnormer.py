"""TransNormer: norm → lightning attention → GLU → layer → model → language model, in this order.

Source: Qin et al. 2023, "TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer",
arXiv:2307.14995. Dims: B batch, H query heads, G key/value heads, T tokens, D head width, C hidden size.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .cache_transnormer import RecurrentLayer, TransnormerCache, check_cache, next_positions
from .configuration_transnormer import TransnormerConfig
from .packing_transnormer import Packing, from_attention_mask, from_cu_seqlens, from_position_ids

try:  # in the repository the operators are a package; beside a checkpoint the same files lie flat
    from ops.decay import layer_log_decay
    from ops.lightning_attention import lightning_attention, lightning_attention_step
    from ops.numerics import unit_length
except ImportError:
    from .decay import layer_log_decay  # type: ignore[no-redef]
    from .lightning_attention import lightning_attention, lightning_attention_step  # type: ignore[no-redef]
    from .numerics import unit_length  # type: ignore[no-redef]


class SimpleRMSNorm(nn.Module):
    """`x / rms(x)` over the last dim, computed in float32, without weights."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LinearizedRelativePosition(nn.Module):
    """LRPE: `x → [x cos(θt), x sin(θt)]`, so that the product of q at t and k at s sees `cos(θ(t - s))`.

    θ (H, 1, D) is learned, from `10000^(-2i / (H·D))` over all H·D channels. Source: Qin et al. 2023,
    "Linearized Relative Positional Encoding", arXiv:2307.09270.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        channel = torch.arange(self.theta.numel(), device=self.theta.device, dtype=torch.float32)
        init.copy_(self.theta, (10000 ** (-2 * channel / self.theta.numel())).view_as(self.theta))

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of θt for positions (B, T), in float32: (B, H, T, D)."""
        angle = self.theta.float() * position_ids[:, None, :, None]
        return angle.cos(), angle.sin()


class LightningAttention(nn.Module):
    """Projections, positional encoding, the operator, norm over the joined heads, gate, output projection."""

    def __init__(self, config: TransnormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        assert config.head_dim is not None  # the configuration fills in both
        assert config.num_key_value_heads is not None
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        query, key = self.num_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.widths = (query, key, key, query)  # q, k, v and the gate u
        self.qkvu_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(query, config.hidden_size, bias=False)
        self.norm = SimpleRMSNorm(config.rms_norm_eps)
        uses_lrpe = layer_idx in config.lrpe_layers
        self.lrpe = LinearizedRelativePosition(self.num_heads, self.head_dim) if uses_lrpe else None
        if config.decay == "learned":
            self.decay_log = nn.Parameter(torch.empty(self.num_heads))  # log(-log_decay), so that it stays ≤ 0
            self.reset_decay()

    @torch.no_grad()
    def reset_decay(self) -> None:
        init.copy_(self.decay_log, (-self.fixed_log_decay(self.decay_log.device)).log())

    def fixed_log_decay(self, device: torch.device) -> Tensor:
        """Made anew in every pass: a buffer would survive neither the meta device nor a cast of the module."""
        return layer_log_decay(self.num_heads, self.layer_idx, self.config.num_hidden_layers, device)

    def log_decay(self, device: torch.device) -> Tensor | None:
        """Log-decay of each head, (H,) float32, or None without decay."""
        if self.config.decay == "none":
            return None
        if self.config.decay == "learned":
            return -self.decay_log.float().exp()
        return self.fixed_log_decay(device)

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        packing: Packing | None = None,
        cache: RecurrentLayer | None = None,
    ) -> Tensor:
        """hidden_states (B, T, C), position_ids (B, T); returns (B, T, C) and moves the cache on by T tokens."""
        q, k, v, gate = self.qkvu_proj(hidden_states).split(self.widths, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        q, k = F.silu(q), F.silu(k)  # (B, H, T, D), (B, G, T, D)
        if self.lrpe is not None:
            q, k = self._encode_positions(q, k, *self.lrpe(position_ids))
        o = self.attend(q, k, v, packing, cache)  # (B, H, T, D)
        o = self.norm(o.transpose(1, 2).flatten(2))  # (B, T, H·D)
        return self.out_proj(o * gate)

    @staticmethod
    def _encode_positions(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """LRPE of q and k; k gets a copy for each query head, because θ differs between them: (B, H, T, 2D)."""
        k = k.expand_as(q) if k.shape[1] == 1 else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        q, k = (torch.cat([x * cos, x * sin], dim=-1).to(x.dtype) for x in (q, k))
        return q, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, cache: RecurrentLayer | None) -> Tensor:
        """The operator over one token, whole rows, or packed sequences; keeps the state in the cache."""
        batch, tokens = q.shape[0], q.shape[2]
        log_decay = self.log_decay(q.device)
        qk_norm = self.config.qk_norm == "l2"
        state = None if cache is None or cache.state is None else cache.state.to(q.device)
        inputs = [x for x in (q, k, v, log_decay, state) if x is not None]
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if cache is not None and state is not None and tokens == 1 and packing is None and not differentiable:
            if qk_norm:
                q, k = unit_length(q), unit_length(k)
            o = lightning_attention_step(q, k, v, log_decay, state)
            cache.store(state, tokens)
            return o
        if packing is not None:
            q, k, v = packing.pack(q), packing.pack(k), packing.pack(v)
            state = packing.pack_state(state)
        o, state = lightning_attention(
            q,
            k,
            v,
            log_decay,
            qk_norm=qk_norm,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=None if packing is None else packing.cu_seqlens,
        )
        if packing is not None:
            o, state = packing.unpack(o, batch), packing.unpack_state(state)
        if cache is not None:
            cache.store(state, tokens)
        return o


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
        self.token_mixer = LightningAttention(config, layer_idx)
        self.channel_norm = SimpleRMSNorm(config.rms_norm_eps)
        self.channel_mixer = GLU(config)

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        packing: Packing | None = None,
        cache: RecurrentLayer | None = None,
    ) -> Tensor:
        hidden_states = hidden_states + self.token_mixer(self.token_norm(hidden_states), position_ids, packing, cache)
        return hidden_states + self.channel_mixer(self.channel_norm(hidden_states))


class TransnormerPreTrainedModel(PreTrainedModel):
    """What every TransNormer shares: initial weights, and a checkpoint folder that carries its own code."""

    config_class = TransnormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["TransnormerLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = {"decay_log", "theta"}
    _supports_context_parallel = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, LinearizedRelativePosition):
            module.reset_parameters()
        elif isinstance(module, LightningAttention) and self.config.decay == "learned":
            module.reset_decay()

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
        check_cache(past_key_values)
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
            hidden_states = layer(hidden_states, position_ids, packing, cache)
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
        """The library's hook before generation: its own caches hold keys and values, ours a state."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation: expected None, got {generation_config.cache_implementation!r}:"
                " a TransNormer has one kind of cache"
            )
        check_cache(model_kwargs.get("past_key_values"))
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = TransnormerCache(self.config)


def source_files() -> list[Path]:
    """Every file of ours that the model imports, to lie flat beside a checkpoint."""
    here = Path(__file__)
    operators = Path(sys.modules[lightning_attention.__module__].__file__ or "")
    found = [here, *here.parent.glob("*_transnormer.py"), operators]
    found += [Path(file) for file in get_relative_import_files(operators)]
    return sorted(set(found))


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
