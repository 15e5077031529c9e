"""The processes that train a network together, through Hugging Face Accelerate; one process needs no package.

Every process reads its part of each batch, and gradients are averaged, so the number of processes does not change what is computed, except
for rounding, for batch normalisation, whose statistics are those of a part, and for losses that compare images within a part.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor, nn

from kdx.disk import check_locked, lock_folder, remove_leftovers
from kdx.errors import KdxError, missing_package
from kdx.remote_lock import RemoteLock

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of a training.

    rank: its number, from 0. count: how many there are.
    """

    rank: int = 0
    count: int = 1
    accelerator: Any = None

    @classmethod
    def of_environment(cls, device: str) -> tuple[Processes, str]:
        """The processes that ``accelerate launch`` or ``torchrun`` started, and the device of this one.

        Both state the number of processes in WORLD_SIZE. Raises KdxError if there are several and Accelerate is not installed, or if all
        are to use the same GPU.
        """
        if int(os.environ.get("WORLD_SIZE") or 1) == 1:
            return SINGLE, device
        if device not in ("auto", "cpu", "cuda"):
            raise KdxError(f"Several processes cannot share the device {device!r}.", "Give cpu, cuda or auto.")
        accelerator = _accelerator(device == "cpu")
        return cls(accelerator.process_index, accelerator.num_processes, accelerator), str(accelerator.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with averaged gradients; its parameters are those of the first process. A module without parameters stays as it is."""
        if self.accelerator is None or not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        wrapped: nn.Module = self.accelerator.prepare_model(module)
        return wrapped

    def without_averaging(self, module: nn.Module) -> AbstractContextManager[None]:
        """Inside the block, the gradients of a wrapped module are summed locally, and the next backward pass outside averages the sum."""
        context: AbstractContextManager[None] = nullcontext() if self.accelerator is None else self.accelerator.no_sync(module)
        return context

    def share_buffers(self, module: nn.Module) -> None:
        """Give the module's buffers, such as the statistics of batch normalisation, the values of the first process."""
        if self.accelerator is not None:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in each of them."""
        if self.accelerator is None:
            return tensor
        total: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return total

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank, in each of them."""
        if self.accelerator is None:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def alone_in(self, folder: Path) -> Iterator[None]:
        """Inside the block, no other training writes to the folder, which is created. The lock ends with the first process.

        Raises KdxError, in every process, if another training has locked the folder or it cannot be written.
        """
        lock: IO[bytes] | RemoteLock | None = None
        problem: KdxError | None = None
        if self.is_main:
            try:
                lock = lock_folder(folder)
                remove_leftovers(folder)
            except KdxError as error:
                problem = error
        with lock or nullcontext():
            problem = self.agree(problem)
            if problem is not None:
                raise problem
            yield
            if lock is not None:
                check_locked(folder, lock)

    def agree(self, value: T) -> T:
        """The first process's value, in each process."""
        if self.accelerator is None:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Return once every process has called this."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


@functools.cache
def _accelerator(cpu: bool) -> Any:
    """The connection to the other processes, which ends with this process."""
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError as error:
        raise missing_package("accelerate", "distill", "A training with several processes") from error
    import_module("torch.distributed.nn.functional")  # imported later, its default arguments would keep the process group alive
    accelerator = Accelerator(cpu=cpu, mixed_precision="no")  # kdx's own settings choose the precision
    atexit.register(_disconnect, accelerator)
    return accelerator


def _disconnect(accelerator: Any) -> None:
    """End the connection while the interpreter still runs.

    Otherwise gloo aborts a process whose peers have left before, or whose interpreter ends while a thread of gloo releases a tensor. These
    threads end with the process group, and a wrapped network keeps it alive.
    """
    accelerator.free_memory()
    accelerator.end_training()


SINGLE = Processes()
"""The only process of a training."""
