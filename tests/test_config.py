"""Configurations: merged left to right, strict, and wrong ones refused with the key and what was expected."""

import contextlib
import dataclasses
from pathlib import Path

import pytest
import yaml

from model import TransnormerConfig
from training.config import Config, ModelConfig, config_dict, load_config
from training.errors import CheckpointError, ConfigError
from training.setup import refuse_other_run, run_identity

ROOT = Path(__file__).parents[1]


def write(folder: Path, text: str, name: str = "a.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_files_merge_left_to_right_and_the_command_line_wins(tmp_path):
    first = write(tmp_path, "seed: 1\noptim: {lr: 3e-4, beta1: 0.8}\nmodel: {lrpe_layers: [0, 2], decay_slopes: [3]}\n")
    more = "model: {decay_slopes: [1, 5e-1], gate: false}\ntracking: {wandb_group: no}\n"
    data = "data: {corpus: text, paths: ['a b.txt', '1', 'no']}\n"
    second = write(tmp_path, f"optim: {{lr: 1e-3}}\n{more}{data}", "b.yaml")
    run = load_config(
        ["--config", first, f"--config={second}", "--seed", "7", "--out", "x", "--import=a.b", "--import", "c"]
    )
    assert (run.config.seed, run.config.optim.lr, run.config.optim.beta1) == (7, 1e-3, 0.8)
    assert run.config.model.lrpe_layers == [0, 2]
    assert run.config.data.paths == ["a b.txt", "1", "no"]
    assert (run.config.model.decay_slopes, run.config.model.gate) == ([1.0, 5e-1], False)
    assert run.config.tracking.wandb_group == "no"
    assert (run.out, run.resume, run.imports) == (Path("x"), "auto", ["a.b", "c"])
    assert (load_config(["--resume=never"]).resume, load_config([]).imports) == ("never", [])


def test_yaml_words_keep_their_text(tmp_path):
    run = load_config(
        ["--config", write(tmp_path, "tracking: {wandb: off}\noptim: {lr: 3e-4}\ntokenizer: {path: null}\n")]
    )
    assert run.config.tracking.wandb == "off"
    assert run.config.optim.lr == 3e-4
    assert run.config.tokenizer.path is None


def test_a_list_is_taken_back_by_null(tmp_path):
    first, second = (write(tmp_path, f"model: {{decay_slopes: {text}}}\n", name=text) for text in ("[0.5]", "null"))
    assert load_config(["--config", first]).config.model.decay_slopes == [0.5]
    assert load_config(["--config", first, "--config", second]).config.model.decay_slopes is None
    assert load_config(["--config", second, "--config", first]).config.model.decay_slopes == [0.5]
    assert load_config(["--config", first, "--model.decay_slopes=[1, 2e-3]"]).config.model.decay_slopes == [1.0, 2e-3]
    assert load_config(["--config", first, "--model.decay_slopes", "null"]).config.model.decay_slopes is None


@pytest.mark.parametrize("slopes", ["null", "[1, 0.001]"])
def test_resolved_configuration_reads_back(tmp_path, slopes):
    arguments = ["--model.lrpe_layers", "[]", "--training.peak_tflops", "1.5", f"--model.decay_slopes={slopes}"]
    config = load_config(arguments).config
    path = write(tmp_path, yaml.safe_dump(config_dict(config)))
    assert load_config(["--config", path]).config == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.step", "5"], "--training.step: no such option; did you mean training.steps?"),
        (["--lr", "5"], "--lr: no such option; did you mean optim.lr?"),
        (["--model", "{}"], "--model: no such option"),
        (["--training.steps", "5.5"], "training.steps: expected a whole number, got 5.5"),
        (["--training.steps", "0"], "training.steps: expected 1 or more, got 0"),
        (["--training.compile", "maybe"], "training.compile: expected true or false, got maybe"),
        (["--model.qk_norm", "l3"], "model.qk_norm: expected one of none, l2, got l3"),
        (["--model.lrpe_layers", "[a]"], "model.lrpe_layers: expected a list like [0, 1], got a"),
        (["--model.decay_slopes", "x"], "model.decay_slopes: expected a list like [0.5, 0.25] or null, got x"),
        (["--model.decay_slopes", "0.5"], "model.decay_slopes: expected a list like [0.5, 0.25] or null, got 0.5"),
        (["--model.decay_slopes=[no]"], "model.decay_slopes: expected a list like [0.5, 0.25] or null, got [False]"),
        (["--model.decay_slopes", "[.inf]"], "model.decay_slopes: expected a finite number, got inf"),
        (["--model.gate", "1"], "model.gate: expected true or false, got 1"),
        (["--optim.lr", "nan"], "optim.lr: expected a number, got nan"),
        (["--data.paths", "a.txt"], """data.paths: expected a list like '["one", "two"]', got a.txt"""),
        (["--data.token_budget", "all"], "data.token_budget: expected a whole number or null, got all"),
        (["--optim.lr", "0"], "optim.lr: expected a positive number, got 0.0"),
        (["--optim.min_lr", "1"], "optim.min_lr: expected 0 to optim.lr = 0.001, got 1.0"),
        (["--optim.beta2", "1"], "optim.beta2: expected 0 up to but not including 1, got 1.0"),
        (["--data.validation_share", "1"], "data.validation_share: expected between 0 and 1, got 1.0"),
        (["--data.token_budget", "0"], "data.token_budget: expected 1 or more, got 0"),
        (["--data.num_proc", "0"], "data.num_proc: expected 1 or more, got 0"),
        (["--data.sequence_length", "0"], "data.sequence_length: expected 1 or more, got 0"),
        (["stray"], "unrecognized arguments: stray"),
        (["--config"], "--config: expected a file, got nothing"),
        (["--out="], "--out: expected a folder, got nothing"),
        (["--optim.lr="], "optim.lr: expected a number, got nothing"),
        (["--training.cpu_threads=5000"], "training.cpu_threads: expected 1,024 or fewer threads, got 5000"),
        (["--data.num_proc=5000"], "data.num_proc: expected 1,024 or fewer threads, got 5000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_command_lines(arguments, message):
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  warmup: 4\n", "{file}: optim.warmup: no such key; did you mean optim.warmup_steps?"),
        ("optim:\n  lr: 1\n  lr: 2\n", "{file}:3: lr is given twice"),
        ("optim: 3\n", "{file}: optim: expected a section with keys of its own, got '3'"),
        ("seed: {a: 1}\n", "{file}: seed: expected a value, got keys a"),
        ("- 1\n", "{file}: expected keys and values, got ['1']"),
        ("model: {decay_slopes: [[1]]}", "model.decay_slopes: expected a plain list, got [['1']]"),
        ("model: {decay_slopes: [a]}", "model.decay_slopes: expected a list like [0.5, 0.25] or null, got ['a']"),
        ("optim:\n  lr: no\n", "optim.lr: expected a number, got False"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", file])
    assert str(caught.value) == message.format(file=file)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(["--config", write(tmp_path, "a: [1\n")])


def test_a_tag_is_refused_and_runs_nothing(tmp_path):
    path = write(tmp_path, f"seed: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:1: expected plain values, got tag:yaml\.org"):
        load_config(["--config", path])
    assert not (tmp_path / "made").exists()


def test_model_section_has_the_fields_of_the_model():
    ours = {field.name for field in dataclasses.fields(ModelConfig)}
    inherited = {field.name for field in dataclasses.fields(TransnormerConfig.__mro__[1])}
    theirs = {field.name for field in dataclasses.fields(TransnormerConfig)} - inherited
    from_elsewhere = {"vocab_size", "max_position_embeddings", "use_cache"}
    from_tokenizer = {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert ours == theirs - from_elsewhere - from_tokenizer | {"tie_word_embeddings"}


def test_a_setting_that_a_checkpoint_does_not_name_was_as_it_is_by_default():
    saved = run_identity(Config(model=ModelConfig(qk_norm="l2")), "data", "tokenizer")
    del saved["model.gate"], saved["model.decay_slopes"]
    for model, message in (
        (ModelConfig(qk_norm="l2"), None),
        (ModelConfig(qk_norm="l2", gate=False), "model.gate was True, is False"),
        (ModelConfig(qk_norm="l2", decay_slopes=[0.5] * 4), r"model.decay_slopes was None, is \[0.5, 0.5"),
        (ModelConfig(), "model.qk_norm was 'l2', is 'none'"),
    ):
        current = run_identity(Config(model=model), "data", "tokenizer")
        with pytest.raises(CheckpointError, match=message) if message else contextlib.nullcontext():
            refuse_other_run(Path("step"), saved, current)
    with pytest.raises(CheckpointError, match=r"tokenizer.sha256 was None"):
        refuse_other_run(Path("step"), {}, run_identity(Config(), "data", "tokenizer"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid(path):
    assert isinstance(load_config(["--config", str(path)]).config, Config)
    assert path.read_text().startswith("# accelerate launch train.py --config configs/")
