"""scripts/benchmark_step.py: one token of decoding against a copy."""

import re

import pytest
import torch

from scripts.benchmark_step import captured_step, main


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_takes_a_token_of_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    step = captured_step(2, 3, 2, 16, torch.bfloat16)
    step.states.zero_()
    step.graph.replay()
    step.graph.replay()
    expected = step.k.float().mT * step.v.float() * (1 + step.log_decay.exp()[:, None, None])
    torch.testing.assert_close(step.states, expected.expand_as(step.states))
    main(["--batch", "1", "2", "--layers", "2", "--repeats", "2"])
    assert len(re.findall(r"batch \d: \d+\.\d\d us", capsys.readouterr().out)) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--heads", "0"], "--heads: expected a whole number from 1, got 0"),
        (["--batch", "4", "-1"], "--batch: expected whole numbers from 1, got -1"),
        (["--repeats", "0"], "--repeats: expected a whole number from 1, got 0"),
    ],
)
def test_wrong_options(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
