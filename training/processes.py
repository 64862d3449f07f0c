"""The processes of a run: which one this is, and how all of them come to know the same."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from training.errors import RunError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """One of `count` processes, with its number and the device on which it exchanges numbers.

    Every method but `is_main` has to be called by all processes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """Return (count, n): the (n,) values of every process, by rank."""
        if self.count == 1:
            return values[None]
        values = values.to(self.device)
        everyone = values.new_empty(self.count, values.numel())
        dist.all_gather(list(everyone.unbind()), values.contiguous())
        return everyone

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of every process, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` in every process; a RunError of one is raised in all, with its rank.

        Unless all go on or none does, those that go on would wait for the others for ever.
        """
        result: Any = None
        mine: RunError | None = None
        try:
            result = action()
        except RunError as error:
            mine = error
        for rank, failure in enumerate(self.gather_objects(mine)):
            if failure is not None:
                raise mine if mine is not None and rank == self.rank else type(failure)(f"rank {rank}: {failure}")
        return result
