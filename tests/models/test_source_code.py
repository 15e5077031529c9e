"""The hash of the code that defines a network."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from torch import nn

from kdx import models
from kdx.models.source_code import code_hash

FACTORY = """
from own_parts import Part
def network():
    import torch
    return torch.nn.Sequential(Part(), torch.nn.Flatten())
"""
PART = """
import torch
class Part(torch.nn.Module):
    def forward(self, x):
        return FACTOR * x
FACTOR = 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def of_code(folder: Path, factory: str, part: str) -> str | None:
    for name, text in {"own_factory": factory, "own_parts": part}.items():
        (folder / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    reference = "own_factory:network"
    return code_hash(reference, models.load(reference).module)


def test_it_changes_with_the_factory_and_with_the_classes_of_the_parts(folder: Path) -> None:
    same = of_code(folder, FACTORY, PART)
    assert same is not None and same == of_code(folder, FACTORY, PART)
    assert len({same, of_code(folder, FACTORY + "# changed\n", PART), of_code(folder, FACTORY, PART.replace("= 1", "= 22"))}) == 3


def test_networks_of_packages_have_no_hash() -> None:
    for reference in ("kdx:resnet,width=2", "timm:resnet18"):
        assert code_hash(reference, models.load(reference).module) is None
    assert code_hash("a network", nn.Linear(2, 2)) is None
