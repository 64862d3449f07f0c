"""A tiny model that trains and saves as a run does, for the tests of checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from training.checkpoint import load_optimizer_state, save_checkpoint
from training.config import OptimConfig
from training.optim import build_optimizer


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
        save_file(self.model.state_dict(), folder / "model.safetensors")
        (folder / "README.md").write_text("# A model\n")

    def save(self, step: int, keep: int = 0, config_hash: str = "abc", **state: object) -> Path:
        return save_checkpoint(
            self.out, step, self.write_model, self.optimizer, self.names, {"step": step, **state}, config_hash, keep
        )

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_file(folder / "model" / "model.safetensors"))
        load_optimizer_state(folder, self.optimizer, self.names)
