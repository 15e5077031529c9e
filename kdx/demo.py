"""The demonstration: handwritten digits, from training to the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kdx import explain
from kdx.distill import DEMO, distill
from kdx.explain import Options


def run(out: Path, *, seed: int = 0, announce: Callable[[str], None] = print) -> dict[str, Path]:
    """Train a teacher, a base and a student with each method, explain both students; a run's folder a method.

    The second student has the first one's teacher and base, so that the two runs differ in the method alone.
    """
    runs = {}
    teacher, base = DEMO["teacher"], None
    for method in ("kd", "at"):
        announce(
            f"Distilling digits with {method}: a teacher, a base and a student." if base is None else f"Distilling digits with {method}."
        )
        folder = out / method / "models"
        models = distill(
            "digits", teacher=teacher, student=DEMO["student"], out=folder, settings=replace(DEMO[method], seed=seed), base=base
        )
        teacher, base = f"{DEMO['teacher']}@{(folder / 'teacher.safetensors').resolve()}", folder / "base.safetensors"
        runs[method] = out / method / "run"
        explain.run(
            "digits",
            models,
            runs[method],
            options=Options(seed=seed),
            networks=out / "networks",
            command=["kdx", "explain", "digits", "--models", str(models), "--out", str(runs[method])],
            announce=announce,
        )
    return runs
