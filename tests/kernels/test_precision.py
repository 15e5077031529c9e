"""Float32 products keep their digits while any thread is in a block of `ieee_float32`, and a program's settings come back after it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from kdx.kernels.precision import ieee_float32, tf32

State = tuple[object, ...]


def state() -> State:
    """What forbids or allows reduced precision."""
    try:
        cudnn: object = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        cudnn = None
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    return (cudnn, torch.get_float32_matmul_precision(), *(backend.fp32_precision for backend in backends))


def reduced() -> list[str]:
    """The settings that allow reduced precision now."""
    return [str(value) for value in state() if value in (True, "tf32", "bf16", "high", "medium")]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = state()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"  # type: ignore[attr-defined]
    assert state() == before


def allow_cudnn() -> None:
    torch.backends.cudnn.allow_tf32 = True


def allow_by_the_old_names() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def allow_bfloat16() -> None:
    torch.set_float32_matmul_precision("medium")


@pytest.mark.parametrize("allow", [allow_cudnn, allow_by_the_old_names, allow_bfloat16])
def test_nothing_is_reduced_inside_and_everything_is_as_before_after(allow: Callable[[], None]) -> None:
    allow()
    before = state()
    assert reduced()
    with ieee_float32():
        assert not reduced()
        with ieee_float32():
            assert not reduced()
        assert not reduced()
        with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):  # what torch.export does
            pass
    assert state() == before


def test_a_thread_that_leaves_first_does_not_end_the_block_of_another() -> None:
    before = state()
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with ieee_float32():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    with ieee_float32():
        thread.start()
        inside.wait()
    assert not reduced()
    leave.set()
    thread.join()
    assert state() == before


def test_an_error_restores_the_settings() -> None:
    before = state()
    with pytest.raises(ZeroDivisionError), ieee_float32():
        1 / 0  # noqa: B018
    assert state() == before


def test_a_pass_may_use_tensor_float_32() -> None:
    before = state()
    with ieee_float32():
        exact = state()
        with tf32(), tf32():
            assert {"True", "tf32"} <= set(reduced())
        assert state() == exact
    assert state() == before
