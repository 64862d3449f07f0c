"""Masked attention in the model: it equals lightning attention under the decay's mask, and takes any other."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import (
    MASKS,
    PADDING,
    VOCABULARY,
    all_variants,
    assert_all_near,
    assert_near,
    every_mask,
    masked_model,
    named_gradients,
    random_ids,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from model import TransnormerForCausalLM, masks_transnormer, register_mask
from model.attention_transnormer import LightningAttention, MaskedAttention
from model.masks_transnormer import pair_tokens, relative_mask
from training.config import load_config
from training.imports import import_modules
from training.optim import parameter_groups

pytestmark = pytest.mark.usefixtures("mask_registry")


def mask_of(model: TransnormerForCausalLM, **batch: Any) -> list[Tensor]:
    """The masks that the operator is given, layer by layer."""
    found: list[Tensor] = []
    for layer in model.model.layers:
        mixer = layer.token_mixer
        make = type(mixer).mask.__get__(mixer)
        mixer.mask = lambda *args, make=make: found.append(make(*args)) or found[-1]
    with torch.no_grad():
        model(**batch)
    return found


BATCHES: dict[str, dict[str, Any]] = {
    "whole rows": {"input_ids": random_ids(2, 150)},
    "padding": {"input_ids": random_ids(3, 12), "attention_mask": PADDING},
    "bounds": {"input_ids": random_ids(1, 40), "cu_seq_lens_q": torch.tensor([0, 7, 7, 30, 40])},
    "positions": {
        "input_ids": random_ids(2, 40),
        "position_ids": torch.stack([torch.arange(40), torch.cat([torch.arange(13), torch.arange(27)])]),
    },
}


@pytest.mark.parametrize("batch", BATCHES)
@all_variants
def test_the_decay_as_a_mask_equals_lightning_attention(variant: str, batch: str) -> None:
    lightning, masked = tiny_model(variant), tiny_model(variant, attention="masked")
    assert type(lightning.model.layers[0].token_mixer) is LightningAttention
    assert type(masked.model.layers[0].token_mixer) is MaskedAttention
    masked.load_state_dict(lightning.state_dict())
    inputs = BATCHES[batch]
    read = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    expected, actual = lightning(**inputs).logits[read], masked(**inputs).logits[read]
    assert_near(actual, expected)
    for logits in (expected, actual):
        logits.square().mean().backward()
    for name, grad in named_gradients(masked).items():
        other = named_gradients(lightning)[name]
        assert_near(grad / other.abs().max(), other / other.abs().max(), 1e-3)


def test_learned_weights_start_at_the_decay() -> None:
    ids = random_ids(1, 30)
    for decay in ("fixed", "none"):
        model = tiny_model(attention="masked", mask="learned", decay=decay, max_position_embeddings=30)
        assert_near(model(ids).logits, tiny_model(decay=decay)(ids).logits)
        assert model.model.layers[0].token_mixer.mask_weights.shape == (4, 30)


def written_out(weights: Tensor, tokens: int) -> Tensor:
    """weights[h, i - j] for each pair, 0 outside: (H, L) to (H, T, T)."""
    mask = torch.zeros(len(weights), tokens, tokens)
    for i in range(tokens):
        for j in range(max(0, i - weights.shape[1] + 1), i + 1):
            mask[:, i, j] = weights[:, i - j]
    return mask


@pytest.mark.parametrize("window", [1, 5, 12, 40])
def test_relative_masks_are_the_weights_of_distances(window: int) -> None:
    weights = torch.randn(3, window, requires_grad=True)
    whole = written_out(weights, 12)
    cpu, valid = torch.device("cpu"), PADDING[:1].bool()
    for new in (12, 5, 1, 0):
        pairs = pair_tokens(new, 12, cpu)
        mask = relative_mask(weights, pairs, torch.float32)
        assert torch.equal(mask[0], whole[:, 12 - new :])
        by_index = relative_mask(weights, pairs._replace(even=False), torch.float32)
        assert torch.equal(by_index, mask)
        grad = torch.randn(mask.shape)
        expected = torch.autograd.grad(whole[:, 12 - new :], weights, grad[0], retain_graph=True)[0]
        for made in (mask, by_index):
            assert_near(torch.autograd.grad(made, weights, grad)[0], expected, 1e-5)
    padded = relative_mask(weights, pair_tokens(12, 12, cpu, valid), torch.float32)[0]
    kept = padded[:, valid[0]][:, :, valid[0]]
    assert torch.equal(kept, written_out(weights, int(valid.sum())))
    assert (padded[:, :, ~valid[0]] == 0).all()


def test_gradient_of_learned_weights_equals_finite_differences() -> None:
    model, ids = masked_model("learned"), random_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    weights = model.model.layers[1].token_mixer.mask_weights
    assert (weights.grad.abs().amax(0) > 0).all()  # type: ignore[union-attr]
    for h, n in ((0, 0), (3, 2), (1, 8)):
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                weights[h, n] += step
                losses.append(model(ids, labels=ids).loss.double())
                weights[h, n] -= step
        assert_near(weights.grad[h, n], (losses[0] - losses[1]) / 2e-2, 1e-4)  # type: ignore[index]


@every_mask
@torch.no_grad()
def test_a_token_changes_nothing_before_it(mask: str) -> None:
    register_mask("shapes", lambda batch, head, query, key: torch.where(key > query, torch.nan, 1.0))
    model, ids = masked_model(mask), random_ids(2, 20)
    logits = model(ids).logits
    assert logits.isfinite().all()
    for t in (0, 7, 19):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % VOCABULARY
        other = model(changed).logits
        assert torch.equal(other[0, :t], logits[0, :t])
        assert torch.equal(other[1], logits[1])
        assert not torch.equal(other[0, t], logits[0, t])


@every_mask
@torch.no_grad()
def test_rows_and_documents_are_as_if_alone(mask: str) -> None:
    model, ids = masked_model(mask), random_ids(3, 12)
    padded = model(ids, attention_mask=PADDING).logits
    for row, keep in enumerate(PADDING.bool()):
        assert_near(padded[row, keep], model(ids[row : row + 1, keep]).logits[0], 2e-5)
    alone = [model(document).logits for document in ids[:1].split([3, 9], dim=1)]
    packed = model(ids[:1], cu_seq_lens_q=torch.tensor([0, 3, 12])).logits
    assert_near(packed, torch.cat(alone, dim=1), 2e-5)
    rows = model(ids, position_ids=torch.cat([torch.arange(3), torch.arange(9)])[None]).logits
    assert_near(rows[:1], packed, 2e-5)


@torch.no_grad()
def test_what_a_function_is_told_and_how_often() -> None:
    calls = []

    def told(*indices: Tensor) -> Tensor:
        calls.append(indices)
        return torch.ones(1, 1, 1, 1)

    register_mask("shapes", told)
    model, ids = masked_model("shapes"), random_ids(3, 12)
    cache = model(ids, attention_mask=PADDING).past_key_values
    model(ids[:, :2], past_key_values=cache)
    model(ids, use_cache=False)
    model(ids[:1], cu_seq_lens_q=torch.tensor([0, 5, 12]))
    shapes = [[tuple(x.shape) for x in indices] for indices in calls]  # one call a pass, of two layers
    assert shapes[0] == [(3, 1, 1, 1), (1, 4, 1, 1), (3, 1, 12, 1), (3, 1, 1, 12)]
    assert shapes[1] == [(3, 1, 1, 1), (1, 4, 1, 1), (3, 1, 2, 1), (3, 1, 1, 14)]
    assert shapes[2] == [(3, 1, 1, 1), (1, 4, 1, 1), (1, 1, 12, 1), (1, 1, 1, 12)]
    assert len(calls) == 4
    assert calls[0][3][0].flatten()[PADDING[0].bool()].tolist() == list(range(7))
    assert calls[1][2].flatten(1).tolist() == [[7, 8], [12, 13], [4, 5]]
    assert calls[3][2].flatten().tolist() == [*range(5), *range(7)]
    assert all(not x.is_floating_point() for indices in calls for x in indices)


@torch.no_grad()
def test_masks_are_no_larger_than_they_differ() -> None:
    ids, mask = random_ids(3, 12), PADDING
    assert [tuple(x.shape) for x in mask_of(masked_model("decay"), input_ids=ids)] == [(1, 4, 12, 12)] * 2
    for name, kind in (("causal", torch.bool), ("no-decay", torch.bool)):
        first, second = mask_of(masked_model(name), input_ids=ids)
        assert first.shape == (1, 1, 12, 12)
        assert first.dtype == kind
        assert first is second
        assert mask_of(masked_model(name), input_ids=ids, attention_mask=mask)[0].shape == (3, 1, 12, 12)
        assert mask_of(masked_model(name), input_ids=ids[:1], cu_seq_lens_q=torch.tensor([0, 12]))[0].shape[0] == 1
    first, second = mask_of(masked_model("shapes"), input_ids=ids)
    assert first.shape == (1, 4, 12, 12)
    assert first is second
    half = masked_model("shapes").bfloat16()
    assert {x.dtype for x in mask_of(half, input_ids=ids)} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        first, second = mask_of(masked_model("shapes"), input_ids=ids)
    assert first.dtype == torch.bfloat16
    assert first is second


@torch.no_grad()
def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (source,) = [x for x in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "register_mask" in x]
    (command,) = re.findall(r"train.py (.* --import masks .*)\n", readme)
    run = load_config(command.split())
    (tmp_path / "masks.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    import_modules(run.imports)
    config = run.config.model
    assert (config.attention, config.mask) == ("masked", "window")
    mask = mask_of(tiny_model(attention="masked", mask="window"), input_ids=random_ids(1, 150))[0]
    assert mask.sum(-1)[0, :, -1].tolist() == [64, 128, 150, 150]


WRONG_RESULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "no tensor": (1.0, TypeError, "expected a tensor from its function, got float"),
    "sparse": (torch.ones(1, 1, 5, 5).to_sparse(), TypeError, "expected torch.strided from its function, got torch.sp"),
    "whole numbers": (torch.ones(1, 1, 5, 5, dtype=torch.long), TypeError, "expected floats or torch.bool"),
    "two dims": (torch.ones(5, 5), ValueError, r"broadcasts to \(2, 4, 5, 5\), got \(5, 5\)"),
    "other heads": (torch.ones(1, 3, 5, 5), ValueError, r"broadcasts to \(2, 4, 5, 5\), got \(1, 3, 5, 5\)"),
    "other keys": (torch.ones(1, 1, 5, 6), ValueError, r"got \(1, 1, 5, 6\)"),
}


@pytest.mark.parametrize("case", WRONG_RESULTS)
def test_wrong_results_are_refused(case: str) -> None:
    result, error, message = WRONG_RESULTS[case]
    register_mask("shapes", lambda *_: result)
    with pytest.raises(error, match=f"mask 'shapes': .*{message}"):
        masked_model("shapes")(random_ids(2, 5))


def test_what_a_function_raises_names_the_mask() -> None:
    def fails(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        raise RuntimeError("no such table")

    register_mask("shapes", fails)
    with pytest.raises(RuntimeError, match="no such table") as caught:
        masked_model("shapes")(random_ids(2, 5))
    shapes = "batch (2, 1, 1, 1), head (1, 4, 1, 1), query (1, 1, 5, 1), key (1, 1, 1, 5)"
    assert caught.value.__notes__ == [f"mask 'shapes': raised by its function of {shapes}"]


def test_wrong_registrations_are_refused() -> None:
    for name, function, error, message in (
        ("decay", torch.ones, ValueError, "name: expected none of decay, learned, which layers make, got 'decay'"),
        ("", torch.ones, TypeError, "name: expected a string"),
        (3, torch.ones, TypeError, "name: expected a string of at least one letter, got 3"),
        ("mine", None, TypeError, "function: expected a function of batch, head, query and key, got None"),
    ):
        with pytest.raises(error, match=message):
            register_mask(name, function)  # type: ignore[arg-type]


def test_a_name_must_be_registered_where_a_model_is_made_or_loaded(tmp_path: Path) -> None:
    model = masked_model("shapes")
    model.save_pretrained(tmp_path)
    del masks_transnormer._FUNCTIONS["shapes"]
    message = "mask: expected one of decay, learned, causal, got 'shapes'; register_mask adds names, called by"
    for make in (
        lambda: tiny_config(attention="masked", mask="shapes"),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
        lambda: model(random_ids(1, 5)),
    ):
        with pytest.raises(Exception, match=message) as caught:
            make()
        assert isinstance(caught.value.__cause__ or caught.value, ValueError)


def test_a_learned_decay_must_have_a_use() -> None:
    for mask in ("learned", "causal"):
        with pytest.raises(Exception, match=f"decay: expected fixed or none with mask '{mask}'"):
            tiny_config(attention="masked", mask=mask, decay="learned")


# transformers 5.23 calls these methods activation_checkpointing_*, a name that older versions lack.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@every_mask
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(mask: str, reentrant: bool) -> None:
    model, ids = masked_model(mask).train(), random_ids(3, 12)
    for batch in ({}, {"attention_mask": PADDING}):
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            else:
                model.gradient_checkpointing_disable()
            model.zero_grad()
            model(ids, labels=ids, **batch).loss.backward()
            found.append([x.clone() for x in named_gradients(model).values()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_mask
def test_compiled_in_one_graph(mask: str) -> None:
    torch.compiler.reset()
    model, ids = masked_model(mask).train(), random_ids(1, 24)
    bounds = torch.tensor([0, 10, 24], dtype=torch.int32)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids} | ({"cu_seq_lens_q": bounds} if mask != "causal" else {})
    loss = model(**batch).loss
    loss.backward()
    expected = [x.clone() for x in named_gradients(model).values()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch).loss
    compiled.backward()
    torch.testing.assert_close(compiled, loss)
    assert_all_near(named_gradients(model).values(), expected, 1e-5)


@torch.no_grad()
def test_compiled_in_evaluation_with_padding_and_cache() -> None:
    torch.compiler.reset()
    model, ids = masked_model("learned"), random_ids(3, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, expected = (run(ids, attention_mask=PADDING) for run in (compiled, model))
    assert_near(ours.logits[PADDING.bool()], expected.logits[PADDING.bool()])
    after = [run(ids[:, :1], past_key_values=x.past_key_values) for run, x in ((compiled, ours), (model, expected))]
    assert_near(after[0].logits, after[1].logits)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_learned_weights_travel_in_float32(saved: torch.dtype, tmp_path: Path) -> None:
    model, ids = masked_model("learned"), random_ids(1, 20)
    model.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=saved).save_pretrained(tmp_path / "second")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert type(loaded) is TransnormerForCausalLM
    assert loaded.dtype == saved
    assert (loaded.config.attention, loaded.config.mask) == ("masked", "learned")
    for a, b in zip(loaded.model.layers, model.model.layers, strict=True):
        assert a.token_mixer.mask_weights.dtype == torch.float32
        assert torch.equal(a.token_mixer.mask_weights, b.token_mixer.mask_weights)
    assert_near(loaded(ids).logits, model(ids).logits, 1e-6 if saved == torch.float32 else 0.25)


@torch.no_grad()
def test_learned_weights_that_a_checkpoint_lacks_are_initialised(tmp_path: Path) -> None:
    model = tiny_model(attention="masked", mask="learned", max_position_embeddings=9)
    weights = {name: x for name, x in model.state_dict().items() if not name.endswith("mask_weights")}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_learned_weights_do_not_decay() -> None:
    model = masked_model("learned")
    plain = {x.data_ptr() for x in parameter_groups(model, 0.1)[1]["params"]}
    assert plain == {x.data_ptr() for name, x in model.named_parameters() if name.endswith(("mask_weights", "theta"))}


def test_empty_rows_and_batches() -> None:
    for mask in MASKS:
        model = masked_model(mask)
        assert model(random_ids(2, 0)).logits.shape == (2, 0, VOCABULARY)
        assert model(random_ids(0, 5)).logits.shape == (0, 5, VOCABULARY)


def test_bounds_that_miss_tokens_are_refused() -> None:
    for wrong in ([0, 10], [1, 20], [0, 15, 10, 20], [0, 30]):
        with pytest.raises(ValueError, match="cu_seqlens: expected values rising from 0 to 20"):
            masked_model("causal")(random_ids(1, 20), cu_seq_lens_q=torch.tensor(wrong))


def test_autocast_trains_learned_weights_in_float32() -> None:
    model, ids = masked_model("learned").train(), random_ids(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert all(grad.dtype == torch.float32 for grad in named_gradients(model).values())
    torch.testing.assert_close(out.loss, model(ids, labels=ids).loss, rtol=0.03, atol=0.03)
