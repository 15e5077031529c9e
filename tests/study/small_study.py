"""A small study for tests: its design, and jobs that only write a file."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from kdx.errors import KdxError
from kdx.study.attempts import Note
from kdx.study.grid import Job

TEACHER = "kdx:resnet,width=4,depth=1,stages=2"
ASSISTANT = "kdx:resnet,width=3,depth=1,stages=2"
STUDENT = "kdx:resnet,width=2,depth=1,stages=2"

CONTENT: dict[str, Any] = {
    "data": {"digits": "sample:300:digits"},
    "teachers": {"large": TEACHER},
    "students": {"tiny": STUDENT},
    "methods": ["kd", "at"],
    "seeds": 1,
    "training": {"epochs": 1, "image_size": 8},
    "explain": {"permutations": 9, "gallery": 2, "runtime": "eager"},
}


def record(job: Job, folder: Path, note: Note) -> None:
    """Append the key of the job to a file. A job that needs another one looks for it there."""
    path = folder / "jobs.txt"
    known = path.read_text().split() if path.exists() else []
    assert set(job.needs) <= set(known), f"{job.key} started before {job.needs}"
    with path.open("a") as file:
        file.write(f"{job.key}\n")


def fail_at(job: Job, folder: Path, note: Note) -> None:
    """`record`, except for some jobs: an error of the user, an error of kdx, or the end of the process, each time or the first time."""
    if job.kind == "assistant":
        raise KdxError("The assistant is ill.", "Give another one.")
    if job.key.endswith("/at/seed0"):
        raise ZeroDivisionError("nothing can be divided")
    if job.key.endswith("/rkd/seed0"):
        os.kill(os.getpid(), signal.SIGKILL)
    if job.key.endswith("/dkd/seed0") and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    record(job, folder, note)


def sleep(job: Job, folder: Path, note: Note) -> None:
    """Write the number of this process, and wait."""
    (folder / f"process-{os.getpid()}").touch()
    time.sleep(600)
