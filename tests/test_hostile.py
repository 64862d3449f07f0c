"""Checkpoints and model folders from an enemy: no file of theirs runs code, leaves the folder or hangs."""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from hostile_cases import Made, call, change_json, make_run, pickles, renew_manifest

from training.errors import CheckpointError
from training.manifest import MANIFEST, describe_files, verify_checkpoint
from training.weights import weight_files

PICKLED = [
    "pytorch_model.bin",
    "model.pt",
    "adapter_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
    "anything.pkl",
    "vocab.pkl",
    "tf_model.h5",
]
OURS = [
    "model/model.safetensors",
    "model/config.json",
    "model/tokenizer.model",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "optimizer.safetensors",
    "rng.safetensors",
    "trainer_state.json",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def checkpoint(made: Made, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return made.copy(tmp_path / "checkpoint")


@pytest.fixture
def folder(checkpoint: Path) -> Path:
    """A model folder without a manifest to spoil."""
    (checkpoint / MANIFEST).unlink()
    return checkpoint / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("def x ( y ) : return z\n" * 20)
    return tmp_path / "text.txt"


def resume(made: Made, checkpoint: Path) -> list[object]:
    out = checkpoint.with_name("resumed")
    shutil.rmtree(out, ignore_errors=True)
    return ["train", *made.arguments, f"--resume={checkpoint}", f"--out={out}", "--training.steps=3"]


def every_command(made: Made, checkpoint: Path, text: Path) -> list[list[object]]:
    return [
        ["verify", checkpoint],
        ["generate", checkpoint, "--max-new-tokens=2"],
        ["evaluate", checkpoint, "--text", text],
        resume(made, checkpoint),
    ]


def test_pickles_under_any_name_are_never_loaded(made: Made, checkpoint: Path, text: Path) -> None:
    marker = checkpoint.with_name("ran")
    for name, kind in ((name, kind) for name in PICKLED for kind in (0, 1)):
        for place in (checkpoint, checkpoint / "model"):
            (place / f"{kind or ''}{name}").write_bytes(pickles(marker)[kind])
    for command in every_command(made, checkpoint, text):
        assert "stray" in call(*command).refused(4)  # the manifest does not list them
    renew_manifest(checkpoint)
    for command in every_command(made, checkpoint, text):
        result = call(*command)
        assert result.code == 0, result.err
    assert not marker.exists()
    pickle.loads(pickles(marker)[0])
    assert marker.exists()  # they would have run


@pytest.mark.parametrize("kind", ["pickle", "archive"])
def test_a_pickle_instead_of_our_file_is_refused(made: Made, checkpoint: Path, text: Path, kind: str) -> None:
    marker, stale = checkpoint.with_name("ran"), (checkpoint / MANIFEST).read_bytes()
    content = pickles(marker)[kind == "archive"]
    for name in OURS:
        original = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content)
        (checkpoint / MANIFEST).write_bytes(stale)
        assert f"{name}: s" in call("verify", checkpoint).refused(4)  # size or sha256
        renew_manifest(checkpoint)
        assert call("verify", checkpoint).code == 0
        if name.startswith("model/"):
            result = call("generate", checkpoint, "--max-new-tokens=1")
            # of the two files of a tokenizer transformers reads tokenizer.json
            assert result.code == 0 if name == "model/tokenizer.model" else result.refused(4)
        elif kind == "pickle":
            assert name in call(*resume(made, checkpoint)).refused(4)
        (checkpoint / name).write_bytes(original)
    assert not marker.exists()


def test_a_model_folder_of_pickles_alone_has_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.bin", "model.pt"):
        (folder / name).write_bytes(pickles(folder / "ran")[1])
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    assert "expected weights as model.safetensors" in call("generate", folder).refused(4)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    assert "got an adapter" in call("generate", folder).refused(4)
    assert not (folder / "ran").exists()


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickles(tmp_path / "ran")[1])
    os.mkfifo(tmp_path / "pipe")
    for name in ("pytorch_model.bin", "pipe"):
        assert "got a file" in call("generate", tmp_path / name).refused(4)
    assert not (tmp_path / "ran").exists()


def test_code_in_the_folder_never_runs(made: Made, checkpoint: Path, text: Path) -> None:
    marker = checkpoint.with_name("ran")
    for file in (*(checkpoint / "model").glob("*.py"), checkpoint / "model" / "custom_generate" / "generate.py"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    renew_manifest(checkpoint)
    for command in every_command(made, checkpoint, text):
        result = call(*command)
        assert result.code == 0, result.err
    change_json(checkpoint / "model" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["blockwise.T", None]})
    change_json(checkpoint / "model" / "config.json", model_type="other")
    renew_manifest(checkpoint)
    assert "model_type 'transnormer'" in call("generate", checkpoint).refused(4)
    change_json(checkpoint / "model" / "config.json", model_type="transnormer")
    change_json(checkpoint / "model" / "tokenizer_config.json", tokenizer_class="T")
    renew_manifest(checkpoint)
    call("generate", checkpoint).refused(4)
    assert not marker.exists()


def test_a_chat_template_is_never_rendered(folder: Path) -> None:
    plain = call("generate", folder, "--prompt=def", "--max-new-tokens=3")
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**12) %}x{% endfor %}"
    (folder / "chat_template.jinja").write_text(attack)
    change_json(folder / "tokenizer_config.json", chat_template=attack)
    attacked = call("generate", folder, "--prompt=def", "--max-new-tokens=3")
    assert (attacked.code, attacked.err) == (0, plain.err)


NAMES = [
    "../outside.txt",
    "/etc/passwd",
    "model/../../outside.txt",
    "..\\outside.txt",
    "C:\\outside.txt",
    "model\\config.json",
    "",
    ".",
    "./trainer_state.json",
    "model//config.json",
    "model/./config.json",
    "model/config.json/",
    "model",
    "trainer_state.json\0",
    "a\nerror: b\x1b[31m",
    "\ud800",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_manifest_names_files_of_its_folder_alone(checkpoint: Path, name: str) -> None:
    (checkpoint.parent / "outside.txt").write_text("x")
    manifest = verify_checkpoint(checkpoint)
    manifest.files[name] = manifest.files["model/config.json"]
    (checkpoint / MANIFEST).write_bytes(manifest.render())
    line = call("verify", checkpoint).refused(4)
    assert line.isprintable()
    expected = "missing" if name == "model" else "leaves the folder" if ".." in name or name[:1] == "/" else "plain"
    assert expected in line


def test_names_are_refused_on_the_disk_too(checkpoint: Path) -> None:
    (checkpoint / "model" / "a\\b").write_text("")
    renew_manifest(checkpoint)
    assert "expected plain relative paths" in call("verify", checkpoint).refused(4)


def test_a_manifest_that_names_a_file_twice_is_refused(checkpoint: Path) -> None:
    content = (checkpoint / MANIFEST).read_text()
    entry = content[content.index(' "files": {') + 11 :].split("},", 1)[0] + "},"
    (checkpoint / MANIFEST).write_text(content.replace(' "files": {', f' "files": {{{entry}', 1))
    json.loads((checkpoint / MANIFEST).read_text())
    assert "altered" in call("verify", checkpoint).refused(4)


@pytest.mark.parametrize(
    "fields",
    [
        {"step": "2"},
        {"step": True},
        {"step": -1},
        {"step": 10**100},
        {"step": 2.0},
        {"config_hash": [1]},
        {"versions": 5},
        {"versions": {"torch": {"a": {}}}},
        {"versions": {"torch": json.loads("[" * 200 + "]" * 200)}},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_valid_manifest_of_other_types_is_refused(made: Made, checkpoint: Path, fields: dict) -> None:
    manifest = dataclasses.replace(verify_checkpoint(checkpoint), **fields)
    (checkpoint / MANIFEST).write_bytes(manifest.render())
    assert "unreadable manifest" in call("verify", checkpoint).refused(4)
    call(*resume(made, checkpoint)).refused(4)


@pytest.mark.parametrize("kind", ["link", "absolute link", "link to a folder", "pipe"])
@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "manifest.json", "more.txt"])
def test_links_and_pipes_in_a_checkpoint_are_refused(made: Made, checkpoint: Path, kind: str, name: str) -> None:
    spoil(checkpoint / name, kind)
    with pytest.raises(CheckpointError, match="link or special file"):
        describe_files(checkpoint, 2, "")
    assert "link or special file" in call("verify", checkpoint).refused(4)
    assert "link or special file" in call(*resume(made, checkpoint)).refused(4)


@pytest.mark.parametrize("kind", ["link", "absolute link", "link to a folder", "pipe"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_links_and_pipes_in_a_model_folder_are_refused(folder: Path, kind: str, name: str) -> None:
    spoil(folder / name, kind)
    call("generate", folder).refused(4)


def spoil(path: Path, kind: str) -> None:
    """Put a link or a pipe in the place of a file; a link has the right content."""
    outside = path.parents[1] / "outside"
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("x")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a folder":
        path.symlink_to("/")
    else:
        path.symlink_to(outside if kind == "absolute link" else os.path.relpath(outside, path.parent))


def test_folders_instead_of_files_are_refused(made: Made, checkpoint: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        other = shutil.copytree(checkpoint / "model", checkpoint.with_name(name))
        (other / name).unlink()
        (other / name).mkdir()
        call("generate", other).refused(4)
    (checkpoint / MANIFEST).unlink()
    (checkpoint / MANIFEST).mkdir()
    call("verify", checkpoint).refused(4)
    call("generate", checkpoint).refused(4)
    call(*resume(made, checkpoint)).refused(4)


def test_a_checkpoint_without_a_model_is_not_asked_of_the_hub(checkpoint: Path, monkeypatch) -> None:
    shutil.rmtree(checkpoint / "model")
    renew_manifest(checkpoint)
    monkeypatch.chdir(checkpoint.parent)
    assert "expected a model folder, there is none" in call("generate", "checkpoint").refused(4)


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "../model.safetensors"}, "leaves"),
        ({"a": "/etc/passwd.safetensors"}, "leaves"),
        ({"a": "..\\model.safetensors"}, "leaves"),
        ({"a": "sub/model.safetensors"}, "leaves"),
        ({"a": ".safetensors"}, "leaves"),
        ({"a": ""}, "end in .safetensors"),
        ({"a": "pytorch_model.bin"}, "end in .safetensors"),
        ({"a": "a\0.safetensors"}, "end in .safetensors"),
        ({"a": "a" * 300 + ".safetensors"}, "missing"),
        ({"a": 5}, "expected a file's name"),
        ({"a": ["model.safetensors"]}, "expected a file's name"),
        ({"a": "none.safetensors"}, "missing"),
        ({"a": "link.safetensors"}, "a link"),
        ({"a": "pipe.safetensors"}, "a link, folder or special file"),
        ({"a": "folder.safetensors"}, "a link, folder or special file"),
        ({}, "expected a weight_map"),
        (["model.safetensors"], "expected a weight_map"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_an_index_names_files_of_its_folder_alone(folder: Path, weight_map: object, reason: str) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "link.safetensors").symlink_to("weights.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=reason):
        weight_files(folder)


def test_weights_in_parts_are_opened_by_their_index(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    plain = call("generate", folder, "--max-new-tokens=3")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for part in set(names.values()):
        mine = {name: tensor for name, tensor in tensors.items() if names[name] == part}
        save_file(mine, folder / part, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert [file.name for file in weight_files(folder)] == ["part-0.safetensors", "part-1.safetensors"]
    assert call("generate", folder, "--max-new-tokens=3")[:2] == plain[:2]
    shutil.copy(folder / "part-0.safetensors", folder / "part-1.safetensors")
    assert "is in another file too" in call("generate", folder).refused(4)
