"""The model: its equations, sizes, losses, gradients, precisions, files and compiled graphs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_cases import VOCABULARY, all_variants, assert_all_near, assert_near, random_ids, some_variants, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from model import TransnormerConfig, TransnormerForCausalLM, TransnormerModel
from ops import lightning_attention
from ops.reference import recurrent


def gradients(model: nn.Module) -> list[Tensor]:
    grads = [x.grad for x in model.parameters()]
    assert all(grad is not None for grad in grads)
    return grads  # type: ignore[return-value]


def logits_by_the_equations(model: TransnormerForCausalLM, ids: Tensor) -> Tensor:
    """The published equations in float64, token by token, on the model's weights: ids (B, T), returns (B, T, V)."""
    config = model.config
    w = {name: x.detach().double() for name, x in model.state_dict().items()}
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def split(x: Tensor) -> Tensor:
        return x.view(*ids.shape, -1, width).transpose(1, 2)

    x = w["model.embed_tokens.weight"][ids] * (math.sqrt(config.hidden_size) if config.scale_embeddings else 1)
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        widths = [heads * width, groups * width, groups * width, *([heads * width] if config.gate else [])]
        q, k, v, *u = (norm(x) @ w[p + "token_mixer.qkvu_proj.weight"].T).split(widths, -1)
        q, k, v = split(F.silu(q)), split(F.silu(k)), split(v)
        k, v = (y.repeat_interleave(heads // groups, 1) for y in (k, v))
        if i in config.lrpe_layers:
            channel = torch.arange(heads * width, dtype=torch.float64)
            theta = (10_000 ** (-2 * channel / (heads * width))).view(heads, 1, width)
            angle = theta * torch.arange(ids.shape[1])[:, None]
            q, k = (torch.cat([y * angle.cos(), y * angle.sin()], -1) for y in (q, k))
        alibi = [2 ** (-8 * (h + 1) / heads) for h in range(heads)]  # H = 2^n
        slopes = torch.tensor(config.decay_slopes or alibi, dtype=torch.float64)
        decay = None if config.decay == "none" else -slopes * (1 - i / (config.num_hidden_layers - 1) + 1e-5)
        o, _ = recurrent(q, k, v, decay, config.qk_norm == "l2")
        o = norm(o.transpose(1, 2).flatten(2))
        x = x + (o * u[0] if config.gate else o) @ w[p + "token_mixer.out_proj.weight"].T
        y = norm(x)
        y = (y @ w[p + "channel_mixer.l1.weight"].T) * (y @ w[p + "channel_mixer.l2.weight"].T)
        x = x + y @ w[p + "channel_mixer.l3.weight"].T
    return norm(x) @ w["lm_head.weight"].T


@all_variants
@torch.no_grad()
def test_equals_the_published_equations(variant: str) -> None:
    model, ids = tiny_model(variant), random_ids(2, 75)
    logits = model(ids).logits
    assert_near(logits, logits_by_the_equations(model, ids))
    assert logits.std() > 0.3  # or the tolerance would mean nothing


@torch.no_grad()
def test_without_a_gate_only_its_projection_is_missing() -> None:
    ids = random_ids(1, 20)
    gated = {name: tuple(x.shape) for name, x in tiny_model(num_key_value_heads=2).named_parameters()}
    model = tiny_model(num_key_value_heads=2, gate=False)
    for name, x in model.named_parameters():
        rows = 32 + 16 + 16 if name.endswith("qkvu_proj.weight") else gated[name][0]
        assert tuple(x.shape) == (rows, *gated[name][1:])
    assert len(gated) == len(list(model.parameters()))
    out = model(ids[:, :-1])
    assert_near(model(ids[:, -1:], past_key_values=out.past_key_values).logits[:, 0], model(ids).logits[:, -1])


@all_variants
@torch.no_grad()
def test_a_token_changes_nothing_before_it(variant: str, device: torch.device) -> None:
    model, ids = tiny_model(variant, device), random_ids(2, 150, device=device)
    logits = model(ids).logits
    for t in (0, 63, 64, 100, 149):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % VOCABULARY
        other = model(changed).logits
        assert torch.equal(other[0, :t], logits[0, :t])
        assert torch.equal(other[1], logits[1])
        assert not torch.equal(other[0, t], logits[0, t])


@pytest.mark.parametrize("shape", [(1, 768), (2, 192), (3, 100), (1, 1)])
@torch.no_grad()
def test_any_head_width(shape: tuple[int, int]) -> None:
    heads, width = shape
    model = tiny_model(num_attention_heads=heads, head_dim=width, num_hidden_layers=2)
    ids = random_ids(1, 70)
    out = model(ids[:, :-1])
    assert_near(model(ids[:, -1:], past_key_values=out.past_key_values).logits[:, 0], model(ids).logits[:, -1])


@torch.no_grad()
def test_one_layer_and_one_head() -> None:
    model, ids = tiny_model(num_attention_heads=1, num_hidden_layers=1), random_ids(1, 20)
    assert torch.isfinite(model(ids).logits).all()


@torch.no_grad()
def test_empty_rows_and_batches() -> None:
    model = tiny_model()
    assert model(random_ids(2, 0)).logits.shape == (2, 0, VOCABULARY)
    assert model(random_ids(0, 5)).logits.shape == (0, 5, VOCABULARY)


def parameters_by_hand(vocabulary: int, width: int, layers: int, glu: int, tied: bool) -> int:
    """q, k, v, u and out of width² each, three GLU matrices, one θ a channel in the first layer, no biases or norms."""
    block = 4 * width * width + width * width + 3 * width * glu
    return vocabulary * width * (1 if tied else 2) + layers * block + width


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("width", "layers", "heads", "glu"), [(1024, 24, 8, 2816), (2048, 16, 16, 5632), (4096, 30, 32, 11008)]
)
def test_published_sizes(width: int, layers: int, heads: int, glu: int, tied: bool) -> None:
    config = TransnormerConfig(
        vocab_size=64_000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=glu,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = TransnormerForCausalLM(config)
    model.tie_weights()
    assert sum(x.numel() for x in model.parameters()) == parameters_by_hand(64_000, width, layers, glu, tied)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


@some_variants
def test_labels(variant: str, device: torch.device) -> None:
    model, ids = tiny_model(variant, device), random_ids(3, 20, device=device)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, cross_entropy(out.logits[:, :-1], ids[:, 1:]))
    labels = ids.clone()
    labels[0, :12] = -100
    labels[2] = -100
    torch.testing.assert_close(model(ids, labels=labels).loss, cross_entropy(out.logits[:, :-1], labels[:, 1:]))


def test_shifted_labels_and_a_given_number_of_items() -> None:
    model, ids = tiny_model(), random_ids(2, 20)
    targets = random_ids(2, 20, seed=2)
    targets[0, :5] = -100
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, shift_labels=targets).loss, cross_entropy(logits, targets))
    total = cross_entropy(logits, targets, "sum")
    torch.testing.assert_close(model(ids, shift_labels=targets, num_items_in_batch=70).loss, total / 70)
    items = torch.tensor(70)
    torch.testing.assert_close(model(ids, shift_labels=targets, num_items_in_batch=items).loss, total / 70)


def test_accumulation_by_number_of_items_equals_one_batch() -> None:
    model, ids = tiny_model(), random_ids(4, 30)
    labels = ids.clone()
    labels[0, :25] = -100  # rows of unequal weight
    items = (labels[:, 1:] != -100).sum()
    model(ids, labels=labels, num_items_in_batch=items).loss.backward()
    expected = [grad.clone() for grad in gradients(model)]
    model.zero_grad()
    for row in range(4):
        model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=items).loss.backward()
    assert_all_near(gradients(model), expected, 1e-5)


def test_loss_without_logits() -> None:
    model, ids = tiny_model(), random_ids(2, 20)
    full, short = model(ids, labels=ids), model(ids, labels=ids, skip_logits=True)
    assert short.logits is None
    assert torch.equal(short.loss, full.loss)
    loss, *rest = model.train()(ids, labels=ids, skip_logits=True, return_dict=False)
    assert torch.equal(loss, full.loss)
    assert rest == []


@torch.no_grad()
def test_logits_to_keep() -> None:
    model, ids = tiny_model(), random_ids(2, 20)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, logits[:, -1:])
    torch.testing.assert_close(model(ids, logits_to_keep=7).logits, logits[:, -7:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])


@torch.no_grad()
def test_inputs_embeds() -> None:
    model, ids = tiny_model(), random_ids(2, 20)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


@torch.no_grad()
def test_hidden_states_are_those_between_the_layers() -> None:
    model, ids = tiny_model(num_hidden_layers=3), random_ids(2, 20)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, seen, strict=False))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 4


@torch.no_grad()
def test_tuples_instead_of_outputs() -> None:
    model, ids = tiny_model(), random_ids(2, 20)
    expected = model(ids, labels=ids)
    loss, logits, cache = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    assert cache.get_seq_length() == 20
    hidden, _ = model.model(ids, return_dict=False)
    assert torch.equal(model.lm_head(hidden), expected.logits)
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], expected.logits)


# transformers 5.23 calls these methods activation_checkpointing_*, a name that older versions lack.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@some_variants
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(variant: str, reentrant: bool) -> None:
    model, ids = tiny_model(variant).train(), random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    for batch in ({}, {"attention_mask": mask}):
        model.gradient_checkpointing_disable()
        model.zero_grad()
        model(ids, labels=ids, **batch).loss.backward()
        expected = [grad.clone() for grad in gradients(model)]
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        model(ids, labels=ids, **batch).loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_refuses_a_cache() -> None:
    model, ids = tiny_model().train(), random_ids(1, 20)
    cache = model(ids, use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="use_cache: expected False"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match="use_cache: expected False"):
        model(ids, past_key_values=cache)
    model.eval()(ids, use_cache=True)


def test_every_parameter_learns(device: torch.device) -> None:
    for variant in ("mha-lrpe-fixed", "one-head-learned", "gqa-l2-learned-tied", "mqa-lrpe2-l2-fixed"):
        model, ids = tiny_model(variant, device).train(), random_ids(2, 40, device=device)
        model(ids, labels=ids).loss.backward()
        assert all(torch.isfinite(grad).all() and grad.abs().max() > 0 for grad in gradients(model))


def test_gradient_of_theta_and_decay_equal_finite_differences() -> None:
    model, ids = tiny_model("one-head-learned"), random_ids(1, 30)
    model(ids, labels=ids).loss.backward()
    mixer = model.model.layers[0].token_mixer
    for x, i in ((mixer.decay_log, 0), (mixer.lrpe.theta, 0), (mixer.lrpe.theta, 11)):
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                x.view(-1)[i] += step
                losses.append(model(ids, labels=ids).loss.double())
                x.view(-1)[i] -= step
        assert x.grad is not None
        assert_near(x.grad.view(-1)[i], (losses[0] - losses[1]) / 2e-2, 2e-3 * max(1, abs(x.grad.view(-1)[i].item())))


def test_learns_to_copy() -> None:
    model, ids = tiny_model().train(), random_ids(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@all_variants
@torch.no_grad()
def test_save_and_load_is_bitwise_equal(variant: str, tmp_path: Path) -> None:
    model, ids = tiny_model(variant), random_ids(2, 30)
    for layer in model.model.layers:  # values that no initialisation gives
        for x in layer.token_mixer.parameters():
            x.add_(0.01)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is TransnormerForCausalLM
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], x) for name, x in model.state_dict().items())
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is TransnormerModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TransnormerConfig)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert torch.equal(again(ids).last_hidden_state, model.model(ids).last_hidden_state)


@torch.no_grad()
def test_every_key_of_a_checkpoint_is_used(tmp_path: Path) -> None:
    tiny_model("one-head-learned").save_pretrained(tmp_path)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@torch.no_grad()
def test_tied_weights_stay_one_matrix(tmp_path: Path) -> None:
    model = tiny_model("gqa-l2-learned-tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    untied = tiny_model()
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_resized_vocabulary(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    model.resize_token_embeddings(VOCABULARY + 9)
    assert model.config.vocab_size == VOCABULARY + 9
    ids = random_ids(1, 5)
    assert model(ids, labels=ids).logits.shape == (1, 5, VOCABULARY + 9)


def sensitive(model: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in model.named_parameters() if name.endswith(("theta", "decay_log"))}


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_half_precision_keeps_theta_and_decay_in_float32(saved: torch.dtype, tmp_path: Path) -> None:
    model, ids = tiny_model("one-head-learned"), random_ids(1, 40)
    exact = {name: x.clone() for name, x in sensitive(model).items()}
    model.save_pretrained(tmp_path / "first")
    asked = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=saved)
    asked.save_pretrained(tmp_path / "second")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    for half in (asked, loaded):
        assert half.dtype == saved
        assert half.model.layers[0].token_mixer.qkvu_proj.weight.dtype == saved
        assert sensitive(half).keys() == exact.keys()
        assert len(exact) == 3
        for name, x in sensitive(half).items():
            assert x.dtype == torch.float32
            assert torch.equal(x, exact[name])
        out = half(ids)
        assert out.logits.dtype == saved
        assert all(layer.state.dtype == torch.float32 for layer in out.past_key_values.layers)
        assert_near(out.logits, model(ids).logits, 1e-6 if saved == torch.float32 else 0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_fixed_decay_survives_any_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = tiny_model(), random_ids(1, 40)
    model.save_pretrained(tmp_path)
    cpu = torch.device("cpu")
    expected = [layer.token_mixer.log_decay(cpu) for layer in model.model.layers]
    logits = model(ids).logits
    for cast in (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), model.to(dtype)):
        actual = [layer.token_mixer.log_decay(cpu) for layer in cast.model.layers]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert_near(cast(ids).logits, logits, 0.25 if dtype != torch.float64 else 1e-4)


@torch.no_grad()
def test_values_right_after_loading_without_weights(tmp_path: Path) -> None:
    """What a checkpoint lacks is initialised, not left as the memory of the meta device."""
    base = tiny_model("one-head-learned")
    names = sensitive(base).keys()
    weights = {name: x for name, x in base.state_dict().items() if name not in names}
    base.save_pretrained(tmp_path, state_dict=weights)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, x in sensitive(loaded).items():
        assert torch.equal(x, sensitive(base)[name]), name


@torch.no_grad()
def test_float16_is_finite_with_normalised_queries_and_keys_only(device: torch.device) -> None:
    torch.manual_seed(0)
    q, k, v = (30 * torch.randn(1, 1, 8192, 768, device=device) for _ in range(3))
    q, k, v = (x.half() for x in (q, k, v))
    o, state = lightning_attention(q, k, v, qk_norm=True, output_final_state=True)
    assert torch.isfinite(o).all()
    assert torch.isfinite(state).all()
    o = lightning_attention(q, k, v)
    # Sums and state are float32: it is the output, Σ (q·k) v of some 30³ · √(768 · T), that leaves float16's range.
    assert torch.isinf(o).any()
    largest = lightning_attention(q.float(), k.float(), v.float()).abs().max()
    assert largest > torch.finfo(torch.float16).max


@torch.no_grad()
def test_float16_attention_is_finite_with_l2_only(device: torch.device) -> None:
    """The same through the model's attention, where silu makes q and k positive and the sums larger still."""
    outputs = {}
    for qk_norm in ("none", "l2"):
        shape = {
            "hidden_size": 64,
            "num_attention_heads": 1,
            "head_dim": 768,
            "num_hidden_layers": 1,
            "lrpe_layers": [],
        }
        model = tiny_model(**shape, qk_norm=qk_norm, decay="none", initializer_range=0.125)  # 1/√64
        attention = model.model.layers[0].token_mixer.to(device).half()
        x = 30 * torch.randn(1, 8192, 64, generator=torch.Generator().manual_seed(0))
        outputs[qk_norm] = attention(x.half().to(device), torch.arange(8192, device=device)[None])
    assert torch.isfinite(outputs["l2"]).all()
    assert not torch.isfinite(outputs["none"]).all()


@some_variants
def test_autocast(variant: str, device: torch.device) -> None:
    model, ids = tiny_model(variant, device).train(), random_ids(2, 80, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert all(torch.isfinite(grad).all() and grad.dtype == torch.float32 for grad in gradients(model))
    exact = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, exact.loss, rtol=0.03, atol=0.03)


@torch.no_grad()
def test_autocast_generates_as_it_runs(device: torch.device) -> None:
    model, ids = tiny_model("gqa-l2-learned-tied", device), random_ids(2, 40, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out = model(ids[:, :-1])
        step = model(ids[:, -1:], past_key_values=out.past_key_values)
        assert_near(step.logits[:, 0], model(ids).logits[:, -1], 0.1)


@pytest.mark.parametrize("variant", ["mha-lrpe-fixed", "gqa-l2-learned-tied"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_in_one_graph(variant: str, packed: bool, device: torch.device) -> None:
    torch.compiler.reset()
    model, ids = tiny_model(variant, device).train(), random_ids(1, 48, device=device)
    bounds = torch.tensor([0, 10, 31, 48], dtype=torch.int32, device=device)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids} | ({"cu_seq_lens_q": bounds} if packed else {})
    loss = model(**batch).loss
    loss.backward()
    expected = [grad.clone() for grad in gradients(model)]
    model.zero_grad()
    # "aot_eager" traces forward and backward as "inductor" does, without minutes of generating code.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch).loss
    compiled.backward()
    torch.testing.assert_close(compiled, loss)
    assert_all_near(gradients(model), expected, 1e-5)


@torch.no_grad()
def test_compiled_in_evaluation_with_padding_and_cache() -> None:
    torch.compiler.reset()
    model, ids = tiny_model(), random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(
        compiled(ids, attention_mask=mask).logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()]
    )
    cache, expected = compiled(ids).past_key_values, model(ids).past_key_values
    assert_near(compiled(ids[:, :1], past_key_values=cache).logits, model(ids[:, :1], past_key_values=expected).logits)
