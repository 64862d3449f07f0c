"""A checkpoint folder carries its own code: it runs in a process that can't see this repository."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import random_ids, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model import TransnormerForCausalLM

# Runs with `python -I`, so the repository is not on the path; hiding the names covers an editable install as well.
STRANGER = '''
import importlib.util, json, os, sys

HIDDEN = {"ops", "model", "training", "scripts", "accelerate", "datasets", "sentencepiece"}

class Hiding:
    """A finder that passes on everything but the hidden packages."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, *args)

    def find_distributions(self, context):
        found = getattr(self.finder, "find_distributions", lambda _: [])(context)
        return (x for x in found if (x.metadata["Name"] or "").lower() not in HIDDEN)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
assert all(importlib.util.find_spec(name) is None for name in HIDDEN)

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

ids = torch.tensor(json.loads(sys.argv[1]))
mask = torch.ones_like(ids)
mask[0, :3] = 0
found, report = {}, {}
models = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in sys.argv[2:]]
with torch.no_grad():
    for i, (model, folder) in enumerate(zip(models, sys.argv[2:], strict=True)):
        found[f"{i}.logits"] = model(ids).logits
        found[f"{i}.padded"] = model(ids, attention_mask=mask).logits
        found[f"{i}.generated"] = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
        found[f"{i}.hidden"] = AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state
        found[f"{i}.half"] = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.bfloat16
        )(ids).logits
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        report[i] = [type(config).__module__, type(model).__module__]
        model.save_pretrained(f"again_{i}")
        again = AutoModelForCausalLM.from_pretrained(f"again_{i}", trust_remote_code=True)
        found[f"{i}.again"] = again(ids).logits
    models[0].train()
    models[0](ids, labels=ids).loss.backward()
    report["gradients"] = None
'''.replace('    models[0].train()\n    models[0](ids, labels=ids).loss.backward()\n    report["gradients"] = None\n', "") + '''
loss = models[0].train()(ids, labels=ids).loss
loss.backward()
found["loss"] = loss.detach()
found["gradient"] = models[0].model.embed_tokens.weight.grad
report["packages"] = sorted(HIDDEN & set(sys.modules))
save_file({name: x.contiguous() for name, x in found.items()}, "found.safetensors")
with open("report.json", "w") as file:
    json.dump(report, file)
'''
VARIANTS = ["mha-lrpe-fixed", "gqa-l2-learned-tied"]
FILES = {
    "cache_transnormer.py",
    "chunkwise.py",
    "config.json",
    "configuration_transnormer.py",
    "decay.py",
    "generation_config.json",
    "lightning_attention.py",
    "model.safetensors",
    "modeling_transnormer.py",
    "packing_transnormer.py",
    "validation.py",
}
