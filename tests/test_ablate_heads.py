"""The instrument of ablations: variants, sizes, budgets; runs that are skipped, go on, fail and are stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from model import TransnormerForCausalLM
from scripts import evaluate
from scripts.ablate_heads import main
from scripts.ablation_report import read_results
from scripts.ablation_runs import Job, Machine, run_jobs
from scripts.ablation_variants import Base, Budget, make_variants, overlay_text, parse_pair
from training.config import config_values, load_config
from training.errors import ConfigError
from training.metrics import flops_per_token
from training.outcome import Interrupted
from training.setup import model_config

ROOT = Path(__file__).parents[1]
BASE = {
    "model": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    "data": {"corpus": "recall", "recall_pairs": 2, "recall_symbols": 20, "recall_examples": 100, "sequence_length": 8},
    "training": {"steps": 4, "batch_size": 4, "micro_batch_size": 4, "eval_every": 2, "sample_prompt": ""},
    "checkpoint": {"every": 0},
}


@pytest.fixture
def base_file(tmp_path: Path) -> str:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump({**BASE, "data": BASE["data"] | {"cache_dir": str(tmp_path / "cache")}}))
    return str(path)


def variants_of(file: str, pairs: list[str], varied=(), overlays=(), arguments=()):
    return make_variants(Base([file], list(arguments)), pairs, varied, overlays)


def test_pairs_are_read_or_refused() -> None:
    assert [parse_pair(text).name for text in ("12x64", "1\u00d7768", "12x64/1", "4x192/4")] == [
        "12x64",
        "1x768",
        "12x64/1",
        "4x192",
    ]
    for text in ("12", "0x64", "12x", "-1x3", "12x64/0", "12*64", "12x64/"):
        with pytest.raises(ConfigError, match="expected heads x width such as 12x64"):
            parse_pair(text)
    with pytest.raises(ConfigError, match="12x64/5: expected a divisor of 12"):
        parse_pair("12x64/5")


def test_sizes_are_those_of_the_models(base_file: str) -> None:
    for variant in variants_of(base_file, ["8x8", "4x16", "1x64", "8x8/2", "8x8/1"]):
        shape = model_config(variant.config, vocab_size=261 + 20, special_ids={})
        parameters = sum(p.numel() for p in TransnormerForCausalLM(shape).parameters())
        assert variant.size.parameters == parameters
        assert variant.size.flops_per_token == flops_per_token(shape)
        assert (shape.num_attention_heads, shape.head_dim) == (variant.pair.heads, variant.pair.width)
        assert variant.size.state_size == 3 * 64 * variant.pair.width  # 2 layers, one of them with LRPE
        assert parameters == pytest.approx(2 * (5 * 64**2 + 3 * 64 * 96) + 2 * 281 * 64 + 64, rel=0.005)
    equal = [v.size.parameters for v in variants_of(base_file, ["8x8", "4x16", "1x64"])]
    assert len(set(equal)) == 1


def test_what_fewer_key_value_heads_save_goes_into_the_glu() -> None:
    wide = ["--model.hidden_size=768", "--model.intermediate_size=2048", "--model.num_hidden_layers=12"]
    full, shared = make_variants(Base([], wide), ["12x64", "12x64/1"], (), ())
    assert shared.config.model.intermediate_size == 2048 + 472  # 2 · 11 · 64 / 3 = 469, to a multiple of 8
    assert shared.size.parameters == pytest.approx(full.size.parameters, rel=0.001)


def test_pairs_values_and_overlays_are_combined(base_file: str, tmp_path: Path) -> None:
    overlay = tmp_path / "no_gate.yaml"
    overlay.write_text("model: {gate: false}")
    found = variants_of(base_file, ["4x16", "1x64"], [["model.decay", "fixed", "none"]], [str(overlay)])
    assert [variant.name for variant in found] == [
        "4x16 decay=fixed",
        "1x64 decay=fixed",
        "4x16 decay=none",
        "1x64 decay=none",
        "4x16 decay=fixed no_gate",
        "1x64 decay=fixed no_gate",
        "4x16 decay=none no_gate",
        "1x64 decay=none no_gate",
    ]
    assert found[-1].settings == {"model.decay": "none", "model.gate": False}
    assert found[0].settings == {"model.decay": "fixed"}
    assert found[-1].config.model.gate is False
    assert found[0].folder == "4x16_decay=fixed"
    assert found[4].size.parameters < found[0].size.parameters
    narrow, wide = variants_of(base_file, ["8x8/1"], [["model.intermediate_size", "64", "96"]])
    assert (narrow.settings, wide.settings) == ({"model.intermediate_size": 64}, {"model.intermediate_size": 96})
    assert narrow.config.model.intermediate_size == 64 + 37  # 2 · 7 · 8 / 3
    (alone,) = variants_of(base_file, [], arguments=["--model.head_dim=8"])
    assert alone.name == "4x8"


@pytest.mark.parametrize(
    ("pairs", "varied", "arguments", "message"),
    [
        (["4x16", "1x32"], [], [], r"--pairs: expected one product of heads and width, got \[32, 64\]"),
        (["4x16", "4x16"], [], [], "expected variants that differ, 4x16 and 4x16 are the same"),
        (["4x16"], [["model.decay"]], [], "--vary: expected a key of the configuration and its values"),
        (["4x16"], [["model.decy", "fixed"]], [], "--vary: expected a key of the configuration"),
        (["4x16"], [["model.decay", "fast"]], [], "model.decay: expected one of fixed, learned, none, got fast"),
        (["4x16"], [["model.head_dim", "8"]], [], "--vary model.head_dim: expected --pairs"),
        (["4x16", "1x64"], [], ["--model.decay_slopes=[0.5]"], "decay_slopes: expected 4 numbers"),
        (["4x16"], [["seed", "1", "2"]], [], "--vary seed: expected another key; see --seeds and --tokens"),
        (["4x16"], [["training.steps", "1", "2"]], [], "--vary training.steps: expected another key"),
        (["4x16"], [["optim.lr", "1e-3", "0.001"]], [], "4x16 lr=1e-3 and 4x16 lr=0.001 are the same"),
        (["4x16"], [["data.recall_symbols", "20", "30"]], [], "4x16 recall_symbols=20: expected the same data for all"),
        (["4x16"], [], ["--data.recall_pairs=80"], "data.sequence_length: expected an even number from 320"),
        (["4x16"], [], ["--model.gate=maybe"], "model.gate: expected true or false, got maybe"),
    ],
)
def test_variants_that_can_not_be_are_refused(base_file, pairs, varied, arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        variants_of(base_file, pairs, varied, (), arguments)


def test_folders_differ_where_names_do(base_file: str) -> None:
    values = ["!", "?", "a" * 300, "a" * 299 + "b", "plain"]
    folders = [v.folder for v in variants_of(base_file, ["8x8/1"], [["training.sample_prompt", *values]])]
    assert len(set(folders)) == 5
    assert max(map(len, folders)) < 120
    assert folders[-1] == "8x8kv1_sample_prompt=plain"


def test_an_overlay_that_changes_nothing_is_refused(base_file: str, tmp_path: Path) -> None:
    overlay = tmp_path / "same.yaml"
    overlay.write_text("model: {gate: false}")
    with pytest.raises(ConfigError, match=r"same\.yaml: expected keys that change something"):
        variants_of(base_file, ["4x16"], (), [str(overlay)], ["--model.gate=true"])


def test_overlays_give_back_the_configuration(base_file: str, tmp_path: Path) -> None:
    arguments = ["--optim.lr=0.002", "--model.decay_slopes=[0.5]", "--tokenizer.path=null", "--optim.eps=1e-9"]
    (variant,) = variants_of(base_file, ["1x64"], [["model.qk_norm", "l2"]], (), arguments)
    file = tmp_path / "overlay.yaml"
    file.write_text(overlay_text(Base([base_file], arguments), variant.config))
    assert load_config(["--config", base_file, "--config", str(file)]).config == variant.config
    assert set(yaml.safe_load(file.read_text())["model"]) == {
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "qk_norm",
        "decay_slopes",
    }


def test_budgets_are_steps(base_file: str) -> None:
    narrow, wide = variants_of(base_file, ["4x16", "1x64"])
    assert Budget("tokens", 320).steps(narrow, None) == Budget("tokens", 320).steps(wide, None) == 10
    assert Budget("tokens", 17).steps(narrow, None) == 1
    for amount in (15, 1e30):
        with pytest.raises(ConfigError, match="--tokens: 4x16: expected a budget of 1 step or more, of 32 tokens each"):
            Budget("tokens", amount).steps(narrow, None)
    flops = 50 * 32 * wide.size.flops_per_token
    assert Budget("flops", flops).steps(wide, None) == 50
    ratio = wide.size.flops_per_token / narrow.size.flops_per_token
    assert Budget("flops", flops).steps(narrow, None) == round(50 * ratio) > 50
    assert Budget("seconds", 10.0).steps(narrow, 640.0) == 200


def test_runs_are_made_skipped_and_added_to(base_file, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    command = ["--config", base_file, "--out", str(out), "--parallel", "2", "--pairs", "4x16"]
    assert main([*command, "1x64", "--seeds", "0"]) == 0
    printed = capsys.readouterr()
    assert "2 of 2 runs" in printed.err
    assert "| 4x16 |" in printed.out
    first, second = read_results(out / "results.jsonl")
    assert {first.variant, second.variant} == {"4x16", "1x64"}
    for result in (first, second):
        assert (result.steps, result.tokens) == (4, 128)
        evaluations = [
            json.loads(line) for line in (out / result.folder / "evaluations.jsonl").read_text().splitlines()
        ]
        assert [record["step"] for record in evaluations] == [2, 4]
        assert result.validation_loss == evaluations[-1]["validation_loss"]
        assert result.accuracy == evaluations[-1]["accuracy"]
        assert result.best_validation_loss == min(record["validation_loss"] for record in evaluations)
        assert result.device == "cpu"
        ran = load_config(["--config", str(out / result.folder / "config.yaml")]).config
        assert ran.model.num_attention_heads == result.heads
        assert ran.tracking.wandb_group == result.variant
        said = (out / "logs" / f"{result.variant}_seed0.log").read_text()
        assert f"{result.parameters:,} parameters" in said
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/seed*/metrics.jsonl")}
    assert main([*command, "--seeds", "0"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/seed*/metrics.jsonl")} == before
    assert len(read_results(out / "results.jsonl")) == 2
    assert main([*command, "--seeds", "0", "--tokens", "64"]) == 2
    assert "holds a run with training.steps 4, expected 2; give another --out" in capsys.readouterr().err
    assert yaml.safe_load((out / "overlays" / "4x16.yaml").read_text())["tracking"] == {"wandb_group": "4x16"}
    assert "steps" not in (out / "overlays" / "4x16.yaml").read_text()
    assert main([*command, "--seeds", "1", "--optim.lr", "0.5"]) == 2
    assert "4x16/seed0 holds a run with optim.lr 0.001, expected 0.5; give another --out" in capsys.readouterr().err
    assert main([*command, "--seeds", "1", "--model.intermediate_size", "97"]) == 2
    assert "holds a run with model.intermediate_size 96, expected 97" in capsys.readouterr().err
    assert not (out / "4x16" / "seed1").exists()
    evaluations = out / "4x16" / "seed0" / "evaluations.jsonl"
    kept = evaluations.read_bytes()
    evaluations.write_bytes(kept.splitlines(keepends=True)[0])
    assert main([*command, "1x64", "--seeds", "0"]) == 1
    printed = capsys.readouterr()
    assert "4x16 seed 0 failed:" in printed.err
    assert "evaluations.jsonl up to step 4; remove the folder to run it again" in printed.err
    assert "Failed: 4x16 seed 0" in (out / "table.md").read_text()
    evaluations.write_bytes(kept)
    assert (
        evaluate.main([str(out / "4x16" / "seed0"), "--config", str(out / "4x16" / "seed0" / "config.yaml"), "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(
        first.accuracy if first.variant == "4x16" else second.accuracy
    )
    assert len((out / "commands.txt").read_text().splitlines()) == 2
    page = (out / "report.html").read_text()
    assert "1x64" in page
    assert "train.py" in page


FAKE = """
import json, signal, sys, time, pathlib
out, seconds, code = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
out.mkdir(parents=True, exist_ok=True)
def end(code, reason):
    (out / "exit.json").write_text(json.dumps({"exit_code": code, "reason": reason}))
    sys.exit(code)
signal.signal(signal.SIGTERM, lambda *_: end(143, "stopped"))
(out / "began").write_text(str(time.monotonic()))
time.sleep(seconds)
(out / "metrics.jsonl").write_text(json.dumps({"step": 4, "tokens": 128, "loss": 1.0}) + "\\n")
(out / "ended").write_text(str(time.monotonic()))
end(code, "as told")
"""


def fake_job(variant, tmp_path: Path, seed: int, seconds: float = 0.0, code: int = 0) -> Job:
    """A job whose command behaves as a run does towards the instrument."""
    out = tmp_path / f"run{seed}"
    command = [sys.executable, "-c", FAKE, str(out), str(seconds), str(code)]
    return Job(variant, seed, replace(variant.config, seed=seed), out, tmp_path / f"run{seed}.log", command)


def span(job: Job) -> tuple[float, float]:
    return float((job.out / "began").read_text()), float((job.out / "ended").read_text())


def test_runs_go_side_by_side_and_failures_are_told(base_file: str, tmp_path: Path) -> None:
    (variant,) = variants_of(base_file, ["4x16"])
    jobs = [
        fake_job(variant, tmp_path, 0, 1.0),
        fake_job(variant, tmp_path, 1, 1.0),
        fake_job(variant, tmp_path, 2, code=5),
    ]
    finished: list[Job] = []
    failed = run_jobs(jobs, Machine(2, [], "cpu"), finished.append)
    assert [job.seed for job in finished] == [0, 1]
    assert list(failed) == ["4x16 seed 2"]
    assert "exit code 5: as told" in failed["4x16 seed 2"]
    (begin, _), (other, end) = span(jobs[0]), span(jobs[1])
    assert other < begin + 1.0
    assert span(jobs[2])[0] > min(span(jobs[0])[1], end)


def test_each_run_gets_its_gpu_or_its_cores() -> None:
    two = Machine(4, ["3", "5"], "some GPU")
    assert [two.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["3", "5", "3", "5"]
    cores = len(os.sched_getaffinity(0))
    assert two.environment(3)["OMP_NUM_THREADS"] == str(max(1, cores // 4))
    assert Machine(1, [], "cpu").environment(0)["OMP_NUM_THREADS"] == str(cores)
    assert Machine(10 * cores, [], "cpu").environment(3)["OMP_NUM_THREADS"] == "1"


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """What a stopped instrument leaves ignored is heard again after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signal_handlers")
def test_a_signal_stops_all_runs(base_file: str, tmp_path: Path) -> None:
    (variant,) = variants_of(base_file, ["4x16"])
    jobs = [fake_job(variant, tmp_path, seed, 60.0) for seed in range(3)]
    watcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, pathlib, signal, sys, time\n"
            "while not all(pathlib.Path(p, 'began').exists() for p in sys.argv[2:]): time.sleep(0.05)\n"
            "os.kill(int(sys.argv[1]), signal.SIGTERM)",
            str(os.getpid()),
            str(jobs[0].out),
            str(jobs[1].out),
        ]
    )
    began = time.monotonic()
    with pytest.raises(Interrupted, match="stopped by SIGTERM; the same command goes on"):
        run_jobs(jobs, Machine(2, [], "cpu"), lambda job: None)
    watcher.wait()
    assert time.monotonic() - began < 30
    assert [json.loads((job.out / "exit.json").read_text())["exit_code"] for job in jobs[:2]] == [143, 143]
    assert not jobs[2].out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3"], "--seed: expected no such key here"),
        (["--seeds", str(2**63)], "seed: expected a whole number that 64 bits hold"),
        (["--seeds", "1", "1"], "--seeds: expected different numbers from 0, got 1 1"),
        (["--parallel", "0"], "--parallel: expected 1 or more runs at once, got 0"),
        (["--optim.lrr", "1"], "--optim.lrr: no such option; did you mean optim.lr?"),
        (["--baseline", "7x7"], "--baseline: expected one of the variants 4x16, got 7x7"),
        (["--config", "missing.yaml"], "missing.yaml: No such file"),
    ],
)
def test_mistakes_are_named_before_anything_runs(base_file, tmp_path, capsys, arguments, message) -> None:
    assert main(["--config", base_file, "--out", str(tmp_path / "out"), "--pairs", "4x16", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_configs_of_ablations_make_their_variants() -> None:
    for name, pairs in (("heads", ["12x64", "1x768", "12x64/1"]), ("demo", ["8x4", "1x32"])):
        file = str(ROOT / "configs" / "ablation" / f"{name}.yaml")
        assert len(make_variants(Base([file], []), pairs, (), ())) == len(pairs)
    recall = str(ROOT / "configs" / "ablation" / "recall.yaml")
    for n in (8, 16, 32):  # the three demands of docs/HEADS.md
        keys = [f"--data.recall_pairs={n}", f"--data.sequence_length={4 * n}"]
        assert len(make_variants(Base([recall], keys), ["8x8", "1x64"], (), ())) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "ablation").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_of_ablations_begins_with_its_command(path: Path) -> None:
    command = path.read_text().splitlines()[0].split()
    assert f"configs/ablation/{path.name}" in command
    files = [command[index + 1] for index, word in enumerate(command) if word == "--config"]
    config = load_config([part for file in files for part in ("--config", str(ROOT / file))]).config
    assert (
        config_values(config) != config_values(load_config(["--config", str(ROOT / files[0])]).config)
        or len(files) == 1
    )
