"""The figure of loss curves and its script."""

import json
import math
import random
from pathlib import Path

import pytest

from scripts.plot_run import main
from training.report import plot_runs, smooth


def write_run(out: Path, steps: int, floor: float, evaluate_every: int = 0) -> Path:
    out.mkdir(parents=True)
    noise = random.Random(floor)
    with (out / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = floor + (8.3 - floor) * math.exp(-6 * step / steps) + noise.gauss(0, 0.15)
            record = {"step": step, "tokens": step * 8192, "loss": None if step == 5 else loss}
            file.write(json.dumps(record) + "\n")
    if evaluate_every:
        with (out / "evaluations.jsonl").open("w") as file:
            for step in range(evaluate_every, steps + 1, evaluate_every):
                loss = floor + 0.2 + (8.3 - floor) * math.exp(-6 * step / steps)
                file.write(json.dumps({"step": step, "tokens": step * 8192, "validation_loss": loss}) + "\n")
    return out


def test_several_runs_make_one_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "lightning", 400, 2.5, evaluate_every=80)
    second = write_run(tmp_path / "one-head", 300, 2.9)
    with (second / "metrics.jsonl").open("a") as file:
        file.write('{"step": 301, "tok')
    target = tmp_path / "figures" / "loss.png"
    assert main([str(first), str(second), "--out", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{target}\n"


def test_the_legend_tells_runs_of_the_same_name_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / parent / "seed0", 10, 2.0, evaluate_every=5) for parent in ("a", "b")]
    plot_runs(runs, tmp_path / "loss.svg")
    text = (tmp_path / "loss.svg").read_text()
    for run in runs:
        assert f"{run}, training" in text
        assert f"{run}, validation" in text
    assert "training tokens" in text
    assert "loss (nats per token)" in text


def test_a_single_step_can_be_drawn(tmp_path: Path) -> None:
    plot_runs([write_run(tmp_path / "run", 1, 2.0)], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_smoothing_averages_without_lag_and_skips_gaps() -> None:
    assert smooth([2.0, math.nan, 2.0, 2.0], 10) == pytest.approx([2.0] * 4)
    assert math.isnan(smooth([math.nan], 1)[0])
    line = [5.0 - 0.1 * i for i in range(20)]
    assert smooth(line, 4)[:15] == pytest.approx(line[:15])
    assert smooth([0.0, 3.0, 0.0, 3.0, 0.0], 1) == pytest.approx([0.0, 1.0, 2.0, 1.0, 1.5])
    assert smooth([1.0, 7.0], 0) == [1.0, 7.0]


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "x.png")]) == 2
    assert f"{tmp_path / 'nothing'}: expected a run" in capsys.readouterr().err
    run = write_run(tmp_path / "run", 3, 2.0)
    assert main([str(run), "--out", str(tmp_path / "x.doc")]) == 2
    assert "x.doc: expected a suffix among" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 1, "loss": 1}\nbroken\n{"step": 2}\n')
    assert main([str(run)]) == 4
    assert "metrics.jsonl:2: expected a JSON object" in capsys.readouterr().err
