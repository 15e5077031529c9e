"""The order of a study's jobs: each starts after those that it needs, in this process or in several."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kdx.cluster.options import ClusterOptions
from kdx.cluster.pool import MOST_DEATHS
from kdx.kernels import ambient
from kdx.study.attempts import Outcome, Perform, attempt
from kdx.study.cluster_workers import ClusterWorkers
from kdx.study.grid import Job
from kdx.study.workers import Workers
from kdx.threads import COUNTS


def run_jobs(
    jobs: Sequence[Job],
    perform: Perform,
    folder: Path,
    *,
    workers: int,
    threads: int,
    cluster: ClusterOptions | None = None,
    on_note: Callable[[Job, str], None],
    complete: Iterable[str] = (),
) -> Generator[Outcome, None, None]:
    """Run the jobs that are not complete, and yield the outcome of each when it ends.

    jobs: in an order in which each job comes after those that it needs. workers: the number of processes; with 1, this process runs all
    jobs. threads: those of each process. cluster: in place of ``workers``, as many workers as the cluster has room for.

    An error ends its job and the jobs that need it, but no others. A job whose worker ends is repeated and resumes, until it has ended as
    many workers as `kdx.cluster.pool.MOST_DEATHS`. An exception in the caller, such as Ctrl-C, or closing the generator stops all jobs.
    """
    done, failed = set(complete), set[str]()
    waiting = [job for job in jobs if job.key not in done]
    if workers == 1 and cluster is None:
        with _threads(threads):
            for job in waiting:
                blocked = _blocked(job, failed)
                if blocked is None:
                    on_note(job, "starting")
                outcome = blocked or attempt(job, perform, folder, lambda text, job=job: on_note(job, text))  # type: ignore[misc]
                if outcome.problem:
                    failed.add(job.key)
                yield outcome
        return
    if not waiting:
        return
    uses_gpus = any(job.extras.device != "cpu" for job in waiting)
    deaths = Counter[str]()
    processes, arguments = min(workers, len(waiting)), (perform, folder, threads)
    with Workers(processes, *arguments) if cluster is None else ClusterWorkers(cluster, *arguments, uses_gpus=uses_gpus) as pool:
        while waiting or pool.busy:
            for job in list(waiting):
                if (blocked := _blocked(job, failed)) is not None:
                    waiting.remove(job)
                    failed.add(job.key)
                    yield blocked
            ready = [job for job in waiting if done.issuperset(job.needs)]
            for job in ready[: pool.free]:
                waiting.remove(job)
                pool.start(job)
                on_note(job, "starting")
            for outcome in pool.wait(on_note):
                deaths[outcome.job.key] += outcome.worker_ended
                if outcome.worker_ended and deaths[outcome.job.key] < MOST_DEATHS:
                    waiting.insert(0, outcome.job)
                    on_note(outcome.job, f"Warning: {outcome.problem} The job is repeated.")
                    continue
                (failed if outcome.problem else done).add(outcome.job.key)
                yield outcome


def _blocked(job: Job, failed: set[str]) -> Outcome | None:
    """The outcome of a job that needs a failed one."""
    needed = next((key for key in job.needs if key in failed), None)
    return None if needed is None else Outcome(job, 0.0, f"It needs {needed}, which failed.", "Correct that error first.")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside the block, PyTorch and the runtimes use this many threads."""
    environment = os.environ.get(COUNTS[0])
    os.environ[COUNTS[0]] = str(count)
    try:
        with ambient.torch_threads(count):
            yield
    finally:
        if environment is None:
            del os.environ[COUNTS[0]]
        else:
            os.environ[COUNTS[0]] = environment
