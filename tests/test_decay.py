"""Slopes, layer decays and powers of λ."""

import itertools
import math

import pytest
import torch

from ops.decay import alibi_slopes, causal_decay, layer_log_decay, powers, step_factors


def published_slopes(n: int) -> list[float]:
    """ALiBi's slopes as its authors describe them: powers of 2^(-8/n), or every second one of twice as many heads."""
    if math.log2(n).is_integer():
        ratio = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [ratio * ratio**i for i in range(n)]
    closest = 2 ** math.floor(math.log2(n))
    return published_slopes(closest) + published_slopes(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("heads", [*range(1, 41), 64, 100])
def test_slopes_are_the_published_ones(heads: int) -> None:
    slopes = alibi_slopes(heads).tolist()
    assert slopes == pytest.approx(published_slopes(heads), rel=2**-22)  # float32
    assert len(set(slopes)) == heads


def test_slopes_of_eight_heads() -> None:
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


def test_deeper_layers_forget_less() -> None:
    decays = [layer_log_decay(8, layer, 5).tolist() for layer in range(5)]
    assert decays[0] == pytest.approx([-s * (1 + 1e-5) for s in published_slopes(8)])
    assert decays[2] == pytest.approx([-s * (0.5 + 1e-5) for s in published_slopes(8)])
    assert decays[4] == pytest.approx([-s * 1e-5 for s in published_slopes(8)])
    assert all(x < y < 0 for a, b in itertools.pairwise(decays) for x, y in zip(a, b, strict=True))


def test_one_head_and_one_layer_divide_by_nothing() -> None:
    assert layer_log_decay(1, 0, 1).tolist() == pytest.approx([-(2**-8) * (1 + 1e-5)])


def test_given_slopes_take_the_place_of_alibis() -> None:
    slopes = [3, 0.5, 1e-30]
    for layer, rate in enumerate((1 + 1e-5, 0.5 + 1e-5, 1e-5)):
        decays = layer_log_decay(3, layer, 3, slopes=slopes)
        assert decays.dtype == torch.float32
        assert decays.tolist() == pytest.approx([-slope * rate for slope in slopes], rel=1e-6, abs=0)
    assert layer_log_decay(1, 0, 1, "meta", (0.25,)).shape == (1,)
    own = alibi_slopes(6)
    assert torch.equal(layer_log_decay(6, 1, 4, slopes=own.tolist()), layer_log_decay(6, 1, 4))


def test_powers() -> None:
    log_decay = torch.tensor([0.0, -0.5, -50.0, -math.inf], dtype=torch.float64)
    exponents = torch.tensor([[0, 1], [2, 1000]])
    expected = [
        [[math.exp(d * n) if n else 1.0 for n in row] for row in exponents.tolist()] for d in log_decay.tolist()
    ]
    torch.testing.assert_close(powers(log_decay, exponents), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [1e-9, math.inf, math.nan])
def test_a_wrong_log_decay_gives_nan_and_only_in_its_head(wrong: float) -> None:
    result = powers(torch.tensor([-1.0, wrong]), torch.arange(3))
    assert result[0].isfinite().all()
    assert result[1].isnan().all()


def test_powers_have_a_gradient() -> None:
    log_decay = torch.tensor([-0.5, -0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: powers(x, torch.arange(4)), log_decay)


@pytest.mark.parametrize("length", [0, 1, 5])
def test_the_causal_mask(length: int) -> None:
    mask = causal_decay(torch.tensor([0.0, -0.5, -200.0]), length)
    assert mask.shape == (3, length, length)
    for h, decay in enumerate((0.0, -0.5, -200.0)):
        for i in range(length):
            for j in range(length):
                expected = math.exp(decay * (i - j)) if i >= j else 0.0
                assert mask[h, i, j].item() == pytest.approx(expected, rel=1e-6, abs=1e-38)


@pytest.mark.parametrize("log_decay", [0.0, -1e-9, -4e-8, -1e-3, -0.4, -0.6, -8.0, -200.0, -math.inf])
def test_two_thousand_steps_are_one_power(log_decay: float) -> None:
    keep, change = step_factors(torch.tensor([log_decay]))
    gains = torch.rand(2000, 64, generator=torch.Generator().manual_seed(0))
    state = torch.full((64,), 3.0)
    expected = state.double()
    for gain in gains:
        state = keep * state + (change * state + gain)
        expected = math.exp(log_decay) * expected + gain.double()
    torch.testing.assert_close(state.double(), expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("wrong", [1e-9, math.inf, math.nan])
def test_step_factors_of_a_wrong_log_decay_are_nan(wrong: float) -> None:
    keep, change = step_factors(torch.tensor([-1.0, wrong]))
    assert (keep + change).isnan().tolist() == [False, True]
