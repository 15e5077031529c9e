"""The classes that callbacks are instances of, and their errors, with packages that stand for the real ones."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from kdx.callbacks.foreign import ForeignSubclass, inner_module
from kdx.errors import KdxError
from tests.callbacks.small import Classifier


class Counter(ForeignSubclass):
    packages = ("kdx_first_package.part", "kdx_second_package")
    base = "Base"

    def __init__(self, start: int) -> None:
        self.count = start


def package(name: str) -> Any:
    module = types.ModuleType(name)
    module.Base = type("Base", (), {"method": lambda self: name})  # type: ignore[attr-defined]
    return module


def test_an_instance_belongs_to_the_packages_that_the_program_has_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = package("kdx_first_package.part"), package("kdx_second_package")
    with pytest.raises(KdxError, match=r"Counter needs the package kdx_first_package, .*\n.*pip install kdx_first_package$"):
        Counter(1)
    monkeypatch.setitem(sys.modules, "kdx_second_package", second)
    counter: Any = Counter(1)
    assert isinstance(counter, second.Base) and issubclass(type(counter), Counter) and counter.count == 1
    assert counter.method() == "kdx_second_package" and type(counter).__name__ == "Counter"
    assert type(Counter(2)) is type(counter) is type(type(counter)(3))
    monkeypatch.setitem(sys.modules, "kdx_first_package.part", first)
    both: Any = Counter(4)
    assert isinstance(both, first.Base) and isinstance(both, second.Base) and both.method() == "kdx_first_package.part"


def test_an_import_that_fails_inside_a_package_is_not_hidden(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kdx_second_package.py").write_text("import kdx_absent_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="kdx_absent_dependency"):
        Counter(1)


def test_the_student_inside_a_module() -> None:
    network = Classifier(0)
    assert inner_module(network, None) is network and inner_module(network, "second.0") is network.second[0]
    with pytest.raises(KdxError, match=r"Classifier has no module 'fist'\.\nExisting names: first"):
        inner_module(network, "fist")
