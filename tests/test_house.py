"""The structure: imports go one way, the wheel holds everything, and the documents say what runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import kdx
from kdx.models import models_file

ROOT = Path(__file__).parents[1]

# A file may import files of lower floors only.
FLOORS = [
    {"kdx.errors", "kdx.choices", "kdx.roles", "kdx.progress", "kdx.threads"},
    {"kdx.remote", "kdx.patience"},
    {"kdx.remote_lock"},
    {"kdx.disk", "kdx.cluster"},
    {"kdx.kernels", "kdx.figure_files"},
    {"kdx.features"},
    {"kdx.export", "kdx.scores"},
    {"kdx.models", "kdx.data", "kdx.runtimes", "kdx.losses"},
    {"kdx.maps", "kdx.distill"},
    {"kdx.explain", "kdx.cam", "kdx.callbacks"},
    {"kdx.runs"},
    {"kdx.report"},
    {"kdx.evaluate", "kdx.study"},
    {"kdx.commands"},
    {"kdx.cli"},
    {"kdx.__main__"},
]


def sources() -> dict[str, Path]:
    """Every module by its dotted name."""
    paths = [path for folder in ("kdx", "export", "kernels") for path in (ROOT / folder).rglob("*.py") if not path.is_symlink()]
    names = {}
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "kdx" else ("kdx", *parts)
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            names |= {f"kdx.{alias.name}" for alias in node.names} if module == "kdx" else {module}
    return names


def floor(module: str) -> int:
    package = ".".join(module.split(".")[:2])
    return next(number for number, rooms in enumerate(FLOORS) if package in rooms)


def test_imports_go_one_way() -> None:
    for module, path in sources().items():
        if module == "kdx":
            continue
        for other in imports(path):
            assert other.split(".")[0] not in ("export", "kernels", "tests"), f"{module} imports {other}"
            if other.startswith("kdx.") and other.split(".")[1] != module.split(".")[1]:
                assert floor(other) < floor(module), f"{module} (floor {floor(module)}) imports {other} (floor {floor(other)})"


# Of kdx.kernels, what compiles and launches; the rest is mathematics.
MACHINERY = {"kdx.kernels.cubins", "kdx.kernels.cuda", "kdx.kernels.drivers", "kdx.kernels.__main__", "kdx.kernels.compilers"}


def test_kernels_know_nothing_of_models_or_files() -> None:
    language = {
        "__future__",
        "collections.abc",
        "concurrent.futures",
        "contextlib",
        "dataclasses",
        "functools",
        "itertools",
        "math",
        "threading",
        "os",
        "typing",
    }
    for module, path in sources().items():
        if module.startswith("kdx.kernels"):
            below = {"kdx.choices", "kdx.errors", "kdx.patience", "kdx.threads"}
            others = {name for name in imports(path) - below if not name.startswith("kdx.kernels")}
            if module in MACHINERY:  # files of the cache, and processes of compilers
                others -= {"kdx.disk"}
                others -= sys.stdlib_module_names | {name for name in others if name.split(".")[0] in sys.stdlib_module_names}
            assert others <= language | {"torch", "numpy"}, module


def test_optional_and_heavy_packages_are_imported_where_they_are_used() -> None:
    """`import kdx` works with the core dependencies alone, and no command waits for a package that it does not use."""
    code = "import sys, kdx.cli.commands; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"onnxruntime", "timm", "torchvision", "matplotlib", "sklearn", "zarr", "pyarrow", "jinja2", "onnxscript", "PIL"}
    heavy |= {
        "tensorrt",
        "tensorrt_rtx",
        "transformers",
        "pycuda",
        "cuda",
        "openvino",
        "datasets",
        "pandas",
        "lightning",
        "pytorch_lightning",
    }
    assert not heavy & set(loaded)


def test_version_changelog_and_citation_agree() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.M)
    assert version and newest and cited and version[1] == newest[1] == cited[1] == kdx.__version__


@pytest.mark.parametrize(
    "module",
    [
        "maps.unicam",
        "maps.class_maps",
        "maps.earlier_layers",
        "maps.salient_images",
        "maps.decomposition",
        "scores.metrics",
        "scores.compare",
        "scores.similarity",
        "distill.probe",
        "cam.methods",
    ],
)
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"kdx.{module}"))
    assert result.attempted > 0 and result.failed == 0


def test_public_names_are_loaded_on_demand() -> None:
    """`import kdx` loads nothing heavy, `dir` lists the public names alone, and each of them is what its annotation names."""
    code = "import sys, kdx; print(len(sys.modules)); print('torch' in sys.modules, dir(kdx) == sorted(kdx.__all__))"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[1] == "False True"
    declared = {
        alias.name: node.module
        for statement in ast.parse(Path(kdx.__file__).read_text()).body
        if isinstance(statement, ast.If)
        for node in statement.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(declared) == sorted(kdx.__all__)
    for name, module in declared.items():
        assert getattr(kdx, name) is getattr(importlib.import_module(str(module)), name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kdx.nonsense
    with pytest.warns(DeprecationWarning, match="ReferenceSet"):
        assert kdx.Reference is kdx.ReferenceSet


def test_files_are_short() -> None:
    """A file is one idea. One that is longer than 400 lines states here why it is not divided."""
    reasons: dict[str, str] = {}
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.cu", "*.cuh", "*.js"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in tracked.split() if (ROOT / name).exists()}
    assert {name for name, length in lengths.items() if length > 400} == set(reasons)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 1200


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The networks of `make demo`, with random weights."""
    from safetensors.torch import save_file

    from kdx.distill import DEMO

    folder = tmp_path / "demo" / "kd" / "models"
    folder.mkdir(parents=True)
    references = {}
    for role, reference in (("teacher", DEMO["teacher"]), ("base", DEMO["student"]), ("student", DEMO["student"])):
        network = kdx.models.load(reference, classes=10)
        save_file({name: tensor.contiguous() for name, tensor in network.module.state_dict().items()}, folder / f"{role}.safetensors")
        references[role] = f"{reference},classes=10@{role}.safetensors"
    preprocessing = kdx.models.load(DEMO["student"]).preprocessing
    base, student, teacher = (references[role] for role in ("base", "student", "teacher"))
    models_file.write_models(folder / "models.toml", base=base, student=student, teacher=teacher, preprocessing=preprocessing)
    return tmp_path


@pytest.mark.slow
def test_readmes_python_example_runs(demo: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(examples) >= 1
    for example in examples:
        result = subprocess.run([sys.executable, "-W", "error", "-c", example], cwd=demo, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


def test_readmes_commands_exist() -> None:
    """Each `kdx` line of the documents names a command and options that the command line has."""
    from typer.main import get_command

    from kdx.cli.commands import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    blocks = [
        block
        for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
        for block in re.findall(r"^```(?:sh|console)\n(.*?)^```", page.read_text(), re.S | re.M)
    ]
    lines = re.findall(r"^kdx .+$", "\n".join(blocks).replace("\\\n", " "), re.M)
    assert len(lines) >= 4
    for line in lines:
        words = line.split()
        assert words[1] in commands, line
        known = {option for parameter in commands[words[1]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known | {"--help"}, line


def test_the_pages_figures_are_the_stored_ones() -> None:
    from benchmarks import readme

    for page in readme.PAGES:
        assert readme.filled(page) == page.read_text()


def kernel_sources() -> set[str]:
    """The CUDA C++ that an installed kdx compiles; what runs it without a GPU is the tests' own."""
    return {f"kdx/kernels/{path.name}" for path in (ROOT / "kernels").iterdir() if path.suffix in (".cu", ".cuh")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], check=True, capture_output=True)
    return out


@pytest.mark.slow
def test_the_sdist_holds_every_module(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for module, path in sources().items():
        stored = module.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        assert stored in names, stored
    assert {"kdx/py.typed", "kdx/report/templates/report.html.j2", "LICENSE"} | kernel_sources() <= names


@pytest.mark.slow
def test_the_installed_wheel_works_outside_the_repository(built: Path, tmp_path: Path) -> None:
    wheel = next(built.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.split("/")[0] not in ("kdx", wheel.name.rsplit("-", 3)[0] + ".dist-info")]
    assert kernel_sources() <= set(names)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, env=clean)
    # The dependencies are those of the running environment, from a path entry that comes after the wheel's own.
    site = next(environment.glob("lib/python*/site-packages"))
    dependencies = tmp_path / "dependencies"
    dependencies.mkdir()
    for entry in Path(pytest.__file__).parents[1].iterdir():
        if "kdx" not in entry.name.lower():
            (dependencies / entry.name).symlink_to(entry)
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    modules = sorted(sources().keys() - {"kdx.__main__"})
    code = f"import importlib, kdx; [importlib.import_module(name) for name in {modules}]; print(kdx.__file__)"
    loaded = subprocess.run([str(python), "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert Path(loaded.stdout.strip()).is_relative_to(environment)
    shown = subprocess.run(
        [str(environment / "bin" / "kdx"), "--help"], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0 and "explain" in shown.stdout
