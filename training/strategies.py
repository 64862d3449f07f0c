"""How processes share the work of a step: one process, DDP and FSDP2 through accelerate.

DeepSpeed's ZeRO is in `training/zero.py`. All of them compute the same update from the same batch: weights and moments
are float32, products run under autocast, and gradients are averaged in float32, whichever process holds what.
"""

import contextlib
import math
import os
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.config import Config
from training.errors import ConfigError
from training.moments import load_moments, moment_parts, part_of
from training.processes import Processes
from training.tensorfiles import Part, TensorReader

LONGEST_WAIT = timedelta(days=1)  # of a collective; `training/peers.py` ends the wait for a lost process much earlier
_LAUNCHED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_strategy(asked: str) -> str:
    """Return "ddp", "fsdp2", "zero2" or "zero3": what was asked for, or with "auto" what accelerate was launched with.

    A process that is alone shares nothing, whatever was asked for.

    Raises:
        ConfigError: accelerate was launched with something that is not supported.
    """
    launched = _launched_strategy()
    for name in [name for name in os.environ if name.startswith(_LAUNCHED)]:
        del os.environ[name]  # the rest goes by the strategy alone
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return "ddp" if alone else launched if asked == "auto" else asked


def _launched_strategy() -> str:
    def is_set(name: str) -> bool:
        return os.environ.get(name, "false").lower() == "true"

    def value(name: str, default: str) -> str:
        return os.environ.get(name, default).lower()

    if is_set("ACCELERATE_USE_FSDP"):
        wrong = [] if value("FSDP_VERSION", "1") == "2" else ["fsdp_version: expected 2"]
        wrong += ["fsdp_offload_params: expected false"] if is_set("FSDP_OFFLOAD_PARAMS") else []
        strategy = "fsdp2"
    elif is_set("ACCELERATE_USE_DEEPSPEED"):
        stage = value("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        wrong = [] if stage in ("2", "3") else [f"zero_stage: expected 2 or 3, got {stage}"]
        for kind in ("OPTIMIZER", "PARAM"):
            device = value(f"ACCELERATE_DEEPSPEED_OFFLOAD_{kind}_DEVICE", "none")
            wrong += [] if device == "none" else [f"offload_{kind.lower()}_device: expected none, got {device}"]
        strategy = f"zero{stage}"
    else:
        wrong = ["Megatron-LM: expected DDP, FSDP2 or DeepSpeed"] if is_set("ACCELERATE_USE_MEGATRON_LM") else []
        strategy = "ddp"
    if wrong:
        raise ConfigError(f"accelerate: {'; '.join(wrong)}")
    return strategy


def resolve_precision(config: Config, strategy: str) -> str:
    """Return "fp32", "bf16" or "fp16"."""
    asked, cuda = config.training.precision, torch.cuda.is_available()
    if asked == "auto":
        return "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    if asked == "fp16" and not cuda:
        raise ConfigError("training.precision: expected fp32 or bf16 on a CPU, got fp16: it has no loss scaling there")
    if asked == "fp16" and strategy != "ddp":
        raise ConfigError(f"training.precision: expected fp32 or bf16 with {strategy}, got fp16")
    return asked


class Strategy:
    """Model and optimizer of a run, spread over its processes; this class is for one process and DDP.

    Args:
        config: the run's.
        precision: of the products, as `resolve_precision` gives it.

    Attributes:
        processes: which process this is.
        device: where it computes.
        module: the model without wrapping, whose parameters carry the names of a checkpoint.
        model: what a training step calls.
    """

    name = "ddp"

    def __init__(self, config: Config, precision: str) -> None:
        self.config, self.precision = config, precision
        self.accelerator = self._open_accelerator()
        device = self.accelerator.device
        started = dist.is_available() and dist.is_initialized()
        self.processes = Processes(dist.get_rank(), dist.get_world_size(), device) if started else Processes()
        self.device = device

    def _open_accelerator(self, **plugins: Any) -> Accelerator:
        cuda = torch.cuda.is_available()
        handlers = [InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
        mixed = "no" if self.precision == "fp32" else self.precision
        # Without the flag accelerate takes the processes of torchrun on a CPU for as many runs of one process.
        accelerator = Accelerator(mixed_precision=mixed, cpu=not cuda, kwargs_handlers=handlers, **plugins)
        supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
        if accelerator.distributed_type not in supported:
            raise ConfigError(f"accelerate: expected CPUs or CUDA GPUs, got {accelerator.distributed_type.value}")
        return accelerator

    def close(self) -> None:
        """Leave the other processes; else threads of the group might abort the process as it exits."""
        if self.processes.count > 1:
            dist.destroy_process_group()

    def autocast(self) -> AbstractContextManager:
        """The context in which the model computes in its precision."""
        enabled = self.precision != "fp32"
        return torch.autocast(self.device.type, _DTYPES[self.precision] if enabled else None, enabled=enabled)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take a model on `device`, whole in each process, and its optimizer, and spread them."""
        self.module: Any = model
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.named_parameters = dict(self.module.named_parameters())
        self._called = torch.compile(self.model) if self.config.training.compile else self.model

    def loss(self, **batch: Any) -> Tensor:
        """The loss of a micro-batch, in the run's precision."""
        with self.autocast():  # accelerate sets it for DDP, but not for FSDP2
            return self._called(**batch).loss

    def accumulating(self, last: bool) -> AbstractContextManager:
        """The context of forward and backward pass of a micro-batch; with the `last` one gradients are averaged."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch to those before it."""
        self.accelerator.backward(loss)

    def clip(self) -> Tensor | None:
        """Clip the gradients to `optim.grad_clip`; return their norm before, or None where only the update tells."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip or math.inf)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def update(self) -> tuple[bool, float | None]:
        """Update the weights and drop the gradients; return whether the update was made, and what `clip` left open."""
        scaler = self.scaler
        scale = 0.0 if scaler is None else scaler.get_scale()
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Not by `step_was_skipped`: accelerate thinks that a fused optimizer, which skips by itself, never does.
        return scaler is None or scaler.get_scale() >= scale, None

    def discard(self) -> None:
        """Drop the gradients without an update."""
        self.optimizer.zero_grad()

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of fp16."""
        return self.accelerator.scaler

    @property
    def generates_together(self) -> bool:
        """Whether a pass of the model needs all processes, as each holds a share of the weights."""
        return False

    def weight_parts(self) -> dict[str, Part]:
        """The weights, for a checkpoint."""
        return {name: part_of(parameter) for name, parameter in self.named_parameters.items()}

    def moment_parts(self) -> dict[str, Part]:
        """The optimizer's state, for a checkpoint."""
        return moment_parts(self.optimizer.optimizer, self.named_parameters)

    def load_moments(self, reader: TensorReader) -> None:
        """Load the optimizer's state from a checkpoint, after `prepare`.

        Raises:
            CheckpointError: it does not fit the model.
        """
        load_moments(reader, self.optimizer.optimizer, self.named_parameters, self.processes)

    def holds_finite_weights(self) -> bool:
        """Whether all weights that this process holds are finite."""
        local = (p.to_local() if isinstance(p, DTensor) else p for p in self.named_parameters.values())
        return all(bool(p.isfinite().all()) for p in local)


class FullySharded(Strategy):
    """FSDP2: each process holds some rows of each weight, gradient and moment, and gathers a layer while it needs it.

    Gradients are averaged after each micro-batch: put off, they would be kept whole.
    """

    name = "fsdp2"

    def _open_accelerator(self, **plugins: Any) -> Accelerator:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["TransnormerLayer"],
            cpu_ram_efficient_loading=False,
            activation_checkpointing=False,  # training.gradient_checkpointing has done it
            mixed_precision_policy=MixedPrecisionPolicy(cast_forward_inputs=False),  # autocast alone, as elsewhere
        )
        accelerator = super()._open_accelerator(fsdp_plugin=plugin, **plugins)
        if accelerator.distributed_type == DistributedType.MULTI_CPU:  # accelerate knows FSDP on GPUs alone
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin
        return accelerator

    def accumulating(self, last: bool) -> AbstractContextManager:
        return contextlib.nullcontext()

    @property
    def generates_together(self) -> bool:
        return True


def open_strategy(config: Config) -> Strategy:
    """Join the other processes and return how the work is shared.

    Raises:
        ConfigError: for what this machine or accelerate's launch can't do.
    """
    name = resolve_strategy(config.training.strategy)
    precision = resolve_precision(config, name)
    if name == "ddp":
        return Strategy(config, precision)
    if name == "fsdp2":
        return FullySharded(config, precision)
    from training.zero import Zero

    asked = config.training.skip_nonfinite
    if asked:
        raise ConfigError(f"training.skip_nonfinite: expected 0, got {asked}: {name} can't drop a batch's gradients")
    return Zero(config, precision, stage=int(name[-1]))
