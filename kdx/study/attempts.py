"""One job of a study: how it is done, and how it ended."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdx.errors import KdxError, first_line
from kdx.study.grid import Job

Note = Callable[[str], None]
"""Called with a line about the progress of a job, or, if it begins with ``Warning:``, about its inputs."""

Perform = Callable[[Job, Path, Note], None]
"""Does a job in the study's folder. It can be pickled by name. A job that was stopped resumes."""

ERROR_FILE = "error.txt"
"""The traceback of an error that is none of the user's, in the job's folder."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended: after which time, and with which error; ``problem`` is empty if it is complete.

    worker_ended: whether the job only ended because its process did.
    """

    job: Job
    seconds: float
    problem: str = ""
    hint: str = ""
    worker_ended: bool = False


def attempt(job: Job, perform: Perform, folder: Path, note: Note) -> Outcome:
    """Do a job, and turn an error into its outcome. Ctrl-C and the end of the process are not caught."""
    start, error_file = time.monotonic(), folder / job.folder / ERROR_FILE
    try:
        perform(job, folder, note)
    except KdxError as error:
        return Outcome(job, time.monotonic() - start, error.problem, error.hint)
    except (Exception, SystemExit) as error:  # code of the user's models may exit
        text = f"{type(error).__name__}: {first_line(error)}"
        try:
            error_file.parent.mkdir(parents=True, exist_ok=True)
            error_file.write_text(traceback.format_exc(), "utf-8")
        except OSError:  # a full disk may be the reason of the error
            return Outcome(job, time.monotonic() - start, f"{text}.", "Run the same command again.")
        return Outcome(job, time.monotonic() - start, f"{text}.", f"This is a bug of kdx or of your code; {error_file} has the traceback.")
    error_file.unlink(missing_ok=True)
    return Outcome(job, time.monotonic() - start)
