"""Texts from an enemy end in one line, in little time and memory: YAML, JSON, headers, tokenizers; links in OUT."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hostile_cases import DEEP, Made, call, call_apart, change_json, make_run, renew_manifest
from safetensors.torch import load_file, save_file

from training.checkpoint import restore_rng
from training.errors import CheckpointError
from training.jsonfile import DEEPEST, parse_json
from training.metrics import read_records
from training.report import plot_runs

MOST_MEMORY = 2 * 10**9  # bytes
DIGITS = "9" * 100_000
HUGE_HEADER = struct.pack("<Q", 2**60) + b"{}"
LAUGHS = ", ".join(["&a0 [x,x,x,x,x,x,x,x,x,x]", *(f"&a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return make_run(tmp_path_factory.mktemp("made"))


def header(**tensors: tuple[str, list[int], list[int]]) -> bytes:
    """Return a safetensors header: type, shape and offsets of each tensor."""
    fields = {n: {"dtype": t, "shape": shape, "data_offsets": where} for n, (t, shape, where) in tensors.items()}
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text


BAD_YAML = {
    "tag": "seed: !!python/object/apply:os.mkdir [ran]",
    "tag of a mapping": "data: !!python/object/new:os.mkdir {args: [ran]}",
    "own tag": "seed: !mine 5",
    "plain tag": "seed: !!int 5",
    "tag in a text": 'seed: "!!python/object/apply:os.mkdir [ran]"',
    "anchor": "seed: &a 5",
    "alias": "data: &a {paths: *a}",
    "laughs": f"data: {{paths: [{LAUGHS}]}}",
    "laughs in a text": f'seed: "[{LAUGHS}]"',
    "laughs in a text of a list": f'data: {{paths: "[{LAUGHS}]"}}',
    "deep": "seed: " + "[" * 100_000,
    "deep mapping": "seed: " + "{a: " * 100_000,
    "deep in a text": 'seed: "' + "[" * 100_000 + '"',
    "list as key": "? [a, b]\n: 3",
    "merge": "<<: {seed: 5}",
    "digits": f"seed: {DIGITS}",
    "large seed": "seed: " + "9" * 30,
    "large width": "model: {hidden_size: " + "9" * 30 + "}",
    "large number": "optim: {lr: .inf, min_lr: 0}",
    "no number": "optim: {eps: .nan}",
    "many documents": "seed: 1\n---\nseed: 2",
    "no text": "\0\0",
    "long": "# " + "x" * 2_000_000,
}


def test_hostile_yaml(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = []
    for number, text in enumerate(BAD_YAML.values()):
        (tmp_path / f"{number}.yaml").write_text(text)
        calls.append(["train", f"--config={tmp_path / f'{number}.yaml'}", f"--out={tmp_path / 'run'}"])
    calls += [["train", f"--seed=[{LAUGHS}]"], ["train", "--seed", "[" * 100_000], ["train", f"--seed={DIGITS}"]]
    results, memory = call_apart(calls)
    for name, result in zip([*BAD_YAML, "laughs", "deep", "digits"], results, strict=True):
        line = result.refused(2)
        assert line.isprintable(), name
    assert memory < MOST_MEMORY
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob("ran"))


MODEL_JSON = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def test_json_and_headers_in_checkpoints(made: Made, tmp_path: Path) -> None:
    """Each with a manifest that verifies, as one who may write the folder can make it."""
    bad = {name: [DEEP, f'{{"a": {DIGITS}}}', "[]", "\xff"] for name in (*MODEL_JSON, "state")}
    bad |= {name: [HUGE_HEADER, b"", struct.pack("<Q", len(DEEP)) + DEEP.encode()] for name in ("weights", "o", "rng")}
    places = {"weights": "model/model.safetensors", "o": "optimizer.safetensors", "rng": "rng.safetensors"}
    places |= {"state": "trainer_state.json", **{name: f"model/{name}" for name in MODEL_JSON}}
    calls = []
    for name, contents in bad.items():
        for number, content in enumerate(contents):
            copy = made.copy(tmp_path / f"{name}-{number}")
            data = content if isinstance(content, bytes) else content.encode("latin-1")
            (copy / places[name]).write_bytes(data)
            renew_manifest(copy)
            if places[name].startswith("model/"):
                calls.append(["generate", copy, "--max-new-tokens=1"])
            if not places[name].endswith("config.json") and "tokenizer" not in name:
                calls.append(["train", *made.arguments, f"--resume={copy}", f"--out={tmp_path / 'resumed'}"])
    for number, content in enumerate((DEEP, DIGITS, "[" * 100_000, '{"format_version": 1e999}')):
        copy = made.copy(tmp_path / f"manifest-{number}")
        (copy / "manifest.json").write_text(content)
        calls.append(["verify", copy])
    million = ",".join(f'"w{i}":"part-{i}.safetensors"' for i in range(1_000_000))
    for number, content in enumerate((DEEP, DIGITS, f'{{"weight_map":{{{million}}}}}')):
        copy = made.copy(tmp_path / f"index-{number}")
        (copy / "model" / "model.safetensors").unlink()
        (copy / "model" / "model.safetensors.index.json").write_text(content)
        renew_manifest(copy)
        calls.append(["generate", copy])
    results, memory = call_apart(calls)
    for arguments, result in zip(calls, results, strict=True):
        assert result.refused(4), arguments
    assert memory < MOST_MEMORY


SHAPES = [
    {"hidden_size": 10**12},
    {"intermediate_size": 10**12},
    {"vocab_size": 10**12},
    {"vocab_size": 319},
    {"vocab_size": 10**400},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 1},
    {"num_attention_heads": 10**9, "num_key_value_heads": 10**9, "head_dim": 1},
    {"head_dim": 8},
    {"num_key_value_heads": 1},
    {"max_position_embeddings": 10**12, "attention": "masked", "mask": "learned"},
    {"lrpe_layers": [10**20]},
    {"lrpe_layers": [{}]},
    {"lrpe_layers": []},
    {"decay_slopes": [1e999] * 2},
    {"decay_slopes": [10**400] * 2},
    {"gate": False},
    {"num_labels": 10**9},
    {"id2label": {str(i): "x" for i in range(10)}},
    {"attn_implementation": "owner/kernel"},
    {"_attn_implementation_internal": "owner/kernel"},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"extra_files": ["/etc/passwd"]},
    {"dtype": "load"},
    {"dtype": "int8"},
    {"torch_dtype": ["float32"]},
    {"eos_token_id": 10**30},
    {"eos_token_id": [1, -1]},
    {"initializer_range": 1e999},
    {"vocab_size": None},
    {"model_type": "llama"},
    {"model_type": None},
]


def test_shapes_that_the_weights_do_not_have(made: Made, tmp_path: Path) -> None:
    calls = []
    for number, fields in enumerate(SHAPES):
        copy = made.copy(tmp_path / str(number))
        change_json(copy / "model" / "config.json", **fields)
        renew_manifest(copy)
        calls.append(["generate", copy, "--max-new-tokens=1"])
    copy = made.copy(tmp_path / "beams")  # harmless: it is not asked
    change_json(copy / "model" / "generation_config.json", num_beams=10**9, num_return_sequences=10**9, top_k=10**12)
    renew_manifest(copy)
    results, memory = call_apart([*calls, ["generate", copy, "--max-new-tokens=1"]])
    for fields, result in zip(SHAPES, results, strict=False):
        assert result.refused(4), fields
    assert results[-1].code == 0, results[-1].err
    assert memory < MOST_MEMORY


TENSORS = {
    "overlap": (header(a=("F32", [2], [0, 8]), b=("F32", [2], [4, 12])) + b"\0" * 12, "invalid offset"),
    "past the end": (header(a=("F32", [2], [0, 8])), "header"),
    "overflow": (header(a=("F32", [2**40, 2**40], [0, 8])) + b"\0" * 8, "overflow"),
    "terabytes": (header(a=("F32", [2**40], [0, 2**42])), "header"),
    "no such type": (header(a=("F33", [2], [0, 8])) + b"\0" * 8, "header"),
    "other names": (header(a=("F32", [2], [0, 8])) + b"\0" * 8, "is missing|no weight of this model|in a file of"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_weights_that_are_not_what_they_say(made: Made, tmp_path: Path, name: str) -> None:
    content, reason = TENSORS[name]
    copy = made.copy(tmp_path / "copy")
    (copy / "model" / "model.safetensors").write_bytes(content)
    (copy / "optimizer.safetensors").write_bytes(content)
    renew_manifest(copy)
    line = call("generate", copy).refused(4)
    assert name == "other names" or reason in line
    call("train", *made.arguments, f"--resume={copy}", f"--out={tmp_path / 'run'}").refused(4)


def test_states_of_generators(made: Made, tmp_path: Path) -> None:
    states = load_file(made.checkpoint / "rng.safetensors")
    for name, state in states.items():
        bad = [torch.tensor(5), torch.zeros(3), torch.zeros(2, 2), torch.zeros(state.shape, dtype=torch.complex64)]
        if name in ("python", "numpy"):
            bad += [-state, state + 2**32, torch.cat([state[:-1], torch.tensor([625])])]
        for tensor in bad:
            save_file(states | {name: tensor}, tmp_path / "rng.safetensors")
            with pytest.raises(CheckpointError, match=rf"rng\.safetensors: unusable: .*{name}"):
                restore_rng(tmp_path)
    restore_rng(made.checkpoint)


@pytest.mark.parametrize("change", ["whole numbers", "transposed", "one more", "one less"])
def test_tensors_of_another_model(made: Made, tmp_path: Path, change: str) -> None:
    copy = made.copy(tmp_path / "copy")
    file = copy / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "model.embed_tokens.weight"
    if change == "one more":
        tensors["more"] = torch.zeros(2)
    elif change == "one less":
        del tensors[name]
    else:
        tensors[name] = tensors[name].T.contiguous() if change == "transposed" else tensors[name].to(torch.int32)
    save_file(tensors, file, metadata={"format": "pt"})
    renew_manifest(copy)
    assert "tensor" in call("generate", copy).refused(4) or change == "whole numbers"


@pytest.mark.parametrize(
    "fields",
    [
        {"step": "2"},
        {"step": -1},
        {"step": 1e999},
        {"tokens": None},
        {"tokens": 10**30},
        {"skipped": []},
        {"scaler": {"scale": "x"}},
        {"scaler": 5},
        {"wandb_run_id": "../../outside"},
        {"wandb_run_id": 5},
        {"identity": []},
        {"identity": {"seed": json.loads("[" * 900 + "]" * 900)}},
        {"identity": {}},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_trainer_state_of_other_types(made: Made, tmp_path: Path, fields: dict) -> None:
    copy = made.copy(tmp_path / "copy")
    change_json(copy / "trainer_state.json", **fields)
    renew_manifest(copy)
    line = call("train", *made.arguments, f"--resume={copy}", f"--out={tmp_path / 'run'}").refused(4)
    assert "identity" in fields or next(iter(fields)) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line", [DEEP, "[" * 100_000, f'{{"step": {DIGITS}}}', '{"step": [1]}', '{"step": 1, "x": [NaN]}', '{"step": true}']
)
def test_metrics_of_a_run_that_is_resumed(made: Made, tmp_path: Path, line: str) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    made.copy(out / "checkpoints" / made.checkpoint.name)
    (out / "metrics.jsonl").write_text(line + "\n" + '{"step": 2}\n')
    assert "metrics.jsonl:1: expected" in call("train", *made.arguments, f"--out={out}").refused(4)
    with pytest.raises(CheckpointError):
        read_records(out / "metrics.jsonl")


@pytest.mark.parametrize(
    "line", ['{"step": 1}', '{"step": 1, "tokens": "x", "loss": 1}', f'{{"step": 1, "tokens": 1{"0" * 99}}}']
)
def test_records_that_can_not_be_drawn(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(CheckpointError, match="step 1: expected numbers as tokens and loss"):
        plot_runs([tmp_path], tmp_path / "loss.png")


def test_a_message_is_one_line_that_a_terminal_shows_as_it_is() -> None:
    assert str(CheckpointError("a\r\n  b\x1b[31m\u202e\ud800 é\n")) == "a b\\x1b[31m\\u202e\\ud800 é"


def test_depth_has_one_limit() -> None:
    for depth in (1, DEEPEST):
        assert parse_json("[" * depth + "]" * depth) is not None
    for depth in (DEEPEST + 2, 900, 100_000):
        with pytest.raises(ValueError, match=f"nested more than {DEEPEST} deep"):
            parse_json('{"a":' * depth + "1" + "}" * depth)


CORPUS = [DEEP, "[" * 100_000, f'{{"text": {DIGITS}}}', '{"text": ["a"]}', '{"text": "\\ud800"}', "\0", '{"text": NaN}']


def test_a_line_of_a_corpus(made: Made, tmp_path: Path) -> None:
    for number, line in enumerate(CORPUS):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "a"}\n' + line + "\n")
        paths = json.dumps([str(tmp_path / f"{number}.jsonl")])
        result = call("train", *made.arguments, f"--data.paths={paths}", f"--out={tmp_path / 'run'}")
        assert f"{number}.jsonl, line 2" in result.refused(3)


def tokenizer_copy(made: Made, tmp_path: Path) -> Path:
    return made.copy(tmp_path / "copy") / "model"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"\x80\x04garbage" * 100, b"", b"{}", b"[]", DEEP.encode(), b'{"added_tokens": 5}']
)
def test_a_tokenizer_of_garbage(made: Made, tmp_path: Path, name: str, content: bytes) -> None:
    folder = tokenizer_copy(made, tmp_path)
    (folder / name).write_bytes(content)
    out = tmp_path / "run"
    result = call("train", *made.arguments, f"--tokenizer.path={folder}", f"--out={out}")
    if result.code != 0:  # a tokenizer_config.json may say nothing: tokenizer.json has it all
        result.refused(3)
    assert result.code == 3 or (name, content[:1]) == ("tokenizer_config.json", b"{")


def test_a_tokenizer_folder_gives_its_own_files_alone(made: Made, tmp_path: Path) -> None:
    folder = tokenizer_copy(made, tmp_path)
    (folder / "config.json").write_text('{"model_type": "evil"}')
    (folder / "evil.pkl").write_bytes(b"")
    (folder / "custom_generate").mkdir()
    out = tmp_path / "run"
    result = call("train", *made.arguments, f"--tokenizer.path={folder}", f"--out={out}")
    assert result.code == 0, result.err
    saved = out / "checkpoints" / made.checkpoint.name / "model"
    assert {path.name for path in saved.iterdir()} == {path.name for path in (made.checkpoint / "model").iterdir()}
    assert json.loads((saved / "config.json").read_text())["model_type"] == "transnormer"
    (folder / "tokenizer.model").unlink()
    os.mkfifo(folder / "tokenizer.model")
    call("train", *made.arguments, f"--tokenizer.path={folder}", f"--out={out}").refused(3)


FILES = (".lock", ".exit.json.writing", "config.yaml", "evaluations.jsonl", "exit.json", "loss.png", "metrics.jsonl")


@pytest.mark.parametrize("name", [*FILES, "checkpoints", "tensorboard", "wandb"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_a_run_writes_through_no_link(made: Made, tmp_path: Path, name: str, kind: str) -> None:
    out, outside = tmp_path / "run", tmp_path / "outside"
    out.mkdir()
    if kind == "pipe":
        os.mkfifo(out / name)
    else:
        (out / name).symlink_to(outside)
    if kind == "link" and name in FILES:
        outside.write_text("mine")
    elif kind == "link":
        outside.mkdir()
    assert f"run/{name}: expected a f" in call("train", *made.arguments, f"--out={out}").refused(2)
    if kind == "link":
        assert list(outside.iterdir()) == [] if outside.is_dir() else outside.read_text() == "mine"
    assert os.path.lexists(out / name)
    assert [path.name for path in out.iterdir()] == [name]


def test_out_may_be_a_link_itself(made: Made, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    result = call("train", *made.arguments, f"--out={tmp_path / 'run'}")
    assert result.code == 0, result.err
    assert (tmp_path / "disk" / "exit.json").is_file()


def test_links_among_the_checkpoints_are_not_followed(made: Made, tmp_path: Path) -> None:
    out, outside = tmp_path / "run", made.copy(tmp_path / "outside")
    (out / "checkpoints").mkdir(parents=True)
    for name in (
        "step_00000001",
        "step_00000002",
        ".saving-step_00000001-01234567",
        ".deleting-step_00000001-01234567",
    ):
        (out / "checkpoints" / name).symlink_to(outside)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in outside.rglob("*"))
    result = call("train", *made.arguments, "--checkpoint.every=1", "--checkpoint.keep=1", f"--out={out}")
    assert result.code in (0, 4), result.err
    assert "Traceback" not in result.err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in outside.rglob("*")) == before
