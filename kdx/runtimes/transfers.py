"""Copies between the host and the device of the networks that overlap with the work of the device.

On a GPU, one asynchronous copy per tensor brings a batch to the device, and one asynchronous copy brings all its results back. Each
direction has a stream of its own, so that the copies neither wait for queued kernels nor delay them. On the CPU nothing is copied.

Asynchronous copies need pinned memory. PyTorch's allocator of pinned memory reuses a block only after the copies from and to it are
complete, so a long run alternates between a few blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")

MOST_PINNED = 1 << 28
"""The largest size in bytes of results that are copied through pinned memory, which PyTorch never returns to the system."""


class Download(Generic[T]):
    """Results that are being copied to the host. ``result`` waits for them."""

    def __init__(self, wait: Callable[[], T]) -> None:
        self._wait = wait

    def result(self) -> T:
        """The results, with every tensor on the CPU. Call this once."""
        return self._wait()


class Transfers:
    """The copies to and from one device."""

    def __init__(self, device: torch.device) -> None:
        self.pinned = device.type == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.pinned and device.index is None else device
        self._streams = [torch.cuda.Stream(self.device) for _ in range(2)] if self.pinned else []

    @property
    def ahead(self) -> int:
        """How many batches are queued beyond the one whose results are read: one on a GPU. On the CPU a batch is complete when its last
        operation returns."""
        return int(self.pinned)

    def staged(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Small tensors on the CPU, in memory from which `upload_together` copies them at once and asynchronously."""
        if not self.pinned:
            return tensors
        with torch.cuda.device(self.device):
            return tuple(unpacked(packed(tensors).pin_memory(), tensors))

    def upload_together(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tensors on the device: `upload` in one copy, for tensors that are `staged`."""
        if not self.pinned or all(tensor.device == self.device for tensor in tensors):
            return tuple(tensor.to(self.device) for tensor in tensors)
        flat = _whole(tensors)
        return tuple(unpacked(self.upload(packed([tensor.cpu() for tensor in tensors]) if flat is None else flat), tensors))

    def upload(self, tensor: Tensor) -> Tensor:
        """The tensor on the device. Work that is queued later on the current stream waits for the copy; the caller does not."""
        if not self.pinned or tensor.device == self.device:
            return tensor.to(self.device)
        stream, current = self._streams[0], torch.cuda.current_stream(self.device)
        with torch.cuda.stream(stream):
            copy = tensor.to(self.device, non_blocking=True)
        current.wait_stream(stream)
        copy.record_stream(current)
        return copy

    def download(self, results: T) -> Download[T]:
        """Copies all tensors of nested dictionaries, tuples and dataclasses to the host, in one copy. The caller does not wait.

        Results of more than MOST_PINNED bytes are copied immediately, because neither side should keep them in memory twice.
        """
        if not self.pinned:
            return Download(lambda: results)
        tensors = [tensor.to(self.device) for tensor in tensors_of(results)]
        if sum(tensor.nbytes for tensor in tensors) > MOST_PINNED:
            copied = on_host(results)
            return Download(lambda: copied)
        flat = packed(tensors)
        stream = self._streams[1]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # a thread that waits by spinning would delay the others
            done.record(stream)
        flat.record_stream(stream)
        # Only shapes and types are kept, so that the memory of the results on the device is free for the next batch.
        shapes = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors]
        structure = replaced(results, iter(shapes))

        def wait() -> T:
            done.synchronize()
            return replaced(structure, iter(unpacked(host, shapes)))

        return Download(wait)


def _whole(tensors: Sequence[Tensor]) -> Tensor | None:
    """The packed bytes of which these tensors are the `unpacked` views; None if they are not such views."""
    storage = tensors[0].untyped_storage()
    if any(tensor.untyped_storage().data_ptr() != storage.data_ptr() for tensor in tensors):
        return None
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    views = unpacked(flat, tensors) if len(flat) == sum(tensor.nbytes for tensor in tensors) else []
    same = len(views) == len(tensors) and all(a.data_ptr() == b.data_ptr() for a, b in zip(views, tensors, strict=True))
    return flat if same else None


def on_host(results: T) -> T:
    """Results with every tensor of their nested dictionaries, tuples and dataclasses on the CPU. Waits for the device."""
    return replaced(results, iter([tensor.cpu() for tensor in tensors_of(results)]))


def one_behind(started: Iterator[T], ahead: int) -> Iterator[T]:
    """Yields the elements in order, each after the next ``ahead`` elements have been drawn.

    If drawing an element raises an exception, the elements before it are returned first, so that no complete result is lost.
    """
    drawn: list[T] = []
    failure: Exception | None = None
    while True:
        try:
            drawn.append(next(started))
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        if len(drawn) > ahead:
            yield drawn.pop(0)
    yield from drawn
    if failure is not None:
        raise failure


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors of one device, one tensor after the other, those of the largest number types first."""
    if not tensors:
        return torch.empty(0, dtype=torch.uint8)
    return torch.cat([tensors[place].reshape(-1).view(torch.uint8) for place in _order(tensors)])


def unpacked(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of `packed`, as views of its result, from tensors of the same shapes and types in the same order."""
    parts: dict[int, Tensor] = {}
    start = 0
    for place in _order(like):
        tensor = like[place]
        end = start + tensor.numel() * tensor.itemsize
        parts[place] = flat[start:end].view(tensor.dtype).reshape(tensor.shape)
        start = end
    return [parts[place] for place in range(len(like))]


def _order(tensors: Sequence[Tensor]) -> list[int]:
    """The places of the tensors by the size of their numbers, largest first. Every tensor then starts at a multiple of its own size."""
    return sorted(range(len(tensors)), key=lambda place: -tensors[place].itemsize)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dictionaries, tuples and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
        return
    for part in _parts(value):
        yield from tensors_of(part)


def replaced(value: T, tensors: Iterator[Tensor]) -> T:
    """``value`` with the next of ``tensors`` in place of every tensor in its nested dictionaries, tuples and dataclasses, in order."""
    changed: Any = value
    if isinstance(value, Tensor):
        changed = next(tensors)
    elif isinstance(value, Mapping):
        changed = {name: replaced(part, tensors) for name, part in value.items()}
    elif isinstance(value, tuple):
        parts = [replaced(part, tensors) for part in value]
        changed = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    elif is_dataclass(value) and not isinstance(value, type):
        changed = replace(value, **{field.name: replaced(getattr(value, field.name), tensors) for field in fields(value)})
    return cast(T, changed)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, tuple):
        return list(value)
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return []
