"""Where numbers stop being finite: which weights and gradients of which process hold NaN or infinity."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from training.processes import Processes


def find_non_finite(module: nn.Module, run: Callable[[], object], processes: Processes) -> str:
    """Say in which process which weight is not finite, or gradient before any exchange; for all processes at once.

    Args:
        module: the model without wrapping.
        run: forward and backward passes over this process's micro-batches; gradients are added to.
        processes: those of the run.
    """
    kind, found = "weight", processes.gather_objects(_weights(module))
    if not any(found):
        kind, found = "gradient of", processes.gather_objects(_gradients(module, run))
    if not any(found):
        return "weights are finite, and gradients too when the batch is run again"
    texts = [
        f"{kind} {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} on rank {rank}"
        for rank, names in enumerate(found)
        if names
    ]
    return f"not finite: {', '.join(texts)}"


def _weights(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if not _is_finite(parameter)]


def _gradients(module: nn.Module, run: Callable[[], object]) -> list[str]:
    found: dict[str, None] = {}
    with _watched_gradients(module, found):
        run()
    return list(found)


@contextlib.contextmanager
def _watched_gradients(module: nn.Module, found: dict[str, None]) -> Iterator[None]:
    """Look at each gradient as it arises; FSDP2 and ZeRO-3 have a parameter only while its module is at work."""
    handles: list[RemovableHandle] = []

    def look(name: str, gradient: Tensor) -> None:
        if not _is_finite(gradient):
            found[name] = None

    def before(prefix: str, part: nn.Module, inputs: tuple) -> None:
        for name, parameter in part.named_parameters(recurse=False):
            handles.append(parameter.register_hook(partial(look, f"{prefix}.{name}")))

    for name, part in module.named_modules():
        if any(True for _ in part.parameters(recurse=False)):
            handles.append(part.register_forward_pre_hook(partial(before, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    share = local if local.numel() else getattr(local, "ds_tensor", local)  # ZeRO-3 empties weights between uses
    return bool(share.detach().isfinite().all())
