"""The recurrent cache: stepping, chunked prefill, padding, and every way in which the library generates."""

import copy
from typing import Any

import pytest
import torch
from model_cases import VOCABULARY, all_variants, assert_all_near, assert_near, random_ids, states, tiny_model
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, TextIteratorStreamer

from model import TransnormerCache, TransnormerConfig, TransnormerForCausalLM

TOKENS = 2000


def steps(model: TransnormerForCausalLM, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits (B, T, V) of one token after the other, and the cache."""
    logits = []
    for t in range(ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


@all_variants
@torch.no_grad()
def test_stepping_equals_one_pass(variant: str, device: torch.device) -> None:
    model, ids = tiny_model(variant, device), random_ids(1, TOKENS, device=device)
    whole = model(ids)
    logits, cache = steps(model, ids)
    assert_near(logits, whole.logits)
    for stepped, at_once in zip(states(cache), states(whole.past_key_values), strict=True):
        assert_near(stepped / at_once.abs().max(), at_once / at_once.abs().max())
    assert cache.get_seq_length() == TOKENS
    assert cache.seen.tolist() == [TOKENS]


@all_variants
@torch.no_grad()
def test_chunked_prefill_equals_one_pass(variant: str, device: torch.device) -> None:
    model, ids = tiny_model(variant, device), random_ids(2, 300, device=device)
    whole = model(ids)
    cache, logits = None, []
    for chunk in ids.split([1, 63, 64, 65, 100, 1, 6], dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    assert_near(torch.cat(logits, dim=1), whole.logits)
    assert_all_near(states(cache), states(whole.past_key_values), 1e-3)


def test_gradients_flow_through_a_carried_state() -> None:
    for variant, trained in (
        ("mha-lrpe-fixed", ""),
        ("one-head-learned", ""),
        ("one-head-learned", "0.token_mixer.decay_log"),
    ):
        model, ids = tiny_model(variant), random_ids(1, 80)
        for name, x in model.named_parameters():
            x.requires_grad_(trained in name)
        model(ids, labels=ids).loss.backward()
        expected = [x.grad.clone() for x in model.parameters() if x.grad is not None]
        model.zero_grad()
        logits, cache = [], None
        for chunk in ids.split([40, 1, 39], dim=1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        model.loss_function(torch.cat(logits, dim=1), ids, VOCABULARY).backward()
        assert_all_near([x.grad for x in model.parameters() if x.grad is not None], expected)


def test_one_token_trains_a_decay_alone() -> None:
    model, ids = tiny_model("one-head-learned"), random_ids(1, 20)
    for name, x in model.named_parameters():
        x.requires_grad_("1.token_mixer.decay_log" in name)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    model(ids[:, :1], past_key_values=cache).logits.square().sum().backward()
    grads = [x.grad for x in model.parameters() if x.requires_grad]
    assert all(grad is not None and grad.abs().min() > 0 for grad in grads)


@torch.no_grad()
def test_use_cache_is_asked_for_or_by_default() -> None:
    model, ids = tiny_model(), random_ids(1, 5)
    assert isinstance(model(ids).past_key_values, TransnormerCache)
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    model.eval().config.use_cache = False
    assert model(ids).past_key_values is None


@torch.no_grad()
def test_state_does_not_grow() -> None:
    model = tiny_model()
    sizes = {
        sum(state.numel() for state in states(model(random_ids(1, tokens)).past_key_values)) for tokens in (1, 10, 200)
    }
    assert len(sizes) == 1


PADDING = {
    "left": [[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 12, [0] * 11 + [1]],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1] * 12, [1] + [0] * 11],
    "anywhere": [[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 1], [1, 0] * 6, [0] * 5 + [1] + [0] * 6],
    "one row": [[0, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0]],
    "a row of padding": [[0] * 12, [1] * 12],
}


@all_variants
@pytest.mark.parametrize("where", PADDING)
@torch.no_grad()
def test_padded_rows_equal_rows_alone(variant: str, where: str, device: torch.device) -> None:
    model, mask = tiny_model(variant, device), torch.tensor(PADDING[where], device=device)
    ids, more = random_ids(*mask.shape, device=device), random_ids(len(mask), 4, seed=2, device=device)
    out = model(ids, attention_mask=mask)
    after, cache = steps(model, more[:, :2], copy.deepcopy(out.past_key_values))
    # The mask that generation passes covers all tokens so far; the last token of the first row is padding here.
    longer = torch.cat([mask, torch.ones_like(more)], dim=1)
    longer[0, -1] = 0
    rest = model(more[:, 2:], attention_mask=longer, past_key_values=cache).logits
    for row, keep in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, keep])
        assert_near(out.logits[row, keep], alone.logits[0], 2e-5)
        if keep.any():
            here = [state[row] for state in states(out.past_key_values)]
            assert_all_near(here, [state[0] for state in states(alone.past_key_values)], 2e-5)
        assert out.past_key_values.seen[row] == keep.sum()
        expected = model(torch.cat([ids[row, keep], more[row]])[None]).logits[0, -4:]
        assert_near(after[row], expected[:2], 2e-5)
        assert_near(rest[row, : 1 if row == 0 else 2], expected[2 : 3 if row == 0 else 4], 2e-5)


@torch.no_grad()
def test_ids_at_padding_do_not_matter() -> None:
    model, mask = tiny_model(), torch.tensor(PADDING["anywhere"])
    ids = random_ids(*mask.shape)
    other = torch.where(mask.bool(), ids, 3)
    a, b = model(ids, attention_mask=mask), model(other, attention_mask=mask)
    assert torch.equal(a.logits[mask.bool()], b.logits[mask.bool()])
    assert all(torch.equal(x, y) for x, y in zip(states(a.past_key_values), states(b.past_key_values), strict=True))


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
@torch.no_grad()
def test_padded_gradients_equal_those_of_rows_alone(kind: torch.dtype) -> None:
    for variant in ("one-head-learned", "gqa-l2-learned-tied"):
        model, mask = tiny_model(variant), torch.tensor(PADDING["anywhere"])
        ids = random_ids(*mask.shape)
        with torch.enable_grad():
            model(ids, attention_mask=mask.to(kind)).logits[mask.bool()].square().sum().backward()
            grads = [x.grad.clone() for x in model.parameters() if x.grad is not None]
            model.zero_grad()
            for row, keep in enumerate(mask.bool()):
                model(ids[row : row + 1, keep]).logits.square().sum().backward()
        expected = [x.grad for x in model.parameters() if x.grad is not None]
        assert_all_near(
            [a / b.abs().max() for a, b in zip(grads, expected, strict=True)], [b / b.abs().max() for b in expected]
        )


def test_refuses_a_wrong_mask() -> None:
    model, ids = tiny_model(), random_ids(2, 6)
    for shape in [(2, 5), (1, 6), (2, 1, 6, 6)]:
        with pytest.raises(ValueError, match="attention_mask: expected shape"):
            model(ids, attention_mask=torch.ones(shape))


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 1.3},
    "top": {"do_sample": True, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 4, "do_sample": False},
    "beams sampled": {"num_beams": 3, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "penalties": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
}


def generate(model: TransnormerForCausalLM, ids: Tensor, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(ids, **({"max_new_tokens": 12, "pad_token_id": 3} | kwargs))


@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize("variant", ["mha-lrpe-fixed", "gqa-l2-learned-tied"])
def test_generates_the_same_with_and_without_cache(variant: str, way: str, device: torch.device) -> None:
    model, ids = tiny_model(variant, device), random_ids(2, 11, device=device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    kwargs = GENERATION[way] | {"attention_mask": mask}
    cached = generate(model, ids, use_cache=True, **kwargs)
    kwargs.pop("prefill_chunk_size", None)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **kwargs))
    assert cached.shape[1] == 11 + 12


@all_variants
def test_left_padded_batch_generates_as_each_row_alone(variant: str, device: torch.device) -> None:
    model, ids = tiny_model(variant, device), random_ids(3, 16, device=device)
    mask = torch.ones_like(ids)
    mask[0, :9], mask[1, :15] = 0, 0
    together = generate(model, ids.masked_fill(mask == 0, 3), attention_mask=mask, do_sample=False)
    for row in range(3):
        alone = generate(model, ids[row : row + 1, mask[row].bool()], do_sample=False)
        assert torch.equal(together[row, 16:], alone[0, -12:])


def test_greedy_is_the_argmax_of_one_pass() -> None:
    model = tiny_model()
    out = generate(model, random_ids(2, 10), do_sample=False, max_new_tokens=30)
    with torch.no_grad():
        assert torch.equal(model(out).logits.argmax(-1)[:, 9:-1], out[:, 10:])


def test_eos_ends_rows_one_by_one() -> None:
    model, ids = tiny_model(), random_ids(2, 10)
    free = generate(model, ids, do_sample=False)
    new = free[:, 10:].tolist()
    eos = next(token for token in new[0] if token not in new[1])
    out = generate(model, ids, do_sample=False, eos_token_id=eos)
    end = new[0].index(eos) + 1
    assert out[0, 10 : 10 + end].tolist() == new[0][:end]
    assert set(out[0, 10 + end :].tolist()) <= {3}
    assert out[1].tolist() == free[1].tolist()
    alone = generate(model, ids[:1], do_sample=False, eos_token_id=eos)
    assert alone[0].tolist() == free[0, : 10 + end].tolist()


def test_continues_from_a_returned_cache() -> None:
    model, ids = tiny_model("gqa-l2-learned-tied"), random_ids(2, 10)
    whole = generate(model, ids, do_sample=False, max_new_tokens=20)
    first = generate(model, ids, do_sample=False, max_new_tokens=8, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, TransnormerCache)
    assert cache.get_seq_length() == 17  # the last token has been chosen, not yet read
    branch = copy.deepcopy(cache)
    rest = generate(model, first.sequences, do_sample=False, max_new_tokens=12, past_key_values=cache)
    assert torch.equal(rest, whole)
    more = torch.cat([first.sequences, random_ids(2, 5, seed=3)], dim=1)  # a next turn of a conversation
    turn = generate(model, more, do_sample=False, past_key_values=branch)
    assert torch.equal(turn, generate(model, more, do_sample=False))


def test_continues_from_a_cache_of_padded_rows() -> None:
    model, ids = tiny_model(), random_ids(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    whole = generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
    first = generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=8, return_dict_in_generate=True)
    longer = torch.cat([mask, mask.new_ones(2, 8)], dim=1)
    rest = generate(
        model, first.sequences, attention_mask=longer, past_key_values=first.past_key_values, do_sample=False
    )
    assert torch.equal(rest, whole)


def test_generates_from_embeddings() -> None:
    model, ids = tiny_model(), random_ids(2, 10)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
    torch.manual_seed(7)
    out = model.generate(inputs_embeds=embeddings, max_new_tokens=12, do_sample=False, pad_token_id=3)
    assert torch.equal(out, generate(model, ids, do_sample=False)[:, 10:])


def test_generates_from_nothing_but_bos() -> None:
    model = tiny_model()
    out = model.generate(max_new_tokens=5, do_sample=False, pad_token_id=3)
    assert out.shape == (1, 6)
    assert out[0, 0] == 1


def test_generates_with_scores() -> None:
    model, ids = tiny_model(), random_ids(1, 10)
    out = generate(model, ids, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        assert_near(torch.stack(out.logits, dim=1), model(out.sequences).logits[:, 9:-1])


def test_streams() -> None:
    class Letters:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(chr(97 + int(i) % 26) for i in ids)

    model, ids = tiny_model(), random_ids(1, 10)
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True)  # type: ignore[arg-type]
    out = generate(model, ids, do_sample=False, streamer=streamer)
    assert "".join(streamer) == Letters().decode(out[0, 10:])


@pytest.mark.parametrize("model_in_training", [False, True])
def test_generation_leaves_no_trace(model_in_training: bool) -> None:
    model, ids = tiny_model().train(model_in_training), random_ids(2, 10)
    first = generate(model, ids, do_sample=False)
    assert torch.equal(generate(model, ids, do_sample=False), first)
    assert model.training is model_in_training


def test_foreign_caches_are_refused() -> None:
    model, ids = tiny_model(), random_ids(1, 10)
    for foreign in (DynamicCache(), [], ((ids, ids),)):
        with pytest.raises(TypeError, match="past_key_values: expected a TransnormerCache or None, got"):
            model(ids, past_key_values=foreign)
    with pytest.raises(TypeError, match="got DynamicCache"):
        generate(model, ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation: expected None, got 'static'"):
        generate(model, ids, cache_implementation="static")


def test_speculative_generation_is_refused() -> None:
    model, ids = tiny_model(), random_ids(1, 10)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(model, ids, do_sample=False, assistant_model=tiny_model())


@torch.no_grad()
def test_cache_operations() -> None:
    model, ids = tiny_model("gqa-lrpe-none"), random_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    before, seen = states(cache), cache.seen.clone()

    def same(order: list[int]) -> bool:
        kept = all(torch.equal(a, b[order]) for a, b in zip(states(cache), before, strict=True))
        return kept and torch.equal(cache.seen, seen[order])

    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert same([2, 0, 1])
    cache.batch_select_indices(torch.tensor([1, 2]))
    assert same([0, 1])
    cache.batch_repeat_interleave(2)
    assert same([0, 0, 1, 1])
    assert cache.get_seq_length() == 9
    for wrong in (lambda: cache.crop(5), lambda: cache.layers[0].crop(-1)):
        with pytest.raises(ValueError, match="can't go back"):
            wrong()
    with pytest.raises(TypeError, match="keeps a state, not keys and values"):
        cache.update(ids, ids, 0)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_near(model(ids, attention_mask=mask, past_key_values=cache).logits, model(ids, attention_mask=mask).logits)


def test_generation_config_travels(tmp_path: Any) -> None:
    model = tiny_model()
    model.generation_config = GenerationConfig(do_sample=True, top_k=5, max_new_tokens=3, pad_token_id=3)
    model.save_pretrained(tmp_path)
    assert TransnormerForCausalLM.from_pretrained(tmp_path).generation_config.top_k == 5


def test_default_generation_config_has_the_special_ids() -> None:
    config = TransnormerConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    generation = TransnormerForCausalLM(config).generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 3)
