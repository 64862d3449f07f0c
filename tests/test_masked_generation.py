"""The cache of masked attention: chunks, steps, padding, and every way in which the library generates."""

import copy
from typing import Any

import pytest
import torch
from model_cases import (
    MASKS,
    PADDING,
    VOCABULARY,
    assert_all_near,
    assert_near,
    every_mask,
    masked_model,
    named_gradients,
    random_ids,
    tiny_model,
)
from torch import Tensor

from model import TransnormerCache, TransnormerForCausalLM
from model.cache_transnormer import KeyValueLayer

pytestmark = pytest.mark.usefixtures("mask_registry")


@every_mask
@torch.no_grad()
def test_chunks_and_steps_equal_one_pass(mask: str) -> None:
    model, ids = masked_model(mask), random_ids(3, 18)
    rest = torch.cat([PADDING, torch.ones(3, 6, dtype=torch.long)], dim=1)
    for attention_mask in (None, rest):
        whole = model(ids, attention_mask=attention_mask).logits
        cache, logits, seen = None, [], 0
        for chunk in ids.split([5, 7, 1, 1, 0, 4], dim=1):
            seen += chunk.shape[1]
            until = None if attention_mask is None else attention_mask[:, :seen]
            out = model(chunk, attention_mask=until, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        read = torch.ones_like(ids).bool() if attention_mask is None else rest.bool()
        assert_near(torch.cat(logits, dim=1)[read], whole[read], 2e-5)
        assert cache.get_seq_length() == 18


@torch.no_grad()
def test_padding_may_end_or_begin_between_chunks() -> None:
    model, ids = masked_model("learned"), random_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[1, 9:11] = 0
    cache = model(ids[:, :6]).past_key_values
    assert cache.valid is None
    middle = model(ids[:, 6:12], attention_mask=mask[:, :12], past_key_values=cache)
    last = model(ids[:, 12:], past_key_values=middle.past_key_values)
    assert cache.seen.tolist() == [16, 14]
    assert_near(last.logits[1], model(ids[1:, mask[1].bool()]).logits[0, -4:], 2e-5)


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 1.3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
}


def generate(model: TransnormerForCausalLM, ids: Tensor, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(ids, **({"max_new_tokens": 8, "pad_token_id": 3} | kwargs))


@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize("mask", ["decay", "learned", "causal"])
def test_generates_the_same_with_and_without_cache(mask: str, way: str) -> None:
    model, ids = masked_model(mask), random_ids(2, 11)
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    kwargs = GENERATION[way] | {"attention_mask": padding}
    cached = generate(model, ids, use_cache=True, **kwargs)
    kwargs.pop("prefill_chunk_size", None)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **kwargs))
    if mask == "decay":
        lightning = tiny_model(**MASKS[mask] | {"attention": "lightning"})
        lightning.load_state_dict(model.state_dict())
        assert torch.equal(cached, generate(lightning, ids, **kwargs))
    if way == "greedy":
        assert torch.equal(cached[1, 4:], generate(model, ids[1:, 4:], do_sample=False)[0])


def test_continues_from_a_returned_cache() -> None:
    model, ids = masked_model("learned"), random_ids(2, 10)
    whole = generate(model, ids, do_sample=False, max_new_tokens=12)
    first = generate(model, ids, do_sample=False, max_new_tokens=5, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, TransnormerCache)
    assert isinstance(cache.layers[0], KeyValueLayer)
    rest = generate(model, first.sequences, do_sample=False, max_new_tokens=7, past_key_values=copy.deepcopy(cache))
    assert torch.equal(rest, whole)


@torch.no_grad()
def test_cache_operations() -> None:
    model, ids = masked_model("learned"), random_ids(3, 12)
    cache = model(ids, attention_mask=PADDING).past_key_values
    before = [(layer.keys, layer.values) for layer in cache.layers]

    def same(order: list[int]) -> bool:
        kept = all(
            torch.equal(layer.keys, keys[order]) and torch.equal(layer.values, values[order])
            for layer, (keys, values) in zip(cache.layers, before, strict=True)
        )
        return (
            kept and torch.equal(cache.valid, PADDING[order].bool()) and cache.seen.tolist() == [seen[i] for i in order]
        )

    seen = [7, 12, 4]
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert same([2, 0, 1])
    cache.batch_select_indices(torch.tensor([1, 2]))
    assert same([0, 1])
    cache.batch_repeat_interleave(2)
    assert same([0, 0, 1, 1])
    for i in range(2):
        cache.offload(i)
    assert same([0, 0, 1, 1])
    assert cache.get_seq_length() == 12
    for wrong in (lambda: cache.crop(5), lambda: cache.layers[0].crop(-1)):
        with pytest.raises(ValueError, match="can't go back"):
            wrong()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_near(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_a_cache_of_the_other_attention_is_refused() -> None:
    lightning, masked, ids = tiny_model(), masked_model("causal"), random_ids(1, 5)
    with pytest.raises(TypeError, match="past_key_values: expected a cache of masked attention, got lightning"):
        masked(ids, past_key_values=lightning(ids).past_key_values)
    with pytest.raises(TypeError, match="past_key_values: expected a cache of lightning attention, got masked"):
        generate(lightning, ids, past_key_values=masked(ids).past_key_values)


def test_gradients_flow_through_cached_keys() -> None:
    model, ids = masked_model("learned"), random_ids(1, 20)
    model(ids, labels=ids).loss.backward()
    expected = [x.clone() for x in named_gradients(model).values()]
    model.zero_grad()
    logits, cache = [], None
    for chunk in ids.split([9, 1, 10], dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    model.loss_function(torch.cat(logits, dim=1), ids, VOCABULARY).backward()
    assert_all_near(named_gradients(model).values(), expected)
