"""The recurrent cache: one state per layer, of a size that does not grow with the tokens seen."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_transnormer import TransnormerConfig


class RecurrentLayer(CacheLayerMixin):
    """State of one layer: `state` (B, H, D, E) float32, None before the first token, and the tokens it has seen."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self.tokens = 0

    def store(self, state: Tensor, tokens: int) -> None:
        """Keep the state after `tokens` more tokens."""
        self.state = state
        self.tokens += tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to allocate: the operator makes the first state."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a recurrent layer keeps a state, not keys and values: use store(state, tokens)")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a recurrent state can't go back: it does not hold the tokens it has seen")

    def reset(self) -> None:
        self.state, self.tokens, self.is_initialized = None, 0, False

    def offload(self) -> None:
        self._map(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing to fetch ahead: the attention moves the state to its device."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda state: state.index_select(0, indices.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def _map(self, change: Any) -> None:
        if self.state is not None:
            self.state = change(self.state)


class TransnormerCache(Cache):
    """States of all layers, and how many tokens that are no padding each row of the batch has seen (`seen`, (B,))."""

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__(layers=[RecurrentLayer() for _ in range(config.num_hidden_layers)])
        self.seen: Tensor | None = None

    def reset(self) -> None:
        super().reset()
        self.seen = None

    def crop(self, *args: Any, **kwargs: Any) -> None:
        self.layers[0].crop()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_seen(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_seen(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.seen is not None:
            self.seen = self.seen.repeat_interleave(repeats)

    def _select_seen(self, indices: Tensor) -> None:
        if self.seen is not None:
            self.seen = self.seen.index_select(0, indices.to(self.seen.device))


def check_cache(cache: object) -> None:
    """Refuse the library's key/value caches, which hold no recurrent state."""
    if cache is not None and not isinstance(cache, TransnormerCache):
        raise TypeError(f"past_key_values: expected a TransnormerCache or None, got {type(cache).__name__}")


def next_positions(cache: TransnormerCache | None, valid: Tensor) -> Tensor:
    """Positions of new tokens, padding not counted: valid (B, T) bool, returns (B, T); the cache counts them."""
    count = valid.long().cumsum(1)  # (B, T)
    before = 0 if cache is None or cache.seen is None else cache.seen[:, None].to(count.device)
    if cache is not None:
        cache.seen = (before + count[:, -1:])[:, 0] if count.shape[1] else cache.seen
    return (before + count - 1).clamp(min=0)
