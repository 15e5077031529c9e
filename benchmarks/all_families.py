"""`benchmarks.families --all`: check every network of `family_networks`, one process per network, and describe the results.

Results are in the entry ``networks`` of benchmarks/results/families.json: one row per network, with the commit and the environment of
its last run. A run continues where the last one ended: it runs the stages that have no result.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from threading import Lock
from typing import Any

import torch

from benchmarks import family_checks, family_networks
from benchmarks.family_checks import EXPORTS, STAGES, agrees, is_successful
from benchmarks.markdown import header, joined, row
from benchmarks.record import RESULTS, origin

RESULT = RESULTS / "families.json"
LIMIT = 600
"""Seconds of processor time per network, unless another limit is given. Busy neighbours do not shorten it."""

_lock = Lock()


def names(record: Mapping[str, Any]) -> list[str]:
    """All networks, by the stored list of timm's smallest networks if it is of the installed version."""
    known = record.get("timm", {})
    if known.get("version") != version("timm"):
        counts = family_networks.parameter_counts()
        known = {"version": version("timm"), "networks": family_networks.smallest_classifiers(counts)}
        _update(lambda stored: stored.update(timm=known))
    architectures = [f"transformers:{name}" for name in family_networks.transformers_architectures()]
    return [f"timm:{name}" for name in known["networks"].values()] + architectures


def run(chosen: Sequence[str], stages: Sequence[str], *, again: bool, workers: int, limit: float, deadline: float | None) -> None:
    """Run the missing stages of the chosen networks; with ``again``, all stages of those with one that did not succeed.

    deadline: in time.monotonic().
    """
    import timm
    import transformers

    assert timm and transformers  # imported before the processes are forked
    torch.set_num_threads(1)
    source = origin("benchmarks.families")
    stored = {row["network"]: row for row in read()["networks"]}
    pending = []
    for name in chosen:
        done = stored.get(name, {})
        todo = _due(done, [stage for stage in STAGES if stage in stages], again)
        if todo:
            known = {key: value for key, value in done.items() if key not in todo}
            pending.append((known | {"network": name, "commit": source["commit"], "environment": source["environment"]}, todo))

    def work(task: tuple[dict[str, Any], list[str]]) -> None:
        if deadline is None or time.monotonic() < deadline:
            row = _checked(*task, limit)
            print(row["network"], *(f"{stage}: {_cell(row, stage)}" for stage in STAGES), sep="  ", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, pending))


def _due(done: Mapping[str, Any], stages: list[str], again: bool) -> list[str]:
    """The stages to run: those without a result, or with ``again`` all of them if any did not succeed, as the layer may be another now."""
    if again and not all(agrees(done, stage) for stage in stages):
        return stages
    if "build" in done and not is_successful(done["build"]):
        return []
    return [stage for stage in stages if stage not in done]


def _checked(row: dict[str, Any], stages: Sequence[str], limit: float) -> dict[str, Any]:
    """The row after a process has run its stages, or has been stopped at the limit. It is stored after every stage."""
    context = multiprocessing.get_context("fork")
    with _lock:  # a process that is forked at the same time would inherit the sender, and no end of file would arrive
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(row, stages, sender, limit))
        process.start()
        sender.close()
    with suppress(EOFError):
        while True:
            row = receiver.recv()
            _keep(row)
    process.join()
    for stage in ("build", *STAGES):
        if row.get(stage, {}).get("stopped"):
            row[stage] = {"stopped": f"not finished after {limit:.0f} s" if process.exitcode == -signal.SIGXCPU else "the process ended"}
    _keep(row)
    return row


def _child(row: dict[str, Any], stages: Sequence[str], sender: Any, limit: float) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + limit), resource.RLIM_INFINITY))
    try:
        family_checks.check(row, stages, sender.send)
    finally:
        sender.close()


def _keep(row: dict[str, Any]) -> None:
    def replace(record: dict[str, Any]) -> None:
        others = [other for other in record["networks"] if other["network"] != row["network"]]
        record["networks"] = sorted([*others, row], key=lambda other: str(other["network"]))

    _update(replace)


def read() -> dict[str, Any]:
    """The stored results, without stages that were running when they were stored."""
    record: dict[str, Any] = {"rows": [], "networks": []} | (json.loads(RESULT.read_text()) if RESULT.exists() else {})
    record["networks"] = [{key: value for key, value in row.items() if value != {"stopped": True}} for row in record["networks"]]
    return record


def _update(change: Callable[[dict[str, Any]], object]) -> None:
    with _lock:
        record = read()
        change(record)
        part = RESULT.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(RESULT)


def table(record: Mapping[str, Any]) -> str:
    """The counts, a row per network, and the reason of everything that a network does not pass."""
    rows = record.get("networks", [])
    if not rows:
        return "No result is stored.\n"
    complete = [each for each in rows if all(stage in each for stage in STAGES)]
    export = sum(all(agrees(each, kind) for kind in EXPORTS) for each in complete)
    passed = sum(all(agrees(each, stage) for stage in STAGES) for each in complete)
    text = (
        f"{export} of {len(complete)} networks export in all three kinds, and {passed} pass every check."
        f" {len(rows) - len(complete)} more networks have run in part.\n\n"
    )
    lines = header("network", "layer", "Grad-CAM", "patch", *EXPORTS)
    lines += [row(each["network"], _layer(each), *(_cell(each, stage) for stage in STAGES[1:])) for each in rows]
    reasons = [line for each in rows for line in _reasons(each)]
    machines = sorted(
        {f"{each['environment']['processor']}, PyTorch {each['environment']['torch']}, commit {each['commit']}" for each in rows}
    )
    return f"{text}{joined(lines)}\n\n{joined(reasons)}\n\n{'; '.join(machines)}.\n"


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
        return "on it" if agrees(result, stage) else f"{entry['distance']} cells away"
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
