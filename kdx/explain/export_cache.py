"""The cache of exported networks: files that any later run or explainer of the same networks uses again."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kdx.disk import cache_folder, log, replacing
from kdx.errors import KdxError
from kdx.export.description import versions
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.models.network import Network
from kdx.models.reference import parse_reference

LIMIT = 4_000_000_000
"""The most bytes in the cache. Files that were not used for the longest time are deleted first."""

_LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers", "kdx": "kdx"}
"""The sources whose code a reference identifies, and the package that contains it. The code of a user's factory may change at any time."""


def cached_path(network: Network, graph: FeatureGraph | GradientGraph, image_size: tuple[int, int]) -> Path | None:
    """The path of this export in the cache, whether it is there or not; None for networks whose code the reference does not identify.

    The name is a hash of everything that the file depends on: the weights, the network's modules, the kind of graph, its layers and
    preprocessing, the image size, the versions of the packages, and the code of kdx's exports.
    """
    try:
        reference = parse_reference(network.reference)
    except KdxError:
        return None
    library = _LIBRARIES.get(reference.source)
    if library is None or any("forward" in vars(module) for module in network.module.modules()):
        return None
    try:
        library_version = version(library)
    except PackageNotFoundError:
        return None
    key = {
        "reference": str(reference.with_weights(None)),
        "weights": network.weights_hash,
        "modules": repr(network.module),
        "kind": graph.kind,
        "layers": graph.layers,
        "at": graph.at if isinstance(graph, GradientGraph) else None,
        "preprocessing": asdict(graph.preprocessing),
        "image_size": image_size,
        "versions": versions() | {library: library_version},
        "code": _code_hash(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "networks" / f"{digest[:40]}.onnx"


@cache
def _code_hash() -> str:
    """A hash of the source of kdx's exports and of its own network, so that a changed checkout does not use old files."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted((*package.glob("export/**/*.py"), package / "models" / "resnet.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def take(cached: Path, path: Path) -> bool:
    """Copy a file of the cache, and its report, to ``path``. False if the cache does not have it, or if it cannot be copied."""
    if not cached.is_file():
        return False
    try:
        cached.touch()  # the time of the last use
        for source, target in ((_report(cached), _report(path)), (cached, path)):
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
    except (OSError, KdxError):  # another process has just deleted it, or the cache cannot be read
        return False
    return True


def keep(path: Path, cached: Path) -> None:
    """Copy an exported file and its report into the cache, and delete old files beyond LIMIT. An error is logged: nothing needs the cache.

    Files with weights beside them (over 2 GB) and files larger than a quarter of LIMIT are not kept. Files appear whole, by a rename, so
    several processes may write the same one.
    """
    try:
        if path.with_name(f"{path.name}.data").exists() or path.stat().st_size > LIMIT / 4:
            return
        for source, target in ((_report(path), _report(cached)), (path, cached)):
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
        _remove_old(cached.parent)
    except (OSError, KdxError) as error:
        log.info("%s was not kept in the cache: %s", path, error)


def _report(path: Path) -> Path:
    return path.with_name(f"{path.name}.parity.json")


def _remove_old(folder: Path) -> None:
    """Delete the files that were used longest ago until the others fit into LIMIT."""
    states = {}
    for path in folder.glob("*.onnx"):
        with suppress(FileNotFoundError):  # another process deletes files as well
            states[path] = path.stat()
    total = 0
    for path, state in sorted(states.items(), key=lambda item: item[1].st_mtime, reverse=True):
        total += state.st_size
        if total > LIMIT:
            path.unlink(missing_ok=True)
            _report(path).unlink(missing_ok=True)
