"""The probes of what is installed return reasons, whatever a broken installation raises."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace

import onnxruntime
import pytest
import torch

from kdx.runtimes.installed import cuda_provider_problem, gpu_problem, is_installed, package_problem

ERRORS = [
    ImportError("libcuda.so.1: cannot open\nmore"),
    OSError("damaged"),
    AttributeError("no _core"),
    ValueError(""),
    SystemError("bad call"),
]
CUDA, ON_CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture(autouse=True)
def uncached() -> Iterator[None]:
    for probe in (package_problem, gpu_problem, cuda_provider_problem):
        probe.cache_clear()
    yield
    for probe in (package_problem, gpu_problem, cuda_provider_problem):
        probe.cache_clear()


def raising(error: Exception) -> object:
    def broken(*_: object, **__: object) -> None:
        raise error

    return broken


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_becomes_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = str(error).partition("\n")[0] or type(error).__name__
    monkeypatch.setattr(importlib, "import_module", raising(error))
    assert package_problem("anything") == reason
    monkeypatch.setattr(torch, "ones", raising(error))
    assert gpu_problem() == reason
    monkeypatch.setattr(onnxruntime, "get_available_providers", raising(error))
    assert cuda_provider_problem() == reason


def test_what_works_has_no_problem() -> None:
    assert package_problem("json") == "" and is_installed("json")
    assert "No module named" in package_problem("a_package_that_does_not_exist")
    assert not is_installed("a_package_that_does_not_exist") and not is_installed("a_package_that_does_not_exist.part")
    if not torch.cuda.is_available():
        assert gpu_problem() != ""


@pytest.mark.parametrize(
    ("compiled", "starts", "message"), [(False, False, "built for the CPU only"), (True, False, "does not start"), (True, True, "")]
)
def test_a_provider_works_when_a_session_of_it_starts(compiled: bool, starts: bool, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnxruntime.InferenceSession
    sessions: list[object] = []

    def session(network: bytes, options: object, providers: list[str]) -> object:
        sessions.append(real(network, providers=[ON_CPU]))  # the network is valid
        return SimpleNamespace(get_providers=lambda: [CUDA, ON_CPU] if starts else [ON_CPU])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, ON_CPU] if compiled else [ON_CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    assert message in cuda_provider_problem() and (cuda_provider_problem() == "") == starts and len(sessions) == compiled
