"""A checkpoint folder carries its own code: it runs in a process that can't see this repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_cases import random_ids, tiny_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from model import TransnormerForCausalLM, register_mask

# Runs with `python -I`, so the repository is not on the path; hiding the names covers an editable install as well.
STRANGER = '''
import importlib.util
import json
import sys

HIDDEN = {"ops", "model", "training", "scripts", "accelerate", "datasets", "sentencepiece"}


class Hiding:
    """A finder of modules that does not see the hidden packages."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, *args)

    def find_distributions(self, context):
        found = getattr(self.finder, "find_distributions", lambda _: [])(context)
        return (x for x in found if x.metadata["Name"] not in HIDDEN)

    def invalidate_caches(self):
        getattr(self.finder, "invalidate_caches", lambda: None)()


sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
assert all(importlib.util.find_spec(name) is None for name in HIDDEN)

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

ids, *folders = json.loads(sys.argv[1])
ids = torch.tensor(ids)
mask = torch.ones_like(ids)
mask[0, :3] = 0
found, modules = {}, []
models = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in folders]
for i, (model, folder) in enumerate(zip(models, folders)):
    loss = model(ids, labels=ids).loss
    loss.backward()
    found[f"{i}.loss"], found[f"{i}.gradient"] = loss.detach(), model.model.embed_tokens.weight.grad
    with torch.no_grad():
        found[f"{i}.padded"] = model(ids, attention_mask=mask).logits
        found[f"{i}.hidden"] = AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state
    found[f"{i}.generated"] = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    model.save_pretrained(f"again_{i}")
    again = AutoModelForCausalLM.from_pretrained(f"again_{i}", trust_remote_code=True)
    found[f"{i}.again"] = again(ids).logits.detach()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    modules += [type(config).__module__, type(model).__module__, type(again).__module__]
assert not HIDDEN & set(sys.modules)
assert all(name.startswith("transformers_modules.") for name in modules), modules
save_file({name: x.contiguous() for name, x in found.items()}, "found.safetensors")
'''

# Appended to it: a function for a checkpoint's mask is registered with that checkpoint's code.
REGISTERING = """
from transformers.dynamic_module_utils import get_class_from_dynamic_module

register_mask = get_class_from_dynamic_module("configuration_transnormer.register_mask", "wave")
register_mask("wave", lambda batch, head, query, key: torch.cos(head + query - key))
model = AutoModelForCausalLM.from_pretrained("wave", trust_remote_code=True)
save_file({"logits": model(ids).logits.detach()}, "wave.safetensors")
"""

VARIANTS = ["mha-lrpe-fixed", "gqa-l2-learned-tied", "one-head-learned"]
CODE = {
    "attention_transnormer.py",
    "blockwise.py",
    "cache_transnormer.py",
    "chunkwise.py",
    "configuration_transnormer.py",
    "decay.py",
    "extension.py",
    "lightning_attention.py",
    "kernels.py",
    "lightning_cuda.py",
    "lightning_wide.py",
    "linear_attention.py",
    "masked_cuda.py",
    "masked_wide.py",
    "masks_transnormer.py",
    "modeling_transnormer.py",
    "numerics.py",
    "packing_transnormer.py",
    "scan.py",
    "validation.py",
}
IDS = random_ids(2, 20)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The folder in which a stranger's process ran, and what it found for each checkpoint NUMBER/model."""
    folder = tmp_path_factory.mktemp("stranger")
    checkpoints = [folder / str(i) / "model" for i in range(len(VARIANTS))]  # every run names its folder alike
    for variant, checkpoint in zip(VARIANTS, checkpoints, strict=True):
        tiny_model(variant).save_pretrained(checkpoint)
    run_stranger(STRANGER, folder, checkpoints)
    return folder, load_file(folder / "found.safetensors")


def run_stranger(script: str, folder: Path, checkpoints: list[Path]) -> None:
    run = subprocess.run(
        [sys.executable, "-I", "-c", script, json.dumps([IDS.tolist(), *map(str, checkpoints)])],
        cwd=folder,
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_a_checkpoint_holds_every_file_it_needs(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # over an older one
    assert {file.name for file in tmp_path.glob("*.py")} == CODE
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert all((tmp_path / f"{value.split('.')[0]}.py").is_file() for value in auto_map.values())


def test_only_the_main_process_writes_the_code(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.py"))


def test_an_upload_without_the_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"push_to_hub: expected False, use model.push_to_hub\(name\)"):
        tiny_model().save_pretrained(tmp_path, push_to_hub=True)


@pytest.mark.parametrize("i", range(len(VARIANTS)))
def test_a_stranger_computes_the_same_bits(i: int, stranger: tuple[Path, dict[str, Tensor]]) -> None:
    _, found = stranger
    assert_found(found, i, tiny_model(VARIANTS[i]))


@pytest.mark.usefixtures("mask_registry")
def test_a_stranger_computes_masked_attention_and_registers_a_mask(tmp_path: Path) -> None:
    register_mask("wave", lambda batch, head, query, key: torch.cos(head + query - key))
    learned, wave = (
        tiny_model("gqa-lrpe-none", attention="masked", mask=mask, max_position_embeddings=15)
        for mask in ("learned", "wave")
    )
    learned.save_pretrained(tmp_path / "learned")
    wave.save_pretrained(tmp_path / "wave")
    run_stranger(STRANGER + REGISTERING, tmp_path, [tmp_path / "learned"])
    assert_found(load_file(tmp_path / "found.safetensors"), 0, learned)
    assert torch.equal(load_file(tmp_path / "wave.safetensors")["logits"], wave(IDS).logits)


def assert_found(found: dict[str, Tensor], i: int, model: TransnormerForCausalLM) -> None:
    """What a stranger found for checkpoint i are the bits of a model here."""
    out = model(IDS, labels=IDS)
    out.loss.backward()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with torch.no_grad():
        padded = model(IDS, attention_mask=mask).logits
        generated = model.generate(IDS, attention_mask=mask, max_new_tokens=9, do_sample=False)
    expected = {
        "loss": out.loss,
        "gradient": model.model.embed_tokens.weight.grad,
        "padded": padded,
        "hidden": model.model(IDS).last_hidden_state,
        "generated": generated,
        "again": out.logits,
    }
    for name, x in expected.items():
        assert torch.equal(found[f"{i}.{name}"], x), name


@pytest.mark.parametrize("i", range(len(VARIANTS)))
@torch.no_grad()
def test_what_a_stranger_saved_loads_here(i: int, stranger: tuple[Path, dict[str, Tensor]]) -> None:
    folder = stranger[0] / f"again_{i}"
    assert {file.name for file in folder.glob("*.py")} == CODE
    for name in CODE:
        assert (folder / name).read_bytes() == (stranger[0] / str(i) / "model" / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(IDS).logits, tiny_model(VARIANTS[i])(IDS).logits)


@torch.no_grad()
def test_here_the_repository_wins_over_the_folder(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded).__module__ == "model.modeling_transnormer"
