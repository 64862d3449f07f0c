"""Packed documents: by bounds or by positions, a batch of one or more, each document as if it were alone."""

from typing import Any

import pytest
import torch
from model_cases import all_variants, assert_all_near, assert_near, random_ids, some_variants, tiny_model
from torch import Tensor
from transformers import DataCollatorWithFlattening

from model import TransnormerForCausalLM

LENGTHS = [1, 70, 2, 64, 13]
TOKENS = sum(LENGTHS)


def bounds(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def positions(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def one_by_one(model: TransnormerForCausalLM, ids: Tensor, lengths: list[int]) -> Tensor:
    """Logits of the documents of a row, each run alone: ids (1, T), returns (1, T, V)."""
    return torch.cat([model(document).logits for document in ids.split(lengths, dim=1)], dim=1)


def packings(lengths: list[int], device: torch.device) -> dict[str, dict[str, Any]]:
    """What callers pass: our training the bounds, the library's packing collator all of it or the positions."""
    bound, position = bounds(lengths, device), positions(lengths, device)
    library = {"cu_seq_lens_q": bound, "cu_seq_lens_k": bound, "max_length_q": 70, "max_length_k": 70}
    return {
        "bounds": {"cu_seq_lens_q": bound},
        "bounds as int64": {"cu_seq_lens_q": bound.long()},
        "positions": {"position_ids": position},
        "library": library | {"position_ids": position},
    }


@all_variants
@pytest.mark.parametrize("way", ["bounds", "bounds as int64", "positions", "library"])
@torch.no_grad()
def test_packed_documents_equal_documents_alone(variant: str, way: str, device: torch.device) -> None:
    model, ids = tiny_model(variant, device), random_ids(1, TOKENS, device=device)
    packed = model(ids, **packings(LENGTHS, device)[way])
    assert_near(packed.logits, one_by_one(model, ids, LENGTHS), 2e-5)
    assert packed.past_key_values is None
    assert not torch.allclose(packed.logits, model(ids).logits, atol=1e-2)  # the bounds matter


@all_variants
@torch.no_grad()
def test_packed_rows_of_a_batch(variant: str, device: torch.device) -> None:
    model, ids = tiny_model(variant, device), random_ids(3, 40, device=device)
    rows = [[7, 33], [40], [1, 20, 19]]
    packed = model(ids, position_ids=torch.cat([positions(row, device) for row in rows])).logits
    for row, lengths in enumerate(rows):
        assert_near(packed[row : row + 1], one_by_one(model, ids[row : row + 1], lengths), 2e-5)


@torch.no_grad()
def test_one_row_of_positions_serves_the_batch() -> None:
    model, ids = tiny_model(), random_ids(3, 40)
    packed = model(ids, position_ids=positions([7, 33])).logits
    assert_near(packed, torch.cat([one_by_one(model, row[None], [7, 33]) for row in ids]), 2e-5)


@some_variants
@pytest.mark.parametrize("way", ["bounds", "positions"])
def test_packed_gradients_equal_those_of_documents_alone(variant: str, way: str, device: torch.device) -> None:
    model, ids = tiny_model(variant, device).train(), random_ids(1, TOKENS, device=device)
    model(ids, **packings(LENGTHS, device)[way]).logits.square().mean().backward()
    grads = [x.grad.clone() for x in model.parameters() if x.grad is not None]
    model.zero_grad()
    one_by_one(model, ids, LENGTHS).square().mean().backward()
    expected = [x.grad for x in model.parameters() if x.grad is not None]
    assert_all_near(grads, expected, 2e-5)


@torch.no_grad()
def test_a_document_does_not_see_its_neighbours() -> None:
    model, ids = tiny_model(), random_ids(1, TOKENS)
    where = {"cu_seq_lens_q": bounds(LENGTHS)}
    logits = model(ids, **where).logits
    changed = ids.clone()
    changed[0, 1:71] = random_ids(70, seed=5)
    other = model(changed, **where).logits
    assert torch.equal(other[:, :1], logits[:, :1])
    assert torch.equal(other[:, 71:], logits[:, 71:])


@torch.no_grad()
def test_empty_documents_are_allowed() -> None:
    model, ids = tiny_model(), random_ids(1, 20)
    packed = model(ids, cu_seq_lens_q=torch.tensor([0, 0, 8, 8, 20, 20])).logits
    assert_near(packed, one_by_one(model, ids, [8, 12]), 2e-5)


@torch.no_grad()
def test_positions_are_relative_far_into_a_row() -> None:
    """LRPE knows distances only, so a document late in a long row is as if it were alone."""
    model, ids = tiny_model(), random_ids(1, 20)
    filler = random_ids(1, 30_000, seed=9)
    packed = model(torch.cat([filler, ids], dim=1), cu_seq_lens_q=bounds([30_000, 20]), logits_to_keep=20).logits
    assert_near(packed, model(ids).logits)


@torch.no_grad()
def test_positions_that_do_not_restart_are_one_sequence() -> None:
    model, ids = tiny_model(), random_ids(2, 40)
    expected = model(ids).logits
    for start in (0, 100):
        position_ids = torch.arange(start, start + 40)[None].expand(2, -1)
        out = model(ids, position_ids=position_ids)
        assert_near(out.logits, expected, 2e-5)
        assert out.past_key_values is not None


@torch.no_grad()
def test_positions_beside_a_mask_are_positions_only() -> None:
    """Left padding, as generation passes it: the positions of padding do not start documents."""
    model, ids = tiny_model(), random_ids(1, 12)
    mask = torch.tensor([[0] * 5 + [1] * 7])
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(ids, attention_mask=mask, position_ids=position_ids).logits[:, 5:]
    assert_near(out, model(ids[:, 5:]).logits, 2e-5)
    whole = model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(12)[None]).logits
    assert_near(whole, model(ids).logits, 2e-5)


@pytest.mark.parametrize("bounds_too", [False, True])
def test_batches_of_the_library_s_packing_collator(bounds_too: bool) -> None:
    """It leaves out the first label of each document, so the loss is the mean over the documents' tokens."""
    model, ids = tiny_model(), random_ids(1, 30)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=bounds_too, return_seq_idx=bounds_too)
    documents = ids[0].split([12, 18])
    batch = collate([{"input_ids": document.tolist()} for document in documents])
    assert ("cu_seq_lens_q" in batch) is bounds_too
    loss = model.train()(**batch).loss
    alone = [model(x[None], labels=x[None]).loss for x in documents]
    torch.testing.assert_close(loss, (alone[0] * 11 + alone[1] * 17) / 28)


@pytest.mark.parametrize("wrong", [[0, 10], [1, 20], [0, 15, 10, 20], [0, 30]])
def test_bounds_that_miss_tokens_are_refused(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens: expected values rising from 0 to 20"):
        tiny_model()(random_ids(1, 20), cu_seq_lens_q=torch.tensor(wrong))


def test_refusals_name_the_argument() -> None:
    model, ids = tiny_model(), random_ids(2, 20)
    row, bound = ids[:1], torch.tensor([0, 8, 20])
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected packed documents in a batch of 1, got a batch of 2"):
        model(ids, cu_seq_lens_q=bound)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected no padding"):
        model(row, cu_seq_lens_q=bound, attention_mask=torch.tensor([[0] + [1] * 19]))
    with pytest.raises(ValueError, match="packed documents: expected no cache"):
        model(row, cu_seq_lens_q=bound, use_cache=True)
    with pytest.raises(ValueError, match="packed documents: expected no cache"):
        model(row, cu_seq_lens_q=bound, past_key_values=model(row).past_key_values)


@torch.no_grad()
def test_compiled_positions_still_start_documents() -> None:
    torch.compiler.reset()
    model, ids = tiny_model(), random_ids(1, 20)
    where = {"position_ids": positions([8, 12])}
    assert_near(torch.compile(model, backend="eager")(ids, **where).logits, model(ids, **where).logits, 2e-5)
