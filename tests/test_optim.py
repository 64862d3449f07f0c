"""Parameter groups, the schedule and AdamW's determinism."""

import math

import pytest
import torch

from model import TransnormerConfig, TransnormerForCausalLM
from training.config import OptimConfig
from training.errors import ConfigError
from training.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 11))


def test_only_trained_matrices_decay() -> None:
    model = small_model()
    model.theta = torch.nn.Parameter(torch.ones(2, 1, 4))
    model[0].weight.requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [p.data_ptr() for p in decayed["params"]] == [model[2].weight.data_ptr()]
    assert [tuple(p.shape) for p in plain["params"]] == [(2, 1, 4), (8,), (8,), (11,)]


def test_tied_parameters_count_once() -> None:
    model = small_model()
    model[2].weight = model[0].weight
    assert len(parameter_groups(model, 0.1)[0]["params"]) == 1


def test_a_model_of_matrices_alone_trains() -> None:
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = build_optimizer(model, OptimConfig(), "cpu")
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert len(optimizer.param_groups) == 1


def test_one_update_follows_the_formula_of_adamw() -> None:
    config = OptimConfig(lr=0.01, weight_decay=0.1)
    model = torch.nn.Linear(3, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = build_optimizer(model, config, "cpu")
    model(torch.tensor([[1.0, -2.0, 3.0]])).sum().backward()
    optimizer.step()
    # The first bias-corrected update is lr * sign(gradient), after a decay by lr * weight_decay.
    direction = torch.tensor([1.0, -1.0, 1.0]).expand(2, 3)
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.001) - 0.01 * direction)
    torch.testing.assert_close(model.bias.detach(), bias - 0.01)


def test_updates_on_the_cpu_do_not_depend_on_the_number_of_threads() -> None:
    def train(threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            model = torch.nn.Linear(333, 517)
            optimizer = build_optimizer(model, OptimConfig(), "cpu")
            for _ in range(3):
                for parameter in model.parameters():
                    parameter.grad = torch.randn_like(parameter)
                optimizer.step()
            return model.weight.detach()
        finally:
            torch.set_num_threads(before)

    assert torch.equal(train(1), train(2))


def test_cosine_warms_up_and_ends_at_min_lr() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(step, config, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[11] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates[19] == pytest.approx(0.1)
    assert learning_rate(25, config, 20) == pytest.approx(0.1)


def test_wsd_is_stable_then_falls_linearly() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=2, schedule="wsd", decay_share=0.4)
    rates = [learning_rate(step, config, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (7, 7), (6, 7), (100, 7), (1, 1)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_extreme_lengths_stay_in_range(schedule: str, warmup: int, total: int, share: float) -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=warmup, schedule=schedule, decay_share=share)
    rates = [learning_rate(step, config, total) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    if warmup < total and (schedule == "cosine" or round(share * total) > 0):
        assert rates[-1] == pytest.approx(0.1)


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ConfigError, match=r"optim\.schedule.*'cosine' or 'wsd'.*'linear'"):
        learning_rate(200, OptimConfig(schedule="linear"), 1000)


def test_set_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(small_model(), OptimConfig(), "cpu")
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_learned_decays_have_a_learning_rate_of_their_own() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = TransnormerForCausalLM(TransnormerConfig(vocab_size=11, decay="learned", decay_slopes=[1, 0.5], **sizes))
    optimizer = build_optimizer(model, OptimConfig(learned_decay_lr_scale=30.0, weight_decay=0.0), "cpu")
    set_learning_rate(optimizer, 0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.arange(11)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    decays = [moved.pop(f"model.layers.{layer}.token_mixer.decay_log") for layer in (0, 1)]
    assert decays[0] == pytest.approx(0.3, rel=1e-3)
    assert 0 < decays[1] < 0.31
    assert max(moved.values()) == pytest.approx(0.01, rel=1e-3)
