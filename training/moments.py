"""AdamW's state by parameter name, which depends on neither grouping nor the number of processes."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.errors import CheckpointError
from training.processes import Processes
from training.tensorfiles import Part, TensorReader


def moment_parts(optimizer: torch.optim.Optimizer, named_parameters: dict[str, nn.Parameter]) -> dict[str, Part]:
    """Return what a checkpoint holds of AdamW: `step.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME` of each parameter.

    Args:
        optimizer: AdamW.
        named_parameters: parameters of the unwrapped model by name, at least those that the optimizer updates.
    """
    return {
        f"{kind}.{name}": part_of(value)
        for name, parameter in _updated(optimizer, named_parameters).items()
        for kind, value in (optimizer.state.get(parameter) or fresh_state(parameter)).items()
    }


def part_of(tensor: Tensor) -> Part:
    """A tensor that each process has whole, or of which FSDP2 gave each some rows."""
    value = tensor.detach()
    return Part(value.shape, value.dtype, value.full_tensor if isinstance(value, DTensor) else lambda: value)


def load_moments(
    reader: TensorReader,
    optimizer: torch.optim.Optimizer,
    named_parameters: dict[str, nn.Parameter],
    processes: Processes | None = None,
) -> None:
    """Load AdamW's state bit by bit; learning rates and the other settings stay the optimizer's own.

    Args:
        reader: of what `moment_parts` gave to be written.
        optimizer: AdamW over the same parameters, grouped in any way.
        named_parameters: parameters of the unwrapped model by name.
        processes: those over which FSDP2 spread the parameters; None for one process.

    Raises:
        CheckpointError: a key is missing, unknown, or has another shape or type than its parameter asks for.
    """
    states = {name: fresh_state(p) for name, p in _updated(optimizer, named_parameters).items()}
    expected = {f"{kind}.{name}": value for name, state in states.items() for kind, value in state.items()}
    check_names(reader, set(expected))
    for key, value in expected.items():
        if isinstance(value, DTensor):
            value.to_local().copy_(reader.read(key, value, _rows(value, processes or Processes())))
        else:
            value.copy_(reader.read(key, value))
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(enumerate(states.values())), "param_groups": groups})


def check_names(reader: TensorReader, expected: set[str]) -> None:
    """Refuse a set of tensors that lacks a name or has one too many; a CheckpointError names it."""
    for key in sorted(expected ^ reader.names):
        raise CheckpointError(f"{reader.path}: {key} is {'missing' if key in expected else 'no part of this model'}")


def _rows(tensor: DTensor, processes: Processes) -> slice:
    """The rows that this process holds: FSDP2 cuts as `torch.chunk` does."""
    rows = tensor.shape[0]
    size = -(-rows // processes.count)
    first = min(processes.rank * size, rows)
    return slice(first, first + tensor.to_local().shape[0])


def fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state that AdamW gives a parameter before its first update."""
    data = parameter.detach()
    return {"step": torch.zeros(()), "exp_avg": torch.zeros_like(data), "exp_avg_sq": torch.zeros_like(data)}


def _updated(optimizer: torch.optim.Optimizer, named_parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the parameters of an optimizer by name, in the order of its groups, which is that of its state_dict."""
    names = {id(parameter): name for name, parameter in named_parameters.items()}
    return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
