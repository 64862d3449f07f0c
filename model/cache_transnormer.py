"""What generation keeps: of lightning attention a state of fixed size, of masked attention all keys and values."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_transnormer import TransnormerConfig


class TransnormerCacheLayer(CacheLayerMixin):
    """What both kinds share: tensors (B, …) by name, None before the first token, and the tokens they stand for."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    tensors: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to allocate: the first tokens bring their tensors."""

    def reset(self) -> None:
        self.tokens, self.is_initialized = 0, False
        for name in self.tensors:
            setattr(self, name, None)

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing to fetch ahead: the attention moves the tensors to its device."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map(self, change: Any) -> None:
        for name in self.tensors:
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))


class RecurrentLayer(TransnormerCacheLayer):
    """State of one layer of lightning attention: `state` (B, H, D, E) float32."""

    tensors = ("state",)

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None

    def store(self, state: Tensor, tokens: int) -> None:
        """Keep the state after `tokens` more tokens."""
        self.state = state
        self.tokens += tokens
        self.is_initialized = True

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a recurrent layer keeps a state, not keys and values: use store(state, tokens)")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a recurrent state can't go back: it does not hold the tokens it has seen")


class KeyValueLayer(TransnormerCacheLayer):
    """Tokens of one layer of masked attention: `keys` (B, G, tokens, D) and `values` (B, G, tokens, E)."""

    tensors = ("keys", "values")
    keys: Tensor | None
    values: Tensor | None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys (B, G, T, D) and values (B, G, T, E) of T tokens; returns those of all, on their device."""
        if self.keys is None or self.values is None:
            self.keys, self.values = key_states, value_states
        else:
            self.keys = torch.cat([self.keys.to(key_states), key_states], dim=2)
            self.values = torch.cat([self.values.to(value_states), value_states], dim=2)
        self.tokens += key_states.shape[2]
        self.is_initialized = True
        return self.keys, self.values

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "keys and values can't go back: the cache counts tokens of each row, which padding makes differ"
        )


_LAYERS: dict[str, type[TransnormerCacheLayer]] = {"lightning": RecurrentLayer, "masked": KeyValueLayer}


class TransnormerCache(Cache):
    """The layers of a model, and what they share.

    `seen` (B,) counts the tokens of each row that are no padding; `valid` (B, tokens) bool says which they are, for
    masked attention and once there was padding.
    """

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__(layers=[_LAYERS[config.attention]() for _ in range(config.num_hidden_layers)])
        self.attention = config.attention
        self.seen: Tensor | None = None
        self.valid: Tensor | None = None

    def extend_valid(self, valid: Tensor | None, batch: int, tokens: int) -> Tensor | None:
        """Which tokens are no padding, (B, all) bool or None when all are, after T new ones with valid (B, T)."""
        if valid is None and self.valid is None:
            return None
        device = self.valid.device if valid is None else valid.device  # type: ignore[union-attr]
        before = torch.ones(batch, self.get_seq_length(), dtype=torch.bool) if self.valid is None else self.valid
        after = torch.ones(batch, tokens, dtype=torch.bool) if valid is None else valid
        self.valid = torch.cat([before.to(device), after.to(device)], dim=1)
        return self.valid

    def reset(self) -> None:
        super().reset()
        self.seen = self.valid = None

    def crop(self, *args: Any, **kwargs: Any) -> None:
        self.layers[0].crop()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map(self, change: Any) -> None:
        self.seen = None if self.seen is None else change(self.seen)
        self.valid = None if self.valid is None else change(self.valid)


def check_cache(cache: object, config: TransnormerConfig) -> None:
    """Refuse the library's caches, which don't know our layers, and one for the other kind of attention."""
    if cache is not None and not isinstance(cache, TransnormerCache):
        raise TypeError(f"past_key_values: expected a TransnormerCache or None, got {type(cache).__name__}")
    if cache is not None and cache.attention != config.attention:
        raise TypeError(f"past_key_values: expected a cache of {config.attention} attention, got {cache.attention}")


def next_positions(cache: TransnormerCache | None, valid: Tensor) -> Tensor:
    """Positions of new tokens, padding not counted: valid (B, T) bool, returns (B, T); the cache counts them."""
    count = valid.long().cumsum(1)  # (B, T)
    before = 0 if cache is None or cache.seen is None else cache.seen[:, None].to(count.device)
    if cache is not None:
        cache.seen = (before + count[:, -1:])[:, 0] if count.shape[1] else cache.seen
    return (before + count - 1).clamp(min=0)
