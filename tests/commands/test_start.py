"""What `kdx` imports before it does any work: help, the version and argument errors wait for no large package."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = """
import sys
sys.argv = ["kdx", *sys.argv[1:]]
status = 0
try:
    from kdx.cli import main
    main()
except SystemExit as stop:
    status = stop.code or 0
print(status, *sorted(sys.modules), file=sys.stderr)
"""

SLOW = {"torch", "numpy", "scipy", "onnx", "sklearn", "matplotlib", "zarr", "pyarrow", "PIL", "jinja2"}
"""Packages that a command needs for its work only."""

MOST = 500
"""Modules: the standard library's, typer's and rich's. PyTorch alone has 1,500."""


def modules_after(*arguments: str) -> tuple[int, set[str]]:
    """The exit status of `kdx` with these arguments, and the modules that it imported."""
    process = subprocess.run([sys.executable, "-c", MODULES, *arguments], capture_output=True, text=True, check=True)
    status, *names = process.stderr.splitlines()[-1].split()
    return int(status), set(names)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("--version", 0),
        ("--help", 0),
        ("explain --help", 0),
        pytest.param("distill --help", 0, marks=pytest.mark.slow),
        pytest.param("export --help", 0, marks=pytest.mark.slow),
        ("", 2),
        pytest.param("paint", 2, marks=pytest.mark.slow),
        pytest.param("explain --colour red", 2, marks=pytest.mark.slow),
        pytest.param("explain digits", 2, marks=pytest.mark.slow),
        ("explain digits --models m --out R --batch many", 2),
    ],
)
def test_help_and_argument_errors_import_no_large_package(command: str, status: int) -> None:
    actual, modules = modules_after(*command.split())
    assert actual == status
    assert not SLOW & {name.split(".")[0] for name in modules}
    assert "rich.progress" not in modules
    assert len(modules) <= MOST


def test_the_version_is_printed_without_rich() -> None:
    assert "rich.console" not in modules_after("--version")[1]


def test_importing_kdx_imports_only_the_standard_library() -> None:
    code = "import sys; before = set(sys.modules); import kdx; print(*sorted(set(sys.modules) - before))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = set(process.stdout.split())
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"kdx"}
    assert [name for name in names if name.startswith("kdx.")] == []
