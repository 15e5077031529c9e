"""`benchmarks.families --all`: check every network of `family_networks`, one process per network, and describe the results.

Results are in the entry ``networks`` of benchmarks/results/families.json: one row per network, with the commit and the environment of
its last run. A run continues where the last one ended: it runs the stages that have no result. If the versions of PyTorch, timm or
transformers differ from those of an incomplete row, that row starts again, so that no row mixes versions.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import family_checks, family_networks, markdown
from benchmarks.family_checks import EXPORTS, STAGES, agrees, is_successful
from benchmarks.record import RESULTS, origin

RESULT = RESULTS / "families.json"
LIMIT = 600
"""Seconds of processor time per network, unless another limit is given. Busy neighbours do not shorten it."""

MEMORY = 12.0
"""Gigabytes of data per process, unless another limit is given."""

_PATIENCE = 5
"""A process is stopped after this many times the limit of processor time, if it waits for something."""

_LIBRARIES = ("torch", "timm", "transformers")
"""The packages whose versions the rows of one network share."""


@dataclass(frozen=True)
class Limits:
    """seconds: of processor time per network. gigabytes: of data per process. deadline: of the run, in time.monotonic()."""

    workers: int = 1
    seconds: float = LIMIT
    gigabytes: float = MEMORY
    deadline: float = float("inf")


def names(record: Mapping[str, Any]) -> list[str]:
    """All networks: those of timm in the stored list that the installed timm has, and transformers' architectures.

    If the record has no list, the parameters of all of timm's networks are counted, which takes minutes.
    """
    import timm

    known = record.get("timm") or {"version": version("timm"), "networks": family_networks.timm_networks()}
    architectures = [f"transformers:{name}" for name in family_networks.transformers_architectures()]
    return [f"timm:{name}" for name in known["networks"].values() if timm.is_model(name)] + architectures


def run(chosen: Sequence[str], stages: Sequence[str], limits: Limits, *, again: bool = False, result: Path | None = None) -> None:
    """Run the missing stages of the chosen networks; with ``again``, all stages of networks with a stage that did not succeed.

    Rows are stored after every stage in ``result``, by default in `RESULT`. Another file starts with the rows that `RESULT` has, and
    `merge` adds it to `RESULT`. At the deadline, running processes end, and their finished stages stay.
    """
    torch.set_num_threads(1)
    result = result or RESULT
    stored = read(result if result.exists() else RESULT)
    write(stored, result)
    source = origin("benchmarks.families")
    environment = source["environment"] | {name: version(name) for name in _LIBRARIES[1:]}
    rows = {each["network"]: each for each in stored["networks"]}
    pending = []
    for name in chosen:
        done = rows.get(name, {})
        todo = _due(done, [stage for stage in STAGES if stage in stages], again)
        if todo and _versions(done.get("environment", {})) != _versions(environment):
            done, todo = {}, [stage for stage in STAGES if stage in stages]
        known = {key: value for key, value in done.items() if key not in todo}
        if todo:
            pending.append((known | {"network": name, "commit": source["commit"], "environment": environment}, todo))
    for changed in _checked(pending, limits):
        rows[changed["network"]] = changed
        write(stored | {"networks": sorted(rows.values(), key=lambda each: str(each["network"]))}, result)


def _versions(environment: Mapping[str, Any]) -> list[Any]:
    return [environment.get(name) for name in _LIBRARIES]


def _due(done: Mapping[str, Any], stages: list[str], again: bool) -> list[str]:
    """The stages to run: those without a result, or with ``again`` all of them if any did not succeed, as the layer may be another now."""
    if again and not all(agrees(done, stage) for stage in stages):
        return stages
    if any(stage in done and not is_successful(done[stage]) for stage in ("build", "layers")):
        return []
    return [stage for stage in stages if stage not in done]


@dataclass
class _Process:
    """A process that checks one network, and the row with the stages that it has finished."""

    process: Any
    row: dict[str, Any]
    start: float


def _checked(pending: Sequence[tuple[dict[str, Any], list[str]]], limits: Limits) -> Iterator[dict[str, Any]]:
    """Check networks in processes and return each row after every stage, and once more after its process has ended.

    One thread does all of this: a process that is forked while another thread holds a lock may wait forever.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = list(pending), dict[Any, _Process]()
    while (waiting or running) and time.monotonic() < limits.deadline:
        while waiting and len(running) < limits.workers:
            known, stages = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(known, stages, sender, limits), daemon=True)
            process.start()
            sender.close()
            running[receiver] = _Process(process, known, time.monotonic())
        ready: list[Any] = connection.wait(list(running), timeout=max(0.0, min(1.0, limits.deadline - time.monotonic())))
        for receiver in ready:
            one = running[receiver]
            try:
                one.row = receiver.recv()
            except (EOFError, OSError):
                del running[receiver]
                one.process.join()
                one.row = _ended(one, limits)
                print(one.row["network"], *(f"{stage}: {_cell(one.row, stage)}" for stage in STAGES), sep="  ", flush=True)
            yield one.row
        for one in running.values():
            if time.monotonic() - one.start > _PATIENCE * limits.seconds:
                one.process.kill()
    for one in running.values():
        one.process.kill()
        one.process.join()
        print(one.row["network"], "is not finished", flush=True)


def _ended(one: _Process, limits: Limits) -> dict[str, Any]:
    """The row of a process that has ended, with the reason at a stage that was running."""
    by_limit = one.process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL) and time.monotonic() - one.start > 0.9 * limits.seconds
    reason = f"not finished after {limits.seconds:.0f} s" if by_limit else f"the process ended with {one.process.exitcode}"
    return {key: {"stopped": reason} if value == {"stopped": True} else value for key, value in one.row.items()}


def _child(row: dict[str, Any], stages: Sequence[str], sender: Any, limits: Limits) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + limits.seconds), resource.RLIM_INFINITY))
    memory = int(limits.gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    try:
        family_checks.check(row, stages, sender.send)
    finally:
        sender.close()


def prepare() -> None:
    """Import the libraries once for all processes, and keep these from the network and from GPUs, which a forked process cannot use."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name in _LIBRARIES:
        importlib.import_module(name)


def read(path: Path | None = None) -> dict[str, Any]:
    """The stored results, without stages that were running when they were stored."""
    path = path or RESULT
    record: dict[str, Any] = {"rows": [], "networks": []} | (json.loads(path.read_text()) if path.exists() else {})
    record["networks"] = [{key: value for key, value in row.items() if value != {"stopped": True}} for row in record["networks"]]
    return record


def write(record: Mapping[str, Any], path: Path | None = None) -> None:
    """Replace a file of results, so that a reader never sees a part of it."""
    path = path or RESULT
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


def merge(paths: Sequence[Path]) -> None:
    """Add the rows of other files of results. A row replaces the stored one of its network if as many of its stages agree, or more."""
    record = read()
    rows = {each["network"]: each for each in record["networks"]}
    for each in (each for path in paths for each in read(path)["networks"]):
        known = rows.get(each["network"], {})
        if sum(agrees(each, stage) for stage in STAGES) >= sum(agrees(known, stage) for stage in STAGES):
            rows[each["network"]] = each
    write(record | {"networks": sorted(rows.values(), key=lambda each: str(each["network"]))})


def table(record: Mapping[str, Any]) -> str:
    """The counts, a row per network, and the reason of everything that a network does not pass."""
    rows = record.get("networks", [])
    if not rows:
        return "No result is stored.\n"
    counts = Counter(map(verdict, rows))
    export = sum(all(agrees(each, kind) for kind in EXPORTS) for each in rows)
    text = (
        f"{len(rows)} networks: {counts['passes']} passed every check, {counts['refused']} were refused with a reason,"
        f" {counts['fails']} failed a check, and {counts['in part']} have run only in part. {export} were exported in all three kinds.\n\n"
    )
    lines = markdown.header("network", "layer", "Grad-CAM", "patch", *EXPORTS)
    lines += [markdown.row(each["network"], _layer(each), *(_cell(each, stage) for stage in STAGES[1:])) for each in rows]
    reasons = [line for each in rows for line in _reasons(each)]
    return f"{text}{markdown.joined(lines)}\n\n{markdown.joined(reasons)}\n\n{_origins(rows)}\n"


def verdict(result: Mapping[str, Any]) -> str:
    """``passes``, ``refused`` (every stage agrees, or kdx states why not), ``fails``, or ``in part``: a stage has no result."""
    entries = [stage for stage in ("build", *STAGES) if stage in result]
    if any("refused" not in result[stage] and not agrees(result, stage) for stage in entries):
        return "fails"
    early = any("refused" in result.get(stage, {}) for stage in ("build", "layers"))
    if not early and not all(stage in result for stage in STAGES):
        return "in part"
    return "refused" if any("refused" in result[stage] for stage in entries) else "passes"


def _origins(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many networks ran with which versions, and their commits."""
    commits: dict[str, list[str]] = {}
    for each in rows:
        place = each["environment"]
        known = (("Python", "python"), ("PyTorch", "torch"), ("timm", "timm"), ("transformers", "transformers"))
        commits.setdefault(", ".join(f"{name} {place[key]}" for name, key in known if key in place), []).append(each["commit"])
    return "\n".join(
        f"{len(used)} networks ran with {versions} (commit{'s' if len(set(used)) > 1 else ''} {', '.join(sorted(set(used)))})."
        for versions, used in commits.items()
    )


def _layer(result: Mapping[str, Any]) -> str:
    if "layer" not in result:
        return "–"
    return f"`{result['layer']}`"


def _cell(result: Mapping[str, Any], stage: str) -> str:
    entry = result.get(stage)
    if entry is None:
        return "–"
    for key in ("refused", "failed", "stopped"):
        if key in entry:
            return key
    if stage == "layers":
        return str(len(entry["names"]))
    if stage == "patch":
        where = f" at {entry['layer']}" if "layer" in entry else ""
        return f"on it{where}" if agrees(result, stage) else f"{entry['distance']} cells away{where}"
    return f"{entry['error']:.0e}" if agrees(result, stage) else f"differs by {entry['error']:.0e}"


def _reasons(result: Mapping[str, Any]) -> Iterator[str]:
    """A line for each stage that kdx refuses, or that fails."""
    reasons: dict[str, list[str]] = {}
    for stage in ("build", *STAGES):
        entry = result.get(stage, {})
        for key in ("refused", "failed", "stopped"):
            if key in entry:
                reasons.setdefault(f"{key} ({entry[key]})" if key == "stopped" else f"{key}: {entry[key]}", []).append(stage)
    for reason, stages in reasons.items():
        yield f"- {result['network']}, {', '.join(stages)}: {reason}"
