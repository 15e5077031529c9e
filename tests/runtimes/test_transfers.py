"""Transfers: packing keeps every bit, and results are read one batch behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kdx.data.pixels import pixels_of
from kdx.runtimes.transfers import Transfers, _whole, one_behind, packed, replaced, unpacked


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclass(frozen=True)
class Result:
    number: int
    pair: Pair
    by_name: dict[str, Tensor]


def mixed() -> list[Tensor]:
    """Tensors of number types of all sizes, some empty, without dimensions, or not contiguous."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, generator=generator)
    return [
        values > 0,
        values.half(),
        values,
        values.double().T,
        torch.arange(7),
        values[:, ::2],
        torch.empty(0, 4),
        torch.tensor(2.5, dtype=torch.float64),
        torch.tensor([1, 2, 3], dtype=torch.uint8),
        torch.tensor([float("nan"), float("-inf"), -0.0]),
    ]


def test_packed_tensors_come_back_bit_for_bit_in_their_order_and_shape() -> None:
    tensors = mixed()
    shapes = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors]
    flat = packed(tensors)
    assert flat.dtype == torch.uint8 and len(flat) == sum(tensor.nbytes for tensor in tensors)
    for actual, expected in zip(unpacked(flat, shapes), tensors, strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        # A view of the bytes also compares NaN and the sign of zero.
        assert torch.equal(actual.contiguous().reshape(-1).view(torch.uint8), expected.contiguous().reshape(-1).view(torch.uint8))
        assert actual.data_ptr() % actual.itemsize == 0
    assert not len(packed([])) and unpacked(packed([]), []) == []


def test_staged_tensors_are_recognised_by_their_memory() -> None:
    """Staged tensors are copied together; others are packed first."""
    flat = packed(mixed())
    staged = unpacked(flat, mixed())
    whole = _whole(staged)
    assert whole is not None and whole.data_ptr() == flat.data_ptr() and torch.equal(whole, flat)
    for others in (mixed(), staged[:-1], staged[::-1], [staged[2], *staged[2:]]):
        assert _whole(others) is None


def test_every_tensor_in_a_nested_result_is_replaced_in_order() -> None:
    result = Result(3, Pair(torch.tensor([0]), None), {"a": torch.tensor([1]), "b": torch.tensor([2])})
    actual = replaced(result, iter([torch.tensor([10]), torch.tensor([11]), torch.tensor([12])]))
    assert isinstance(actual, Result) and isinstance(actual.pair, Pair)
    assert (actual.number, int(actual.pair.first), actual.pair.second) == (3, 10, None)
    assert {name: int(value) for name, value in actual.by_name.items()} == {"a": 11, "b": 12}


def test_nothing_is_copied_on_the_cpu() -> None:
    transfers, tensor = Transfers(torch.device("cpu")), torch.ones(3)
    assert transfers.upload(tensor) is tensor and transfers.staged((tensor,))[0] is tensor
    assert transfers.upload_together((tensor,))[0] is tensor
    result = {"a": (tensor,)}
    assert transfers.download(result).result() is result
    assert transfers.ahead == 0


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_an_element_is_yielded_after_the_next_ones_are_drawn(ahead: int) -> None:
    drawn: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(5):
            drawn.append(number)
            yield number

    given = []
    for number in one_behind(numbers(), ahead):
        assert len(drawn) == min(number + 1 + ahead, 5)
        given.append(number)
    assert given == [0, 1, 2, 3, 4]


def test_complete_elements_are_yielded_before_an_error_is_raised() -> None:
    def numbers() -> Iterator[int]:
        yield from (0, 1)
        raise ValueError("batch 2")

    given = []
    with pytest.raises(ValueError, match="batch 2"):
        for number in one_behind(numbers(), 1):
            given.append(number)
    assert given == [0, 1]


@pytest.mark.gpu
def test_copies_to_and_from_a_gpu_keep_every_bit_while_other_work_is_queued() -> None:
    transfers = Transfers(torch.device("cuda"))
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randint(0, 256, (64, 3, 64, 64), generator=generator, dtype=torch.uint8).pin_memory() for _ in range(6)]
    factor = torch.rand(2048, 2048, device="cuda")
    downloads = []
    for number, levels in enumerate(inputs):
        uploaded = transfers.upload(levels)
        (factor @ factor).sum()  # work between the copies
        result = {"levels": uploaded.clone(), "sum": uploaded.long().sum((1, 2, 3))}
        downloads.append(transfers.download((result, number)))
        del uploaded, result  # the allocator may use their memory for the next batch
    for number, (levels, download) in enumerate(zip(inputs, downloads, strict=True)):
        actual, its_number = download.result()
        assert its_number == number and actual["levels"].device.type == "cpu"
        assert torch.equal(actual["levels"], levels) and torch.equal(actual["sum"], levels.long().sum((1, 2, 3)))


@pytest.mark.gpu
def test_staged_tensors_arrive_together() -> None:
    transfers = Transfers(torch.device("cuda"))
    expected = tuple(tensor for tensor in mixed() if tensor.numel())
    for given in (transfers.staged(expected), expected):
        for actual, tensor in zip(transfers.upload_together(given), expected, strict=True):
            assert actual.is_cuda and torch.equal(actual.cpu().nan_to_num(), tensor.nan_to_num())


@pytest.mark.gpu
def test_large_results_are_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdx.runtimes.transfers.MOST_PINNED", 100)
    values = torch.arange(1000, device="cuda")
    assert torch.equal(Transfers(values.device).download((values,)).result()[0], torch.arange(1000))


@pytest.mark.gpu
def test_levels_become_the_same_pixels_on_a_gpu() -> None:
    levels = torch.arange(256, dtype=torch.uint8).repeat(3)
    assert torch.equal(pixels_of(levels.cuda()).cpu(), pixels_of(levels))
