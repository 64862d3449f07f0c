"""A tiny model that trains and saves as a run does, for the tests of checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from training.checkpoint import Content, save_checkpoint
from training.config import OptimConfig
from training.moments import load_moments, moment_parts, part_of
from training.optim import build_optimizer
from training.tensorfiles import TensorReader


class Run:
    """A tiny model that trains, saves and loads as a run does."""

    def __init__(self, out: Path, seed: int = 0, grouped: bool = True) -> None:
        self.out = out
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))
        self.optimizer: torch.optim.Optimizer = build_optimizer(self.model, OptimConfig(), "cpu")
        if not grouped:
            self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.names = dict(self.model.named_parameters())

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            self.model(batch).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def write_model(self, folder: Path) -> None:
        (folder / "README.md").write_text("# A model\n")

    def save(self, step: int, keep: int = 0, config_hash: str = "abc", **state: object) -> Path:
        weights = {name: part_of(parameter) for name, parameter in self.names.items()}
        moments = moment_parts(self.optimizer, self.names)
        content = Content(step, config_hash, self.write_model, weights, moments, {"step": step, **state})
        return save_checkpoint(self.out, content, keep)

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_file(folder / "model" / "model.safetensors"))
        load_moments(TensorReader(folder, "optimizer"), self.optimizer, self.names)
